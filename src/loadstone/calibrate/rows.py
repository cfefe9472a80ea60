"""Rows of tokens to calibrate on: from a text, or written by the model itself.

A model's own text (LLM-QAT: Liu et al. 2023, arXiv:2305.17888) needs no data, and is what the model knows best: a text
of another kind moves the weights towards that kind (docs/quantize.md has figures).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.corpus import Corpus
from ..errors import LoadstoneError
from ..generate import Stream
from ..model import GPT
from ..sampling import Sampling
from ..tokenizer import Tokenizer

SELF = "self"
LENGTH, COUNT = 512, 64  # tokens of a row, rows
_TOGETHER = 32  # rows that are written at once
_MOST, _EACH = 1 << 22, 1 << 18  # characters that are looked at: in all, and of one document
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Rows:
    """Token ids [B, T], and where they come from, for the report."""

    ids: Tensor
    source: str

    def as_dict(self) -> dict[str, object]:
        return {"source": self.source, "rows": self.ids.shape[0], "tokens_each": self.ids.shape[1]}


def calibration_rows(
    model: GPT,
    tokenizer: Tokenizer | None,
    source: str,
    *,
    count: int = COUNT,
    seed: int = 0,
    progress: Progress | None = None,
) -> Rows:
    """`count` rows of LENGTH tokens (or the context, if that is shorter).

    Args:
        source: `self`, or a text file, folder, archive or JSONL.

    Raises LoadstoneError for a text that cannot be read or is too short, and without a tokenizer for it.
    """
    length = min(LENGTH, model.config.context_length)
    if source == SELF:
        return own_rows(model, tokenizer, count, length, seed=seed, progress=progress)
    if tokenizer is None:
        raise LoadstoneError(f"--calibration {source}: the model has no tokenizer to read it with. Use: {SELF}.")
    ids = tokenizer.encode(_beginning(source), add_special=False)
    if len(ids) < 2:
        raise LoadstoneError(f"--calibration {source}: it has {len(ids)} tokens. Name a longer text.")
    if max(ids) >= model.config.vocab_size:
        raise LoadstoneError(f"--calibration {source}: the tokenizer has tokens that the model has no rows for.")
    length = min(length, len(ids))
    fitting = min(count, len(ids) // length)
    step = (len(ids) - length) / max(1, fitting - 1)
    starts = [round(number * step) for number in range(fitting)]
    return Rows(torch.tensor([ids[start : start + length] for start in starts]), Path(source).name)


def own_rows(
    model: GPT,
    tokenizer: Tokenizer | None,
    count: int,
    length: int,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Rows:
    """Text that the model writes from its begin token on, every token drawn from its whole distribution.

    End tokens are tokens like others: what a model writes behind one is another text. Rows of a vocabulary's padding
    are not drawn.
    """
    begin = model.config.bos_id
    begin = (model.config.eos_ids or (0,))[0] if begin is None else begin
    n_tokens = min(tokenizer.vocab_size, model.config.vocab_size) if tokenizer else None
    rows: list[list[int]] = []
    for first in range(0, count, _TOGETHER):
        number = min(_TOGETHER, count - first)
        stream = Stream(
            model, [[begin]] * number, max_new_tokens=length - 1, sampling=Sampling(temperature=1.0), seed=seed,
            n_tokens=n_tokens,
        )  # fmt: skip
        # With one seed for all, as prompts in a batch have it, each row would get the same text.
        stream.generators = [np.random.default_rng([seed, first + row]) for row in range(number)]
        for step, _ in enumerate(stream):
            if progress:
                progress(first * length + (step + 1) * number, count * length)
        rows += stream.history
    return Rows(torch.tensor(rows), f"the model's own text, seed {seed}")


def _beginning(source: str) -> str:
    """The beginnings of the first documents of a source: of an archive of books, some sixteen."""
    parts, size = [], 0
    for document in Corpus([source]):
        parts.append(document.text[:_EACH])
        size += len(parts[-1])
        if size >= _MOST:
            break
    return "\n\n".join(parts)
