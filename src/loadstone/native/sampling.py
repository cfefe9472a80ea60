"""`loadstone.sampling` in numpy: the same settings, order and meaning, for engines that run without torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import LoadstoneError
from ..sampling import NOT_FINITE, RANGE, Sampling

Floats = NDArray[np.float32]


def choose(
    logits_BV: NDArray[Any],
    histories: Sequence[Sequence[int]],
    sampling: Sampling,
    generators: Sequence[np.random.Generator],
) -> list[int]:
    """One token id per row; see `loadstone.sampling.choose`. The generators are numpy's, so seeds draw other tokens."""
    scores = logits_BV.astype(np.float32, copy=False)
    if not np.isfinite(scores.max(axis=-1)).all():
        raise LoadstoneError(NOT_FINITE)
    if sampling.temperature < RANGE.tiny and sampling.repetition_penalty == 1.0:
        return [int(token) for token in scores.argmax(axis=-1)]
    probabilities_BV = probabilities(scores, histories, sampling)
    pairs = zip(probabilities_BV, generators, strict=True)
    return [_draw(row, generator) for row, generator in pairs]


def probabilities(scores_BV: Floats, histories: Sequence[Sequence[int]], sampling: Sampling) -> Floats:
    """What each token is drawn with; at temperature 0 all of it lies on the likeliest."""
    if sampling.repetition_penalty != 1.0:
        scores_BV = _penalise(scores_BV, histories, sampling.repetition_penalty).clip(max=RANGE.max)
    highest = scores_BV.max(axis=-1, keepdims=True)
    if sampling.temperature < RANGE.tiny:  # what float32 takes for 0
        chosen = np.zeros_like(scores_BV)
        np.put_along_axis(chosen, scores_BV.argmax(axis=-1)[:, None], 1, axis=-1)
        return chosen
    # Below the highest score, so that a temperature near 0 makes -inf and not inf.
    with np.errstate(over="ignore"):
        scaled = (scores_BV - highest) / np.float32(sampling.temperature)
    return _softmax(_keep(scaled, sampling))


def _draw(probabilities_V: Floats, generator: np.random.Generator) -> int:
    sums = probabilities_V.cumsum(dtype=np.float64)
    token = int(np.searchsorted(sums, generator.random() * sums[-1], side="right"))
    return min(token, int(np.flatnonzero(probabilities_V)[-1]))


def _penalise(scores_BV: Floats, histories: Sequence[Sequence[int]], penalty: float) -> Floats:
    scores_BV = scores_BV.copy()
    for row, history in zip(scores_BV, histories, strict=True):
        seen = np.unique(np.asarray(history, np.int64))
        with np.errstate(over="ignore", divide="ignore"):
            row[seen] = np.where(row[seen] > 0, row[seen] / np.float32(penalty), row[seen] * np.float32(penalty))
    return scores_BV


def _keep(scores_BV: Floats, sampling: Sampling) -> Floats:
    """Scores with everything that top-k, top-p or min-p leaves out at -inf; the likeliest token always stays."""
    size = scores_BV.shape[-1]
    if sampling.top_k is not None and sampling.top_k < size:
        lowest = np.partition(scores_BV, size - sampling.top_k, axis=-1)[:, size - sampling.top_k, None]
        scores_BV = np.where(scores_BV < lowest, -np.inf, scores_BV)
    if sampling.top_p is not None and sampling.top_p < 1:
        order = np.argsort(-scores_BV, axis=-1, kind="stable")
        ranked = _softmax(np.take_along_axis(scores_BV, order, axis=-1))
        out = np.empty(scores_BV.shape, bool)
        beyond = ranked.cumsum(axis=-1) - ranked >= sampling.top_p
        beyond[:, 0] = False  # of a p that float32 takes for 0 too
        np.put_along_axis(out, order, beyond, axis=-1)
        scores_BV = np.where(out, -np.inf, scores_BV)
    if sampling.min_p:
        likely = _softmax(scores_BV)
        least = np.float32(sampling.min_p) * likely.max(axis=-1, keepdims=True)
        scores_BV = np.where(likely < least, -np.inf, scores_BV)
    return scores_BV.astype(np.float32, copy=False)


def _softmax(scores_BV: Floats) -> Floats:
    weights = np.exp(scores_BV - scores_BV.max(axis=-1, keepdims=True))
    found: Floats = weights / weights.sum(axis=-1, keepdims=True)
    return found
