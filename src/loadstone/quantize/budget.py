"""Mixed precision: which tensor gets which type, under a budget of bytes or of loss.

Every tensor has a few choices (bytes, estimated loss). What is best for some budget lies on the convex hull of these,
so the steps along all hulls are taken in the order of what they gain per byte: the optimum of the problem in which a
tensor could be split, and at most one step away from that of the real one.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

from ..errors import LoadstoneError


class Choice(NamedTuple):
    """One way to store a tensor."""

    type: str
    nbytes: int
    loss: float


class _Step(NamedTuple):
    gain: float  # less loss per byte more
    unit: str
    before: Choice
    after: Choice


def choose(
    units: Mapping[str, list[Choice]],
    fixed: Choice | None = None,
    *,
    most_bytes: int | None = None,
    most_loss: float | None = None,
) -> dict[str, str]:
    """Unit -> type, beginning with the smallest and adding where it helps most.

    Args:
        fixed: bytes and loss of what there is no choice about; both count.
        most_bytes: of all together; None: any.
        most_loss: stop as soon as the estimated loss of all together is not above; None: go on.

    Raises LoadstoneError if even the smallest types, or the least loss, break the budget.
    """
    chosen = {unit: min(choices, key=lambda choice: choice.nbytes) for unit, choices in units.items()}
    counted = [*chosen.values(), *([fixed] if fixed else [])]
    nbytes, loss = (sum(getattr(choice, what) for choice in counted) for what in ("nbytes", "loss"))
    if most_bytes is not None and nbytes > most_bytes:
        raise LoadstoneError(
            f"--budget-size: {most_bytes:,} bytes are too few: with the smallest type everywhere the matrices take "
            f"{nbytes:,}, {fixed.nbytes if fixed else 0:,} of these the embeddings. Allow more, or a smaller type for "
            "the embeddings (--embedding)."
        )
    for step in sorted(_steps(units), reverse=True):
        if most_loss is not None and loss <= most_loss:
            break
        more = step.after.nbytes - step.before.nbytes
        # A step that no longer fits leaves room for smaller ones; those behind it of the same unit begin elsewhere.
        if chosen[step.unit] is not step.before or (most_bytes is not None and nbytes + more > most_bytes):
            continue
        chosen[step.unit] = step.after
        nbytes, loss = nbytes + more, loss + step.after.loss - step.before.loss
    if most_loss is not None and loss > most_loss:
        raise LoadstoneError(
            f"--budget-loss: an estimated {loss:.2g} nats per token are lost even in the largest type, and "
            f"{most_loss:g} are allowed. Allow more."
        )
    return {unit: choice.type for unit, choice in chosen.items()}


def _steps(units: Mapping[str, list[Choice]]) -> list[_Step]:
    found = []
    for unit, choices in units.items():
        hull = _hull(choices)
        for before, after in pairwise(hull):
            gain = (before.loss - after.loss) / (after.nbytes - before.nbytes)
            found.append(_Step(gain, unit, before, after))
    return found


def _hull(choices: list[Choice]) -> list[Choice]:
    """The choices from the smallest on, each step gaining less per byte than the one before it."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.nbytes, choice.loss)):
        if hull and choice.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(first: Choice, second: Choice) -> float:
    """Negative: the steeper, the more is gained per byte."""
    return (second.loss - first.loss) / (second.nbytes - first.nbytes)
