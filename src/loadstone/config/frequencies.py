"""How fast rotary embedding turns each pair of elements: numpy, for every engine."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from .base import Rope

if TYPE_CHECKING:
    from numpy.typing import NDArray


def frequencies_of(rope: Rope, dims: int) -> tuple[NDArray[np.float32], float]:
    """Radians per position for each of the R/2 turned pairs (of R = `dims` elements), and the factor on cos and sin.

    Scalings: linear (Chen et al. 2023, arXiv:2306.15595), llama3 (Llama 3.1's `use_scaled_rope`), yarn (Peng et al.
    2023, arXiv:2309.00071), factors (GGUF's rope_freqs.weight). Values as transformers and llama.cpp compute them.
    """
    shares = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    frequencies: NDArray[np.float32] = 1 / np.power(np.float32(rope.theta), shares)  # [R/2]
    if rope.scaling in ("linear", "factors"):
        divisors: NDArray[np.float32] = np.array(rope.factors if rope.scaling == "factors" else rope.factor, np.float32)
        return np.true_divide(frequencies, divisors), 1.0
    if rope.scaling == "llama3":
        turns = rope.original_context * frequencies / np.float32(2 * math.pi)  # full turns over the original context
        low, high = rope.low_freq_factor, rope.high_freq_factor
        return _blend(frequencies, (turns - np.float32(low)) / np.float32(high - low), rope.factor), 1.0
    if rope.scaling == "yarn":
        low, high = (
            dims * math.log(rope.original_context / (beta * 2 * math.pi)) / (2 * math.log(rope.theta))
            for beta in (rope.beta_fast, rope.beta_slow)
        )
        low, high = max(math.floor(low), 0), min(math.ceil(high), dims - 1)
        slow = (np.arange(dims // 2, dtype=np.float32) - np.float32(low)) / np.float32(max(high - low, 0.001))
        attention = rope.attention_factor or (0.1 * math.log(rope.factor) + 1 if rope.factor > 1 else 1.0)
        return _blend(frequencies, 1 - slow.clip(0, 1), rope.factor), attention
    return frequencies, 1.0


def _blend(frequencies: NDArray[np.float32], keep: NDArray[np.float32], factor: float) -> NDArray[np.float32]:
    """As it is where `keep` is 1, divided by the factor where it is 0."""
    keep = keep.clip(0, 1)
    return frequencies * (keep + (1 - keep) / np.float32(factor))
