"""What a figure shows, read back from its artists: curves, cells, bars, labels."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection, PolyCollection, QuadMesh
from matplotlib.figure import Figure

from loadstone.plot.style import styled

Data = np.ndarray[Any, np.dtype[np.float64]]


def laid_out(figure: Figure) -> Figure:
    """With ticks and legend where they would be in a file."""
    with styled():
        figure.draw_without_rendering()
    return figure


def curves(axes: Axes) -> dict[str, Data]:
    """[N, 2] points of each line, by label."""
    return {str(line.get_label()): np.asarray(line.get_xydata()) for line in axes.lines}


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def mesh(axes: Axes) -> QuadMesh:
    (found,) = (part for part in axes.collections if isinstance(part, QuadMesh))
    return found


def cells(axes: Axes) -> np.ma.MaskedArray[Any, Any]:
    array = mesh(axes).get_array()
    assert array is not None
    return np.ma.array(array, mask=np.ma.getmaskarray(array))


def row_labels(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_yticklabels()]


def bars(axes: Axes, hatch: str) -> list[tuple[float, float, float, float]]:
    """(x0, x1, y0, y1) of each hatched bar."""
    found = []
    for part in axes.collections:
        if isinstance(part, PolyCollection | PathCollection) and not isinstance(part, QuadMesh):
            if part.get_hatch() != hatch:
                continue
            for path in part.get_paths():
                (x0, y0), (x1, y1) = path.get_extents().get_points()
                found.append((x0, x1, y0, y1))
    return found
