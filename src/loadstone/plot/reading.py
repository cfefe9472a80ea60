"""`read_run`: what a run wrote about itself, as arrays. Works while the run goes on, and after it was resumed.

A run folder has `metrics.jsonl` and perhaps `updates.jsonl`; one that `loadstone extend` wrote has `extend.json`,
and one of `loadstone quantize` has `quantize.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.wording import shown, visible
from ..errors import FormatError, LoadstoneError
from .extension import Array, Extension, read_extension
from .quantised import Sensitivity, read_sensitivity

Row = dict[str, Any]
METRICS, UPDATES, EXTENSION, QUANTISED = "metrics.jsonl", "updates.jsonl", "extend.json", "quantize.json"
_LARGEST = 2**53  # whole numbers up to here are exact in float64
_LARGEST_VALUE = 1e30


@dataclass(frozen=True)
class Training:
    """[N] arrays, one value per logged training step; NaN where a line has none."""

    step: Array
    tokens: Array  # seen since the beginning
    loss: Array  # nats per token
    lr: Array
    phase: Array  # index into the strategy's phases
    seconds: Array  # of training since the beginning


@dataclass(frozen=True)
class Evaluation:
    """[N] arrays, one value per evaluation; NaN where a line has none."""

    step: Array
    tokens: Array
    val_loss: Array
    perplexity: Array  # absent where the task is no language model

    @property
    def best(self) -> int | None:
        """Index of the least validation loss; None where there is none."""
        return int(np.nanargmin(self.val_loss)) if np.isfinite(self.val_loss).any() else None


@dataclass(frozen=True)
class Updates:
    """How far each module group moved in each interval (`train.updates`).

    Attributes:
        since, until: [I] steps where the interval begins and ends.
        groups: G names, in the model's order.
        moved: [G, I] relative Frobenius norms; exactly 0 where frozen; NaN where not measured or not finite.
    """

    since: Array
    until: Array
    groups: tuple[str, ...]
    moved: Array


@dataclass(frozen=True)
class Learning:
    """Which parts of the model learn from when on (the phases of a strategy).

    Attributes:
        since: [P] steps at which something changed, the first one 0.
        groups: G names, in the model's order.
        shares: [P, G] share of the group's parameters that learns from then on.
    """

    since: Array
    groups: tuple[str, ...]
    shares: Array


@dataclass(frozen=True)
class Run:
    """A run folder; empty arrays, and None, where it has nothing of a kind."""

    folder: Path
    training: Training
    evaluation: Evaluation
    updates: Updates
    learning: Learning
    extension: Extension | None
    sensitivity: Sensitivity | None = None

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def last_step(self) -> float:
        steps = np.concatenate([self.training.step, self.evaluation.step, self.updates.until])
        return float(steps.max(initial=0))


def read_run(folder: Path | str) -> Run:
    """Read all that a run folder has.

    A last line that is still being written is left out. Where a resumed run went back to an earlier step, what it
    wrote since replaces what was there from that step on.

    Raises:
        LoadstoneError: the folder is not there, or is no run.
        FormatError: a file is damaged; the text says which line.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LoadstoneError(f"{folder}: there is no such folder. Name the folder that a training run writes to.")
    if not any((folder / name).exists() for name in (METRICS, UPDATES, EXTENSION, QUANTISED)):
        raise LoadstoneError(
            f"{folder}: this is not the folder of a run: it has neither {METRICS} nor {UPDATES} (`loadstone train` and "
            f"`loadstone finetune` write them) nor {EXTENSION} (`loadstone extend`) nor {QUANTISED} "
            "(`loadstone quantize`). Name a folder that has."
        )
    metrics = list(_lines(folder / METRICS))
    return Run(
        folder,
        Training(**_columns(Training, _current(row for row in metrics if "loss" in row))),
        Evaluation(**_columns(Evaluation, _current(row for row in metrics if "val_loss" in row))),
        _updates(folder / UPDATES),
        _learning(folder / METRICS, _current(row for row in metrics if "learns" in row)),
        read_extension(folder / EXTENSION) if (folder / EXTENSION).exists() else None,
        read_sensitivity(folder / QUANTISED) if (folder / QUANTISED).exists() else None,
    )


