"""Element types: how far rounding moves weights and logits, and to which type a tensor was once rounded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint.base import DTYPES
from ..weightmap import Identity


@dataclass(frozen=True)
class Precision:
    """What one element type does. Measured figures and how they were got are in docs/diagnose.md.

    Attributes:
        rounding: relative error of a weight (root mean square) when it is rounded to the type.
        usual: differences of logits between two right implementations, as a part of the logits' scale.
        allowed: above this part of the scale, two models are called different.
    """

    rounding: float
    usual: tuple[float, float]
    allowed: float


PRECISIONS: Mapping[str, Precision] = {
    "float64": Precision(0.0, (1e-7, 1e-5), 1e-4),  # computed in float32 like the others
    "float32": Precision(0.0, (1e-7, 1e-5), 1e-4),
    "float16": Precision(2.1e-4, (5e-4, 6e-3), 0.02),
    "bfloat16": Precision(1.7e-3, (5e-3, 6e-2), 0.15),
    "float8_e4m3fn": Precision(0.027, (0.1, 0.5), 1.0),
    "float8_e5m2": Precision(0.053, (0.2, 0.7), 1.0),
}
_BITS = re.compile(r"I?Q(\d)|MXFP(\d)")


def block_bits(dtype: str) -> int:
    """Bits of a weight in one of GGUF's block types; 0 for others."""
    found = _BITS.match(dtype)
    return int(found[1] or found[2]) if found else 0


def is_known(dtype: object) -> bool:
    """Whether it is the name of an element type at all."""
    return isinstance(dtype, str) and (dtype in DTYPES or re.fullmatch(r"[A-Z]{1,5}\d\w*", dtype) is not None)


def precision(dtype: str) -> Precision:
    """Of an element type as a header names it, GGUF's block types included: Q4_0 has 4 bits and a scale per 32."""
    if dtype in PRECISIONS:
        return PRECISIONS[dtype]
    bits = block_bits(dtype) or 4
    rounding = 0.6 / 2 ** (bits - 1)  # the largest of 32 normal numbers is 2.1 sigma; uniform rounding errors
    return Precision(rounding, (rounding, 8 * rounding), min(1.0, 30 * rounding))


def loosest(dtypes: Iterable[str]) -> str:
    """The type that rounds most, which decides what may be expected of a comparison."""
    return max(dtypes, key=lambda dtype: (precision(dtype).allowed, precision(dtype).rounding))


def stored_type(identity: Identity) -> str:
    """The loosest element type among a source's weights."""
    return loosest(step.dtype for step in identity.plan.steps)


def _as_type(dtype: torch.dtype) -> Callable[[Tensor], bool]:
    return lambda weight: torch.equal(weight, weight.to(dtype).float())


def _as_blocks(levels: int) -> Callable[[Tensor], bool]:
    """Blocks of 32 along a row, each a scale times whole numbers up to `levels` (GGUF's Q8_0 and Q4_0)."""

    def holds(weight: Tensor) -> bool:
        if weight.dim() != 2 or weight.shape[1] % 32:
            return False
        blocks = weight.reshape(-1, 32)
        steps = blocks / (blocks.abs().amax(1, keepdim=True).clamp_min(1e-30) / levels)
        return bool((steps - steps.round()).abs().max() < 2e-3 * levels / 8)

    return holds


# From coarse to fine, for what fits a coarse type may fit a fine one too.
ROUNDED_TO: Mapping[str, Callable[[Tensor], bool]] = {
    "Q4_0": _as_blocks(8),
    "float8_e5m2": _as_type(torch.float8_e5m2),
    "float8_e4m3fn": _as_type(torch.float8_e4m3fn),
    "Q8_0": _as_blocks(127),
    "bfloat16": _as_type(torch.bfloat16),
    "float16": _as_type(torch.float16),
}


def rounded_to(weight: Tensor) -> str | None:
    """The coarsest type in which every value of a float32 tensor can be written; None if only float32 can."""
    if not weight.any() or bool((weight == weight.flatten()[0]).all()):
        return None  # zeros and ones fit everything and show nothing
    return next((name for name, fits in ROUNDED_TO.items() if fits(weight)), None)
