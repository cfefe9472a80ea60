"""The vocabulary extension: the real embedding matrix before and after, with its new rows and its padding marked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from .extension import NEW, OLD, PADDING, Array, Extension, Side
from .style import new_figure, plain, shortened, styled

_OLD_HEIGHT, _PADDING_HEIGHT = 3.0, 0.08  # inches: of all old rows together, of a block of padding
_NAMED, _NAMED_HEIGHT, _NEW_HEIGHT = 12, 0.2, 0.05  # new rows up to which each is named; inches of one; else
_TALLEST, _LINE = 12.0, 0.13  # inches: of a matrix, from one label to the next
_WHAT = {OLD: "old rows", NEW: "new", PADDING: "padding"}
_MARKS: dict[str, dict[str, Any]] = {
    NEW: {"facecolor": "none", "edgecolor": "#D55E00", "linewidth": 2.0},
    PADDING: {"facecolor": "none", "edgecolor": "#555555", "hatch": "xxxx", "linewidth": 0.8},
}


@styled()
def vocabulary_figure(extension: Extension, name: str) -> Figure:
    """Two matrices beside each other; rows are not to scale, or nobody would see two new ones below 50,000."""
    sides = {"before": extension.before, "after": extension.after}
    edges = {title: _edges(side) for title, side in sides.items()}
    tallest = max(edge[-1] for edge in edges.values())
    if tallest > _TALLEST:  # thousands of new tokens in between
        edges = {title: edge * _TALLEST / tallest for title, edge in edges.items()}
        tallest = _TALLEST
    figure = new_figure(9, tallest + 2.0)
    panels: list[Axes] = list(figure.subplots(1, 2))
    rms = np.concatenate([side.rms.ravel() for side in sides.values()])
    norm = Normalize(0, float(rms.max()) or 1)
    mesh: QuadMesh | None = None
    for axes, (title, side) in zip(panels, sides.items(), strict=True):
        mesh = axes.pcolormesh(
            extension.columns,
            edges[title],
            side.rms,
            norm=norm,
            cmap="cividis_r",
            rasterized=True,
        )
        _mark(axes, side, edges[title])
        axes.set_title(f"{title}: {side.shape[0]:,} × {side.shape[1]:,}")
        axes.set_xlabel("column")
        axes.xaxis.set_major_formatter(plain())
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.set_ylim(tallest, 0)
    _name_rows(panels[0], extension.before, edges["before"], {})
    panels[1].yaxis.tick_right()
    _name_rows(panels[1], extension.after, edges["after"], extension.tokens)
    kinds = {*extension.before.kinds, *extension.after.kinds}
    names = {NEW: "rows of new tokens", PADDING: "padding (rows without a token)"}
    handles = [Patch(**_MARKS[kind], label=name) for kind, name in names.items() if kind in kinds]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
    figure.suptitle(
        f"Vocabulary extension: {shortened(name)} (heights are not to scale)", x=0.02, ha="left", fontsize=11
    )
    if mesh is not None:
        label = "size of the weights (root mean square)"
        figure.colorbar(mesh, ax=panels, location="bottom", shrink=0.4, aspect=30, label=label)
    return figure


def _edges(side: Side) -> Array:
    """[B + 1] inches from the top: old rows share a height, new ones are tall enough to be read."""
    news = side.kinds.count(NEW)
    heights = {
        OLD: _OLD_HEIGHT / max(side.kinds.count(OLD), 1),
        NEW: _NAMED_HEIGHT if news <= _NAMED else _NEW_HEIGHT,
        PADDING: _PADDING_HEIGHT,
    }
    return np.concatenate(([0.0], np.cumsum([heights[kind] for kind in side.kinds])))


def _bands(kinds: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """(kind, first block, behind the last) of each run of blocks of one kind."""
    start = 0
    for kind, members in groupby(kinds):
        stop = start + len(list(members))
        yield kind, start, stop
        start = stop


def _mark(axes: Axes, side: Side, edges: Array) -> None:
    for kind, start, stop in _bands(side.kinds):
        if kind in _MARKS:
            corner, height = (0, edges[start]), edges[stop] - edges[start]
            axes.add_patch(Rectangle(corner, side.shape[1], height, clip_on=False, **_MARKS[kind]))


def _name_rows(axes: Axes, side: Side, edges: Array, tokens: Mapping[int, str]) -> None:
    """Beside each band its rows; beside a new row the token, if there are not too many."""
    at, labels = [], []
    for kind, start, stop in _bands(side.kinds):
        first, last = int(side.starts[start]), int(side.stops[stop - 1]) - 1
        span = f"row {first:,}" if first == last else f"rows {first:,} to {last:,}"
        if kind == NEW and side.kinds.count(NEW) <= _NAMED:
            for block in range(start, stop):
                row = int(side.starts[block])
                at.append((edges[block] + edges[block + 1]) / 2)
                labels.append(f"{row:,}  {shortened(tokens.get(row, ''), 20)}".rstrip())
            continue
        at.append((edges[start] + edges[stop]) / 2)
        labels.append(f"{last - first + 1:,} {_WHAT[kind]}\n{span}" if kind == OLD else f"{_WHAT[kind]}: {span}")
    kept = [i for i in range(len(at)) if not i or at[i] - at[i - 1] >= _LINE]
    axes.set_yticks([at[i] for i in kept], [labels[i] for i in kept])
    axes.tick_params(axis="y", length=0, labelsize=9)
