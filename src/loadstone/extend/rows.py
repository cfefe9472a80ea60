"""Rows for new tokens: random, the mean of the trained rows, or the mean with some of their covariance.

V rows (of embedding or head), C width, N of them trained, K new ones. Statistics are taken in float64 and in pieces, so
that no second matrix is held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import LoadstoneError

PIECE = 2**22  # elements of a float64 piece: 32 MB
COVARIANCE = 1e-5  # Hewitt's factor
SIGMA = 0.02  # GPT-2's initialisation


@dataclass(frozen=True)
class TrainedRows:
    """The rows that new ones are made from.

    Attributes:
        weight: of the embedding or the head.
        known: ids of the tokens that it has rows for. Padding is left out: nothing trained it.
    """

    weight: Tensor  # [V, C]
    known: Tensor  # [N]

    def pieces(self) -> Iterator[Tensor]:
        """The rows in float64 on the CPU, some at a time."""
        weight_VC = self.weight.detach()
        for part in torch.split(self.known, max(PIECE // weight_VC.shape[1], 1)):
            yield weight_VC[part.to(weight_VC.device)].to("cpu", torch.float64)

    @cached_property
    def mean(self) -> Tensor:
        """[C] float64. Raises LoadstoneError if a row is not finite."""
        total = torch.zeros(self.weight.shape[1], dtype=torch.float64)
        for piece in self.pieces():
            total += piece.sum(0)
        if not torch.isfinite(total).all():
            raise LoadstoneError(
                "the model's embedding or head holds NaN or infinity in the row of a token, so new rows cannot be made "
                "from it. `loadstone verify` says more."
            )
        return total / len(self.known)

    def start(self, method: str, count: int, generator: torch.Generator) -> Tensor:
        """[K, C] for `count` new tokens, in the matrix's type and on its device.

        Args:
            method: `random`, normal(0, 0.02) as GPT-2's; `mean`; `mean_cov`, normal(mean, 1e-5 covariance), from Hewitt
                2021, "Initializing New Word Embeddings for Pretrained Language Models".
            generator: of the CPU.
        """
        return METHODS[method](self, count, generator).to(self.weight)


def _random(rows: TrainedRows, count: int, generator: torch.Generator) -> Tensor:
    return SIGMA * torch.randn(count, rows.weight.shape[1], dtype=torch.float64, generator=generator)


def _mean(rows: TrainedRows, count: int, generator: torch.Generator) -> Tensor:
    return rows.mean.repeat(count, 1)


def _mean_cov(rows: TrainedRows, count: int, generator: torch.Generator) -> Tensor:
    """A sum of all centred rows with normal weights has exactly their covariance: no C x C matrix, no factorisation."""
    noise_KC = torch.zeros(count, rows.weight.shape[1], dtype=torch.float64)
    for piece in rows.pieces():
        weights = torch.randn(count, len(piece), dtype=torch.float64, generator=generator)
        noise_KC += weights @ (piece - rows.mean)
    return rows.mean + math.sqrt(COVARIANCE / len(rows.known)) * noise_KC


METHODS: Mapping[str, Callable[[TrainedRows, int, torch.Generator], Tensor]] = {
    "random": _random,
    "mean": _mean,
    "mean_cov": _mean_cov,
}


def grown(weight_VC: Tensor, rows: int, ids: list[int], values_KC: Tensor, padding_C: Tensor) -> Tensor:
    """A copy with `rows` rows: the old ones, `values_KC` at `ids`, and `padding_C` in what is left of the new ones."""
    copy = weight_VC.new_empty(rows, weight_VC.shape[1])
    copy[: len(weight_VC)] = weight_VC.detach()
    copy[len(weight_VC) :] = padding_C.to(copy)
    copy[ids] = values_KC
    return copy
