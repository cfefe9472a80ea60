"""Arrays of any size compared and walked some rows at a time, so that nothing of a tensor's own size is made."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .base import Array

CHUNK = 1 << 16  # elements: the pieces and what is computed from them stay in cache


def row_blocks(*arrays: Array, by_rows: bool = False) -> Iterator[tuple[Array, ...]]:
    """Arrays of one shape in step, in pieces of whole rows.

    Where all of them are transposed views (GPT-2's matrices in HuggingFace's file), the pieces are rows of what lies in
    memory, which is several times faster; `by_rows` insists on the rows of the arrays as given.
    """
    if not by_rows and all(array.ndim == 2 and array.T.flags.c_contiguous for array in arrays):
        arrays = tuple(array.T for array in arrays)
    flat = [np.atleast_1d(array) for array in arrays]
    if not flat[0].size:
        return
    step = max(1, CHUNK // flat[0][0].size)
    for i in range(0, len(flat[0]), step):
        yield tuple(array[i : i + step] for array in flat)


def same_bits(a: Array, b: Array) -> bool:
    """Equal to the last bit, shape and type included; a NaN equals the same NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return all(np.array_equal(_bits(x), _bits(y)) for x, y in row_blocks(a, b))


def _bits(array: Array) -> Array:
    if array.dtype.itemsize > 8:  # complex128, for which there is no integer of that size
        return np.ascontiguousarray(array).view(np.uint64)
    return array.view(f"u{array.dtype.itemsize}")
