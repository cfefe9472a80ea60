"""`evaluate`: tasks on a model, resumable by item, each figure with the protocol that it was measured by."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..errors import LoadstoneError
from ..model import GPT
from ..tokenizer import Tokenizer
from .anchors import Anchor, anchors_for
from .intervals import Metric
from .scoring import Request, Scores, score
from .store import Store, model_hash, requests_hash
from .tasks.base import Prepared, Settings, Task

USUAL_CONTEXT = 2048  # at most, unless asked for: a context of 128k tokens is another experiment
PORTION = 1024  # requests that are sorted by length together
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TaskResult:
    """The figures of one task.

    Attributes:
        items, of: how many were scored, of how many there are.
        tokens: log-probabilities that the figures are made of.
        protocol: whatever the figures depend on besides the model.
        groups: figures of parts of the task (BLiMP's phenomena).
        anchors: published figures of a model of this shape.
        seconds, tokens_per_second: of the items that were run now, 0 and None if all were there; tokens that the model
            read, padding not counted.
    """

    task: str
    title: str
    metrics: list[Metric]
    items: int
    of: int
    tokens: int
    protocol: Mapping[str, Any]
    notes: Sequence[str]
    groups: Mapping[str, list[Metric]] = field(default_factory=dict)
    anchors: Sequence[Anchor] = ()
    seconds: float = 0.0
    tokens_per_second: float | None = None

    def as_dict(self) -> dict[str, Any]:
        groups = {name: [metric._asdict() for metric in metrics] for name, metrics in self.groups.items()}
        found = asdict(self) | {"metrics": [metric._asdict() for metric in self.metrics], "groups": groups}
        return found | {"anchors": [anchor._asdict() for anchor in self.anchors]}

    def value(self, metric: str) -> float | None:
        """Raises KeyError for a figure that the task has not."""
        return {each.name: each.value for each in self.metrics}[metric]


def evaluate(
    model: GPT,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    data: Mapping[str, str] | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
) -> list[TaskResult]:
    """Run tasks, one after the other; all data are found and read before the first is run.

    Args:
        context: tokens that the model may read; the model's context, at most USUAL_CONTEXT, if not given.
        stride: of the windows of a text; the context if not given.
        batch_size: rows at once; chosen by their length if not given. In float32 no figure depends on it.
        limit: items (of a text: windows) of each task, evenly spread.
        data: path or hub name of a task's data, by its name.
        out: a folder for the scores of each item; those that it has already are not run again.
        progress: called with tokens done and tokens in all.

    Raises LoadstoneError for data that are missing or malformed, and for a context or stride that cannot be.
    """
    settings = settings_for(model, context, stride)
    if limit is not None and limit < 1:
        raise LoadstoneError(f"a limit of {limit} items: it must be at least 1.")
    prepared = [task.prepare((data or {}).get(task.name), tokenizer, settings) for task in tasks]
    sha = model_hash(model)
    chosen = [_spread(len(each.items), limit) for each in prepared]
    meter = _Meter(
        progress, sum(_tokens(p.items[item]) for p, items in zip(prepared, chosen, strict=True) for item in items)
    )
    results = []
    for task, each, items in zip(tasks, prepared, chosen, strict=True):
        key = {"model": sha, "requests": requests_hash(each.items), "protocol": dict(each.protocol)}
        started, before = time.perf_counter(), meter.run
        with Store(out, task.name, key, each.items) if out else nullcontext() as store:
            scored = _run(model, each, items, batch_size, store, meter)
        seconds, read = time.perf_counter() - started, meter.run - before
        speed = (seconds, read / seconds) if read else (0.0, None)
        results.append(_result(model, task, each, scored, sha, speed))
    return results


def settings_for(model: GPT, context: int | None, stride: int | None) -> Settings:
    """Raises LoadstoneError for a context beyond the model's, or a stride beyond the context."""
    longest = model.config.context_length
    context = min(longest, USUAL_CONTEXT) if context is None else context
    if not 1 <= context <= longest:
        raise LoadstoneError(f"--context {context}: this model reads from 1 to {longest:,} tokens.")
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise LoadstoneError(
            f"--stride {stride}: it must be from 1 to the context, {context:,}; larger ones skip tokens."
        )
    return Settings(context, stride)


class _Meter:
    """Tokens for the progress bar: `done` of `total`, and those that the model has really `run`."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total = progress, total
        self.done = self.run = 0

    def add(self, tokens: int, *, run: bool) -> None:
        self.done += tokens
        self.run += tokens if run else 0
        if self._progress is not None:
            self._progress(self.done, self._total)


def _run(
    model: GPT, prepared: Prepared, items: Sequence[int], batch_size: int | None, store: Store | None, meter: _Meter
) -> dict[int, list[Scores]]:
    """Scores of the items: those that are kept, and the others after running them."""
    kept = store.scored if store else {}
    scored = {item: kept[item] for item in items if item in kept}
    for item in scored:
        meter.add(_tokens(prepared.items[item]), run=False)
    for portion in _portions(prepared, [item for item in items if item not in kept]):
        owners = [(item, number) for item in portion for number in range(len(prepared.items[item]))]
        requests = [prepared.items[item][number] for item, number in owners]
        parts: dict[int, dict[int, Scores]] = {}
        for index, scores in score(model, requests, batch_size=batch_size):
            item, number = owners[index]
            parts.setdefault(item, {})[number] = scores
            meter.add(_tokens([requests[index]]), run=True)
            if len(parts[item]) == len(prepared.items[item]):
                found = parts.pop(item)
                scored[item] = [found[number] for number in range(len(found))]
                if store:
                    store.add(item, scored[item])
    return scored


def _portions(prepared: Prepared, items: Sequence[int]) -> Iterator[list[int]]:
    """Items of like length, at most PORTION requests (or one item).

    The options of an item differ in length, so they are not run together, and an item is kept when it is complete: a
    run that is stopped must not have all items half done.
    """
    order = sorted(items, key=lambda item: -max(len(request.ids) for request in prepared.items[item]))
    each = max(1, PORTION // max((len(prepared.items[item]) for item in order), default=1))
    for start in range(0, len(order), each):
        yield order[start : start + each]


def _result(
    model: GPT, task: Task, prepared: Prepared, scored: Mapping[int, list[Scores]], sha: str,
    speed: tuple[float, float | None],
) -> TaskResult:  # fmt: skip
    of = len(prepared.items)
    notes = list(prepared.notes)
    if len(scored) < of:
        notes.append(f"{len(scored):,} of {of:,} items, evenly spread: an estimate")
    dtype = str(model.tok_emb.weight.dtype).removeprefix("torch.")
    about = {"dtype": dtype, "model_sha256": sha, "loadstone": __version__, "torch": torch.__version__}
    return TaskResult(
        task.name, task.title, prepared.metrics(scored), len(scored), of,
        sum(len(scores.logprobs) for each in scored.values() for scores in each),
        {**prepared.protocol, **about}, notes, prepared.groups(scored), anchors_for(model.config, task.name), *speed,
    )  # fmt: skip


def _spread(n: int, limit: int | None) -> list[int]:
    """So many of n, evenly spread; all without a limit."""
    return list(range(n)) if limit is None or limit >= n else [number * n // limit for number in range(limit)]


def _tokens(item: Sequence[Request]) -> int:
    return sum(len(request.ids) - 1 for request in item)
