"""Tables of labels and texts: TSV, CSV and JSONL, recognised by their content; columns, header and classes are said.

Why not as others do it: the book reads sms.tsv with pandas, whose quotes swallow line breaks: 5,572 of its 5,574
messages arrive. Here TSV has no quotes, as its writers mean it, and labels that are no classes are refused.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from ..checkpoint.wording import few, shown
from ..errors import FormatError
from .records import Sources, decoded, paths_of, read_bytes, read_records, text_of

# What columns are usually called; in this order.
_LABELS = ("label", "class", "category", "target", "sentiment", "labels", "v1")
_TEXTS = ("text", "sentence", "message", "content", "review", "sms", "comment", "v2")
_MOST_CLASSES = 1000  # more are no classes, but texts taken for labels


@dataclass
class Table:
    """Labelled texts as they stand in the files.

    Attributes:
        labels: the names of the classes, sorted (numbers by value); a class id is an index into them.
        rows: (class id, text).
        notes: what was recognised, a sentence each.
    """

    labels: tuple[str, ...]
    rows: list[tuple[int, str]]
    notes: list[str]


def read_labelled(
    sources: Sources, *, label: str | None = None, text: str | None = None, header: bool | None = None
) -> Table:
    """Read tables of labels and texts.

    A file whose first character is `{` or `[` is JSONL or JSON; one with a tab in its first line is TSV (a line a row,
    quotes are characters); any other is CSV (RFC 4180).

    Args:
        sources: a file, or several.
        label, text: columns, by name or, from 1, by number; None: by their usual names, or label first, text second.
        header: whether the first line names the columns; None: it does if it holds the usual or the given names.

    Raises FormatError, naming the line, for rows of another width, missing columns, and labels that are no classes.
    """
    found: list[tuple[str, str]] = []
    notes: list[str] = []
    guessed: list[tuple[Path, list[tuple[str, str]]]] = []
    for path in paths_of(sources):
        raw = read_bytes(path)
        read = _json if raw.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[") else _delimited
        table = _Columns(path, label, text, header)
        before = len(found)
        found += read(table)
        notes.append(f"{path}: {len(found) - before:,} rows of {table.kind}, {table.said}")
        guessed += [(path, found[before:])] if table.guessed else []
    labels = _classes(paths_of(sources)[0], [name for name, _ in found])
    for path, rows in guessed:
        _require_no_header(path, [name for name, _ in rows])
    number = {name: i for i, name in enumerate(labels)}
    counts = Counter(row[0] for row in found)
    notes.append("classes: " + few([f"{name} ({counts[name]:,})" for name in labels], 20))
    return Table(labels, [(number[name], content) for name, content in found], notes)


@dataclass
class _Columns:
    """Which columns a file's labels and texts are in, as asked for and as found."""

    path: Path
    label: str | None
    text: str | None
    header: bool | None
    kind: str = ""
    said: str = ""
    guessed: bool = False  # that there is no header

    def named(self, names: Sequence[str]) -> tuple[str, str] | None:
        """Label and text among named columns, or None."""
        known = {name.strip().lower(): name for name in reversed(names)}
        wanted = [[asked.lower()] if asked else usual for asked, usual in ((self.label, _LABELS), (self.text, _TEXTS))]
        label, text = (next((known[word] for word in words if word in known), None) for words in wanted)
        return None if label is None or text is None or label == text else (label, text)

    def numbers(self, width: int) -> tuple[int, int]:
        """Label and text as column numbers, from 0."""
        if self.label is None and self.text is None and width == 2:
            return 0, 1
        asked = [self.label or "", self.text or ""]
        if all(name.isascii() and name.isdigit() and 1 <= int(name[:9]) <= width for name in asked):
            return int(asked[0]) - 1, int(asked[1]) - 1
        raise self.wrong("line 1", f"of its columns, {width} in number, which hold label and text cannot be told.")

    def wrong(self, place: str, problem: str) -> FormatError:
        return FormatError(
            self.path,
            f"{place}: {problem}",
            "Name both: label=... and text=..., as in the header, or by number from 1.",
        )


