"""The sensitivity map: what the model would lose if one tensor alone were of a type, and which each tensor got."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, NullLocator

from .extension import Array
from .quantised import Sensitivity
from .style import new_figure, plain, round_numbers, shortened, styled

_LABELLED, _ROW, _TALLEST = 40, 0.2, 13.0  # rows up to which each is named; inches
NOTHING = "#ececec"
_CELLS = 100  # of a panel, from which the SVG holds it as pixels


@styled()
def sensitivity_figure(found: Sensitivity, name: str) -> Figure:
    """A panel for each type, on one logarithmic scale; a dot is on what was written."""
    height = min(_TALLEST, max(3.6, 2.0 + _ROW * len(found.rows)))
    figure = new_figure(9, height)
    panels: list[Axes] = list(figure.subplots(1, len(found.types), sharey=True, squeeze=False)[0])
    limits = _limits(found.losses)
    norm = LogNorm(*limits)
    mesh: QuadMesh | None = None
    for number, (axes, losses) in enumerate(zip(panels, found.losses, strict=True)):
        nothing = np.ma.masked_where(losses != 0, losses)
        axes.pcolormesh(nothing, cmap=ListedColormap([NOTHING]), rasterized=losses.size > _CELLS)
        mesh = axes.pcolormesh(
            np.ma.masked_where(~(losses > 0), losses), norm=norm, cmap="cividis_r", rasterized=losses.size > _CELLS
        )
        rows, columns = np.nonzero(found.chosen == number)
        axes.plot(columns + 0.5, rows + 0.5, "o", color="white", markeredgecolor="black", markersize=4, linestyle="")
        axes.set_title(found.types[number])
        axes.set_xticks(np.arange(len(found.columns)) + 0.5, found.columns, rotation=60, ha="right", fontsize=8)
        axes.grid(visible=False)
        axes.tick_params(length=0)
    _name_rows(panels[0], found)
    dot = Line2D([], [], marker="o", color="white", markeredgecolor="black", markersize=4, label="what was written")
    exact = [Patch(color=NOTHING, label="nothing lost: on this grid already")] * bool((found.losses == 0).any())
    figure.legend(handles=[dot, *exact], loc="outside lower center", ncols=2)
    figure.suptitle(f"What each tensor of {shortened(name)} would lose alone, by type", x=0.02, ha="left", fontsize=11)
    if mesh is not None:
        bar = figure.colorbar(mesh, ax=panels, pad=0.02, label="estimated loss, nats per token")
        bar.ax.yaxis.set_major_locator(FixedLocator(round_numbers(*limits)))
        bar.ax.yaxis.set_minor_locator(NullLocator())
        bar.ax.yaxis.set_major_formatter(plain(3))
    return figure


def _limits(losses: Array) -> tuple[float, float]:
    positive = losses[losses > 0]
    low, high = (float(positive.min()), float(positive.max())) if len(positive) else (0.1, 1.0)
    return (low, high) if low < high else (low / 2, high * 2)


def _name_rows(axes: Axes, found: Sensitivity) -> None:
    every = 1 if len(found.rows) <= _LABELLED else -(-len(found.rows) // 20)
    named = [i for i, row in enumerate(found.rows) if i % every == 0 or not row.startswith("block ")]
    axes.set_yticks([i + 0.5 for i in named], [shortened(found.rows[i], 24) for i in named], fontsize=8)
    axes.set_ylim(len(found.rows), 0)
