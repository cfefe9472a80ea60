"""The loss picture: training and validation loss of one run, or of several to compare."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator
from numpy.typing import NDArray

from .extension import Array
from .reading import Evaluation, Run, Training, distinct_names
from .style import (
    COLOURS,
    DASHES,
    FAINT,
    GREY,
    MARKERS,
    label_steps,
    new_figure,
    number,
    plain,
    round_numbers,
    shortened,
    styled,
)

_WINDOWS = 20  # the smoothed curve averages over so many-th parts of the run
_BEGINNING = 0.02  # share of a run whose loss may be cut off
_ENOUGH = 1000  # points of a smoothed curve
_FEW, _MANY = 60, 5000  # points up to which each is marked, and from which the SVG holds the raw curve as pixels


@styled()
def loss_figure(runs: Sequence[Run]) -> Figure:
    """Loss against steps for one run, against tokens for several, with perplexity on the right.

    Lines, by label: "training", "training, mean of N" and "validation" for one run; the runs' names for several.
    """
    alone = len(runs) == 1
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    by_tokens = not alone and all(_has_tokens(run) for run in runs)
    if alone:
        _draw_one(axes, runs[0])
    else:
        for index, (run, name) in enumerate(zip(runs, distinct_names(runs), strict=True)):
            _draw_compared(axes, run, name, index, by_tokens)
    label_steps(axes.xaxis, "tokens seen in training" if by_tokens else _steps_label(runs))
    axes.set_ylabel("loss (nats per token)" if _is_language(runs) else "loss (nats)")
    axes.set_title("Loss of " + (shortened(runs[0].name) if alone else f"{len(runs)} runs"))
    axes.margins(x=0.02)
    _limit(axes, runs)
    if _is_language(runs):
        _perplexity_axis(axes)
    _legend(figure, axes, runs)
    return figure


def smoothed(values: Array) -> tuple[Array, int]:
    """Mean over a twentieth of the run around each value, and over how many values.

    The window is narrower at the beginning, where the loss falls fast, and one-sided at the end.
    """
    half = len(values) // (2 * _WINDOWS)
    half = half if half > 1 else 0  # few values speak for themselves
    at = np.arange(len(values))
    start, stop = np.maximum(at - half, 0), np.minimum(at + np.minimum(half, at), len(values) - 1) + 1
    sums = np.concatenate(([0.0], np.cumsum(values)))
    return (sums[stop] - sums[start]) / (stop - start), 2 * half + 1


def _draw_one(axes: Axes, run: Run) -> None:
    x, y = _known(run.training.step, run.training.loss)
    mean, over = smoothed(y)
    raw: Any = {"color": FAINT, "linewidth": 0.9} if over > 1 else {"color": COLOURS[0], "linewidth": 1.4}
    if len(x):
        points: Any = {"marker": ".", "markersize": 4} if len(x) <= _FEW else {}
        axes.plot(x, y, label="training", rasterized=len(x) > _MANY, **points, **raw)
    if over > 1:
        at = _some(len(x))
        axes.plot(x[at], mean[at], color=COLOURS[0], linewidth=1.6, label=f"training, mean of {over:,} values")
    x, y = _known(run.evaluation.step, run.evaluation.val_loss)
    if len(x):
        _draw_validation(axes, x, y, "validation", COLOURS[1], DASHES[1], "o")


def _draw_compared(axes: Axes, run: Run, name: str, index: int, by_tokens: bool) -> None:
    """Validation loss with the run's own dash and marker; training loss, smoothed, faint in the same colour."""
    colour, dash = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]
    training, evaluation = run.training, run.evaluation
    x, y = _known(training.tokens if by_tokens else training.step, training.loss)
    known: Any = {"linewidth": 1.4, "label": f"{shortened(name, 40)} (training)"}
    faint: Any = {"linewidth": 0.9, "alpha": 0.55, "label": "_training"}
    at = _some(len(x))
    axes.plot(x[at], smoothed(y)[0][at], color=colour, linestyle=dash, **(known if evaluation.best is None else faint))
    if evaluation.best is not None:
        x, y = _known(evaluation.tokens if by_tokens else evaluation.step, evaluation.val_loss)
        label = f"{shortened(name, 40)}: best {y.min():.3f}"
        _draw_validation(axes, x, y, label, colour, dash, MARKERS[index % len(MARKERS)])


def _draw_validation(axes: Axes, x: Array, y: Array, label: str, colour: str, dash: Any, marker: str) -> None:
    """The curve, marked so that it can be told from others without colour, and a star at its lowest point."""
    some = {"marker": marker, "markersize": 4, "markevery": math.ceil(len(x) / _FEW)}
    style: Any = {"color": colour, "linestyle": dash, "linewidth": 1.7, **some}
    axes.plot(x, y, label=label, **style)
    best = int(y.argmin())
    star: Any = {"marker": "*", "color": colour, "markeredgecolor": "black", "markersize": 13, "linestyle": "none"}
    axes.plot([x[best]], [y[best]], label="_best", zorder=5, **star)


