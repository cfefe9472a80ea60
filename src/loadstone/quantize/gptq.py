"""GPTQ: round a matrix input by input, and let the inputs still to come make up for the error of each.

Frantar et al. 2022, arXiv:2210.17323; the algorithm of OBS (Hassibi & Stork 1993) in an order that is the same for all
rows. Minimises |(W - Q) X|^2 for the inputs X of a calibration text, of which only the matrix of their second moments
(`gram`, half the Hessian) is needed.

*Others*: GPTQModel and llm-compressor write layouts of their own, which other programs do not read; `torchao` has no
calibrated rounding for a block of 32 with a float16 scale. Here the result is ggml's blocks.

Shapes: M rows (outputs), K inputs, 32 inputs share a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LoadstoneError
from .blocks import SIZE, BlockType
from .grid import Grid, Rounded, best_grid

COLUMNS = 128  # inputs whose errors are passed on among themselves first, and to the rest in one product
DAMPING = 0.1  # of the mean of the diagonal, added to it
SHARE = 0.5  # of what would make up for the errors of the layers before
_ATTEMPTS = 6  # each with ten times the damping


@torch.no_grad()
def gptq(weight_MK: Tensor, gram_KK: Tensor, kind: BlockType, shift_KK: Tensor | None = None) -> Rounded:
    """The codes and scales of a matrix.

    Inputs are rounded in the order of their size, the largest first ("act order"), when the most others are left to
    make up for them; the blocks stay where they are, so their grids are chosen beforehand, by the errors that count:
    one at the k-th input costs (error / upper[k, k])^2.

    Args:
        weight_MK: K a multiple of 32.
        gram_KK: sum (or mean) of x x^T over the inputs x that the layer saw.
        shift_KK: the same of (y - x) x^T, y being its inputs before anything was rounded: see `making_up`.

    Raises LoadstoneError if the moments are not finite.
    """
    order = gram_KK.diagonal().argsort(descending=True)
    upper_KK = inverse_factor(gram_KK[order][:, order])
    M, K = weight_MK.shape
    left = weight_MK.float()[:, order]  # the weights, with the errors of the inputs before them passed on
    if shift_KK is not None:
        left += making_up(left, shift_KK[order][:, order], upper_KK)
    back = order.argsort()
    importance_K = upper_KK.diagonal()[back] ** -2
    grid = best_grid(left[:, back].reshape(M, -1, SIZE), kind, importance_K.view(-1, SIZE))
    codes = torch.empty(M, K)
    for start in range(0, K, COLUMNS):
        stop = min(start + COLUMNS, K)
        errors = torch.empty(M, stop - start)
        for k in range(start, stop):
            block = Grid(*(each[:, order[k] // SIZE] for each in grid))
            codes[:, order[k]] = block.codes(left[:, k : k + 1], kind)[:, 0]
            rounded = block.values(codes[:, order[k], None])[:, 0]
            errors[:, k - start] = (left[:, k] - rounded) / upper_KK[k, k]
            left[:, k + 1 : stop] -= torch.outer(errors[:, k - start], upper_KK[k, k + 1 : stop])
        left[:, stop:] -= errors @ upper_KK[start:stop, stop:]
    return Rounded(kind, codes.to(torch.int8).view(M, -1, SIZE), grid)


def making_up(weight_MK: Tensor, shift_KK: Tensor, upper_KK: Tensor) -> Tensor:
    """What to add to the weights, so that they make up for the errors of the layers before.

    Rounding those moved the inputs from y to x. The D that minimises |(W + D) x - W y|^2 is W E[(y - x) x^T]
    E[x x^T]^-1 ("GPTAQ", Li et al. 2025, arXiv:2504.02692). As every regression on noisy inputs it also shrinks what
    the layer computes; half of D ("QEP", Arai & Ichikawa 2025, arXiv:2504.09629) gained as much (docs/quantize.md).
    """
    return SHARE * (weight_MK @ shift_KK) @ upper_KK.T @ upper_KK


def inverse_factor(gram_KK: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped moments, in float32; computed in float64.

    An input that was always zero gets the moment of a mean one, so that it is rounded to nearest.
    """
    gram = gram_KK.double().clone()
    diagonal = gram.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        raise LoadstoneError("the model computes values that are NaN or infinite on the calibration text.")
    mean = float(diagonal.mean()) or 1.0
    diagonal[diagonal == 0] = mean
    for attempt in range(_ATTEMPTS):
        diagonal += DAMPING * mean * 10.0**attempt
        lower, failed = torch.linalg.cholesky_ex(gram)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper.float()
    raise LoadstoneError(
        "the inputs of a layer are so alike that their moments cannot be inverted. Calibrate on more text."
    )
