"""Continuous batching: requests join and leave the running batch at every step; one thread computes for all models.

A step gives each row of the batch its next token: the one that was just chosen, or the next of a prompt. Prompts that
have more are read in pieces before the step, so many tokens at most, so that the others keep streaming meanwhile.
*Others*: transformers' server pads a batch and waits for its longest answer; llama.cpp's divides one context among its
slots. Here a row has the context of the model, and an answer is the one that the request would get alone.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

from ..errors import LoadstoneError
from ..generate import check_prompt
from ..model import GPT
from ..native import NativeEngine
from ..sampling import Floats, Sampling, choose
from .caches import slots_of

PIECE = 256  # tokens of prompts that are read between two steps

Result = TypeVar("Result")
Task = Generator[None, None, Result]  # other work for a model: it yields wherever a step may come in between


@dataclass(frozen=True)
class Token:
    """A token that was chosen, its log-probability (the model's, before temperature and filters), and the likeliest."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class End:
    """`stop` (an end token), `length`, `context`, `cancelled`, `timeout`, or `error` with what went wrong."""

    reason: str
    error: str = ""
    token: Token | None = None  # the end token, which is not delivered as the others are


@dataclass
class Job:
    """A request as the batch sees it.

    Attributes:
        ids: the prompt.
        deliver: called in the batch's thread with each Token, and with one End at last; it must not block.
        seed: of this request alone.
        logprobs: how many of the likeliest tokens to name beside each one; None for no log-probabilities at all.
        deadline: of time.monotonic().
        cancelled: set it, from any thread, and the row is free at the next step.
        known: prompt tokens that did not have to be read.
    """

    ids: Sequence[int]
    deliver: Callable[[Token | End], None]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    deadline: float = float("inf")
    cancelled: bool = False
    known: int = 0


@dataclass(frozen=True)
class Work:
    """Other work: its steps, which must not raise, and who is told why it will not be ended."""

    steps: Iterator[None]
    fail: Callable[[str], None]


class FullError(LoadstoneError):
    """As many requests wait as may. Try again later."""


@dataclass
class _Row:
    job: Job
    generator: np.random.Generator
    history: list[int]
    todo: list[int]  # tokens that the cache does not hold yet; the last one's logits are due
    made: int = 0


class Batch:
    """The batch of one model.

    Args:
        model: what computes: a model, or the native engine.
        rows: requests at the same time.
        length: tokens that each may have, prompt and answer.
        waiting: requests that may wait for a row.
        n_tokens: ids from here on are padding of the vocabulary and are never chosen.
    """

    def __init__(
        self, model: GPT | NativeEngine, *, rows: int = 16, length: int | None = None, waiting: int = 64,
        n_tokens: int | None = None,
    ) -> None:  # fmt: skip
        self.config, self.waiting, self.n_tokens = model.config, waiting, n_tokens
        self.slots = slots_of(model, rows, length or model.config.context_length)
        self._queue: deque[Job] = deque()
        self._work: deque[Work] = deque()
        self._rows: list[_Row] = []
        self._lock = threading.Lock()
        self.wake: Callable[[], None] = lambda: None  # set by the Worker

    def submit(self, job: Job) -> None:
        """Queue a request. Raises FullError, and LoadstoneError for a prompt that cannot be answered."""
        self.check(job.ids)
        with self._lock:
            if len(self._rows) + len(self._queue) >= self.most:
                raise FullError(f"{len(self._queue)} requests are waiting already.")
            self._queue.append(job)
        self.wake()

    @property
    def most(self) -> int:
        """Requests that may be here at the same time."""
        return self.slots.rows + self.waiting

    def check(self, ids: Sequence[int]) -> None:
        """Raises LoadstoneError for token ids that the model cannot read, or not at once."""
        if len(ids) > self.slots.length:
            raise LoadstoneError(f"the text has {len(ids)} tokens, but the context is {self.slots.length}.")
        check_prompt(ids, self.config)

    def add(self, work: Work) -> None:
        """Take steps of other work too, one between two of the batch's. Raises FullError."""
        with self._lock:
            if len(self._work) > self.waiting:
                raise FullError(f"{len(self._work)} requests are waiting already.")
            self._work.append(work)
        self.wake()

    @property
    def busy(self) -> bool:
        return bool(self._rows or self._queue or self._work)

    @property
    def load(self) -> tuple[int, int]:
        """Requests that run, and that wait."""
        return len(self._rows), len(self._queue)

    @torch.inference_mode()  # for the other work
    def step(self) -> None:
        """One token for every row. Whatever fails ends the requests that it concerns, never the thread."""
        try:
            self._advance()
            self._leave()
            self._join()
            if self._rows:
                self._read()
                self._write()
        except Exception as error:
            self._fail(error)

    def close(self, reason: str) -> None:
        """End what runs and what waits."""
        for job in [*self._waiting(), *(row.job for row in self._rows)]:
            job.deliver(End("error", reason))
        while self._work:
            self._work.popleft().fail(reason)
        while self._rows:
            self._end(0, None)

    def _advance(self) -> None:
        """One step of other work; those who wait for theirs take turns."""
        if self._work:
            work = self._work.popleft()
            if next(work.steps, work) is not work:
                self._work.append(work)

    def _waiting(self) -> Iterator[Job]:
        while self._queue:
            yield self._queue.popleft()

    def _leave(self) -> None:
        """Those whose client is gone, or whose time is over; who waits leaves too, and makes room in the queue."""
        now = time.monotonic()
        with self._lock:
            waiting = [(job, job.cancelled or now > job.deadline) for job in self._queue]
            self._queue = deque(job for job, over in waiting if not over)
        for job in (job for job, over in waiting if over):
            job.deliver(_over(job))
        for at in reversed(range(len(self._rows))):
            job = self._rows[at].job
            if job.cancelled or now > job.deadline:
                self._end(at, _over(job))

    def _join(self) -> None:
        while len(self._rows) < self.slots.rows:
            with self._lock:
                if not self._queue:
                    return
                job = self._queue.popleft()
            if job.max_new_tokens == 0:
                job.deliver(End("length"))
            else:
                self._begin(job)

    def _begin(self, job: Job) -> None:
        row = _Row(job, np.random.default_rng(job.seed), list(job.ids), list(job.ids))
        try:
            job.known = self.slots.admit(job.ids)
        except Exception as error:
            job.deliver(_failure(error))  # it has no row yet that could be ended
            raise
        del row.todo[: job.known]
        self._rows.append(row)

    def _read(self) -> None:
        """Pieces of prompts, those that came first first; each leaves its last token to the step."""
        left = PIECE
        for at, row in enumerate(self._rows):
            piece = row.todo[: min(left, len(row.todo) - 1)]
            if piece:
                self._feed(at, at + 1, [piece])
                left -= len(piece)
            if not left:
                return

    def _write(self) -> None:
        logits_BV = self._feed(0, len(self._rows), [row.todo[:1] for row in self._rows])
        due = [at for at, row in enumerate(self._rows) if not row.todo]
        if not due:
            return
        if self.n_tokens is not None:
            logits_BV[:, self.n_tokens :] = -np.inf
        chosen = [self._choose(self._rows[at], logits_BV[at]) for at in due]
        ended = [(at, end) for at, given in zip(due, chosen, strict=True) if (end := self._give(self._rows[at], given))]
        for at, end in reversed(ended):  # the last first: a row that ends is replaced by one from behind
            self._end(at, end)

    def _feed(self, first: int, last: int, ids: list[list[int]]) -> Floats:
        """Tokens, as many for each row, into the cache; logits after each row's last [B, V]."""
        logits_BV = self.slots.read(first, last, ids)
        for row, tokens in zip(self._rows[first:last], ids, strict=True):
            del row.todo[: len(tokens)]
        return logits_BV

    def _choose(self, row: _Row, logits_V: Floats) -> Token | End:
        """A token for a row; an end if there are no finite scores."""
        if not np.isfinite(logits_V.max()):
            return End("error", "the model gives no finite scores; see `loadstone verify`.")
        (token,) = choose(logits_V[None], [row.history], row.job.sampling, [row.generator])
        return described(token, logits_V, row.job.logprobs)

    def _give(self, row: _Row, given: Token | End) -> End | None:
        if isinstance(given, End):
            return given
        if given.id in row.job.stop_ids:
            return End("stop", token=given)
        row.job.deliver(given)
        row.history.append(given.id)
        row.todo.append(given.id)
        row.made += 1
        if row.made == row.job.max_new_tokens:
            return End("length")
        return End("context") if len(row.history) > self.slots.length else None

    def _end(self, at: int, end: End | None) -> None:
        if end is not None:
            self._rows[at].job.deliver(end)
        self._rows[at] = self._rows[self.slots.release(at)]
        self._rows.pop()

    def _fail(self, error: Exception) -> None:
        for at in range(len(self._rows)):
            self.slots.forget(at)
        while self._rows:
            self._end(len(self._rows) - 1, _failure(error))


def _failure(error: Exception) -> End:
    return End("error", f"{type(error).__name__}: {error}")


def _over(job: Job) -> End:
    return End("cancelled") if job.cancelled else End("timeout", "the time for this request is over.")


def described(token: int, logits_V: Floats, wanted: int | None) -> Token:
    """A token with its log-probability and the `wanted` likeliest; None for neither."""
    if wanted is None:
        return Token(token)
    above_V = logits_V - logits_V.max()
    logprobs_V = above_V - np.log(np.exp(above_V).sum(dtype=np.float64)).astype(np.float32)
    count = min(wanted, len(logprobs_V))
    likeliest = np.argpartition(-logprobs_V, count - 1)[:count] if count else np.empty(0, np.int64)
    top = sorted(((int(i), float(logprobs_V[i])) for i in likeliest), key=lambda pair: (-pair[1], pair[0]))
    return Token(token, float(logprobs_V[token]), tuple(pair for pair in top if pair[1] > -np.inf))


class Worker(threading.Thread):
    """The thread that computes: one step of each batch in turn, so that models do not fight for the cores."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        super().__init__(name="loadstone-worker", daemon=True)
        self._batches, self._work, self._closing = batches, threading.Condition(), False
        for batch in batches:
            batch.wake = self._notify

    def _notify(self) -> None:
        with self._work:
            self._work.notify()

    def run(self) -> None:
        while True:
            with self._work:
                self._work.wait_for(lambda: self._closing or any(batch.busy for batch in self._batches))
            if self._closing:
                break
            for batch in self._batches:
                if batch.busy:
                    batch.step()
        for batch in self._batches:
            batch.close("the server is shutting down.")

    def close(self, timeout: float | None = None) -> None:
        """End what runs, and wait for the thread."""
        with self._work:
            self._closing = True
            self._work.notify()
        self.join(timeout)
