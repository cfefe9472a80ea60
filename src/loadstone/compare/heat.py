"""The heat strip: a text in which every piece shows which of two models foresaw it better, and how much.

Colour says who and how much; a line below says it again without colour: unbroken for A, dotted for the other, thicker
for more. One bit: twice as likely.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from .align import Piece
from .markup import Html, join, tag

BEFORE, AFTER = 24, 12  # characters of context
LONGEST = 80  # characters of a piece in a table; a text that a tokenizer changes is one piece
_RUNS = re.compile(" {2,}")
LEVELS = (1, 2, 4)  # bits from which on a piece is marked, a little, clearly, strongly
_SIDES = ("first", "other")


def strip(content: str, found: Sequence[Piece], letters: tuple[str, str]) -> Html:
    """The whole text. Pieces that differ by less than a bit stay plain, and neighbouring ones become one."""
    return tag("p", *_parts(content, found, letters), class_="strip")


def _parts(content: str, found: Sequence[Piece], letters: tuple[str, str]) -> Iterator[Html]:
    plain = 0  # where the plain text that was not given out yet begins
    for piece in found:
        if style := _style(piece.difference):
            yield join([content[plain : piece.begin]])
            plain = piece.end
            marked = content[piece.begin : piece.end].replace("\n", "↵\n")  # a line end that is marked can be seen
            yield tag("span", marked, class_=style, title=_told(piece, letters))
    yield join([content[plain:]])


def in_context(content: str, piece: Piece) -> Html:
    """A piece, marked, on one line with what stands around it."""
    before, marked, after = (
        _RUNS.sub(" ", content[begin:end].replace("\n", "↵"))
        for begin, end in ((max(0, piece.begin - BEFORE), piece.begin), piece[:2], (piece.end, piece.end + AFTER))
    )
    marked = shortened(marked)
    return tag("span", before, tag("span", marked, class_=_style(piece.difference) or None), after, class_="context")


def shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


def _told(piece: Piece, letters: tuple[str, str]) -> str:
    return ", ".join(f"{letter} {bits:.1f} bits" for letter, bits in zip(letters, piece.bits, strict=True))


def _style(difference: float) -> str:
    """`first2`: the first model foresaw it better, clearly. Nothing for what is alike, or not scored."""
    level = 0 if math.isnan(difference) else sum(abs(difference) >= bits for bits in LEVELS)
    return f"{_SIDES[difference > 0]}{level}" if level else ""


def times(difference: float) -> str:
    """How many times as likely the better model held a piece."""
    ratio = 2.0 ** min(abs(difference), 60)
    if ratio >= 1e6:
        return "over a million"
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.1f}"


def legend(letters: tuple[str, str]) -> Html:
    items = []
    for side, name, line in zip(_SIDES, letters, ("unbroken", "dotted"), strict=True):
        marks = join([tag("span", f"{2**bits}×", class_=f"{side}{i}") for i, bits in enumerate(LEVELS, 1)], " ")
        items.append(tag("li", f"{name} foresaw it better ({line} line): at least ", marks, " as likely"))
    return tag("ul", *items, class_="legend")
