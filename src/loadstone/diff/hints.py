"""One cheap explanation in words of why two tensors differ, each tried on the whole of both before it is said.

A hypothesis that is wrong is refuted by the first piece that is compared, so trying them costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ..checkpoint.arrays import row_blocks
from ..checkpoint.base import DTYPES, Array
from ..config import GPTConfig
from ..weightmap.ops import RotaryHalves
from .values import Numbers, near, reals, tolerance

_FLOATS = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
# What the gguf package can quantise; the K types it only reads.
_BLOCKS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


@dataclass(frozen=True)
class Pair:
    """The two tensors `a` and `b` of one parameter, their stored types, and A's config if it was recognised."""

    name: str
    a: Array
    b: Array
    dtypes: tuple[str, str]
    config: GPTConfig | None = None

    @property
    def tolerance(self) -> float:
        return tolerance(*self.dtypes)


def rounding(pair: Pair) -> str:
    """The type to which one side was rounded exactly, in words; "" if there is none."""
    a, b = pair.a, pair.b
    if any(array.dtype.kind in "biuc" for array in (a, b)):
        return ""
    for kind in (*_FLOATS, *_BLOCKS):
        what = f"{kind} blocks" if kind in _BLOCKS else kind
        if _is_rounded(a, b, kind):
            return f"B is A rounded to {what}"
        if _is_rounded(b, a, kind):
            return f"A is B rounded to {what}"
    return ""


def _is_rounded(source: Array, rounded: Array, kind: str) -> bool:
    """Whether `rounded` holds exactly the values that `source` has after rounding to `kind`."""
    if kind in _BLOCKS:
        if source.ndim < 1 or source.shape[-1] % 32 or source.dtype != np.float32:
            return False
        apply: Callable[[Array], Array] = lambda x: _through_blocks(x, kind)  # noqa: E731
    else:
        apply = lambda x: x.astype(DTYPES[kind])  # noqa: E731
    with np.errstate(all="ignore"):
        pairs = row_blocks(source, rounded, by_rows=kind in _BLOCKS)
        return all(np.array_equal(reals(apply(x)), reals(y), equal_nan=True) for x, y in pairs)


def _through_blocks(rows: Array, kind: str) -> Array:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    qtype = GGMLQuantizationType[kind]
    decoded: Array = dequantize(quantize(np.ascontiguousarray(rows), qtype), qtype)
    return decoded


def explain(pair: Pair, numbers: Numbers) -> str:
    """What would make B out of A, in words; "" if nothing that is known does."""
    if numbers.unmatched:
        return f"NaN or infinite in one of the two only: {numbers.unmatched:,} of {numbers.elements:,} elements"
    for label, rms in (("A", numbers.rms_a), ("B", numbers.rms_b)):
        if not rms:
            return f"all zeros in {label}"
    if numbers.within(pair.tolerance):  # the caller asked for less; there is nothing to explain
        return ""
    if numbers.cosine is not None and 1 - abs(numbers.cosine) < pair.tolerance**2:
        factor = np.copysign(numbers.rms_b / numbers.rms_a, numbers.cosine)
        return f"B is A times {factor:.6g}"
    return next((words for words, x in _rearranged(pair) if near(x, pair.b, pair.tolerance)), "")


def explain_shapes(pair: Pair) -> str:
    """The same for two tensors of different shapes."""
    a, b, limit = pair.a, pair.b, pair.tolerance
    if a.ndim == 2 and a.shape == b.shape[::-1] and near(a.T, b, limit):
        return "B is A transposed"
    if not a.ndim or a.ndim != b.ndim or a.shape[1:] != b.shape[1:]:
        return ""
    rows = min(len(a), len(b))
    longer, more = ("A", a[rows:]) if len(a) > rows else ("B", b[rows:])
    if not rows or not near(a[:rows], b[:rows], limit):
        return ""
    zeros = ", all zeros" if not any(x.any() for (x,) in row_blocks(more)) else ""
    return f"the first {rows:,} rows are the same; {longer} has {len(more):,} more{zeros}"


def _rearranged(pair: Pair) -> Iterator[tuple[str, Array]]:
    """(words, what B is if they are true)."""
    a, config = pair.a, pair.config
    if a.ndim == 2 and a.shape[0] == a.shape[1]:
        yield "B is A transposed", a.T
    if config is None or config.rope is None:
        return
    for part, heads in ((".attn.q.", "n_heads"), (".attn.k.", "n_kv_heads")):
        if part in pair.name and len(a) == getattr(config, heads) * config.head_dim:
            op = RotaryHalves(heads)
            yield "B has the rows of A in rotary halves instead of pairs", op.forward([a], config)[0]
            yield "B has the rows of A in rotary pairs instead of halves", op.inverse([a], config)[0]
