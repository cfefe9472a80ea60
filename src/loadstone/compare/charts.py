"""Inline SVG: bars and curves that are as wide as the page while their text keeps its size.

Positions across are per cent, heights pixels; lines lie in an inner SVG that is stretched. A picture of fixed shape
would shrink its letters to nothing on a phone. Colours come from the page's classes m0, m1, ..., so that they change
with the scheme; a letter at every mark, and a dash for every line, say the same without colour.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .history import Points
from .markup import Html, join, tag
from .tables import amount, bits, letter

COLOURS = 6  # classes m0 to m5 of the page
_BAR, _GAP, _HEAD = 20, 14, 20  # pixels: a bar with its space, between groups, a group's name
_WIDEST = 78  # per cent: the rest is for the figure behind the bar
_TOP, _PLOT, _BOTTOM = 10, 260, 26  # pixels of a chart of curves
_NEAR = 8  # per cent: a figure so near to an edge would stick out of the page if it were centred


def mark(index: int) -> str:
    return f"m{index % COLOURS}"


def bars(title: str, groups: Mapping[str, Sequence[float]]) -> Html:
    """One group of bars for each text, one bar for each model; lengths from zero."""
    longest = max((value for values in groups.values() for value in values if math.isfinite(value)), default=1) or 1
    content: list[Html] = []
    y = 0
    for name, values in groups.items():
        content.append(tag("text", name, x="0", y=y + 14, class_="name"))
        y += _HEAD
        for index, value in enumerate(values):
            width = _WIDEST * value / longest if math.isfinite(value) else 0
            content.append(tag("rect", x="0", y=y, width=f"{width:.2f}%", height=_BAR - 4, class_=mark(index)))
            label = tag("tspan", letter(index), class_="letter")
            content.append(tag("text", label, f" {bits(value)}", x=f"{width:.2f}%", dx="6", y=y + 13))
            y += _BAR
        y += _GAP
    summary = "; ".join(
        f"{name}: " + ", ".join(f"{letter(i)} {bits(value)}" for i, value in enumerate(values))
        for name, values in groups.items()
    )
    return _picture("bars", title, f"Bits per byte. {summary}.", y, content)


@dataclass(frozen=True)
class Curve:
    """Nats per token over tokens seen, of one model."""

    index: int
    name: str
    training: Points
    validation: Points


def curves(title: str, found: Sequence[Curve]) -> Html:
    """Training loss as thin lines, validation loss as thick ones with points. Tokens on a logarithmic axis."""
    axes = _Axes.around([point for curve in found for point in (*curve.training, *curve.validation) if point[0] > 0])
    content, lines = axes.grid(), []
    for curve in found:
        style = f"{mark(curve.index)} d{curve.index % COLOURS}"
        for points, kind in ((curve.training, "thin"), (curve.validation, "thick")):
            shown = [point for point in points if point[0] > 0]
            path = " ".join(f"{axes.x(x):.2f},{axes.y(y):.2f}" for x, y in shown)
            lines.append(tag("polyline", points=path, class_=f"{kind} {style}"))
            if kind == "thick":
                content += [
                    tag("circle", cx=f"{axes.x(x):.2f}%", cy=f"{axes.pixel(y):.1f}", r=3, class_=mark(curve.index))
                    for x, y in shown
                ]
    inner = tag(
        "svg", *lines, x="0", y=_TOP, width="100%", height=_PLOT, viewBox="0 0 100 100", preserveAspectRatio="none"
    )
    content.insert(0, inner)
    content += _end_labels(axes, found)
    return _picture("curves", title, " ".join(map(_told, found)), _TOP + _PLOT + _BOTTOM, content)


@dataclass(frozen=True)
class _Axes:
    """Tokens left to right, logarithmic; nats top to bottom."""

    left: float
    right: float
    low: float
    high: float

    @classmethod
    def around(cls, points: Points | list[tuple[float, float]]) -> _Axes:
        tokens, losses = [x for x, _ in points], [y for _, y in points]
        spare = 0.04 * (max(losses) - min(losses)) or 0.5
        right = max(tokens) * 1.35  # room for the letters at the ends
        return cls(min(tokens), right, min(losses) - spare, max(losses) + spare)

    def x(self, tokens: float) -> float:
        """Per cent."""
        return 100 * math.log(tokens / self.left) / math.log(self.right / self.left)

    def y(self, nats: float) -> float:
        """Per cent, from the top."""
        return 100 * (self.high - nats) / (self.high - self.low)

    def pixel(self, nats: float) -> float:
        return _TOP + _PLOT * self.y(nats) / 100

    def grid(self) -> list[Html]:
        """Lines and figures of both axes."""
        found: list[Html] = []
        size = 10.0 ** math.floor(math.log10((self.high - self.low) / 7))
        step = next(size * n for n in (2, 5, 10) if (self.high - self.low) / (size * n) <= 7)
        for count in range(math.ceil(self.low / step), math.floor(self.high / step) + 1):
            y = f"{self.pixel(count * step):.1f}"
            found.append(tag("line", x1="0", x2="100%", y1=y, y2=y, class_="grid"))
            found.append(tag("text", f"{count * step:g}", x="2", y=y, dy="-3", class_="tick"))
        for tokens in self._round_tokens():
            x = self.x(tokens)
            place = "tick" if x < _NEAR else "tick end" if x > 100 - _NEAR else "tick middle"
            found.append(tag("line", x1=f"{x:.2f}%", x2=f"{x:.2f}%", y1=_TOP, y2=_TOP + _PLOT, class_="grid"))
            found.append(tag("text", amount(tokens), x=f"{x:.2f}%", y=_TOP + _PLOT + 18, class_=place))
        return found

    def _round_tokens(self) -> list[float]:
        """Powers of ten, and where there are fewer than two, numbers between them: two to five that fit on a phone."""
        powers = range(math.floor(math.log10(self.left)), math.floor(math.log10(self.right)) + 1)
        found: list[float] = []
        for factors in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7), range(1, 10)):
            found = [n * 10.0**power for power in powers for n in factors if self.left <= n * 10.0**power <= self.right]
            if len(found) > 1:
                break
        return found[:: 1 + len(found) // 6]


def _end_labels(axes: _Axes, found: Sequence[Curve]) -> list[Html]:
    """A letter where each curve ends, moved down where one lies there already."""
    labels: list[Html] = []
    lowest = -math.inf
    ends = [
        (axes.pixel(points[-1][1]), points[-1][0], c.index) for c in found if (points := c.validation or c.training)
    ]
    for y, tokens, index in sorted(ends):
        lowest = max(y, lowest + 14)
        x = f"{axes.x(tokens):.2f}%"
        labels.append(tag("text", letter(index), x=x, dx="8", y=f"{lowest + 4:.1f}", class_="letter"))
    return labels


def _told(curve: Curve) -> str:
    ends = [f"{kind} loss {points[-1][1]:.2f}" for kind, points in _kinds(curve) if points]
    tokens = max((points[-1][0] for _, points in _kinds(curve) if points), default=0)
    return f"{letter(curve.index)} ({curve.name}) ends after {amount(tokens)} tokens with {' and '.join(ends)}."


def _kinds(curve: Curve) -> tuple[tuple[str, Points], ...]:
    return ("training", curve.training), ("validation", curve.validation)


def _picture(name: str, title: str, description: str, height: int, content: Sequence[Html]) -> Html:
    """An SVG that says in words what it shows."""
    told = join([tag("title", title, id=f"{name}-title"), tag("desc", description, id=f"{name}-desc")])
    return tag(
        "svg", told, *content, role="img", aria_labelledby=f"{name}-title", aria_describedby=f"{name}-desc",
        class_=name, width="100%", height=height,
    )  # fmt: skip
