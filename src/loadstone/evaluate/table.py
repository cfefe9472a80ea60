"""Results as lines for a terminal: figure, interval, what it is, and what was published for such a model."""

from __future__ import annotations

from collections.abc import Iterator

from ..checkpoint.wording import visible
from .intervals import Metric
from .run import TaskResult

_SHARES = ("acc", "last_token_acc")
_HIDDEN = ("model_sha256", "loadstone", "torch")


def lines(result: TaskResult) -> Iterator[str]:
    yield visible(f"{result.task}: {result.title}")
    for metric in result.metrics:
        yield f"  {metric.name:<22}{figure(metric.name, metric.value):>10}  {_interval(metric):<26}{metric.meaning}"
        for anchor in result.anchors:
            if anchor.metric == metric.name:
                published = f"published for {anchor.of}: {anchor.protocol}; {anchor.source}"
                yield f"  {'':<22}{figure(metric.name, anchor.value):>10}  {published}"
    for group, (metric, *_) in result.groups.items():
        yield f"    {visible(group):<54}{figure(metric.name, metric.value):>8}  {_interval(metric)}"
    shown = (f"{key} {_short(value)}" for key, value in result.protocol.items() if key not in _HIDDEN)
    items = f"{result.items:,} of {result.of:,} items" if result.items < result.of else f"{result.of:,} items"
    yield f"  protocol: {visible('; '.join(shown))}; {items}, {result.tokens:,} tokens scored"
    for note in result.notes:
        yield f"  note: {visible(note)}"
    if result.tokens_per_second:
        yield f"  {result.seconds:.1f} s, {result.tokens_per_second:,.0f} tokens/s"


def figure(name: str, value: float | None) -> str:
    """Shares as percent; perplexities and bits with four digits that count."""
    if value is None:
        return "-"
    if name.startswith(_SHARES):
        return f"{value:.2%}"
    return f"{value:.4f}" if value < 10 else f"{value:,.2f}" if value < 1e6 else f"{value:.3g}"


def _interval(metric: Metric) -> str:
    if metric.low is None or metric.high is None:
        return "(too few for 95%)"
    return f"({figure(metric.name, metric.low)} to {figure(metric.name, metric.high)})"


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 and text.isalnum() else repr(value) if "\n" in text or not text else text
