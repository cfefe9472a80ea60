"""HTML and SVG elements whose text cannot become markup: what is no `Html` is escaped, whoever wrote it."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from html import escape

_REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # Trojan Source, CVE-2021-42574
_EMPTY = frozenset({"meta", "rect", "line", "polyline", "circle"})


class Html(str):
    """Markup that this package made. Only `tag`, `join` and constants make one."""

    __slots__ = ()


def text(value: str) -> Html:
    """Text of a model or a file, to be shown: control characters and what would reorder the line as escapes."""
    shown = (char if _harmless(char) else repr(char)[1:-1] for char in value)
    return Html(escape("".join(shown)))


def _harmless(char: str) -> bool:
    return char in "\n\t" or (unicodedata.category(char) not in ("Cc", "Cs") and char not in _REORDERING)


def join(parts: Iterable[str], between: str = "") -> Html:
    return Html(text(between).join(part if isinstance(part, Html) else text(part) for part in parts))


def tag(element: str, *content: str, **attributes: str | float | None) -> Html:
    """`tag("th", "Loss", scope="row")`. `class_` and `aria_label` become `class` and `aria-label`; None is left out."""
    pairs = [
        f' {name.rstrip("_").replace("_", "-")}="{text(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    ]
    begin = f"<{element}{''.join(pairs)}"
    return Html(f"{begin}/>" if element in _EMPTY else f"{begin}>{join(content)}</{element}>")
