"""`compare`: models measured one after the other, and the figures that only several of them together have."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from .._version import __version__
from ..errors import LoadstoneError
from ..evaluate.intervals import interval_of_mean
from ..evaluate.perplexity import Text
from ..load import load_tokenizer_for, require_device, require_tokenizer
from ..sampling import Sampling
from ..train.losses import perplexity
from ..weightmap import Identity
from .align import Piece, pieces, ranked, scored_by_all
from .history import read_history, weights_of
from .measure import Candidate, Measured, Protocol, measure, steps
from .repetition import REPEATED, distinct, repetition

BLOCK = 32  # pieces whose sum is one observation of the interval: neighbours are alike, blocks hardly
SPANS = 10  # largest differences that are listed
NGRAMS = (1, 2, 3)


class Difference(NamedTuple):
    """Bits per byte that a model needs more than the first one, with its 95% interval (None for too short a text)."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Comparison:
    """Attributes:
    models: in the order given; the others are compared with the first.
    texts: by domain.
    made: when, where and by what.
    """

    models: tuple[Measured, ...]
    texts: Mapping[str, Text]
    protocol: Protocol
    made: Mapping[str, str]

    @cached_property
    def domains(self) -> dict[str, list[float]]:
        """Domain -> bits per byte of each model, over the characters that all of them scored."""
        return {name: self._bits_per_byte([name]) for name in self.texts}

    @cached_property
    def bits_per_byte(self) -> list[float]:
        """Of each model, over all texts."""
        return self._bits_per_byte(list(self.texts))

    @cached_property
    def same_tokens(self) -> bool:
        """Whether all models score the same tokens of these texts, so that their losses per token can be compared."""
        first, *others = self.models
        return all(
            first.scores[name].tokens == model.scores[name].tokens
            and np.array_equal(first.scores[name].bits.ends, model.scores[name].bits.ends)
            for model in others
            for name in self.texts
        )

    @cached_property
    def _scored_by_all(self) -> dict[str, list[Piece]]:
        """Each text in the pieces that all models share."""
        return {name: scored_by_all(pieces([model.scores[name].bits for model in self.models])) for name in self.texts}

    def _bits_per_byte(self, names: Sequence[str]) -> list[float]:
        bits, size = np.zeros(len(self.models)), 0
        for name in names:
            for piece in self._scored_by_all[name]:
                bits += piece.bits
                size += self._bytes(name, piece)
        values: list[float] = (bits / size).tolist() if size else [float("nan")] * len(self.models)
        return values

    def _bytes(self, name: str, piece: Piece) -> int:
        return len(self.texts[name].content[piece.begin : piece.end].encode())

    def pieces(self, other: int, name: str) -> list[Piece]:
        """A text in the pieces that the first model and another share; the first one's bits come first."""
        return pieces([self.models[index].scores[name].bits for index in (0, other)])

    def spans(self, other: int) -> list[tuple[str, Piece]]:
        """(domain, piece): where the first model and another differ most, over all texts; none where they are equal."""
        found = [(name, piece) for name in self.texts for piece in ranked(self.pieces(other, name), SPANS)]
        different = [(name, piece) for name, piece in found if piece.difference]
        return sorted(different, key=lambda item: -abs(item[1].difference))[:SPANS]

    def difference(self, other: int) -> Difference:
        """How much worse another model is than the first; below zero: better. NaN where nothing was scored by all."""
        more, size = [], []
        for name in self.texts:
            # The characters that `bits_per_byte` counts, lest the two disagree: an unscored token is a text's first.
            begin = next((piece.begin for piece in self._scored_by_all[name]), len(self.texts[name].content))
            found = [piece for piece in self.pieces(other, name) if piece.begin >= begin]
            for start in range(0, len(found), BLOCK):
                block = found[start : start + BLOCK]
                more.append(-sum(piece.difference for piece in block))
                size.append(sum(self._bytes(name, piece) for piece in block))
        if not size:
            return Difference(math.nan, None, None)
        return Difference(*interval_of_mean((np.array(more, float), np.array(size, float))))

    def as_dict(self) -> dict[str, Any]:
        return {
            "made": dict(self.made),
            "protocol": asdict(self.protocol),
            "texts": {
                name: {
                    "source": text.source,
                    "sha256": text.sha256,
                    "characters": len(text.content),
                    "notes": list(text.notes),
                }
                for name, text in self.texts.items()
            },
            "same_tokens": self.same_tokens,
            "models": [self._model(index) for index in range(len(self.models))],
            "against_first": [self._against(index) for index in range(1, len(self.models))],
        }

    def _model(self, index: int) -> dict[str, Any]:
        model = self.models[index]
        facts = {name: value for name, value in vars(model).items() if name not in ("scores", "samples", "history")}
        texts = {
            name: {
                "tokens": score.tokens, "loss": score.nats / score.tokens,
                "perplexity": perplexity(score.nats / score.tokens),
                "bits_per_byte": self.domains[name][index],
            }
            for name, score in model.scores.items()
        }  # fmt: skip
        return {
            **facts,
            "history": asdict(model.history) if model.history else None,
            "loss": loss_of(model),
            "perplexity": perplexity(loss_of(model)),
            "bits_per_byte": self.bits_per_byte[index],
            "texts": texts,
            "samples": [asdict(sample) for sample in model.samples],
            f"repeated_{REPEATED}_grams": repetition([sample.text for sample in model.samples]),
            **{f"distinct_{n}": distinct([sample.text for sample in model.samples], n) for n in NGRAMS},
        }

    def _against(self, other: int) -> dict[str, Any]:
        spans = [
            {"domain": name, "begin": piece.begin, "end": piece.end, "bits": list(piece.bits),
             "text": self.texts[name].content[piece.begin : piece.end]}
            for name, piece in self.spans(other)
        ]  # fmt: skip
        return {"model": self.models[other].name, "bits_per_byte_more": self.difference(other)._asdict(), "most": spans}


