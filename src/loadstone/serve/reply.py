"""One HTTP answer with its choices, whole or as a stream of events; `forms` knows how each is written."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..tokenizer import Tokenizer
from .answers import Answer, Piece
from .batch import Token
from .details import details


@dataclass
class Choice:
    """One answer, as far as it has come."""

    index: int
    answer: Answer
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish = piece.finish or None


class Form(Protocol):
    """How completions, or chats, are written. What came before the answer (an echo, a role) is the form's to know."""

    kind: str
    chunk_kind: str
    prefix: str

    def whole(self, choice: Choice) -> dict[str, Any]: ...
    def first(self, index: int) -> dict[str, Any] | None: ...
    def part(self, index: int, piece: Piece) -> dict[str, Any]: ...


@dataclass
class Reply:
    """Several choices to one or several prompts.

    Attributes:
        prompts: token ids of the prompts, for the bill.
        tokenizer: if the tokens are to be described in Loadstone's own form too (`details`), and the prompts' ids.
    """

    model: str
    form: Form
    choices: Sequence[Choice]
    prompts: Sequence[Sequence[int]]
    tokenizer: Tokenizer | None = None

    def __post_init__(self) -> None:
        self._head: dict[str, Any] = {
            "id": f"{self.form.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.model,
            "system_fingerprint": None,
        }  # fmt: skip

    def cancel(self) -> None:
        for choice in self.choices:
            choice.answer.cancel()

    @property
    def usage(self) -> dict[str, Any]:
        """As OpenAI counts: a prompt once, however many answers it has."""
        prompts, made = sum(map(len, self.prompts)), sum(choice.answer.made for choice in self.choices)
        per_prompt = len(self.choices) // max(len(self.prompts), 1)
        known = sum(choice.answer.job.known for choice in self.choices[::per_prompt])
        return {
            "prompt_tokens": prompts, "completion_tokens": made, "total_tokens": prompts + made,
            "prompt_tokens_details": {"cached_tokens": known},
        }  # fmt: skip

    async def whole(self) -> dict[str, Any]:
        """All choices at once. Raises FailedError."""

        async def finish(choice: Choice) -> None:
            async for piece in choice.answer:
                choice.add(piece)

        await asyncio.gather(*map(finish, self.choices))
        choices = [self._detailed(self.form.whole(choice), choice.tokens) for choice in self.choices]
        return self._head | {"object": self.form.kind, "choices": choices, "usage": self.usage} | self._prompt_ids()

    async def events(self, *, usage: bool) -> AsyncIterator[str]:
        """The same as server-sent events; the choices' pieces as they come."""
        queue: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue()
        tasks = [asyncio.create_task(_pump(choice, queue)) for choice in self.choices]
        try:
            firsts = [first for choice in self.choices if (first := self.form.first(choice.index))]
            if firsts or self.tokenizer:
                yield self._event(firsts, usage, self._prompt_ids())
            left = len(tasks)
            while left:
                index, piece = await queue.get()
                if isinstance(piece, Exception):
                    yield _line({"error": {"message": str(piece), "type": "server_error", "param": None, "code": None}})
                    return
                if piece is None:
                    left -= 1
                else:
                    yield self._event([self._detailed(self.form.part(index, piece), piece.tokens)], usage)
            if usage:
                yield _line(self._head | {"object": self.form.chunk_kind, "choices": [], "usage": self.usage})
            yield "data: [DONE]\n\n"
        finally:
            self.cancel()
            for task in tasks:
                task.cancel()

    def _event(self, choices: list[dict[str, Any]], usage: bool, more: dict[str, Any] | None = None) -> str:
        content = self._head | {"object": self.form.chunk_kind, "choices": choices}
        return _line(content | ({"usage": None} if usage else {}) | (more or {}))

    def _detailed(self, choice: dict[str, Any], tokens: Sequence[Token]) -> dict[str, Any]:
        return choice | {"details": details(self.tokenizer, tokens)} if self.tokenizer else choice

    def _prompt_ids(self) -> dict[str, Any]:
        return {"prompt_token_ids": [list(ids) for ids in self.prompts]} if self.tokenizer else {}


async def _pump(choice: Choice, queue: asyncio.Queue[tuple[int, Piece | Exception | None]]) -> None:
    """The pieces of one choice into the queue of all; then None, or what went wrong."""
    try:
        async for piece in choice.answer:
            queue.put_nowait((choice.index, piece))
        queue.put_nowait((choice.index, None))
    except Exception as error:
        queue.put_nowait((choice.index, error))


def _line(content: dict[str, Any]) -> str:
    # In ASCII, as many clients take U+2028 and its like for the end of a line.
    return f"data: {json.dumps(content)}\n\n"
