"""Labelled texts for classification as samples: balanced, split and cut.

Why not as others do it: the usual recipes (pandas' `sample`, scikit-learn's `train_test_split`) put copies of a text
into training and test alike, and every 14th of the SMS messages is a copy. Here copies stay on one side, and what was
chosen, cut or left out is said.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.atomic import atomic_file
from ..checkpoint.wording import few, shown
from ..errors import FormatError, LoadstoneError
from ..tokenizer import Tokenizer
from .batch import Sample
from .records import Ragged, Sources, paths_of, shuffled, split
from .tables import Table, read_labelled


@dataclass(frozen=True)
class LabelledRows:
    """Tokenised texts as samples: `targets` is [1], the class id.

    Attributes:
        ids: the rows.
        classes: [rows] class ids.
    """

    ids: Ragged
    classes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Sample:
        ids = self.ids[index]
        return Sample(ids, self.classes[index][None])

    @cached_property
    def identity(self) -> str:
        return self.ids.digest(self.classes)


@dataclass(frozen=True)
class LabelledTexts:
    """What `load_labelled` returns.

    Attributes:
        labels: the names of the classes.
        train, validation, test: the three parts.
        test_texts: (label, whole text) of the test part, for `write_labelled`.
        notes: what was recognised, chosen and cut, a sentence each.
    """

    labels: tuple[str, ...]
    train: LabelledRows
    validation: LabelledRows
    test: LabelledRows
    test_texts: list[tuple[str, str]]
    notes: list[str] = field(default_factory=list)


def load_labelled(
    sources: Sources,
    tokenizer: Tokenizer,
    context_length: int,
    *,
    label: str | None = None,
    text: str | None = None,
    header: bool | None = None,
    balance: bool = False,
    validation: float = 0.1,
    test: float = 0.2,
    max_length: int = 0,
    seed: int = 0,
) -> LabelledTexts:
    """Tables of labelled texts, tokenised and split; copies of a text stay on one side.

    Args:
        sources, label, text, header: see `read_labelled`.
        tokenizer: the model's.
        context_length: the model's.
        balance: as many rows of each class as the rarest has, chosen by the seed.
        validation, test: shares of the rows.
        max_length: tokens of a text at most, the rest is cut off; 0: as many as the longest of the training texts has.
        seed: of choice and split.

    Raises a LoadstoneError if a file is unsound, or a class has no training text.
    """
    table = read_labelled(sources, label=label, text=text, header=header)
    rows, notes = _balanced(table, seed) if balance else table.rows, list(table.notes)
    if balance:
        notes.append(f"balanced: {len(rows) // len(table.labels):,} rows of each class")
    ids = [tokenizer.encode(content) for _, content in rows]
    if empty := sum(not row for row in ids):
        notes.append(f"{empty:,} texts are empty and were left out")
        rows, ids = [row for row, own in zip(rows, ids, strict=True) if own], [row for row in ids if row]
    sides = split([content for _, content in rows], (1 - validation - test, validation, test), seed)
    limit = min(max_length or max((len(ids[i]) for i in sides[0]), default=0), context_length)
    parts = [
        LabelledRows(Ragged.of(ids[i][:limit] for i in side), np.array([rows[i][0] for i in side], np.int64))
        for side in sides
    ]
    if absent := [name for i, name in enumerate(table.labels) if i not in parts[0].classes]:
        raise LoadstoneError(
            f"{paths_of(sources)[0]}: no training text is left of the class {few(map(shown, absent))}: it has too few "
            "rows for this split. Add some, or take smaller shares for validation and test."
        )
    cut = sum(len(row) > limit for row in ids)
    notes.append(f"{len(parts[0]):,} to train on, {len(parts[1]):,} to validate, {len(parts[2]):,} to test")
    notes.append(f"at most {limit:,} tokens each" + (f"; {cut:,} longer texts were cut at the end" if cut else ""))
    held_out = [(table.labels[rows[i][0]], rows[i][1]) for i in sides[2]]
    return LabelledTexts(table.labels, parts[0], parts[1], parts[2], held_out, notes)


def rows_for(sources: Sources, tokenizer: Tokenizer, labels: Sequence[str], context_length: int) -> LabelledRows:
    """All rows of labelled tables, with the class ids of a classifier that there is; texts are cut to the context.

    Raises FormatError for a label that the classifier does not know, and for an empty text.
    """
    table = read_labelled(sources)
    if strange := [name for name in table.labels if name not in labels]:
        raise FormatError(
            paths_of(sources)[0],
            f"the label {few(map(shown, strange))} is unknown to the classifier; it has {few(map(shown, labels), 20)}.",
            "Are these the data of another model?",
        )
    ids = [tokenizer.encode(text)[:context_length] for _, text in table.rows]
    if [] in ids:
        raise FormatError(paths_of(sources)[0], f"the text of row {ids.index([]) + 1} is empty.", "Remove the row.")
    classes = [labels.index(table.labels[number]) for number, _ in table.rows]
    return LabelledRows(Ragged.of(ids), np.array(classes, np.int64))


def write_labelled(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """(label, text) rows as JSONL, which `read_labelled` reads: a test part that no later training can meet."""
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for label, text in rows:
            file.write(json.dumps({"label": label, "text": text}, ensure_ascii=False) + "\n")


def _balanced(table: Table, seed: int) -> list[tuple[int, str]]:
    """As many of each class as of the rarest, in order of the file."""
    order = sorted(range(len(table.rows)), key=lambda i: (shuffled("balance", seed, table.rows[i][1]), i))
    fewest = min(Counter(number for number, _ in table.rows).values())
    taken: Counter[int] = Counter()
    chosen = []
    for i in order:
        number = table.rows[i][0]
        if taken[number] < fewest:
            taken[number] += 1
            chosen.append(i)
    return [table.rows[i] for i in sorted(chosen)]
