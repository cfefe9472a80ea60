"""`read_sensitivity`: quantize.json's estimates of what each tensor loses in each type, as arrays."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError
from .extension import Array

_BLOCK = re.compile(r"blk\.(\d{1,6})\.(.+)\.weight")
_LARGEST = 1e30
Unit = tuple[str, str, dict[str, float]]  # name, type, type -> loss


@dataclass(frozen=True)
class Sensitivity:
    """Estimated losses in nats per token.

    Attributes:
        rows: what the map's rows are called, from the model's top to its bottom: `block 0`, or a tensor by itself.
        columns: the kinds of tensors in a block.
        types: [P] what was tried, from the smallest on.
        losses: [P, rows, columns]; NaN where there is no such tensor. A tensor by itself fills its row.
        chosen: [rows, columns] index of the type that it got; -1 where there is no such tensor, or it is another.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    types: tuple[str, ...]
    losses: Array
    chosen: NDArray[np.intp]


def read_sensitivity(path: Path) -> Sensitivity | None:
    """Read what `loadstone quantize` wrote; None if it was not calibrated, and so estimated nothing.

    Raises FormatError if the file is damaged.
    """
    try:
        units = [_unit(unit) for unit in json.loads(path.read_bytes())["units"]]
        return _table([unit for unit in units if unit[2]])
    except OSError as error:
        raise FormatError(path, f"it cannot be read: {error.strerror}.") from None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        problem = f"this is not what `loadstone quantize` writes ({type(error).__name__}: {error})."
        raise FormatError(path, problem, "Quantise once more.") from None


def _unit(values: Any) -> Unit:
    """(name, type, losses); raises ValueError and its like for anything unexpected."""
    losses = {str(kind): float(loss) for kind, loss in values["losses"].items()}
    if not all(math.isfinite(loss) and 0 <= loss < _LARGEST for loss in losses.values()):
        raise ValueError("expected losses of 0 or more")
    return str(values["name"]), str(values["type"]), losses


def _table(units: list[Unit]) -> Sensitivity | None:
    if not units:
        return None
    places = [_place(name) for name, _, _ in units]
    numbers = sorted({int(row) for row, _ in places if isinstance(row, int)})
    alone = [row for row, _ in places if isinstance(row, str)]
    order: list[int | str] = [*alone[:1], *numbers, *alone[1:]]  # the embedding, the blocks, an untied head
    columns = list(dict.fromkeys(column for _, column in places if column)) or [""]
    types = tuple(dict.fromkeys(tried for _, _, losses in units for tried in losses))
    losses = np.full((len(types), len(order), len(columns)), np.nan)
    chosen = np.full((len(order), len(columns)), -1)
    for (row, column), (_, got, found) in zip(places, units, strict=True):
        cells = columns.index(column) if column else slice(None)
        chosen[order.index(row), cells] = types.index(got) if got in types else -1
        for tried, loss in found.items():
            losses[types.index(tried), order.index(row), cells] = loss
    names = tuple(f"block {row}" if isinstance(row, int) else row for row in order)
    return Sensitivity(names, tuple(columns), types, losses, chosen)


def _place(name: str) -> tuple[int | str, str]:
    """(block, kind), or (name, "") for a tensor by itself."""
    block = _BLOCK.fullmatch(name)
    return (int(block[1]), block[2]) if block else (name.removesuffix(".weight"), "")
