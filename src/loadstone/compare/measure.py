"""One model, measured: what it is, how well it predicts each text, what it writes, how fast it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np

from ..evaluate.perplexity import Stream as Tokens
from ..evaluate.perplexity import Text, stream
from ..evaluate.scoring import Request, score
from ..generate import generate, generate_texts
from ..load import load_model
from ..model import GPT
from ..sizes import why_size
from ..tokenizer import Tokenizer
from ..weightmap import Identity
from ..weightmap.canonical import parameter_count
from .align import TokenBits, token_bits
from .history import History

Tick = Callable[[], None]
READ_TOKENS, WRITTEN_TOKENS = 512, 32  # of one timing
TIMINGS, SECONDS = 5, 3.0  # at most so many, and no more after so long, but two at least: the first one warms up


@dataclass(frozen=True)
class Protocol:
    """The same for every model.

    Attributes:
        context: tokens that a model may look back at: the smallest context of all.
        stride: tokens scored by each window; all but the first window look back at least context - stride.
        prompts, seeds, max_new_tokens, temperature, top_k: of the samples.
        dtype, device: as for `load`.
    """

    context: int
    stride: int
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    top_k: int | None
    dtype: str
    device: str


@dataclass(frozen=True)
class Candidate:
    """A model that is opened and not loaded yet."""

    name: str
    source: str
    identity: Identity
    tokenizer: Tokenizer
    history: History | None


@dataclass(frozen=True)
class TextScore:
    """Attributes:
    tokens: that were scored.
    nats: the sum of their losses.
    bits: token by token.
    """

    tokens: int
    nats: float
    bits: TokenBits


@dataclass(frozen=True)
class Sample:
    prompt: str
    seed: int
    text: str
    finish: str


@dataclass(frozen=True)
class Measured:
    """A model's figures; bytes are bytes, speeds tokens per second.

    Attributes:
        parameters: distinct ones; untied_parameters: if a tied head were a copy of the embedding.
        file_bytes: of the weights' files; weight_bytes: of the parameters in memory, in `dtype`.
        reading_speed: of texts in a batch; writing_speed: of one text, token after token.
        notes: what was only assumed of the model, and what else a reader of its figures should know.
    """

    name: str
    source: str
    architecture: str
    vocabulary: int
    context: int
    parameters: int
    untied_parameters: int
    file_bytes: int
    stored: str
    weight_bytes: int
    dtype: str
    history: History | None
    scores: Mapping[str, TextScore]
    samples: tuple[Sample, ...]
    reading_speed: float
    writing_speed: float
    notes: tuple[str, ...]


def steps(protocol: Protocol) -> int:
    """How often `measure` ticks."""
    return len(protocol.seeds) + 3


def measure(candidate: Candidate, texts: Mapping[str, Text], protocol: Protocol, tick: Tick) -> Measured:
    """Load a model and measure it; it is forgotten afterwards, so that one at a time is in memory."""
    identity, tokenizer = candidate.identity, candidate.tokenizer
    model = load_model(identity, dtype=protocol.dtype, device=protocol.device)
    tick()
    streams = {name: stream(text, tokenizer, protocol.context, protocol.stride) for name, text in texts.items()}
    scores = _scored(model, tokenizer, streams)
    tick()
    samples = _samples(model, tokenizer, protocol, tick)
    speeds = _reading_speed(model, streams), _writing_speed(model, tokenizer, protocol.prompts[0])
    tick()
    config, parameters = identity.config, list(model.parameters())
    return Measured(
        candidate.name,
        candidate.source,
        _architecture(identity),
        config.vocab_size,
        config.context_length,
        parameter_count(config),
        parameter_count(config.with_overrides({"tied": False})),
        why_size(identity.checkpoint).nbytes,
        ", ".join(dict.fromkeys(step.dtype for step in identity.plan.steps)),
        sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        ", ".join(dict.fromkeys(str(parameter.dtype).removeprefix("torch.") for parameter in parameters)),
        candidate.history,
        scores,
        samples,
        *speeds,
        tuple(_notes(identity, scores)),
    )


def _notes(identity: Identity, scores: Mapping[str, TextScore]) -> Iterator[str]:
    yield from (f"assumed: {line}" for line in identity.assumed)
    yield from identity.remarks
    if changed := [name for name, score in scores.items() if not score.bits.whole]:
        yield (
            f"its tokenizer drops or replaces characters of {', '.join(changed)}: its bits per byte there are not "
            "those of the whole text"
        )


def _architecture(identity: Identity) -> str:
    config = identity.config
    shared = f" ({config.n_kv_heads} key/value)" if config.n_kv_heads != config.n_heads else ""
    return f"{config.architecture}: {config.n_layers} layers, width {config.d_model}, {config.n_heads} heads{shared}"


def _scored(model: GPT, tokenizer: Tokenizer, streams: Mapping[str, Tokens]) -> dict[str, TextScore]:
    """Each text's losses."""
    requests: list[Request] = []
    owners: list[str] = []
    for name, tokens in streams.items():
        requests += tokens.requests()
        owners += [name] * len(tokens.windows)
    found = dict(score(model, requests))
    scores = {}
    for name, tokens in streams.items():
        parts = [found[i].logprobs.astype(np.float64) for i, owner in enumerate(owners) if owner == name]
        nats = -np.concatenate(parts)
        spelled = [tokenizer.token_bytes(token) for token in tokens.ids[int(tokens.begun) :].tolist()]
        bits = token_bits(tokens.text.content, spelled, nats)
        scores[name] = TextScore(len(nats), float(nats.sum()), bits)
    return scores


def _samples(model: GPT, tokenizer: Tokenizer, protocol: Protocol, tick: Tick) -> tuple[Sample, ...]:
    """Prompt by prompt, each with every seed."""
    columns = []
    for seed in protocol.seeds:
        columns.append(
            generate_texts(
                model, tokenizer, protocol.prompts, seed=seed, max_new_tokens=protocol.max_new_tokens,
                temperature=protocol.temperature, top_k=protocol.top_k, overflow="window",
            )
        )  # fmt: skip
        tick()
    return tuple(
        Sample(prompt, seed, column[row].text, column[row].finish)
        for row, prompt in enumerate(protocol.prompts)
        for seed, column in zip(protocol.seeds, columns, strict=True)
    )


def _reading_speed(model: GPT, streams: Mapping[str, Tokens]) -> float:
    """Of the texts' first windows, until there are READ_TOKENS."""
    requests: list[Request] = []
    for request in chain.from_iterable(tokens.requests() for tokens in streams.values()):
        requests.append(request)
        if (read := sum(len(each.ids) - 1 for each in requests)) >= READ_TOKENS:
            break
    return _best_speed(lambda: list(score(model, requests)), read)


def _writing_speed(model: GPT, tokenizer: Tokenizer, prompt: str) -> float:
    """One text, token by token, greedily; it does not stop at an end token."""
    ids = tokenizer.encode(prompt)
    return _best_speed(lambda: generate(model, [ids], max_new_tokens=WRITTEN_TOKENS, overflow="window"), WRITTEN_TOKENS)


def _best_speed(run: Callable[[], object], tokens: int) -> float:
    """The most tokens per second of a few timings: whatever else the machine does only ever makes it slower."""
    speeds: list[float] = []
    begun = time.perf_counter()
    while len(speeds) < 2 or (len(speeds) < TIMINGS and time.perf_counter() - begun < SECONDS):
        start = time.perf_counter()
        run()
        speeds.append(tokens / max(time.perf_counter() - start, 1e-9))
    return max(speeds)
