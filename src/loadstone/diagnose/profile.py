"""Statistics of one tensor, taken in a single pass over pieces of it: no second copy of a weight is ever made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

PIECE = 1 << 18  # elements taken at once: 2 MB as float64, which stays in a processor's cache


@dataclass(frozen=True)
class Profile:
    """What one tensor looks like from outside. A vector is taken as a matrix of one row.

    Attributes:
        shape: of the tensor itself.
        rows, columns: Euclidean norm of each row and of each column, float64 on the CPU.
        mean, std: over all elements.
        kurtosis: fourth moment over the squared second, about the mean: 3 for a normal, 1.8 for a uniform distribution.
        positive: part of the elements that are above 0.
        low, high: the smallest and the largest element.
        repeated_rows: rows that equal an earlier row bit for bit (only counted for matrices).
    """

    shape: tuple[int, ...]
    rows: Tensor
    columns: Tensor
    mean: float
    std: float
    kurtosis: float
    positive: float
    low: float
    high: float
    repeated_rows: int

    @property
    def size(self) -> int:
        return self.rows.numel() * self.columns.numel()

    @property
    def constant(self) -> bool:
        return self.low == self.high

    @property
    def zero_rows(self) -> int:
        return int((self.rows == 0).sum())


def pieces(weight: Tensor) -> Iterator[Tensor]:
    """Views of some rows at a time, [rows, columns]; a vector is one row."""
    matrix = weight.detach().reshape(-1, weight.shape[-1])
    yield from torch.split(matrix, max(1, PIECE // matrix.shape[1]))


def profile(weight: Tensor) -> Profile:
    """The profile of a vector or matrix of any floating type, on any device."""
    low, high = torch.inf, -torch.inf
    moments, positive = torch.zeros(4, dtype=torch.float64), 0
    columns = torch.zeros(weight.shape[-1], dtype=torch.float64)
    rows, hashes = [], []
    for piece in pieces(weight):
        x = piece.double().cpu()
        squares = x * x
        rows.append(squares.sum(1))
        columns += squares.sum(0)
        moments += torch.stack([x.sum(), squares.sum(), (squares * x).sum(), squares.square().sum()])
        positive += int((x > 0).sum())
        smallest, largest = x.aminmax()
        low, high = min(low, float(smallest)), max(high, float(largest))
        hashes.append(_row_hashes(x))
    m1, m2, m3, m4 = (moments / weight.numel()).tolist()
    variance = max(m2 - m1**2, 0.0)
    fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
    hashed = torch.cat(hashes)
    return Profile(
        shape=tuple(weight.shape),
        rows=torch.cat(rows).sqrt(),
        columns=columns.sqrt(),
        mean=m1,
        std=variance**0.5,
        kurtosis=fourth / variance**2 if variance else 0.0,
        positive=positive / weight.numel(),
        low=low,
        high=high,
        repeated_rows=len(hashed) - len(torch.unique(hashed)),
    )


def _row_hashes(rows: Tensor) -> Tensor:
    """One 64-bit number per row of float64; equal rows have equal ones, others hardly ever (2^-51 a pair)."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=generator) * 2 + 1
    bits = rows.view(torch.int64)
    bits = bits ^ (bits >> 32)  # narrow types fill the upper bits alone, and a product only carries upwards
    return (bits * factors).sum(1)  # wraps around, so the order of the sum does not matter
