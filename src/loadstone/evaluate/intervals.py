"""`Metric`: a figure with its 95% interval, and the two ways in which intervals are computed; both deterministic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Z = 1.959964  # of a normal distribution, 95%


Interval = tuple[float, float | None, float | None]  # the value, and the ends, where there are enough observations


class Metric(NamedTuple):
    """One figure.

    Attributes:
        value: None where nothing was counted.
        low, high: the ends of the 95% interval; None where there are too few observations.
        meaning: how it is computed.
    """

    name: str
    value: float | None
    low: float | None
    high: float | None
    meaning: str


def interval_of_mean(observations: tuple[NDArray[np.float64], NDArray[np.float64]]) -> Interval:
    """(mean, low, high) of sums/sizes: the ratio of totals, with its standard error over the observations.

    Args:
        observations: their sums and their sizes. Fewer than 5 give no interval.
    """
    sums, sizes = observations
    mean, n = float(sums.sum() / sizes.sum()), len(sums)
    if n < 5:
        return mean, None, None
    residuals = sums - mean * sizes
    error = math.sqrt(float((residuals**2).sum()) * n / (n - 1)) / float(sizes.sum())
    return mean, mean - Z * error, mean + Z * error


def accuracy(name: str, right: Sequence[bool], meaning: str) -> Metric:
    """The share that is right, with Wilson's interval, which holds near 0 and 1 and for few items, too."""
    n = len(right)
    if not n:
        return Metric(name, None, None, None, meaning)
    p = sum(right) / n
    middle = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return Metric(name, p, max(0.0, middle - half), min(1.0, middle + half), meaning)
