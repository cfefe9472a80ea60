"""The schedule: the learning rate over the steps, and below it which parts of the model learn when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .reading import Learning, Run
from .style import COLOURS, DASHES, FROZEN, GREY, label_steps, new_figure, plain, shortened, styled
from .updates import row_name

_BLUE = "#4a6fa5"
_LOOKS: dict[str, dict[str, Any]] = {
    "learns": {"facecolor": _BLUE, "linewidth": 0},
    "learns in part": {"facecolor": "#dbe5f1", "edgecolor": _BLUE, "hatch": "\\\\\\", "linewidth": 0},
    "frozen": FROZEN,
}
Shares = tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """A part of the model, or several neighbouring blocks that learn alike: its share that learns, per phase."""

    label: str
    shares: Shares


@styled()
def schedule_figure(run: Run) -> Figure:
    """Learning rate (above) and, where the run recorded them, the phases of its strategy (below)."""
    rows = learning_rows(run.learning)
    figure = new_figure(8, 3.2 + (0.8 + 0.27 * len(rows) if rows else 0))
    heights = [2.4, max(0.27 * len(rows), 0.5)] if rows else [1]
    axes: list[Axes] = list(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0])
    _draw_rate(axes[0], run)
    for each in axes:
        for step in run.learning.since[1:]:
            each.axvline(step, color=GREY, linewidth=0.8, linestyle=DASHES[2])
    if rows:
        _draw_rows(axes[1], rows, [*run.learning.since, run.last_step])
        used = {_look(share) for row in rows for share in row.shares}
        handles = [Patch(**look, label=name) for name, look in _LOOKS.items() if name in used]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    axes[0].set_title(f"Learning rate{' and what learns' if rows else ''}: {shortened(run.name)}")
    axes[-1].set_xlim(0, run.last_step or 1)
    label_steps(axes[-1].xaxis)
    return figure


def learning_rows(learning: Learning) -> list[Row]:
    """Rows from top to bottom. Neighbouring blocks with the same history are one; parts of a block share a row too."""
    modules: dict[str, dict[str, Shares]] = {}  # `tok_emb` -> {"": ...}; `blocks.3` -> {"attn": ..., "mlp": ...}
    for group, shares in zip(learning.groups, learning.shares.T.tolist(), strict=True):
        module, _, part = group.rpartition(".") if group.startswith("blocks.") else (group, "", "")
        modules.setdefault(module, {})[part] = tuple(shares)
    tied = "head" not in modules
    rows = []
    for _, members in groupby(modules.items(), key=lambda item: (item[0].partition(".")[0], item[1])):
        names, parts = zip(*members, strict=True)
        label = row_name(names[0], tied)
        if names[0].startswith("blocks."):
            first, last = (name.partition(".")[2] for name in (names[0], names[-1]))
            label = f"block {first}" if first == last else f"blocks {first} to {last}"
        alike: dict[Shares, list[str]] = {}
        for part, shares in parts[0].items():
            alike.setdefault(shares, []).append(part)
        rows += [Row(label if len(alike) == 1 else f"{label}: {', '.join(p)}", shares) for shares, p in alike.items()]
    return rows


def _draw_rate(axes: Axes, run: Run) -> None:
    known = np.isfinite(run.training.lr)
    few: Any = {"marker": "o", "markersize": 4} if known.sum() <= 3 else {}
    axes.plot(run.training.step[known], run.training.lr[known], color=COLOURS[0], linewidth=1.6, clip_on=False, **few)
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(plain(4))


def _look(share: float) -> str:
    return "learns" if share == 1 else "learns in part" if share > 0 else "frozen"


def _draw_rows(axes: Axes, rows: Sequence[Row], edges: Sequence[float]) -> None:
    for index, row in enumerate(rows):
        for share, start, stop in zip(row.shares, edges, edges[1:], strict=False):
            axes.broken_barh([(start, stop - start)], (index + 0.1, 0.8), **_LOOKS[_look(share)])
    axes.set_ylim(len(rows), 0)
    axes.set_yticks([index + 0.5 for index in range(len(rows))], [row.label for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False)
