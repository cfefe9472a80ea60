"""Tokens in Loadstone's own form, for the page: ids, bytes, and what else could have come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..tokenizer import Tokenizer
from .batch import Token


def details(tokenizer: Tokenizer, tokens: Sequence[Token]) -> list[dict[str, Any]]:
    """Id, text, bytes and logprob (None for a text's first) of each token, and `top`: the likeliest at its place."""
    return [
        named(tokenizer, token.id)
        | {"logprob": token.logprob, "top": [named(tokenizer, i) | {"logprob": p} for i, p in token.top]}
        for token in tokens
    ]


def named(tokenizer: Tokenizer, token: int) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token)
    return {"id": token, "text": token_text(tokenizer, token), "bytes": list(raw)}


def token_text(tokenizer: Tokenizer, token: int) -> str:
    r"""A token's own text; bytes that are no characters as `bytes:\x..`, as OpenAI writes them."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
