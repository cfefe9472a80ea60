"""A scale (and a minimum) for each block of 32 weights, and the codes nearest to them.

Shapes: M rows (outputs), K inputs, G = K/32 blocks of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import SIZE, BlockType, Bytes, Halves, decode, encode

# Scales that are tried, relative to the one at which the largest weight of a block just fits. Cutting off a lone large
# weight makes the others finer; above 1 nothing is gained but where float16 rounds the scale.
SHRUNK = tuple(1.02 - 0.02 * step for step in range(20))
CUT = (0.0, 0.03, 0.07, 0.12, 0.18)  # with a minimum: shares of the range that are cut off at either end
_LARGEST = 65504.0  # float16's


class Grid(NamedTuple):
    """Scales and minima [...], float32 values that float16 holds."""

    scales: Tensor
    minima: Tensor

    def codes(self, blocks: Tensor, kind: BlockType) -> Tensor:
        """The nearest codes of [..., 32], as floats; 0 where the scale is 0 (the weights are alike, or too small)."""
        inverse = torch.where(self.scales == 0, 0.0, 1.0 / self.scales)
        return ((blocks - self.minima[..., None]) * inverse[..., None]).round_().clamp_(kind.low, kind.high)

    def values(self, codes: Tensor) -> Tensor:
        return codes * self.scales[..., None] + self.minima[..., None]


class Rounded(NamedTuple):
    """A matrix on the grid of a block type: codes [M, G, 32], int8, and its scales and minima [M, G]."""

    kind: BlockType
    codes: Tensor
    grid: Grid

    def values(self) -> Tensor:
        """[M, K] float32: exactly what a reader of the file computes."""
        return torch.from_numpy(decode(self.codes.numpy(), *self._floats()))

    def split(self, rows: Sequence[int]) -> list[Rounded]:
        """The matrices that lie one below the other in this one."""
        parts = (torch.split(each, list(rows)) for each in (self.codes, *self.grid))
        return [Rounded(self.kind, codes, Grid(scales, minima)) for codes, scales, minima in zip(*parts, strict=True)]

    def blocks(self) -> Bytes:
        """[M, bytes of a row], as the file has them."""
        return encode(self.kind, self.codes.numpy(), *self._floats())

    def _floats(self) -> list[Halves]:
        return [each.half().numpy() for each in (self.grid if self.kind.minimum else self.grid[:1])]


@torch.no_grad()
def nearest(weight_MK: Tensor, kind: BlockType) -> Rounded:
    """Round to nearest, with the scales of least squared error."""
    blocks_MG32 = weight_MK.float().reshape(len(weight_MK), -1, SIZE)
    grid = best_grid(blocks_MG32, kind)
    return Rounded(kind, grid.codes(blocks_MG32, kind).to(torch.int8), grid)


def best_grid(blocks: Tensor, kind: BlockType, importance: Tensor | None = None) -> Grid:
    """[..., 32] -> the grids of least squared error among those tried, weighted by the importance of each input."""
    zero = torch.zeros(blocks.shape[:-1])
    best, least = Grid(zero, zero), torch.full_like(zero, torch.inf)
    for grid in _minimum_grids(blocks, kind) if kind.minimum else _symmetric_grids(blocks, kind):
        squared = grid.values(grid.codes(blocks, kind)).sub_(blocks).square_()
        error = (squared if importance is None else squared.mul_(importance)).sum(-1)
        better = error < least
        best = Grid(*(torch.where(better, new, old) for new, old in zip(grid, best, strict=True)))
        least = torch.where(better, error, least)
    return best


def _symmetric_grids(blocks: Tensor, kind: BlockType) -> Iterator[Grid]:
    """A scale may be negative: the codes go one step further below zero than above, and the largest weight takes it."""
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))[..., 0]
    fitting = [extreme / kind.low, extreme / kind.high] if kind.low + kind.high else [extreme.abs() / kind.high]
    for scale in fitting:
        for factor in SHRUNK if kind.bits < 8 else (1.0,):
            yield Grid(_half(scale * factor), torch.zeros_like(scale))


def _minimum_grids(blocks: Tensor, kind: BlockType) -> Iterator[Grid]:
    low, high = blocks.amin(-1), blocks.amax(-1)
    span = high - low
    for below in CUT:
        for above in CUT:
            yield Grid(_half(span * (1 - below - above) / kind.high), _half(low + span * below))


def _half(values: Tensor) -> Tensor:
    return values.clamp(-_LARGEST, _LARGEST).half().float()
