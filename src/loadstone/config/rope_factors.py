"""Llama 3's rotary scaling as GGUF's `rope_freqs.weight` (one divisor per frequency), and back; without torch."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from .base import GPTConfig, Rope

# Every Llama 3.1, 3.2 and 3.3 has these; only the factor differs (8, and 32 for the small 3.2 models).
PUBLISHED = Rope(scaling="llama3", original_context=8192, low_freq_factor=1.0, high_freq_factor=4.0)


def rope_factors(rope: Rope, dims: int) -> NDArray[np.float32] | None:
    """The `dims / 2` divisors of the frequencies as llama.cpp's converter writes them; None if there is no need.

    They can be below 1 only where the file that the rope came from said so.
    """
    if rope.scaling == "factors":
        return np.array(rope.factors, np.float32)
    if rope.scaling != "llama3":
        return None
    frequencies = 1.0 / rope.theta ** (np.arange(0, dims, 2) / dims)
    turns = rope.original_context * frequencies / (2 * math.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / (keep + (1 - keep) / rope.factor)).astype(np.float32)


def with_named_scaling(config: GPTConfig) -> GPTConfig:
    """Divisors that are Llama 3's are called so again: other dialects have a word for that and none for divisors."""
    rope, dims = config.rope, config.head_dim
    if rope is None or rope.scaling != "factors" or rope.dims not in (0, dims):
        return config
    # The last frequency turns slowest, so it is scaled in full; whether the guess is right shows in all the others.
    named = replace(PUBLISHED, theta=rope.theta, factor=float(np.float32(rope.factors[-1])))
    made = rope_factors(named, dims)
    same = made is not None and np.allclose(made, rope.factors, rtol=1e-5, atol=0)
    return replace(config, rope=named) if same else config
