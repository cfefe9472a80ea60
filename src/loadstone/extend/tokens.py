"""New tokens in a tokenizer: checked before, and proven after, to be one id each and to leave the old ids alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from tokenizers import Tokenizer as Backend

from ..checkpoint.wording import shown
from ..errors import TokenizerError
from ..tokenizer import Tokenizer
from ..tokenizer.base import refusing
from ..tokenizer.bpe import add_tokens


def tokens_of(tokenizer: Tokenizer) -> dict[int, str]:
    """id -> text of every token, but for rows that a GGUF file lists as `[PAD7]` because its format has no gaps."""
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    named = {tokenizer.bos_id, tokenizer.pad_id, *tokenizer.eos_ids, *tokenizer.backend.get_added_tokens_decoder()}
    return {number: text for text, number in vocabulary.items() if text != f"[PAD{number}]" or number in named}


def extend_tokenizer(tokenizer: Tokenizer, texts: Sequence[str], *, special: bool) -> tuple[Tokenizer, list[int]]:
    """A tokenizer with more tokens, and their ids; the given one stays as it is.

    Args:
        tokenizer: from any source.
        texts: what the new tokens stand for.
        special: they are found only where special text is parsed; if not, in every text.

    Raises TokenizerError if one is empty, given twice, there already, the same after normalization as another, or does
    not come back from `encode` and `decode` as one token.
    """
    base = _without_padding(tokenizer)
    _check(base, texts)
    with refusing(base.source, "the tokens could not be added"):
        backend = Backend.from_str(base.backend.to_str())
        add_tokens(backend, texts, special=special)
        reread = Backend.from_str(backend.to_str())
    extended = replace(base, backend=backend)
    ids = [int(number) for text in texts if (number := backend.token_to_id(text)) is not None]
    if len({*ids} - {*tokens_of(base)}) < len(texts) or [reread.token_to_id(text) for text in texts] != ids:
        raise TokenizerError(
            f"{base.source}: its ids have gaps, and the `tokenizers` library would give a new token the id of an old "
            "one. Renumber the vocabulary without gaps first."
        )
    for text, number in zip(texts, ids, strict=True):
        _prove(extended, text, number, special)
    return extended, ids


def with_chat_template(tokenizer: Tokenizer, template: str, where: str) -> Tokenizer:
    """The tokenizer with another chat template. Raises TokenizerError if it cannot render one message of a user."""
    changed = replace(tokenizer, chat_template=template)
    replace(changed, source=where).apply_chat([{"role": "user", "content": "Hello"}])
    return changed


def unused_by_template(tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
    """Whether a conversation of two messages, as the chat template writes it, holds none of these tokens."""
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
    try:
        text = tokenizer.apply_chat(messages, add_generation_prompt=True)
    except TokenizerError:  # a template may refuse a prompt after an answer
        text = tokenizer.apply_chat(messages[:1])
    return not {*tokenizer.encode(text, add_special=False, parse_special=True)} & {*ids}


def _without_padding(tokenizer: Tokenizer) -> Tokenizer:
    """Without the `[PAD7]` at the end, whose ids new tokens then take."""
    known, last = tokens_of(tokenizer), tokenizer.vocab_size - 1
    if last in known:
        return tokenizer
    steps = json.loads(tokenizer.backend.to_str())
    while last not in known and steps["model"]["vocab"].pop(f"[PAD{last}]", None) is not None:
        last -= 1
    with refusing(tokenizer.source, "the padding could not be removed from the vocabulary"):
        return replace(tokenizer, backend=Backend.from_str(json.dumps(steps)))


def _check(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    if not texts:
        raise TokenizerError("there is no token to add. Name at least one.")
    normalized = {_normalized(tokenizer, token.content): token.content for token in tokenizer._added.values()}
    for i, text in enumerate(texts, 1):
        if not text:
            raise TokenizerError(f"a token needs a text, and number {i} of the {len(texts)} to add is empty.")
        if text in texts[: i - 1]:
            raise TokenizerError(f"{shown(text)} is to be added twice. Name each new token once.")
        if (number := _existing(tokenizer, text)) is not None:
            raise TokenizerError(
                f"{tokenizer.source}: {shown(text)} is a token already, with id {number}. Leave it out, and "
                "use it as it is."
            )
        same = _normalized(tokenizer, text)
        # SentencePiece's normalizers put a space before: a text that goes on changing is no other spelling.
        number = _existing(tokenizer, same) if _normalized(tokenizer, same) == same else None
        if number is not None or same in normalized:
            other = normalized.get(same, same)
            there = "is to be added too" if number is None and other in texts else "is a token already"
            raise TokenizerError(
                f"{tokenizer.source}: {shown(text)} and {shown(other)} are one text to this tokenizer, which "
                f"normalizes what it reads, and {shown(other)} {there}. Choose another text."
            )
        normalized[same] = text


def _normalized(tokenizer: Tokenizer, text: str) -> str:
    with refusing(tokenizer.source, f"{shown(text)} cannot be normalized"):
        return tokenizer.backend.normalizer.normalize_str(text) if tokenizer.backend.normalizer else text


def _existing(tokenizer: Tokenizer, text: str) -> int | None:
    """The token that a text is, as the vocabulary spells it or as it is encoded (` user` is spelled `\u0120user`)."""
    ids = _ids(tokenizer, text, parse_special=True)
    if (number := tokenizer.backend.token_to_id(text)) is not None:
        return number
    return ids[0] if len(ids) == 1 and tokenizer.token_bytes(ids[0]) == text.encode() else None


def _ids(tokenizer: Tokenizer, text: str, *, parse_special: bool = False) -> list[int]:
    """Those of a plain text; none where the tokenizer has no token for a character, as one of characters may not."""
    try:
        return tokenizer.encode(text, add_special=False, parse_special=parse_special)
    except TokenizerError:
        if any("\ud800" <= char <= "\udfff" for char in text):  # no text at all
            raise
        return []


def _prove(tokenizer: Tokenizer, text: str, number: int, special: bool) -> None:
    ordinary = _ids(tokenizer, text)
    if tokenizer.encode(text, add_special=False, parse_special=True) != [number] or (ordinary == [number]) is special:
        raise TokenizerError(
            f"{tokenizer.source}: {shown(text)} was added as token {number} and is not encoded as it, because of "
            "another added token or of the tokenizer's settings. Choose another text."
        )
    before = _ids(tokenizer, "a")
    found = tokenizer.decode([*before, number], skip_special=False)[len(tokenizer.decode(before)) :]
    if text not in (found, tokenizer.decode([number], skip_special=False)):  # behind a word, or alone
        raise TokenizerError(
            f"{tokenizer.source}: {shown(text)} comes back as {shown(found)} when it is decoded: this tokenizer's "
            "decoder reads some characters as bytes or spaces. Choose a text of ASCII characters."
        )
