"""How all pictures look, and how they become files: no display, no pyplot, the same bytes for the same data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..checkpoint.wording import visible

# Okabe and Ito's colours (jfly.uni-koeln.de/color): told apart by colour-blind people, dark and light ones alternating.
COLOURS = ("#0072B2", "#D55E00", "#000000", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)))
MARKERS = ("o", "s", "^", "D", "v")
GREY, FAINT = "#555555", "#b8b8b8"
FROZEN: dict[str, Any] = {"facecolor": "white", "edgecolor": "#9a9a9a", "hatch": "/////", "linewidth": 0}
_STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture everywhere
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "text.parse_math": False,  # a `$` in a name is a `$`
    "svg.fonttype": "none",  # text stays text: it can be searched and read aloud
    "svg.hashsalt": "loadstone",
    "figure.facecolor": "white",  # in a dark page too
}
CANVASES = {"png": FigureCanvasAgg, "svg": FigureCanvasSVG}
DPI = 150
_STEPS = [1, 2, 2.5, 5, 10]  # from tick to tick


@contextmanager
def styled() -> Iterator[None]:
    """Our look for what is drawn and saved in the block, whatever the user's own settings are."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        # A name in a script that the font lacks is drawn as boxes in the PNG, and stays text in the SVG.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        warnings.filterwarnings("ignore", "constrained_layout not applied")  # hostile labels: drawn, if not well
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that belongs to no window."""
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path, format: str, title: str) -> None:
    """Write a figure as `png` or `svg`, whatever the path's suffix."""
    metadata = {"Title": title, **({"Date": None} if format == "svg" else {"Software": "Loadstone"})}
    with styled():
        CANVASES[format](figure).print_figure(path, format=format, dpi=DPI, metadata=metadata)


def plain(digits: int = 12) -> FuncFormatter:
    """Tick labels as plain text: 0.001, 1e-05, 120,000, 1.5 million."""
    return FuncFormatter(lambda value, _: number(value, digits))


def number(value: float, digits: int = 12) -> str:
    """`120000` -> `120,000`; millions and more in words."""
    for size, unit in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if size <= value < 1e15:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.{digits}g}"


def round_numbers(low: float, high: float) -> list[float]:
    """Ticks for a logarithmic axis: powers of ten, or 1, 2, 5, 10, ..., or equal steps where those are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 2, 5)):
        ticks = [d * 10.0**k for k in decades for d in digits if low <= d * 10.0**k <= high]
        if len(ticks) >= 4:
            return ticks[:: math.ceil(len(ticks) / 12)]
    return [float(tick) for tick in MaxNLocator(7, steps=_STEPS).tick_values(low, high) if low <= tick <= high]


def label_steps(axis: Axis, label: str = "step") -> None:
    """Name an axis of steps or tokens, and put its ticks at whole numbers."""
    axis.set_label_text(label)
    axis.set_major_locator(MaxNLocator(8, steps=_STEPS, integer=True))
    axis.set_major_formatter(plain())


def shortened(name: str, limit: int = 50) -> str:
    """A name that fits into a title: printable, its middle left out where it is long."""
    name = visible(name)
    return name if len(name) <= limit else f"{name[: limit // 2 - 1]}…{name[-(limit // 2) :]}"
