"""A `Diff` as lines for a terminal: the verdict first, then what differs, worst first, with layers folded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..checkpoint.wording import folded, layer_template, visible
from .compare import SAME, STATUS, Diff, Entry


def diff_lines(diff: Diff, *, fold: bool = True) -> Iterator[str]:
    """Lines that are safe for a terminal.

    `fold`: one line per kind of parameter, and none for what is equal bit for bit; else one per parameter.
    """
    for label, side in (("A", diff.a), ("B", diff.b)):
        yield visible(f"{label}  {side['path']}  ({side['format']}, {side['dialect'] or 'not recognised'})")
    yield from map(visible, _verdict(diff))
    groups = _groups(diff.entries) if fold else [[entry] for entry in diff.entries]
    groups.sort(key=lambda group: list(STATUS).index(group[0].status))
    rows = [_row(group) for group in groups if not fold or group[0].status != "equal"]
    widths = [max(map(len, column)) for column in zip([max(STATUS, key=len), "", "", ""], *rows, strict=True)][:3]
    for *cells, detail in rows:
        yield visible("  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip())
        if detail:
            yield visible(f"               {detail}")
    for field in diff.config:
        note = "" if field.known else "   (one of the files does not tell)"
        yield visible(f"  config       {field.field}: {_value(field.a)} in A, {_value(field.b)} in B{note}")
    for text in diff.problems:
        yield visible(f"  other        {text}")
    for text in [*_leftovers(diff), *diff.remarks]:
        yield visible(f"  note         {text}")


def _verdict(diff: Diff) -> Iterator[str]:
    total, counts = len(diff.entries), diff.counts
    text = ", ".join(f"{count} {STATUS[status]}" for status, count in reversed(counts.items()))
    known = sum(field.known for field in diff.config)
    config = f"{known} config field{'s' * (known > 1)} differ{'s' * (known == 1)}" if known else "same config"
    config = config if diff.a["dialect"] and diff.b["dialect"] else "configs not compared"
    yield f"{'same' if diff.same else 'DIFFERENT'}: of {total} parameters {text or 'none'}; {config}"


def _groups(entries: Sequence[Entry]) -> list[list[Entry]]:
    groups: dict[tuple[object, ...], list[Entry]] = {}
    for entry in entries:
        kind = (entry.status, entry.shape_a, entry.shape_b, entry.dtype_a, entry.dtype_b, layer_template(entry.hint))
        # What is the same but for its type need not be listed by name.
        name = "" if entry.status in SAME else layer_template(entry.name)
        groups.setdefault((name, *kind), []).append(entry)
    return list(groups.values())


def _row(group: Sequence[Entry]) -> tuple[str, str, str, str]:
    """Status, names, shape and type, and how far apart and why."""
    first = group[0]
    names = [entry.name for entry in group]
    same_kind = len({layer_template(name) for name in names}) == 1
    name = folded(names) if same_kind else f"{len(names)} parameters"
    return first.status, name, _both(first), "; ".join(filter(None, (_hint(group), _numbers(group))))


def _both(entry: Entry) -> str:
    shapes = [" x ".join(map(str, shape)) or "scalar" for shape in (entry.shape_a, entry.shape_b) if shape is not None]
    dtypes = [dtype for dtype in (entry.dtype_a, entry.dtype_b) if dtype]
    return " ".join(" -> ".join(dict.fromkeys(each)) for each in (shapes, dtypes))


def _numbers(group: Sequence[Entry]) -> str:
    """The worst of the group."""
    found = [entry.numbers for entry in group if entry.numbers and entry.numbers.differing]
    if not found:
        return ""
    worst = max(found, key=lambda numbers: numbers.max_abs)
    parts = [f"differs by {max(n.relative for n in found):.2g} x rms, at most {worst.max_abs:.2g}"]
    differing, elements = sum(n.differing for n in found), sum(n.elements for n in found)
    if differing < elements:
        parts.append(f"in {differing:,} of {elements:,} elements")
    cosines = [n.cosine for n in found if n.cosine is not None]
    if group[0].status == "different" and cosines:
        parts.append(f"cosine {min(cosines):.3f}")
    ulps = [n.max_ulps for n in found if n.max_ulps is not None]
    if group[0].status == "close" and ulps:
        parts.append(f"{max(ulps):,} ulps")
    return ", ".join(parts)


def _hint(group: Sequence[Entry]) -> str:
    hints = list(dict.fromkeys(entry.hint for entry in group))
    return folded(hints) if len(hints) > 1 else hints[0]


def _value(value: Any) -> str:
    if isinstance(value, dict):  # a whole rope against none
        return f"rotary of theta {value['theta']:.6g}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _leftovers(diff: Diff) -> Iterator[str]:
    if diff.a["leftovers"] == diff.b["leftovers"]:
        return
    for label, side in (("A", diff.a), ("B", diff.b)):
        for reason, count in side["leftovers"].items():
            yield f"{label} also holds {count} x {reason}"
