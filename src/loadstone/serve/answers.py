"""From a job in the batch's thread to pieces of text in the server's: whole characters, stop texts, a fair end.

Whoever asks closes the iterator when the client is gone; that cancels the job, and its row is free at the next step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from random import getrandbits

from ..errors import LoadstoneError
from ..generate import Text
from ..sampling import Sampling
from ..tokenizer import Tokenizer
from .batch import Batch, End, Job, Token


class FailedError(LoadstoneError):
    """An answer that was begun cannot be ended."""


class LateError(FailedError):
    """Its time was over first."""


@dataclass
class Piece:
    """Some text, perhaps none, and the tokens that came since the last piece; `finish` in the last one."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: str = ""


@dataclass
class Wish:
    """What is asked of a model, once the prompt is token ids."""

    ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    stop: Sequence[str] = ()
    seed: int | None = None
    logprobs: int | None = None
    stop_ids: frozenset[int] = frozenset()


class Answer:
    """One answer. Iterate over it once; afterwards `made` tells how many tokens it took.

    Raises FullError, and LoadstoneError for what cannot be asked, when it is created; FailedError while iterating.
    """

    def __init__(self, batch: Batch, tokenizer: Tokenizer, wish: Wish, *, timeout: float) -> None:
        loop, self._told = asyncio.get_running_loop(), asyncio.Queue[Token | End]()
        self._text, self.made = Text(tokenizer, wish.stop), 0

        def deliver(event: Token | End) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._told.put_nowait, event)

        self.job = Job(
            wish.ids, deliver, wish.max_new_tokens, wish.sampling,
            seed=getrandbits(63) if wish.seed is None else wish.seed, stop_ids=wish.stop_ids, logprobs=wish.logprobs,
            deadline=time.monotonic() + timeout,
        )  # fmt: skip
        batch.submit(self.job)

    def cancel(self) -> None:
        self.job.cancelled = True

    async def __aiter__(self) -> AsyncIterator[Piece]:
        held: list[Token] = []  # tokens whose text is not out yet
        try:
            while True:
                event = await self._told.get()
                if isinstance(event, End):
                    if event.reason in ("error", "timeout"):
                        raise (LateError if event.reason == "timeout" else FailedError)(event.error)
                    if event.token and event.token.logprob is not None:
                        held.append(event.token)  # of no text; lm-eval, for one, counts on a token after the prompt's
                    yield Piece(self._text.flush(), held, "length" if event.reason == "context" else event.reason)
                    return
                self.made += 1
                held.append(event)
                text = self._text.push(event.id)
                if self._text.stopped:
                    yield Piece(text, held, "stop")
                    return
                if text:
                    yield Piece(text, held)
                    held = []
        finally:
            self.cancel()
