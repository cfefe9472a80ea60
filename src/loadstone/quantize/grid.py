"""A scale for each block of 32 weights, and the codes nearest to them.

Shapes: M rows (outputs), K inputs, G = K/32 blocks of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .blocks import SIZE, BlockType, decode

# Scales that are tried, relative to the one at which the largest weight of a block just fits. Cutting off a lone large
# weight makes the others finer; above 1 nothing is gained but where float16 rounds the scale.
SHRUNK = tuple(1.02 - 0.02 * step for step in range(20))
_LARGEST = 65504.0  # float16's


class Rounded(NamedTuple):
    """A matrix on the grid of a block type: codes [M, G, 32], int8, and scales [M, G], float16 (in torch)."""

    kind: BlockType
    codes: Tensor
    scales: Tensor

    def values(self) -> Tensor:
        """[M, K] float32: exactly what a reader of the file computes."""
        return torch.from_numpy(decode(self.codes.numpy(), self.scales.numpy()))


@torch.no_grad()
def nearest(weight_MK: Tensor, kind: BlockType, importance_K: Tensor | None = None) -> Rounded:
    """Round to nearest. The scales are those of least squared error, weighted by the importance of each input."""
    blocks_MG32 = weight_MK.float().unflatten(1, (-1, SIZE))
    weights = None if importance_K is None else importance_K.view(-1, SIZE)
    scales_MG = best_scales(blocks_MG32, kind, weights)
    return Rounded(kind, codes_of(blocks_MG32, scales_MG, kind).to(torch.int8), scales_MG.half())


def best_scales(blocks: Tensor, kind: BlockType, importance: Tensor | None = None) -> Tensor:
    """[..., 32] -> [...]: float32 values that float16 holds. Zero for a block of zeros.

    A scale may be negative: the codes go one step further below zero than above, and the largest weight takes it.
    """
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))[..., 0]
    fitting = [extreme / kind.low, extreme / kind.high] if kind.low + kind.high else [extreme.abs() / kind.high]
    factors = SHRUNK if kind.bits < 8 else (1.0,)
    best, least = torch.zeros_like(extreme), torch.full_like(extreme, torch.inf)
    for scale in (each * factor for each in fitting for factor in factors):
        scale = scale.clamp(-_LARGEST, _LARGEST).half().float()
        squared = (codes_of(blocks, scale, kind) * scale[..., None] - blocks).square_()
        error = (squared if importance is None else squared.mul_(importance)).sum(-1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def codes_of(blocks: Tensor, scales: Tensor, kind: BlockType) -> Tensor:
    """The nearest codes, as floats; 0 where the scale is 0 (all weights are too small for float16's)."""
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales)
    return (blocks * inverse[..., None]).round_().clamp_(kind.low, kind.high)


def as_numpy(rounded: Rounded) -> tuple[np.ndarray, np.ndarray]:
    return rounded.codes.numpy(), rounded.scales.numpy()