def _json(table: _Columns) -> Iterator[tuple[str, str]]:
    table.kind, names = "JSON", None
    for place, fields in read_records(table.path):
        names = names or table.named(list(fields))
        if names is None:
            raise table.wrong(
                place, f"its fields are {few(map(shown, fields), 8)}; none is a label and another a text."
            )
        table.said = f"label in {names[0]!r}, text in {names[1]!r}"
        if missing := [name for name in names if name not in fields]:
            raise FormatError(table.path, f"{place}: the field {missing[0]!r} is missing.", "Each record needs it.")
        yield (
            _label(table.path, place, fields[names[0]]),
            text_of(table.path, place, names[1], fields[names[1]]),
        )


def _label(path: Path, place: str, value: object) -> str:
    """A class's name; numbers and truth values are common ones."""
    if isinstance(value, (bool, int)):
        return json.dumps(value)
    return text_of(path, place, "the label", value).strip()


def _delimited(table: _Columns) -> Iterator[tuple[str, str]]:
    content = decoded(table.path, read_bytes(table.path))
    if "\t" in content.partition("\n")[0]:
        table.kind, lines = "TSV", _tsv(content)
    else:
        table.kind, lines = "CSV", _csv(table.path, content)
    place, first = next(lines, ("", []))
    if not first:
        raise FormatError(table.path, "it holds no row.", "Name a file with the data.")
    named = None if table.header is False else table.named(first)
    if table.header and named is None:
        raise table.wrong(place, f"its columns are {few(map(shown, first), 8)}; none is a label and another a text.")
    label, text = (first.index(named[0]), first.index(named[1])) if named else table.numbers(len(first))
    columns = f"label in column {label + 1}, text in column {text + 1}"
    table.said = f"with a header; {columns}" if named else f"without a header; {columns}"
    if named is None:
        table.guessed = table.header is None
        yield first[label].strip(), first[text]
    for place, row in lines:
        if len(row) != len(first):
            raise FormatError(
                table.path,
                f"{place}: it has {len(row)} columns, and those before have {len(first)}: {shown(row)}.",
                "A text that holds the separator must be quoted in CSV, and cannot be in TSV.",
            )
        yield row[label].strip(), row[text]


def _tsv(content: str) -> Iterator[tuple[str, list[str]]]:
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            yield f"line {number}", line.removesuffix("\r").split("\t")


def _csv(path: Path, content: str) -> Iterator[tuple[str, list[str]]]:
    rows = csv.reader(StringIO(content, newline=""), strict=True)
    while True:
        place = f"line {rows.line_num + 1}"
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise FormatError(path, f"{place}: it is no CSV ({error}).", "Is a quote left open?") from None
        if row:
            yield place, row


def _classes(path: Path, found: Sequence[str]) -> tuple[str, ...]:
    labels, rows = set(found), len(found)
    if "" in labels:
        raise FormatError(path, f"row {found.index('') + 1} of the data has no label.", "Remove it, or label it.")
    if len(labels) < 2:
        named = f"the one class {shown(found[0])}" if found else "no row"
        raise FormatError(path, f"it holds {named}, and to classify takes two at least.", "Are the columns right?")
    once = sum(count == 1 for count in Counter(found).values())
    if len(labels) > _MOST_CLASSES or (rows > 20 and once > rows / 2):
        raise FormatError(
            path,
            f"{len(labels):,} different labels in {rows:,} rows ({few(map(shown, sorted(labels)[:2]))}): these are no "
            "classes.",
            "Are label and text exchanged? Name the columns: label=... and text=...",
        )
    if all(name.isascii() and name.isdigit() and len(name) < 10 for name in labels):
        return tuple(sorted(labels, key=lambda name: (int(name), name)))
    return tuple(sorted(labels))


def _require_no_header(path: Path, found: Sequence[str]) -> None:
    if len(found) > 20 and found.count(found[0]) == 1:
        raise FormatError(
            path,
            f"the label of the first row, {shown(found[0])}, is used nowhere else, so the row looks like a header.",
            "Say so: header=True with label=... and text=..., or header=False.",
        )
