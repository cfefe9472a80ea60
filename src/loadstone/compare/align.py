"""What each stretch of a text costs two models, in bits, though their tokens begin and end at different characters.

A loss per token cannot be compared between tokenizers; bits of the same characters can. The text is cut where *both*
models' tokens end, so every piece consists of whole tokens of either: no token is divided, nothing is guessed, and the
pieces' bits add up to each model's loss exactly. With one tokenizer, pieces are its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.float64]


@dataclass(frozen=True)
class TokenBits:
    """What a model thinks of a text.

    Attributes:
        ends: [T] how many characters of the text are told after each token; never falls, the last is the whole text.
        bits: [T] -log2 of each token's probability; NaN for a first token that nothing comes before.
        whole: whether the tokens spell the text. If not, nobody knows where they lie in it, and each ends with it.
    """

    ends: NDArray[np.int64]
    bits: Bits
    whole: bool = True


class Piece(NamedTuple):
    """Characters begin..end of the text, and their bits; NaN where a model did not score them."""

    begin: int
    end: int
    bits: tuple[float, ...]

    @property
    def difference(self) -> float:
        """Bits by which the first model is worse; 1 bit: it held the text for half as likely."""
        return self.bits[0] - self.bits[1]


def token_bits(text: str, tokens: Sequence[bytes], nats: Bits) -> TokenBits:
    """From the bytes of a text's T tokens and a model's losses.

    A token that ends within a character goes with the one that completes it. A tokenizer that changes the text (that
    drops accents, say) cannot tell where its tokens lie in it: then they count to the whole.

    Args:
        tokens: UTF-8 bytes of each, without a begin token. A space before the first, which SentencePiece adds, is none.
        nats: [T] or, if the first token was not scored, [T - 1].
    """
    raw, said = text.encode(), b"".join(tokens)
    added = len(said) - len(raw) if said in (raw, b" " + raw) else None
    if added is None:
        ends = np.full(len(tokens), len(text))
    else:
        character = np.repeat(np.arange(len(text)), [len(char.encode()) for char in text])  # of each byte
        byte_ends = np.maximum(np.cumsum([len(token) for token in tokens]) - added, 0)
        ends = np.concatenate([[0], character + 1])[byte_ends]
    unscored = np.full(len(tokens) - len(nats), np.nan)
    return TokenBits(ends, np.concatenate([unscored, nats / math.log(2)]), added is not None)


def pieces(models: Sequence[TokenBits]) -> list[Piece]:
    """The text cut at the ends that all models' tokens have in common."""
    common = models[0].ends
    for model in models[1:]:
        common = np.intersect1d(common, model.ends)
    common = np.unique(common[common > 0])
    sums = [_sums(model, common) for model in models]
    begins = np.concatenate([[0], common[:-1]])
    columns = zip(begins.tolist(), common.tolist(), zip(*(each.tolist() for each in sums), strict=True), strict=True)
    return [Piece(begin, end, bits) for begin, end, bits in columns]


def _sums(model: TokenBits, ends: NDArray[np.int64]) -> Bits:
    """[P] bits of the tokens that end in each piece."""
    sums = np.zeros(len(ends))
    np.add.at(sums, np.searchsorted(ends, model.ends), model.bits)
    return sums


def scored_by_all(found: Sequence[Piece]) -> list[Piece]:
    return [piece for piece in found if not any(map(math.isnan, piece.bits))]


def ranked(found: Sequence[Piece], limit: int) -> list[Piece]:
    """The pieces in which two models differ most, the largest difference first."""
    return sorted(scored_by_all(found), key=lambda piece: (-abs(piece.difference), piece.begin))[:limit]