def distinct_names(runs: Sequence[Run]) -> list[str]:
    """The runs' names, with the folders above where two are called the same."""
    names = [run.name for run in runs]
    paths = [run.folder.resolve().parts for run in runs]
    return [name if names.count(name) == 1 else "/".join(path[-2:]) for name, path in zip(names, paths, strict=True)]


def _updates(path: Path) -> Updates:
    rows = _current(_lines(path))
    groups, moved = _table(path, rows, "updates")
    until = np.array([row["step"] for row in rows], np.float64)
    since = np.array([row.get("since", math.nan) for row in rows], np.float64)
    since = np.where(np.isfinite(since), since, np.concatenate(([0.0], until[:-1]))[: len(rows)])
    return Updates(since, until, groups, moved.T)


def _learning(path: Path, rows: list[Row]) -> Learning:
    """A resumed run tells its phase once more; only what differs from the line before is a change."""
    rows = [row for i, row in enumerate(rows) if not i or row["learns"] != rows[i - 1]["learns"]]
    groups, shares = _table(path, rows, "learns")
    return Learning(np.array([row["step"] for row in rows], np.float64), groups, shares)


def _table(path: Path, rows: list[Row], key: str) -> tuple[tuple[str, ...], Array]:
    """Names, and [rows, names] values, of the objects that the rows hold under a key; NaN where one lacks a name."""
    for row in rows:
        if not isinstance(row.get(key), dict):
            raise FormatError(path, f"the line of step {row['step']:.0f} has no object `{key}`.", _hint(path))
        row[key] = {name: _number(path, f"`{visible(name)}`", value) for name, value in row[key].items()}
    names = tuple(dict.fromkeys(name for row in rows for name in row[key]))
    values = [row[key].get(name, math.nan) for row in rows for name in names]
    return names, np.array(values, np.float64).reshape(len(rows), len(names))


def _columns(kind: type, rows: list[Row]) -> dict[str, Array]:
    names = [field.name for field in fields(kind)]
    return {name: np.array([row.get(name, math.nan) for row in rows], np.float64) for name in names}


def _current(rows: Iterable[Row]) -> list[Row]:
    """The rows by rising step, without those that a resumed run has since replaced."""
    kept: list[Row] = []
    for row in rows:
        while kept and kept[-1]["step"] >= row["step"]:
            kept.pop()
        kept.append(row)
    return kept


def _lines(path: Path) -> Iterator[Row]:
    """Each line's object, its numbers as floats (null as NaN). No file: no lines."""
    for number, line in enumerate(_bytes(path).splitlines(keepends=True), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if not line.endswith(b"\n"):
                return  # still being written
            raise FormatError(path, f"line {number} is not JSON.", _hint(path)) from None
        if not isinstance(row, dict) or "step" not in row:
            raise FormatError(path, f"line {number} is not a JSON object with a `step`.", _hint(path))
        where = f"line {number}: "
        row |= {key: _number(path, where + key, row[key]) for key in row if key in _NUMBERS}
        if not (0 <= row["step"] <= _LARGEST):
            raise FormatError(path, f"line {number}: step {shown(row['step'])} is no step.", _hint(path))
        yield row


_NUMBERS = {"since", *(field.name for kind in (Training, Evaluation) for field in fields(kind))}


def _number(path: Path, what: str, value: Any) -> float:
    """A JSON number as a float; NaN for null, as which NaN and infinities are written, and for what no run can mean."""
    if value is None:
        return math.nan
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value) if abs(value) <= _LARGEST_VALUE else math.nan
    raise FormatError(path, f"{what} should be a number, and is {shown(value)}.", _hint(path))


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise FormatError(path, f"it cannot be read: {error.strerror}.") from None


def _hint(path: Path) -> str:
    return f"Take the damaged part out of it, or move {path.name} away to do without what is in it."
