"""Wording of errors: values and lists from a file, which may be long or hostile, shortened to fit into a sentence."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 8

shown = _REPR.repr


def few(items: Iterable[str], limit: int = 4) -> str:
    """The first few, and how many more there are."""
    listed = list(items)
    rest = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {rest:,} more" if rest > 0 else "")


def visible(text: str) -> str:
    """Text that may come out of a file, safe for a terminal: control characters and lone surrogates as escapes."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def size_text(nbytes: int, *, tenths_below: float = 10) -> str:
    """`523 MB`: decimal units, as disks and hubs count; tenths are shown for values below `tenths_below`."""
    value, unit = float(nbytes), 0
    while value >= 999.5 and unit < 4:
        value, unit = value / 1000, unit + 1
    digits = 1 if unit and value < tenths_below else 0
    return f"{value:.{digits}f} {('bytes', 'KB', 'MB', 'GB', 'TB')[unit]}"
