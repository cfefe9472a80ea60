"""Documents to ids: cut into pieces, millions of characters at a time, on all cores, in order; see `tokenizer.fast`."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import TokenizerError
from ..tokenizer import Tokenizer
from ..tokenizer.base import refusing
from ..tokenizer.fast import WORTH, FastEncoder, fast_encoder
from ..tokenizer.gguf_vocab import CUTS
from ..tokenizer.parts import Parts
from .corpus import Document
from .tokenizer_training import CHARACTER

_PIECE = 1 << 18  # characters of a document that are encoded at once, where a cut changes no id
_GROUP = 1 << 22  # characters encoded together; their ids take some 300 MB while they are made
_AHEAD = 2  # groups that are read and encoded while another is written
# Between a letter and the line break after it, every pattern of `CUTS` cuts words as well (tested).
_SAFE = re.compile(r"\n(?<=[A-Za-z]\n)")  # searched for from line break to line break


class Piece(NamedTuple):
    """A part of a document of one split; `first` and `last` mark its beginning and end."""

    split: str
    document: str
    text: str
    first: bool
    last: bool


def pieces_of(documents: Iterable[tuple[str, Document]], tokenizer: Tokenizer) -> Iterator[Piece]:
    """The documents, long ones cut where the ids are the same as those of the whole."""
    divisible = _is_divisible(tokenizer)
    for split, (name, text) in documents:
        cuts = [0]
        while divisible and len(text) - cuts[-1] > _PIECE and (cut := _SAFE.search(text, cuts[-1] + _PIECE)):
            cuts.append(cut.start())
        for start, stop in zip(cuts, [*cuts[1:], len(text)], strict=True):
            yield Piece(split, name, text[start:stop], start == 0, stop == len(text))


def encoded(
    pieces: Iterator[Piece], tokenizer: Tokenizer, dtype: np.dtype[Any]
) -> Iterator[list[tuple[Piece, NDArray[Any]]]]:
    """Groups of pieces with their ids; the last piece of a document gets the tokenizer's end token, if it has one.

    Raises TokenizerError for a character that the tokenizer has no token for.
    """
    encode = _Encoder(tokenizer, dtype)
    waiting: deque[Future[list[tuple[Piece, NDArray[Any]]]]] = deque()
    with ThreadPoolExecutor(1) as pool:  # the next group is read meanwhile; `tokenizers` has threads of its own
        for group in _groups(pieces):
            waiting.append(pool.submit(encode, group))
            if len(waiting) >= _AHEAD:
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()


def _groups(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    group, size = [], 0
    for piece in pieces:
        group.append(piece)
        size += len(piece.text)
        if size >= _GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def _is_divisible(tokenizer: Tokenizer) -> bool:
    """Whether a text may be cut at `_SAFE`: its words are cut in a way that is known, and no token spans the place."""
    parts = Parts.of(tokenizer)
    if parts.patterns() == (CHARACTER,):
        return not parts.added and not parts.steps["normalizer"]
    known = parts.patterns() in {cut.patterns for cut in CUTS.values()} and not parts.unusual()
    return known and not any("\n" in token.content for token in parts.added.values())


class _Encoder:
    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype[Any]) -> None:
        self._tokenizer, self._dtype = tokenizer, dtype
        self._end = np.array(tokenizer.eos_ids[:1], dtype)
        self._characters = 0

    def __call__(self, group: list[Piece]) -> list[tuple[Piece, NDArray[Any]]]:
        try:
            ids = [np.array(own, self._dtype) for own in self._encode([piece.text for piece in group])]
        except TokenizerError as error:
            raise self._refusal(group, error) from None
        return [(p, np.append(own, self._end) if p.last else own) for p, own in zip(group, ids, strict=True)]

    @cached_property
    def _fast(self) -> FastEncoder | None:
        return fast_encoder(self._tokenizer)

    def _encode(self, texts: list[str]) -> Iterator[list[int] | NDArray[Any]]:
        """As Tokenizer.encode(text, add_special=False) of each, on all cores: what looks like a token is plain text."""
        self._characters += sum(map(len, texts))
        if self._characters >= WORTH and self._fast:
            yield from self._fast(texts)
            return
        backend = self._tokenizer.backend
        with refusing(self._tokenizer.source, "the text could not be encoded"), self._tokenizer._lock:
            backend.encode_special_tokens = True
            found = backend.encode_batch_fast(texts, add_special_tokens=False)
        for encoding in found:
            yield encoding.ids

    def _refusal(self, group: list[Piece], error: TokenizerError) -> TokenizerError:
        """Name the document and the character, where a single one is to blame."""
        for piece in group:
            for char in sorted(set(piece.text)):
                try:
                    self._tokenizer.encode(char, add_special=False)
                except TokenizerError:
                    return TokenizerError(
                        f"{piece.document}: it holds the character {char!r} (U+{ord(char):04X}), for which "
                        f"{self._tokenizer.source} has no token. Take it out of the text, make the tokenizer from all "
                        "of the text, or use a byte-level one (gpt2, bpe:8192), which has a token for everything."
                    )
        return error
