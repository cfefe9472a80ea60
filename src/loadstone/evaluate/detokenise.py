"""Invertible de-tokenisers: WikiText's and Penn Treebank's spelling back to English as people write it.

The GPT-2 paper scores text so, because a model that has never seen ` @-@ ` or ` n't ` pays for the spelling and not for
the language. A de-tokeniser must not lose anything, or the model would be asked less than the published models were;
hence each comes with its inverse, and what the inverse would not restore exactly is kept as it was and marked.

A line is cut into pieces between two plain words; a piece is written as English if that can be undone, else as it was,
with a second space before it. A line that is not even surrounded by single spaces is kept whole behind a NUL.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .perplexity import Text

_BETWEEN_WORDS = re.compile(r"(?<=\w) (?= ?\w)(?!n't\b)")
_RAW_LINE = "\0"
Rules = Sequence[tuple[str, str]]

# Before a full stop that is none: "Mr. Smith", "J. R. Tolkien", "U.S. Army".
_ABBREVIATION = r"(?<!\.)(?<!\.[a-z])(?<!\bp)(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)(?<!\bJr)(?<!\bNo)(?<!\bvs)"
_ABBREVIATION += r"(?<!\bLt)(?<!\bCol)(?<!\bGen)(?<!\b[A-Z])"
_QUOTES: Rules = ((r'(?<!\S)"(?=\S)', '" '), (r'(?<=\S)"(?!\w)', ' "'))


@dataclass(frozen=True)
class Spelling:
    """How one corpus spells: rules to English, and rules back. Quotes are paired before, per line."""

    join: Rules
    split: Rules

    def encode(self, line: str) -> str:
        """A line as English; `decode` gives the line back, whatever it was."""
        if line in ("", " ") or not self._regular(line):
            encoded = "" if line == " " else _RAW_LINE + line
        else:
            pieces = _BETWEEN_WORDS.split(_paired(line[1:-1]))
            encoded = " ".join(piece if piece.isalnum() else self._piece(piece) for piece in pieces)
        return encoded if self.decode(encoded) == line else _RAW_LINE + line

    def decode(self, line: str) -> str:
        if line.startswith(_RAW_LINE):
            return line[1:]
        return f" {' '.join(map(self._original, _BETWEEN_WORDS.split(line)))} " if line else " "

    def _original(self, piece: str) -> str:
        if piece.isalnum():  # most are
            return piece
        return piece[1:] if piece.startswith(" ") else _apply(self.split, piece)

    def _regular(self, line: str) -> bool:
        return line[0] == line[-1] == " " and line[1:-1] == line.strip() and not {_OPEN, _CLOSE} & set(line)

    def _piece(self, piece: str) -> str:
        english = _apply(self.join, piece)
        plain = piece.replace(_OPEN, '"').replace(_CLOSE, '"')
        return english if _apply(self.split, english) == plain else " " + plain


_OPEN, _CLOSE = "\ue000", "\ue001"  # quotes whose side is known, while a line is worked on


def _paired(line: str) -> str:
    """Quotes between spaces open and close in turn."""
    parts = re.split(r'(?<!\S)"(?!\S)', line)
    return "".join(part + (_OPEN, _CLOSE)[i % 2] * (i < len(parts) - 1) for i, part in enumerate(parts))


def _apply(rules: Rules, text: str) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


SPELLINGS: Mapping[str, Spelling] = {
    "wikitext": Spelling(
        join=(
            (rf"(?<!\S){_OPEN} ", '"'),
            (rf" {_CLOSE}(?!\S)", '"'),
            (r" @([-,.])@ ", r"\1"),
            (r" ([,.;:?!%)\]])(?!\S)", r"\1"),
            (r"(?<!\S)([(\[$£€]) ", r"\1"),
            (r" ('(?:s|t|re|ve|ll|d|m)?)(?!\S)", r"\1"),
        ),
        split=(
            (r"(?<=\S)('(?:s|t|re|ve|ll|d|m)?)(?![\w'])", r" \1"),
            (r"(?<=\w)-(?=\w)", " @-@ "),
            (r"(?<=\d),(?=\d)", " @,@ "),
            (r"(?<=\d)\.(?=\d)", " @.@ "),
            (r'(?<=\S)([,;:?!%)\]])(?=[\s,.;:?!%)\]"]|$)', r" \1"),
            (rf'(?<=\S){_ABBREVIATION}\.(?=[\s,;:?!)\]"]|$)', " ."),
            (r"(?<!\S)([(\[$£€])(?=\S)", r"\1 "),
            *_QUOTES,
        ),
    ),
    "ptb": Spelling(
        join=((r" (n't|'(?:s|re|ve|ll|d|m)?)(?!\S)", r"\1"), (r"(?<!\S)([$#]) ", r"\1"), (r" (%)(?!\S)", r"\1")),
        split=(
            (r"(?<=[a-z>.])(n't)(?!\S)", r" \1"),
            (r"(?<=\S)('(?:s|re|ve|ll|d|m)?)(?!\S)", r" \1"),
            (r"(?<!\S)([$#])(?=\S)", r"\1 "),
            (r"(?<=\S)(%)(?!\S)", r" \1"),
        ),
    ),
}


def detokenised(text: Text, spelling: str) -> Text:
    """The text as English. Words and line ends are still counted in the original; a note says what was kept."""
    rules = SPELLINGS[spelling]
    *lines, last = text.content.split("\n")  # the last has no line end, and mostly is nothing
    english = [rules.encode(line) for line in lines]
    english.append(last and (rules.encode(last) or _RAW_LINE + last))
    marked = sum(line.count("  ") for line in english)
    whole = sum(line.startswith(_RAW_LINE) for line in english)
    total = len(lines) + bool(last)
    note = f"de-tokenised ({spelling}); {marked:,} places and {whole:,} of {total:,} lines kept their spelling"
    return replace(text, content="\n".join(english), form=f"de-tokenised ({spelling})", notes=(*text.notes, note))


def retokenised(content: str, spelling: str) -> str:
    """The inverse of `detokenised`, of the content."""
    *lines, last = content.split("\n")
    decode = SPELLINGS[spelling].decode
    return "\n".join([*map(decode, lines), last and decode(last)])