def loss_of(model: Measured) -> float:
    """Nats per token of its own vocabulary, over all texts."""
    return sum(score.nats for score in model.scores.values()) / sum(score.tokens for score in model.scores.values())


def compare(
    sources: Sequence[str],
    texts: Mapping[str, Text],
    *,
    prompts: Sequence[str],
    seeds: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    dtype: str,
    device: str,
    open_source: Callable[[str], Identity],
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Measure models under one protocol, one at a time.

    Args:
        sources: two or more; a run's folder stands for its best checkpoint.
        texts: by domain (`domains.read_texts`).
        prompts, seeds, max_new_tokens, temperature, top_k: of the samples; see `generate_texts`.
        dtype, device: as for `load`.
        open_source: as `load.open_source`.
        progress: called with (steps done, steps in all).

    Raises LoadstoneError if a source cannot be had or has no tokenizer; all are opened before the first is loaded.
    """
    if len(sources) < 2:
        raise LoadstoneError("compare needs at least two models: loadstone compare A B -o report.html.")
    if not (texts and prompts and seeds and max_new_tokens > 0):
        raise LoadstoneError("compare needs at least one text, and at least one prompt, one seed and one new token.")
    Sampling(temperature, top_k)  # refuses what has no meaning, before anything is measured
    require_device(device)
    candidates = _candidates(sources, open_source)
    if not all(candidate.tokenizer.encode(prompt) for candidate in candidates for prompt in prompts):
        raise LoadstoneError("a prompt is empty, and a model needs at least one token to go on from.")
    context = min(candidate.identity.config.context_length for candidate in candidates)
    protocol = Protocol(
        context, max(1, context // 2), tuple(prompts), tuple(seeds), max_new_tokens, temperature, top_k, dtype, device
    )
    done, total = 0, steps(protocol) * len(candidates)

    def tick() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    models = tuple(measure(candidate, texts, protocol, tick) for candidate in candidates)
    return Comparison(models, texts, protocol, _made(device))


def _candidates(sources: Sequence[str], open_source: Callable[[str], Identity]) -> list[Candidate]:
    names = _names(sources)
    found = []
    for name, source in zip(names, sources, strict=True):
        identity = open_source(weights_of(source))
        identity.plan.require_clean(str(identity.checkpoint.path))
        tokenizer = require_tokenizer(load_tokenizer_for(identity), source, identity.remarks)
        found.append(Candidate(name, source, identity, tokenizer, read_history(identity.checkpoint.folder)))
    return found


def _names(sources: Sequence[str]) -> list[str]:
    """The last parts of paths, as many as tell them apart; RUN for RUN/best. A source that comes twice is numbered."""
    whole = [source.rstrip("/").split("/") for source in sources]
    short = [parts[:-1] if parts[-1] in ("best", "latest") and len(parts) > 1 else parts for parts in whole]
    names = next(names for paths in (short, whole) if len(set(names := _ends(paths))) == len(set(map(tuple, whole))))
    counts = [names[:i].count(name) + 1 for i, name in enumerate(names)]
    return [name if count == 1 else f"{name} ({count})" for name, count in zip(names, counts, strict=True)]


def _ends(paths: Sequence[Sequence[str]]) -> list[str]:
    """The shortest ends of paths that are as different as the paths are."""
    different = len({tuple(path) for path in paths})
    ends = (["/".join(path[-depth:]) for path in paths] for depth in range(1, max(map(len, paths)) + 1))
    return next(names for names in ends if len(set(names)) == different)


def _made(device: str) -> dict[str, str]:
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "program": f"loadstone {__version__}, torch {torch.__version__}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, device {device}",
    }
