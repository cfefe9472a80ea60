"""Generation: prefill once, then one token at a time from the cache. `generate` and `stream` know token ids only.

Why not as others do it: transformers pads on the left and shifts positions by a mask that callers forget; here rows are
padded on the right, each row's cache has its own length, and a prompt gives the same tokens in a batch as alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from random import getrandbits
from typing import TYPE_CHECKING, Any

import numpy as np

from .config import GPTConfig
from .engines import Cache, Engine, engine_of
from .errors import LoadstoneError
from .sampling import Floats, Sampling, as_floats, choose

if TYPE_CHECKING:  # an engine without torch must not wait for it
    from .model import GPT
    from .tokenizer import Tokenizer

OVERFLOW = ("refuse", "window")


@dataclass
class Session:
    """A cache that outlives one call, and the tokens it holds: a prompt that continues them is not read again."""

    cache: Cache
    ids: list[int] = field(default_factory=list)


@dataclass
class Generation:
    """New tokens of one prompt, and why they ended: `stop` (an end token), `length` (max_new_tokens), `context`."""

    ids: list[int] = field(default_factory=list)
    finish: str = ""


def check_prompt(ids: Sequence[int], config: GPTConfig) -> None:
    """Raises LoadstoneError for a prompt without tokens, and for ids outside the vocabulary."""
    if not ids:
        raise LoadstoneError("the prompt has no tokens; the model needs at least one to go on from.")
    if wrong := next((token for token in ids if not 0 <= token < config.vocab_size), None):
        raise LoadstoneError(
            f"token {wrong} is outside the model's vocabulary of {config.vocab_size}: another tokenizer's?"
        )


class Stream:
    """Iterates over generation steps; each gives one new token per row, None for a row that has ended.

    Args:
        model: the model, or an engine that runs it.
        prompts: token ids, one list per row; none may be empty.
        max_new_tokens: most tokens to make per row.
        sampling: how to choose.
        seed: the same for every row; None draws one.
        stop_ids: tokens that end a row; they are not given out.
        n_tokens: ids from here on are padding of the vocabulary and are never chosen.
        overflow: `refuse`: a prompt longer than the context is an error, and a row ends when the context is full.
            `window`: a longer prompt keeps its last tokens, and a full row goes on from its last half context.
        session: a cache to go on with (one row only).

    Raises LoadstoneError for an empty or too long prompt and for ids outside the vocabulary.
    """

    def __init__(
        self,
        model: GPT | Engine,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        seed: int | None = None,
        stop_ids: Collection[int] = (),
        n_tokens: int | None = None,
        overflow: str = "refuse",
        session: Session | None = None,
    ) -> None:
        self.engine, self.sampling = engine_of(model), sampling or Sampling()
        self.max_new_tokens, self.stop_ids, self.n_tokens = max_new_tokens, frozenset(stop_ids), n_tokens
        self.context = min(model.config.context_length, session.cache.size if session else model.config.context_length)
        self.overflow, self.session, self.seed = overflow, session, seed
        self._check(prompts)
        self.history = [list(prompt) for prompt in prompts]
        self.results = [Generation() for _ in prompts]
        longest = min(max(map(len, prompts)) + max_new_tokens, self.context)
        self.cache: Cache = session.cache if session else self.engine.new_cache(len(prompts), longest)
        seed = getrandbits(63) if seed is None else seed
        self.generators = [np.random.default_rng(seed) for _ in prompts]

    def _check(self, prompts: Sequence[Sequence[int]]) -> None:
        if self.overflow not in OVERFLOW:
            raise LoadstoneError(f"overflow must be {' or '.join(OVERFLOW)}, found {self.overflow!r}.")
        if self.max_new_tokens < 0:
            raise LoadstoneError(f"max_new_tokens must be 0 or more, found {self.max_new_tokens}.")
        for prompt in prompts or [[]]:
            check_prompt(prompt, self.engine.config)
        longest = max(map(len, prompts))
        if longest > self.context and self.overflow == "refuse":
            raise LoadstoneError(
                f"the prompt has {longest} tokens, but the context is {self.context}. Shorten it, or go on from its "
                "end with overflow='window' (--overflow window)."
            )
        if self.n_tokens is not None and self.n_tokens < 1:
            raise LoadstoneError("n_tokens must be 1 or more: at least one token must be left to choose.")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise LoadstoneError(f"the seed must be from 0 to 2**63 - 1, found {self.seed}.")
        if self.session and len(prompts) > 1:
            raise LoadstoneError("a session goes on with one prompt, not with a batch.")

    def __iter__(self) -> Iterator[list[int | None]]:
        if self.max_new_tokens == 0:
            for result in self.results:
                result.finish = "length"
            return
        logits_BV = self._prefill()
        while True:
            tokens = self._choose(logits_BV)
            if any(token is not None for token in tokens):
                yield tokens
            if all(result.finish for result in self.results):
                return
            logits_BV = self._step()

    def _prefill(self) -> Floats:
        rows = [ids[-self.context :] for ids in self.history]
        known = self._known(self.session, rows[0]) if self.session else 0
        return as_floats(self.engine.prefill(self.cache, {row: ids[known:] for row, ids in enumerate(rows)}))

    def _known(self, session: Session, row: list[int]) -> int:
        """How many of the prompt's tokens the session holds already (never the last: its logits are due)."""
        pairs = enumerate(zip(session.ids, row[:-1], strict=False))
        known = next((i for i, (held, wanted) in pairs if held != wanted), min(len(session.ids), len(row) - 1))
        # What lies beyond is overwritten from now on, so it is forgotten first, lest an interruption leave it named.
        self.engine.reset(session.cache, [known])
        session.ids = session.ids[:known]
        return known

    def _choose(self, logits_BV: Floats) -> list[int | None]:
        """Choose for every row that goes on, and end rows that met a stop token or their limit."""
        if self.n_tokens is not None:
            logits_BV[:, self.n_tokens :] = -np.inf
        if self.session:
            self.session.ids = self.history[0][-self.cache.lengths[0] :]
        chosen = choose(logits_BV, self.history, self.sampling, self.generators)
        given: list[int | None] = []
        for row, token in enumerate(chosen):
            result = self.results[row]
            if result.finish or token in self.stop_ids:
                result.finish = result.finish or "stop"
                given.append(None)
                continue
            result.ids.append(token)
            self.history[row].append(token)
            given.append(token)
            if len(result.ids) == self.max_new_tokens:
                result.finish = "length"
            elif self.overflow == "refuse" and len(self.history[row]) > self.context:
                result.finish = "context"
        return given

    def _step(self) -> Floats:
        """Feed each row's newest token; logits after it.

        All rows are fed, so that they stay one batch; one that has ended, or whose window is full, writes into a slot
        that it does not keep.
        """
        held = self.cache.lengths
        grows = [not r.finish and n < self.context for r, n in zip(self.results, held, strict=True)]
        self.engine.reset(self.cache, [min(n, self.cache.size - 1) for n in held])
        logits_BV = as_floats(self.engine.decode(self.cache, [ids[-1] for ids in self.history]))
        self.engine.reset(self.cache, [n + grow for n, grow in zip(held, grows, strict=True)])
        for row, result in enumerate(self.results):
            if not (grows[row] or result.finish):
                logits_BV[row] = self._slide(row)
        return logits_BV

    def _slide(self, row: int) -> Floats:
        """The window is full: read the last half context again from position 0, for this row alone."""
        if self.session:
            self.session.ids = []
        tail = self.history[row][-max(self.context // 2, 1) :]
        self.engine.reset(self.cache, [0 if r == row else n for r, n in enumerate(self.cache.lengths)])
        return as_floats(self.engine.prefill(self.cache, {row: tail}))[0]


def generate(model: GPT | Engine, prompts: Sequence[Sequence[int]], **options: Any) -> list[Generation]:
    """Generate for a batch of prompts at once; see `Stream` for the options. The results hold new tokens only."""
    stream = Stream(model, prompts, **options)
    for _ in stream:
        pass
    return stream.results


class Text:
    """Text of one row as it grows: whole characters only, held back while it could be the beginning of a stop text."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        if not all(stop):
            raise LoadstoneError("a stop text must not be empty.")
        self._decoder, self._stop = tokenizer.decode_stream(), stop
        self._held = ""
        self.stopped = False

    def push(self, token: int | None) -> str:
        """What can be shown after one more token; nothing after a stop text."""
        if token is None or self.stopped:
            return ""
        self._held += self._decoder.push(token)
        if found := [at for text in self._stop if (at := self._held.find(text)) >= 0]:
            self.stopped = True
            return self._held[: min(found)]
        return self._release(len(self._held) - self._partial_stop())

    def flush(self) -> str:
        """The rest, when no more tokens come."""
        self._held += "" if self.stopped else self._decoder.flush()
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, length: int) -> str:
        ready, self._held = self._held[:length], self._held[length:]
        return ready

    def _partial_stop(self) -> int:
        """Length of the longest end of the held text that could begin a stop text."""
        longest = min(max((len(stop) - 1 for stop in self._stop), default=0), len(self._held))
        ends = (self._held[-n:] for n in range(longest, 0, -1))
        return next((len(end) for end in ends if any(stop.startswith(end) for stop in self._stop)), 0)


def stream_text(
    model: GPT | Engine,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 100,
    stop: Sequence[str] = (),
    seed: int | None = None,
    overflow: str = "refuse",
    session: Session | None = None,
    **sampling: Any,
) -> Iterator[str]:
    """The continuation of a prompt piece by piece, as whole characters.

    Args:
        model, tokenizer: a pair from `load`.
        prompt: text, or token ids that are encoded already.
        max_new_tokens, seed, overflow, session: see `Stream`.
        stop: texts that end the generation; they are not given out, not even in part.
        sampling: fields of `Sampling` (temperature, top_k, top_p, min_p, repetition_penalty).
    """
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    options = {"max_new_tokens": max_new_tokens, "seed": seed, "overflow": overflow, "session": session}
    # Not a generator itself: what is wrong with a request is raised here, not at the first piece.
    return _pieces(Stream(model, [ids], **_for_text(model, tokenizer, options, sampling)), Text(tokenizer, stop))


def _pieces(steps: Stream, text: Text) -> Iterator[str]:
    for (token,) in steps:
        if piece := text.push(token):
            yield piece
        if text.stopped:
            return
    if rest := text.flush():
        yield rest


@dataclass
class Completion:
    """A continuation as text, and why it ended: `stop`, `length` or `context`."""

    text: str = ""
    finish: str = ""


def generate_texts(
    model: GPT | Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 100,
    stop: Sequence[str] = (),
    seed: int | None = None,
    overflow: str = "refuse",
    **sampling: Any,
) -> list[Completion]:
    """Continue several prompts as one batch, each as it would be alone; see `stream_text` for the options."""
    options = {"max_new_tokens": max_new_tokens, "seed": seed, "overflow": overflow}
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    steps = Stream(model, ids, **_for_text(model, tokenizer, options, sampling))
    texts, completions = [Text(tokenizer, stop) for _ in prompts], [Completion() for _ in prompts]
    for tokens in steps:
        for text, completion, token in zip(texts, completions, tokens, strict=True):
            completion.text += text.push(token)
        if all(text.stopped or result.finish for text, result in zip(texts, steps.results, strict=True)):
            break
    for text, completion, result in zip(texts, completions, steps.results, strict=True):
        completion.text += text.flush()
        completion.finish = "stop" if text.stopped else result.finish
    return completions


def _for_text(
    model: GPT | Engine, tokenizer: Tokenizer, options: dict[str, Any], sampling: dict[str, Any]
) -> dict[str, Any]:
    """`Stream`'s options, with the end tokens (config's and tokenizer's) and where padding of the vocabulary begins."""
    ends = {*tokenizer.eos_ids, *model.config.eos_ids}
    known = {"stop_ids": ends, "n_tokens": min(tokenizer.vocab_size, model.config.vocab_size)}
    return options | known | {"sampling": Sampling(**sampling)}


def generate_text(model: GPT | Engine, tokenizer: Tokenizer, prompt: str, **options: Any) -> str:
    """The prompt and its continuation as one text; see `stream_text` for the options."""
    return prompt + "".join(stream_text(model, tokenizer, prompt, **options))
