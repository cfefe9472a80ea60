"""How far apart two arrays of one shape are, as numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.arrays import row_blocks
from ..checkpoint.base import DTYPES, Array

Reals = NDArray[np.float64]

# Two tensors are close if no difference exceeds this part of their largest value, by the coarser of the two types: for
# 16 bits a few times what rounding does, for 32 and 64 what computing in another order does.
_TOLERANCE: Mapping[str, float] = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3, "bfloat16": 2**-7}
_FP8 = 2**-3
# ggml's blocks by the bits of one element: a step of the scale, of which rounding may take half, and some slack.
_BLOCK_BITS: Mapping[str, float] = {"8": 2**-6, "6": 2**-4, "5": 2**-3, "4": 2**-2}
_BLOCK_OTHER = 0.5


def tolerance(*dtypes: str) -> float:
    """What counts as close between stored types (`float32`, `Q8_0`), relative to the largest value."""
    return max(map(_tolerance_of, dtypes))


def _tolerance_of(dtype: str) -> float:
    if dtype in DTYPES:
        return _TOLERANCE.get(dtype, _FP8 if dtype.startswith("float8") else 0.0)
    bits = next((char for char in dtype if char.isdigit()), "")
    return _BLOCK_BITS.get(bits, _BLOCK_OTHER)


@dataclass(frozen=True)
class Numbers:
    """The difference of two arrays. NaNs in the same place are equal.

    Attributes:
        elements, differing: how many there are, and how many have other values.
        unmatched: NaN or infinite on one side only; left out of all that follows.
        max_abs, rms_difference: of a - b.
        rms_a, rms_b, largest: of the two, and the largest absolute value in either.
        cosine: of the angle between them; None if one is all zeros.
        max_ulps: floating-point numbers that lie between the two values that are farthest apart so counted; None if
            the types differ.
    """

    elements: int
    differing: int
    unmatched: int
    max_abs: float
    rms_difference: float
    rms_a: float
    rms_b: float
    largest: float
    cosine: float | None
    max_ulps: int | None

    def within(self, relative: float) -> bool:
        """Whether every difference is at most this part of the largest value."""
        return not self.unmatched and self.max_abs <= relative * self.largest

    @property
    def relative(self) -> float:
        """RMS of the difference in units of the larger RMS; 1.4 is what unrelated tensors have."""
        scale = max(self.rms_a, self.rms_b)
        return self.rms_difference / scale if scale else 0.0


def measure(a: Array, b: Array) -> Numbers:
    """The numbers of two arrays of one shape, summed in float64."""
    sums = np.zeros(4)  # of aa, bb, ab, dd
    differing = unmatched = ulps = 0
    max_abs = largest = 0.0
    countable = a.dtype == b.dtype and a.dtype.name in _TOLERANCE
    with np.errstate(all="ignore"):
        for x, y in row_blocks(a, b):
            p, q = reals(x), reals(y)
            if not np.isfinite(p @ p + q @ q):
                unmatched += _set_odd_aside(p, q)
            d = p - q
            sums += [p @ p, q @ q, p @ q, d @ d]
            differing += int(np.count_nonzero(d != 0))
            max_abs = max(max_abs, _largest(d))
            largest = max(largest, _largest(p), _largest(q))
            ulps = max(ulps, _ulps(x, y)) if countable else 0
        aa, bb, ab, dd = map(float, sums)
        cosine = ab / math.sqrt(aa) / math.sqrt(bb) if aa and bb else None
        rms_d, rms_a, rms_b = (math.sqrt(total / max(a.size, 1)) for total in (dd, aa, bb))
    return Numbers(
        a.size,
        differing + unmatched,
        unmatched,
        max_abs,
        rms_d,
        rms_a,
        rms_b,
        largest,
        cosine,
        ulps if countable else None,
    )


def _largest(values: Reals) -> float:
    return float(max(values.max(), -values.min()))


def _set_odd_aside(p: Reals, q: Reals) -> int:
    """Zero what is not finite on either side; how many of these were not the same on both."""
    odd = ~(np.isfinite(p) & np.isfinite(q) & np.isfinite(p - q))
    same = (p == q) | (np.isnan(p) & np.isnan(q))
    p[odd] = q[odd] = 0
    return int(np.count_nonzero(odd & ~same))


def near(a: Array, b: Array, relative: float) -> bool:
    """Whether no difference exceeds this part of the largest value, of each piece. Done at the first that does."""
    if a.shape != b.shape:
        return False
    with np.errstate(all="ignore"):
        for x, y in row_blocks(a, b):
            p, q = reals(x), reals(y)
            if not np.isfinite(p @ p + q @ q) and _set_odd_aside(p, q):
                return False
            if _largest(p - q) > relative * max(_largest(p), _largest(q)):
                return False
    return True


def reals(array: Array) -> Reals:
    """The values as a fresh vector of float64, a complex number as two."""
    if array.dtype.kind == "c":
        return np.ascontiguousarray(array).reshape(-1).view(array.real.dtype).astype(np.float64)
    return array.astype(np.float64).reshape(-1)


def _ulps(x: Array, y: Array) -> int:
    """Floats as integers in the order of their values: then the distance is a subtraction."""
    kind = np.dtype(f"u{x.dtype.itemsize}")
    sign = kind.type(1 << (8 * kind.itemsize - 1))
    ordered = [np.where(bits & sign, ~bits, bits | sign) for bits in (x.view(kind), y.view(kind))]
    finite = np.isfinite(x) & np.isfinite(y)
    return int(np.where(finite, np.maximum(*ordered) - np.minimum(*ordered), kind.type(0)).max())
