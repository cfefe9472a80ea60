"""`FastEncoder`: much text to ids by tiktoken (extra `fast`), several times faster, where the ids must be the same.

tiktoken merges whichever two neighbours make the token of lowest id; `tokenizers` merges the pair that is first in its
list. Both give the same for every text if the ids of merged tokens rise in the order of the merges, and each such
token, taken as a text, becomes itself: then no other two neighbours that would make it can ever meet, since what merges
within a token's borders depends on its own bytes alone. Both conditions are looked at here, token by token. How words
are cut is taken from a list of known patterns only, and a hostile probe is encoded both ways before the first use.

*Others*: gigatoken 0.10 is faster still, and gives other ids for some texts ("'s" behind a code point that is not
assigned); see docs/performance.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import models

from ..errors import TokenizerError
from .base import BYTE_OF, Tokenizer, refusing
from .gguf_vocab import CUTS
from .parts import Parts

WORTH = 1 << 22  # characters of text from which on the checks, some 0.7 s, are soon made up for
_DIGIT, _GPT2 = CUTS["smollm"].patterns
# A digit at a time, the rest as GPT-2, in one pattern: a cut before each digit is what `(?!\S)` must see as an end.
_DIGITS_GPT2 = rf"{_DIGIT}|" + _GPT2.replace(r"| ?\p{N}+", "").replace(r"\s+(?!\S)", r"\s+(?=\p{N})|\s+(?!\S)")
_PATTERNS: Mapping[tuple[str, ...], str] = MappingProxyType(
    {cut.patterns: cut.patterns[0] for cut in CUTS.values() if len(cut.patterns) == 1} | {(_DIGIT, _GPT2): _DIGITS_GPT2}
)
_STEP = 509  # code points between two of the probe's; tests look at far more
_CHARACTERS = "".join(map(chr, (*range(0, 0xD800, _STEP), *range(0xE000, 0x110000, _STEP))))
_PROBE = "".join(f"a{char}'s {char}1{char}\n {char}" for char in _CHARACTERS) + (
    " I'll  they'VE 12345 \r\n\r\n\t\t x\n \n <|endoftext|> \u00a0 \u3000  end   "
)
_BYTES = {ord(char): byte for char, byte in BYTE_OF.items()}
_SPACE = 500  # characters; a run of white space that is twice as long fills a block of so many


class UnfitError(Exception):
    """Why a tokenizer has no fast encoder."""


class FastEncoder:
    """Texts to ids as `Tokenizer.encode(text, add_special=False)`, on all cores.

    Raises UnfitError if tiktoken is not installed, or the ids could be others.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            from tiktoken import Encoding
        except ImportError:
            raise UnfitError("tiktoken is not installed (the extra `fast`)") from None
        parts = Parts.of(tokenizer)
        pattern = _PATTERNS.get(parts.patterns() or ())
        if pattern is None or (unusual := parts.unusual()):
            raise UnfitError("the way it cuts words is not known" if pattern is None else f"it {unusual}")
        if plain := [token.content for token in parts.added.values() if not token.special]:
            raise UnfitError(f"{plain[0]!r} is matched whole in plain text too")
        self._tokenizer = tokenizer
        self._encoding: Any = Encoding("loadstone", pat_str=pattern, mergeable_ranks=_ranks(parts), special_tokens={})
        try:
            with refusing(tokenizer.source, "tiktoken could not encode a probe"):
                found = self._encoding.encode_ordinary(_PROBE)
        except TokenizerError as error:
            raise UnfitError(str(error)) from None
        if found != tokenizer.encode(_PROBE, add_special=False):
            raise UnfitError("a probe gets other ids")

    def __call__(self, texts: Sequence[str]) -> Iterator[NDArray[np.uint32]]:
        """Raises TokenizerError for a lone surrogate."""
        # A thread makes its ids an array itself, while tiktoken, which lets go of Python's lock, works in the others.
        with ThreadPoolExecutor(_threads()) as pool:
            yield from pool.map(self._ids, texts)

    def _ids(self, text: str) -> NDArray[np.uint32]:
        if _is_easy(text):
            with suppress(TokenizerError), refusing(self._tokenizer.source, "tiktoken could not encode the text"):
                return np.array(self._encoding.encode_ordinary(text), np.uint32)
        return np.array(self._tokenizer.encode(text, add_special=False, yielding=True), np.uint32)


def _is_easy(text: str) -> bool:
    """Whether tiktoken can encode it: long white space overflows its stack, a lone surrogate it replaces unasked."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return not any(text[i : i + _SPACE].isspace() for i in range(0, len(text) - _SPACE + 1, _SPACE))


def fast_encoder(tokenizer: Tokenizer) -> FastEncoder | None:
    """The fast encoder of a tokenizer, where there can be one."""
    try:
        return FastEncoder(tokenizer)
    except UnfitError:
        return None


def _threads() -> int:
    """As many as `tokenizers` takes."""
    wanted = os.environ.get("RAYON_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) else len(os.sched_getaffinity(0))


def _ranks(parts: Parts) -> dict[bytes, int]:
    """Bytes -> id of everything that text can become: single bytes, and what merges make. Raises UnfitError."""
    vocab = parts.model["vocab"]
    if missing := [byte for byte in BYTE_OF if byte not in vocab]:
        raise UnfitError(f"it has no token for {len(missing)} of the 256 bytes")
    merged = [left + right for left, right in parts.merges]
    if any(vocab[first] >= vocab[second] for first, second in pairwise(merged)):
        raise UnfitError("the ids of its tokens are not in the order of its merges")
    tokens = [*BYTE_OF, *merged]
    if foreign := {*"".join(merged)} - {*BYTE_OF}:
        raise UnfitError(f"a token holds {min(foreign)!r}, which stands for no byte")
    if parts.ignore_merges and (others := {*vocab} - {*tokens} - {token.content for token in parts.added.values()}):
        raise UnfitError(f"no merge makes {min(others)!r}, and a word that is a token becomes that token")
    model = models.BPE(vocab=vocab, merges=parts.merges)
    if never := next((token for token in merged if len(model.tokenize(token)) != 1), None):
        raise UnfitError(f"its merges never make {never!r}")
    return {token.translate(_BYTES).encode("latin-1"): vocab[token] for token in tokens}
