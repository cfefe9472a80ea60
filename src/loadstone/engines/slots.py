"""A key/value cache in numpy, for engines that are not torch: the same slots and lengths as the model's own `KVCache`.

Shapes: B rows, K key/value heads, S slots, D head_dim, R rows of a call, T its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import GPTConfig

Floats = NDArray[np.float32]


class SlotCache:
    """Keys and values of every layer; a row's token at position p lies in slot p. See `protocol.Cache`.

    Attributes:
        kv: [layers, 2, B, K, S, D]; grows in doublings up to `size`.
    """

    def __init__(
        self, config: GPTConfig, batch: int = 1, length: int | None = None, *, allocate: int | None = None
    ) -> None:
        self.size = config.context_length if length is None else min(length, config.context_length)
        slots = self.size if allocate is None else min(allocate, self.size)
        # Zeros, not empty: a hidden slot has weight 0, and 0 * NaN is NaN.
        self.kv: Floats = np.zeros(
            (config.n_layers, 2, batch, config.n_kv_heads, slots, config.head_dim), dtype=np.float32
        )
        self.lengths = [0] * batch

    def reserve(self, end: int) -> None:
        """Make room up to slot `end`. Raises IndexError beyond `size`."""
        if end > self.size:
            raise IndexError(f"position {end - 1} is beyond the limit of {self.size} tokens")
        slots = self.kv.shape[4]
        if end > slots:
            grown = np.zeros((*self.kv.shape[:4], min(max(end, 2 * slots), self.size), self.kv.shape[5]), np.float32)
            grown[:, :, :, :, :slots] = self.kv
            self.kv = grown

    def held(self, rows: Sequence[int]) -> Floats:
        """What these rows hold: the cache itself if it is all of them, one unused slot if they are empty, else a copy.

        One and not none: max 26.6 computes nonsense where an operand of its matrix product is empty.
        """
        if not any(self.lengths[row] for row in rows):
            return np.zeros((*self.kv.shape[:2], len(rows), self.kv.shape[3], 1, self.kv.shape[5]), np.float32)
        return (
            self.kv if list(rows) == list(range(len(self.lengths))) else np.ascontiguousarray(self.kv[:, :, list(rows)])
        )

    def append(self, rows: Sequence[int], new: NDArray[Any], counts: Sequence[int]) -> None:
        """Store a call's keys and values [layers, 2, R, K, T, D]; of row r the first `counts[r]` tokens are real."""
        for place, (row, count) in enumerate(zip(rows, counts, strict=True)):
            start = self.lengths[row]
            self.kv[:, :, row, :, start : start + count] = new[:, :, place, :, :count]
            self.lengths[row] = start + count
