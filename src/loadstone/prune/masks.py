"""Which weights of a matrix become zero.

Wanda: Sun et al. 2023, arXiv:2306.11695: |W| times the norm of the input that a weight is multiplied with, compared
within a row. 2:4: of every four neighbouring inputs two stay, the form that sparse tensor cores run.

Shapes: M rows (outputs), K inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mask_of(weight_MK: Tensor, sparsity: float, *, norms_K: Tensor | None = None, two_of_four: bool = False) -> Tensor:
    """True where a weight stays.

    Args:
        sparsity: the share that goes: of each row with `norms_K`, else of the whole matrix; rounded down.
        norms_K: of the inputs, for Wanda; None: magnitude alone.
        two_of_four: the two least of each four go; K must be a multiple of 4, and `sparsity` is a half.
    """
    scores = weight_MK.abs() if norms_K is None else weight_MK.abs() * norms_K
    if two_of_four:
        groups = scores.reshape(len(scores), -1, 4)
        return _largest(groups, 2).flatten(1)
    compared = scores.flatten()[None] if norms_K is None else scores
    count = compared.shape[1]
    return _largest(compared, count - int(sparsity * count + 1e-9)).view_as(weight_MK)


def _largest(scores: Tensor, count: int) -> Tensor:
    """True at the `count` largest along the last dimension, exactly so many even where some are equal."""
    kept = scores.topk(count, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, kept, True)
