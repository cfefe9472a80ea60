"""Answers in OpenAI's form: whole, and as a stream of events.

Source of the form: OpenAI's API reference; judged by the `openai` package (tests/serve).
"""

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
from .engine import Token


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
    """How completions, or chats, are written."""

    kind: str
    chunk_kind: str
    prefix: str

    def whole(self, choice: Choice) -> dict[str, Any]: ...
    def first(self, index: int) -> dict[str, Any] | None: ...
    def part(self, index: int, piece: Piece) -> dict[str, Any]: ...


@dataclass
class Reply:
    """One HTTP answer: several choices to one or several prompts.

    Attributes:
        prompts: tokens of the prompts, for the bill.
        cached: of these, how many did not have to be read.
    """

    model: str
    form: Form
    choices: Sequence[Choice]
    prompts: int

    def __post_init__(self) -> None:
        self._head = {
            "id": f"{self.form.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.model,
            "system_fingerprint": None,
        }  # fmt: skip

    def cancel(self) -> None:
        for choice in self.choices:
            choice.answer.cancel()

    @property
    def usage(self) -> dict[str, Any]:
        made = sum(choice.answer.made for choice in self.choices)
        known = sum(choice.answer.job.known for choice in self.choices)
        return {
            "prompt_tokens": self.prompts, "completion_tokens": made, "total_tokens": self.prompts + made,
            "prompt_tokens_details": {"cached_tokens": min(known, self.prompts)},
        }  # fmt: skip

    async def whole(self) -> dict[str, Any]:
        """All choices at once. Raises Failed."""

        async def finish(choice: Choice) -> None:
            async for piece in choice.answer:
                choice.add(piece)

        await asyncio.gather(*map(finish, self.choices))
        choices = [self.form.whole(choice) for choice in self.choices]
        return self._head | {"object": self.form.kind, "choices": choices, "usage": self.usage}

    async def events(self, *, usage: bool) -> AsyncIterator[str]:
        """The same as server-sent events; the choices' pieces as they come."""
        queue: asyncio.Queue[tuple[int, Piece | None, Exception | None]] = asyncio.Queue()

        async def pump(choice: Choice) -> None:
            try:
                async for piece in choice.answer:
                    queue.put_nowait((choice.index, piece, None))
                queue.put_nowait((choice.index, None, None))
            except Exception as error:  # noqa: BLE001  told to the client, whose stream has begun
                queue.put_nowait((choice.index, None, error))

        tasks = [asyncio.create_task(pump(choice)) for choice in self.choices]
        try:
            for choice in self.choices:
                if first := self.form.first(choice.index):
                    yield self._event([first], usage)
            left = len(tasks)
            while left:
                index, piece, error = await queue.get()
                if error is not None:
                    yield _line({"error": {"message": str(error), "type": "server_error", "param": None, "code": None}})
                    return
                if piece is None:
                    left -= 1
                else:
                    yield self._event([self.form.part(index, piece)], usage)
            if usage:
                yield _line(self._head | {"object": self.form.chunk_kind, "choices": [], "usage": self.usage})
            yield "data: [DONE]\n\n"
        finally:
            self.cancel()
            for task in tasks:
                task.cancel()

    def _event(self, choices: list[dict[str, Any]], usage: bool) -> str:
        return _line(
            self._head | {"object": self.form.chunk_kind, "choices": choices} | ({"usage": None} if usage else {})
        )


def _line(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


@dataclass
class Completions:
    """`text_completion`, with tokens and log-probabilities as four parallel lists."""

    tokenizer: Tokenizer
    logprobs: bool
    echoes: Sequence[str]  # by choice: what comes before the text
    echoed: Sequence[Sequence[Token]]  # by choice: the prompt's tokens
    kind: str = "text_completion"
    chunk_kind: str = "text_completion"
    prefix: str = "cmpl"
    offsets: dict[int, int] = field(default_factory=dict)

    def whole(self, choice: Choice) -> dict[str, Any]:
        text = self.echoes[choice.index] + choice.text
        tokens = [*self.echoed[choice.index], *choice.tokens]
        return self._choice(choice.index, text, tokens, choice.finish)

    def first(self, index: int) -> dict[str, Any] | None:
        if not self.echoes[index]:
            return None
        return self._choice(index, self.echoes[index], self.echoed[index], None)

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        return self._choice(index, piece.text, piece.tokens, piece.finish or None)

    def _choice(self, index: int, text: str, tokens: Sequence[Token], finish: str | None) -> dict[str, Any]:
        return {
            "index": index, "text": text, "finish_reason": finish,
            "logprobs": self._logprobs(index, tokens) if self.logprobs else None,
        }  # fmt: skip

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        texts = [token_text(self.tokenizer, token.id) for token in tokens]
        offsets, at = [], self.offsets.get(index, 0)
        for text in texts:
            offsets.append(at)
            at += len(text)
        self.offsets[index] = at
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                None if token.logprob is None else {token_text(self.tokenizer, i): p for i, p in reversed(token.top)}
                for token in tokens
            ],
            "text_offset": offsets,
        }


@dataclass
class Chats:
    """`chat.completion`: messages; each token's log-probability as an object."""

    tokenizer: Tokenizer
    logprobs: bool
    kind: str = "chat.completion"
    chunk_kind: str = "chat.completion.chunk"
    prefix: str = "chatcmpl"

    def whole(self, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {
            "index": choice.index, "message": message, "finish_reason": choice.finish,
            "logprobs": self._logprobs(choice.tokens),
        }  # fmt: skip

    def first(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "finish_reason": None, "logprobs": None}

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text else {}
        logprobs = self._logprobs(piece.tokens) if piece.tokens else None
        return {"index": index, "delta": delta, "finish_reason": piece.finish or None, "logprobs": logprobs}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = [
            self._entry(token.id, token.logprob) | {"top_logprobs": [self._entry(*each) for each in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": token_text(self.tokenizer, token), "logprob": logprob,
            "bytes": list(self.tokenizer.token_bytes(token)),
        }  # fmt: skip


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token's own text; bytes that are no characters as `bytes:\\x..`, as OpenAI writes them."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
