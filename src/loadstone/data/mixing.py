"""Random numbers as pure functions of a seed and an index: a hash, and a permutation that needs no memory.

Why not numpy's: `Generator.permutation` and `.integers` may give other numbers in the next version of numpy (NEP 19),
and a run that is resumed there would see other batches; and a permutation of a billion rows takes 8 GB and a minute.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15


def mix(words: Words, key: int) -> Words:
    """64 well-mixed bits for each word: the finalizer of SplitMix64 (Steele et al. 2014)."""
    x: Words = words + np.uint64(key * _GOLDEN % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key_of(*parts: int | str) -> int:
    """64 bits that depend on all parts, negative and large numbers too."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8], "little")


class Permutation:
    """A permutation of 0..size-1, evaluated where it is asked for.

    An alternating Feistel network over Z_a x Z_b with a*b just above `size`: each half moves by a hash of the other, so
    every round can be undone; the few results beyond `size` go through it again (cycle walking).
    """

    def __init__(self, size: int, key: int) -> None:
        self.size = size
        self._a = math.isqrt(max(size - 1, 0)) + 1
        self._b = -(-size // self._a) or 1
        self._keys = [key_of(key, number) for number in range(2 * _ROUNDS)]

    def __call__(self, start: int, stop: int) -> NDArray[np.int64]:
        """Where the indices from `start` to below `stop` go: [stop - start] int64."""
        out = self._once(np.arange(start, stop, dtype=np.uint64))
        while (beyond := out >= self.size).any():
            out[beyond] = self._once(out[beyond])
        return out.astype(np.int64)

    def _once(self, words: Words) -> Words:
        a, b = np.uint64(self._a), np.uint64(self._b)
        left, right = words // b, words % b
        for first, second in zip(self._keys[::2], self._keys[1::2], strict=True):
            left = (left + mix(right, first) % a) % a
            right = (right + mix(left, second) % b) % b
        return left * b + right
