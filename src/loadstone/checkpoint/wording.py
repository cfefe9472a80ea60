"""Wording of errors: values and lists from a file, which may be long or hostile, shortened to fit into a sentence."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Sequence

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 8

shown = _REPR.repr
_LAYER = re.compile(r"\d{1,18}")  # bounded, as Python refuses to read numbers of thousands of digits


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


def layer_template(name: str) -> str:
    """`h.3.ln_1.weight` -> `h.#.ln_1.weight`: what the same tensor of every layer is called."""
    return _LAYER.sub("#", name, count=1)


def folded(names: Sequence[str], span_from: int = 2) -> str:
    """`h.0.x`, `h.1.x`, `h.2.x` -> `h.{0..2}.x`; fewer layers than `span_from` are listed; a single name stays."""
    numbers = sorted(int(found.group()) for name in names if (found := _LAYER.search(name)))
    if len(names) == 1 or len(numbers) != len(names):
        return names[0]
    whole = len(numbers) >= span_from and numbers == list(range(numbers[0], numbers[-1] + 1))
    span = f"{numbers[0]}..{numbers[-1]}" if whole else ",".join(map(str, numbers))
    return _LAYER.sub(f"{{{span}}}", names[0], count=1)
