"""The heat map of weight updates: which part of the model moved when, and by how much of its own size."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, NullLocator
from numpy.typing import NDArray

from .extension import Array
from .reading import Run, Updates
from .style import FROZEN, label_steps, new_figure, plain, round_numbers, shortened, styled

_BLOCK = re.compile(r"blocks\.(\d{1,6})\.(\w+)")
_NAMES = {
    "tok_emb": "token embedding",
    "pos_emb": "position embedding",
    "norm": "final norm",
    "score": "classifier",
}
_LABELLED, _TALLEST = 40, 13.0  # rows up to which each has a name; inches
_LEAST = 1e-30  # smaller changes have the colour of this one
_CELLS = 300  # from which the SVG holds the map as pixels
_NAN: dict[str, Any] = {"facecolor": "#f0f0f0", "edgecolor": "black", "hatch": "xxxx", "linewidth": 0}
Mask = NDArray[np.bool_]


@styled()
def updates_figure(run: Run) -> Figure:
    """Rows: the model from top to bottom; columns: intervals of training; colour: relative change, on a log scale.

    What did not move at all is hatched, and has no colour. Norms within the blocks have rows only where they moved
    while their block's attention or MLP stood still; updates.jsonl has them in any case.
    """
    updates = run.updates
    rows = shown_rows(updates)
    height = min(_TALLEST, 1.9 + len(rows) * (0.23 if len(rows) <= _LABELLED else 0.115))
    figure = new_figure(8, max(height, 3.2))
    axes = figure.add_subplot()
    edges, columns = _columns(updates)
    moved = updates.moved[rows]
    cells = np.full((len(rows), len(edges) - 1), np.nan)
    cells[:, columns] = moved
    _draw_cells(figure, axes, edges, cells)
    handles = []
    measured = np.zeros(len(edges) - 1, bool)
    measured[columns] = True
    for mask, style, label in (
        (cells == 0, FROZEN, "exactly zero: frozen"),
        (~np.isfinite(cells) & measured, _NAN, "not a finite number"),
    ):
        if mask.any():
            _draw_bars(axes, edges, mask, style)
            handles.append(Patch(**style, label=label))
    _name_rows(axes, [updates.groups[row] for row in rows], tied="head" not in updates.groups)
    axes.grid(visible=False)
    axes.set_xlim(edges[0], edges[-1])
    label_steps(axes.xaxis)
    axes.set_title(f"Weight updates of {shortened(run.name)}")
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def shown_rows(updates: Updates) -> list[int]:
    """Indices of the groups that have a row."""
    zero = dict(zip(updates.groups, updates.moved == 0, strict=True))
    needed = False
    for group in updates.groups:
        if (block := _BLOCK.fullmatch(group)) and block[2].startswith("norm"):
            still = [zero[other] for part in ("attn", "mlp") if (other := f"blocks.{block[1]}.{part}") in zero]
            needed = needed or any(bool((~zero[group] & other).any()) for other in still)
    return [
        row
        for row, group in enumerate(updates.groups)
        if needed or not ((block := _BLOCK.fullmatch(group)) and block[2].startswith("norm"))
    ]


def _columns(updates: Updates) -> tuple[Array, NDArray[np.intp]]:
    """Edges of the columns, and which column each interval is; steps that nobody measured are columns in between."""
    edges, columns = [float(min(updates.since[0], updates.until[0] - 1))], []
    for since, until in zip(updates.since, updates.until, strict=True):
        if edges[-1] < since < until:
            edges.append(float(since))
        columns.append(len(edges) - 1)
        edges.append(float(until))
    return np.array(edges), np.array(columns, np.intp)


def _draw_cells(figure: Figure, axes: Axes, edges: Array, cells: Array) -> None:
    positive = cells[np.isfinite(cells) & (cells > 0)]
    limits = (max(positive.min(), _LEAST), max(positive.max(), 2 * _LEAST)) if len(positive) else (0.1, 1.0)
    if limits[0] == limits[1]:
        limits = (limits[0] / 2, limits[1] * 2)
    mesh: QuadMesh = axes.pcolormesh(
        edges, np.arange(len(cells) + 1), np.ma.masked_where(~(cells > 0), cells), norm=LogNorm(*limits),
        cmap="cividis_r", rasterized=cells.size > _CELLS,
    )  # fmt: skip
    if len(positive):
        bar = figure.colorbar(mesh, ax=axes, pad=0.02, label="relative change in the interval, ‖ΔW‖ / ‖W‖")
        bar.ax.yaxis.set_major_locator(FixedLocator(round_numbers(*limits)))
        bar.ax.yaxis.set_minor_locator(NullLocator())
        bar.ax.yaxis.set_major_formatter(plain(3))


def _draw_bars(axes: Axes, edges: Array, mask: Mask, style: dict[str, Any]) -> None:
    """Neighbouring cells of a row as one bar, so that hatching goes on across them."""
    for row, cells in enumerate(mask):
        if bars := [(edges[start], edges[stop] - edges[start]) for start, stop in spans(cells)]:
            axes.broken_barh(bars, (row, 1), **style)


def spans(cells: Mask) -> Iterator[tuple[int, int]]:
    """(start, stop) of each run of true cells."""
    start = 0
    for true, members in groupby(cells.tolist()):
        stop = start + len(list(members))
        if true:
            yield start, stop
        start = stop


def _name_rows(axes: Axes, groups: Sequence[str], tied: bool) -> None:
    axes.set_ylim(len(groups), 0)  # the first on top
    blocks = [_BLOCK.fullmatch(group) for group in groups]
    numbers = [int(block[1]) for block in blocks if block]
    every = 1 if len(groups) <= _LABELLED else max(1, -(-(max(numbers, default=0) + 1) // 16))
    ticks, labels = [], []
    for row, (group, block) in enumerate(zip(groups, blocks, strict=True)):
        first = block is not None and (not row or not blocks[row - 1] or blocks[row - 1][1] != block[1])  # type: ignore[index]
        if block is None:
            label = row_name(group, tied)
        elif len(groups) <= _LABELLED:
            label = f"block {block[1]}  {block[2]}" if first else block[2]
        elif first and int(block[1]) % every == 0:
            label = f"block {block[1]}"
        else:
            label = ""
        if first and row:
            axes.axhline(row, color="white", linewidth=1.2 if len(groups) <= _LABELLED else 0.4)
        if label:
            ticks.append(row + 0.5)
            labels.append(label)
    axes.set_yticks(ticks, labels)
    axes.tick_params(axis="y", length=0, labelsize=10 if len(groups) <= _LABELLED else 7.5)


def row_name(group: str, tied: bool) -> str:
    """What a module group is called beside a row; a tied head is the token embedding."""
    return _NAMES.get(group, shortened(group, 30)) + (" = head" if group == "tok_emb" and tied else "")