def _some(count: int) -> NDArray[np.intp]:
    """Indices of up to _ENOUGH points, first and last among them: a mean over many values has no finer detail."""
    return np.unique(np.linspace(0, count - 1, min(count, _ENOUGH)).round().astype(np.intp))


def _known(x: Array, y: Array) -> tuple[Array, Array]:
    known = np.isfinite(y)
    return x[known], y[known]


def _best_text(evaluation: Evaluation, best: int) -> str:
    loss, perplexity = evaluation.val_loss[best], evaluation.perplexity[best]
    also = f" (perplexity {number(perplexity, 4)})" if math.isfinite(perplexity) else ""
    return f"lowest validation loss: {loss:.4g} at step {number(evaluation.step[best])}{also}"


def _limit(axes: Axes, runs: Sequence[Run]) -> None:
    """Room for what matters: a spike of the raw loss, or the fall of the first steps, does not flatten all the rest."""
    curves = [curve for run in runs for curve in _curves(run) if len(curve)]
    low = min(*(curve[:, 1].min() for curve in curves), *(np.nanmin(run.training.loss, initial=np.inf) for run in runs))
    high = max(curve[:, 1].max() for curve in curves)
    late = [curve[curve[:, 0] >= _BEGINNING * curve[-1, 0], 1].max() for curve in curves]
    if max(late) - low < 0.5 * (high - low):
        begins, high = high, max(late)
        note = f"cut off at the top: the loss begins at {begins:.3g}"
        axes.text(0.99, 0.98, note, transform=axes.transAxes, ha="right", va="top", color=GREY, fontsize=9)
    room = 0.06 * (high - low) or 0.1 * (abs(high) or 1)
    axes.set_ylim(low - room, high + room)


def _curves(run: Run) -> Iterator[Array]:
    """[N, 2] of step and value: the smoothed training loss, the validation loss."""
    steps, losses = _known(run.training.step, run.training.loss)
    yield np.column_stack([steps, smoothed(losses)[0]])
    yield np.column_stack(_known(run.evaluation.step, run.evaluation.val_loss))


def _perplexity_axis(axes: Axes) -> None:
    """exp(loss) on the right."""
    low, high = (float(_exp(limit)) for limit in axes.get_ylim())
    right = axes.secondary_yaxis("right", functions=(_exp, _log))
    right.set_ylabel("perplexity = exp(loss)")
    right.yaxis.set_major_locator(FixedLocator(round_numbers(low, high)))
    right.yaxis.set_minor_locator(NullLocator())
    right.yaxis.set_major_formatter(plain())
    right.spines["right"].set_color(GREY)


def _exp(loss: Any) -> Any:
    return np.exp(np.clip(loss, -600, 600))


def _log(perplexity: Any) -> Any:
    return np.log(np.maximum(perplexity, 1e-300))


def _legend(figure: Figure, axes: Axes, runs: Sequence[Run]) -> None:
    handles, labels = axes.get_legend_handles_labels()
    bests = [(run.evaluation, run.evaluation.best) for run in runs if run.evaluation.best is not None]
    if bests:
        star: Any = {"marker": "*", "color": "white", "markeredgecolor": "black", "markersize": 11}
        handles.append(Line2D([], [], linestyle="none", **star))
        labels.append("lowest validation loss" if len(runs) > 1 else _best_text(*bests[0]))
        if len(runs) > 1:
            handles.append(Line2D([], [], color=GREY, linewidth=0.9, alpha=0.55))
            labels.append("faint: training")
    figure.legend(handles, labels, loc="outside lower center", ncols=2)


def _steps_label(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return "step"
    tokens = _all(runs[0], "tokens")
    tokens = tokens[np.isfinite(tokens)]
    return f"step ({number(tokens.max())} tokens in all)" if len(tokens) else "step"


def _all(run: Run, name: str) -> Array:
    parts: tuple[Training, Evaluation] = run.training, run.evaluation
    return np.concatenate([getattr(part, name) for part in parts])


def _has_tokens(run: Run) -> bool:
    return bool(np.isfinite(_all(run, "tokens")).all())


def _is_language(runs: Sequence[Run]) -> bool:
    """Perplexity means something: every run that was evaluated has it (a classifier has none)."""
    evaluated = [run for run in runs if run.evaluation.best is not None]
    return all(np.isfinite(run.evaluation.perplexity).any() for run in evaluated)
