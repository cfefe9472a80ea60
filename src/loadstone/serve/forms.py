"""Completions and chats in OpenAI's form.

Source of the form: OpenAI's API reference; judged by the `openai` package (tests/serve).
"""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..tokenizer import Tokenizer
from .answers import Piece
from .batch import Token
from .details import token_text
from .reply import Choice


@dataclass
class Completions:
    """`text_completion`, with tokens and log-probabilities as four parallel lists.

    Attributes:
        logprobs: how many alternatives beside each token; None for no log-probabilities at all.
        echoes: by choice, the text that comes before the answer.
        echoed: by choice, that text's tokens.
    """

    tokenizer: Tokenizer
    logprobs: int | None
    echoes: Sequence[str]
    echoed: Sequence[Sequence[Token]]
    kind: str = "text_completion"
    chunk_kind: str = "text_completion"
    prefix: str = "cmpl"

    def __post_init__(self) -> None:
        # The tokens of a prompt may have more in front than its text has: a begin token, a space.
        shown = [b"".join(self.tokenizer.token_bytes(token.id) for token in tokens) for tokens in self.echoed]
        self._at = [len(text) - len(raw.decode(errors="replace")) for text, raw in zip(self.echoes, shown, strict=True)]
        self._decoders = [getincrementaldecoder("utf-8")(errors="replace") for _ in self.echoes]

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
        logprobs = None if self.logprobs is None else self._logprobs(index, tokens)
        return {"index": index, "text": text, "finish_reason": finish, "logprobs": logprobs}

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        return {
            "tokens": [token_text(self.tokenizer, token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [None if token.logprob is None else self._top(token) for token in tokens],
            "text_offset": [self._offset(index, token.id) for token in tokens],
        }

    def _offset(self, index: int, token: int) -> int:
        """Where the next token of a choice begins, in whole characters of its text."""
        at = max(self._at[index], 0)
        self._at[index] += len(self._decoders[index].decode(self.tokenizer.token_bytes(token)))
        return at

    def _top(self, token: Token) -> dict[str, float | None]:
        """The likeliest and the token itself by their texts; of two with the same text the likelier."""
        both = [(token.id, token.logprob), *reversed(token.top[: self.logprobs])]
        return {token_text(self.tokenizer, each): logprob for each, logprob in both}


@dataclass
class Chats:
    """`chat.completion`: messages; each token's log-probability as an object.

    Attributes:
        logprobs: how many alternatives beside each token; None for no log-probabilities at all.
    """

    tokenizer: Tokenizer
    logprobs: int | None
    kind: str = "chat.completion"
    chunk_kind: str = "chat.completion.chunk"
    prefix: str = "chatcmpl"

    def whole(self, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        logprobs = self._logprobs(choice.tokens)
        return {"index": choice.index, "message": message, "finish_reason": choice.finish, "logprobs": logprobs}

    def first(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "finish_reason": None, "logprobs": None}

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text else {}
        logprobs = self._logprobs(piece.tokens) if piece.tokens else None
        return {"index": index, "delta": delta, "finish_reason": piece.finish or None, "logprobs": logprobs}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        content = [
            self._entry(token.id, token.logprob)
            | {"top_logprobs": [self._entry(*each) for each in token.top[: self.logprobs]]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        raw = list(self.tokenizer.token_bytes(token))
        return {"token": token_text(self.tokenizer, token), "logprob": logprob, "bytes": raw}
