"""From the scores of the next token to one token: greedy, temperature, top-k, top-p, min-p, repetition penalty.

The order is transformers': penalty, temperature, top-k, top-p, min-p; each filter sees what the one before left over.
*Others* draw with their framework's generator, which differs from device to device; here it is numpy's, so that a seed
means the same on every engine and device, and filters work on the tokens that are left and not on the vocabulary.

Shapes: B rows, V vocabulary, K tokens that are left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import LoadstoneError

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

NOT_FINITE = (
    "the model gives no finite score for the next token: its weights or its config are broken. `loadstone verify` "
    "tells which."
)
RANGE = np.finfo(np.float32)


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token. The default is greedy. Raises LoadstoneError for values without a meaning."""

    temperature: float = 0.0  # 0 takes the likeliest token; above 1 flattens, below 1 sharpens
    top_k: int | None = None  # keep the k likeliest
    top_p: float | None = (
        None  # keep the fewest whose probabilities add up to p (Holtzman et al. 2019, arXiv:1904.09751)
    )
    min_p: float | None = None  # keep those at least p times as likely as the likeliest (arXiv:2407.01082)
    repetition_penalty: float = 1.0  # divides positive and multiplies negative scores of tokens seen (arXiv:1909.05858)

    def __post_init__(self) -> None:
        for name, value, good, range_ in (
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "1 or more"),
            ("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p, self.min_p is None or 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < math.inf, "above 0"),
        ):
            if not good:
                raise LoadstoneError(f"{name} must be {range_}, found {value}.")


def choose(
    logits_BV: Any, histories: Sequence[Sequence[int]], sampling: Sampling, generators: Sequence[np.random.Generator]
) -> list[int]:
    """One token id per row.

    Args:
        logits_BV: scores, numpy's or torch's, in any floating type; computed on in float32.
        histories: tokens so far of each row, for the repetition penalty.
        sampling: the settings.
        generators: one source of randomness per row, so that a row draws the same in a batch as alone.

    Raises LoadstoneError for a row without a finite highest score.
    """
    scores_BV = as_floats(logits_BV)
    if not np.isfinite(scores_BV.max(axis=-1)).all():
        raise LoadstoneError(NOT_FINITE)
    rows = zip(scores_BV, histories, generators, strict=True)
    return [_draw(*candidates(scores_V, history, sampling), generator) for scores_V, history, generator in rows]


def as_floats(logits: Any) -> Floats:
    """Scores as numpy's float32, in the same memory where they are that already."""
    if not isinstance(logits, np.ndarray):
        logits = logits.float().numpy(force=True)
    found: Floats = logits.astype(np.float32, copy=False)
    return found


def candidates(scores_V: Floats, history: Sequence[int], sampling: Sampling) -> tuple[Ids, Floats]:
    """The tokens that may be drawn, in the order of their ids, and with which probability: [K], [K]."""
    if sampling.repetition_penalty != 1.0:
        # A penalty near 0 makes scores infinite, and their differences no numbers.
        scores_V = penalise(scores_V, history, sampling.repetition_penalty).clip(max=RANGE.max)
    if sampling.temperature < RANGE.tiny:  # what float32 takes for 0
        return np.array([scores_V.argmax()]), np.ones(1, np.float32)
    ids, kept = _top_k(scores_V, sampling.top_k)
    # Below the highest score, so that a temperature near 0 makes -inf and not inf.
    with np.errstate(over="ignore"):
        weights = np.exp((kept - kept.max()) / np.float32(sampling.temperature))
    likely = weights / weights.sum()
    if sampling.top_p is not None and sampling.top_p < 1:
        ids, likely = _left(ids, likely, _top_p(likely, sampling.top_p))
    if sampling.min_p:
        ids, likely = _left(ids, likely, likely >= np.float32(sampling.min_p) * likely.max())
    return ids, likely


def penalise(scores_V: Floats, history: Sequence[int], penalty: float) -> Floats:
    """Make tokens that were there before less likely (more, if penalty < 1)."""
    scores_V, seen = scores_V.copy(), np.unique(np.asarray(history, np.int64))
    with np.errstate(over="ignore", divide="ignore"):
        old = scores_V[seen]
        scores_V[seen] = np.where(old > 0, old / np.float32(penalty), old * np.float32(penalty))
    return scores_V


def _top_k(scores_V: Floats, k: int | None) -> tuple[Ids, Floats]:
    """The k likeliest, and what is as likely as the last of them."""
    size = len(scores_V)
    if k is None or k >= size:
        return np.arange(size), scores_V
    ids = np.flatnonzero(scores_V >= np.partition(scores_V, size - k)[size - k])
    return ids, scores_V[ids]


def _top_p(likely_K: Floats, p: float) -> NDArray[np.bool_]:
    """The fewest whose probabilities add up to p; always one."""
    order = np.argsort(-likely_K, kind="stable")
    ranked = likely_K[order]
    before = ranked.cumsum() - ranked  # mass of the likelier ones
    stays = np.empty(len(order), bool)
    stays[order] = before < p
    stays[order[0]] = True  # of a p that float32 takes for 0 too
    return stays


def _left(ids_K: Ids, likely_K: Floats, stays_K: NDArray[np.bool_]) -> tuple[Ids, Floats]:
    likely = likely_K[stays_K]
    return ids_K[stays_K], likely / likely.sum()


def _draw(ids_K: Ids, likely_K: Floats, generator: np.random.Generator) -> int:
    if len(ids_K) == 1:
        return int(ids_K[0])
    sums = likely_K.cumsum(dtype=np.float64)
    place = np.searchsorted(sums, generator.random() * sums[-1], side="right")
    return int(ids_K[min(place, np.flatnonzero(likely_K)[-1])])
