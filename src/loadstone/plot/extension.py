"""`read_extension`: extend.json's view of the embedding matrix before and after, as arrays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError

Array = NDArray[np.float64]
_LARGEST = 1e12  # beyond any matrix and any weight
OLD, NEW, PADDING = KINDS = ("old", "new", "padding")


@dataclass(frozen=True)
class Side:
    """One matrix, [V, C], as B blocks of rows and the columns' blocks.

    Attributes:
        shape: V and C.
        starts, stops: [B] the rows of each block, in order and without a gap.
        kinds: [B] of KINDS: rows that were there, rows of new tokens, rows without a token.
        rms: [B, column blocks] root mean square of the elements.
    """

    shape: tuple[int, int]
    starts: Array
    stops: Array
    kinds: tuple[str, ...]
    rms: Array


@dataclass(frozen=True)
class Extension:
    """Both matrices. `columns`: edges of the column blocks; `tokens`: id -> text of the new tokens."""

    columns: Array
    before: Side
    after: Side
    tokens: Mapping[int, str]


def read_extension(path: Path) -> Extension:
    """Read what `loadstone extend` wrote. Raises FormatError if the file is damaged."""
    try:
        values = json.loads(path.read_bytes())
        view = values["view"]
        columns = np.array(view["columns"], np.float64)
        before, after = (_side(view[name], columns) for name in ("before", "after"))
        tokens = {int(token["id"]): str(token["text"]) for token in values["report"]["tokens"]}
    except OSError as error:
        raise FormatError(path, f"it cannot be read: {error.strerror}.") from None
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError) as error:
        raise FormatError(
            path, f"this is not what `loadstone extend` writes ({type(error).__name__}: {error}).", "Extend once more."
        ) from None
    return Extension(columns, before, after, tokens)


def _side(values: Any, columns: Array) -> Side:
    """Raises ValueError and its like for anything unexpected."""
    rows, width = values["shape"]
    blocks = values["blocks"]
    starts, stops = (np.array([block[key] for block in blocks], np.float64) for key in ("start", "stop"))
    kinds = tuple(str(block["kind"]) for block in blocks)
    rms = np.array([block["rms"] for block in blocks], np.float64)
    for good, what in (
        (len(columns) > 1 and (np.diff(columns) > 0).all() and (columns[0], columns[-1]) == (0, width), "columns"),
        (len(blocks) > 0 and (stops > starts).all() and (starts[0], stops[-1]) == (0, rows), "rows"),
        (np.array_equal(starts[1:], stops[:-1]), "rows in order"),
        (rms.shape == (len(blocks), len(columns) - 1), "one rms per block"),
        (((rms >= 0) & (rms < _LARGEST)).all() and max(rows, width) < _LARGEST, "numbers in range"),
        (set(kinds) <= {*KINDS}, "known kinds of rows"),
    ):
        if not good:
            raise ValueError(f"expected {what}")
    return Side((int(rows), int(width)), starts, stops, kinds, rms)
