"""Perplexity of one text before and after a change to a model, token by token, so that the difference has an interval.

Both are scored on the same tokens by `evaluate`. What the model wrote itself is a text as well: the loss on it rises by
exactly the divergence of the changed model from the old one, KL(old || new), in the mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import LoadstoneError
from ..evaluate.intervals import interval_of_mean
from ..evaluate.perplexity import blocks
from ..evaluate.run import settings_for
from ..evaluate.scoring import Request, score
from ..evaluate.tasks import task_named
from ..evaluate.tasks.text import TEXTS, TextTask, file_task
from ..model import GPT
from ..tokenizer import Tokenizer
from ..train.losses import perplexity
from .rows import Progress, own_rows

OWN_ROWS, OWN_LENGTH, OWN_SEED = 32, 256, 1  # another seed than the calibration's


@dataclass(frozen=True)
class Examination:
    """What is scored, and how."""

    requests: Sequence[Request]
    protocol: Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """Perplexity per token before and after.

    Attributes:
        low, high: 95% interval of the relative change, over blocks of neighbouring tokens; None for too few.
    """

    before: float
    after: float
    tokens: int
    low: float | None
    high: float | None
    protocol: Mapping[str, Any] = field(default_factory=dict)

    @property
    def relative(self) -> float:
        return self.after / self.before - 1

    def as_dict(self) -> dict[str, Any]:
        return {
            "perplexity_before": self.before, "perplexity_after": self.after, "relative_change": self.relative,
            "relative_change_95": [self.low, self.high], "tokens": self.tokens, "protocol": dict(self.protocol),
        }  # fmt: skip

    def __str__(self) -> str:
        ends = "" if self.low is None else f", 95% from {self.low:+.2%} to {self.high:+.2%}"
        return f"{self.before:,.4g} -> {self.after:,.4g} per token ({self.relative:+.2%}{ends})"


def examination(
    model: GPT,
    tokenizer: Tokenizer | None,
    *,
    text: Path | None = None,
    task: str | None = None,
    context: int | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Examination:
    """The requests of a text file, of a task that is a text (`wikitext2`), or of the model's own text.

    Args:
        context: tokens that the model may read; the model's, at most 2,048, if not given.
        limit: so many windows, evenly spread.
    """
    if (text is None and task is None) or tokenizer is None:
        length = min(OWN_LENGTH, model.config.context_length)
        rows = own_rows(model, tokenizer, OWN_ROWS, length, seed=OWN_SEED, progress=progress)
        requests = [Request(row, len(row) - 1) for row in rows.ids.numpy()]
        return Examination(requests, {"text": rows.source, "rows": len(requests), "tokens_each": length})
    chosen = file_task(text) if text else task_named(task or "")
    if not isinstance(chosen, TextTask):
        known = ", ".join(each.name for each in TEXTS)
        raise LoadstoneError(f"--task {task}: perplexity is that of a text; texts: {known}. Or --text FILE.")
    prepared = chosen.prepare(None, tokenizer, settings_for(model, context, None))
    items = prepared.items
    if limit is not None and limit < len(items):
        items = [items[number * len(items) // limit] for number in range(limit)]
    windows = {"windows": len(items), "of": len(prepared.items)}
    return Examination([request for item in items for request in item], {**prepared.protocol, **windows})


def nats(model: GPT, what: Examination, progress: Progress | None = None) -> NDArray[np.float64]:
    """Of each scored token, in the text's order."""
    found: dict[int, NDArray[np.float64]] = {}
    for index, scores in score(model, what.requests):
        found[index] = -scores.logprobs.astype(np.float64)
        if progress:
            progress(len(found), len(what.requests))
    return np.concatenate([found[index] for index in range(len(found))])


def change(before: NDArray[np.float64], after: NDArray[np.float64], what: Examination) -> Change:
    _, low, high = interval_of_mean(blocks(after - before))
    low, high = (None if end is None else float(np.expm1(end)) for end in (low, high))
    return Change(perplexity(before.mean()), perplexity(after.mean()), len(before), low, high, what.protocol)
