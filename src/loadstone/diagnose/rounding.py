"""How far rounding the weights to a type moves each point: what a difference must exceed to be a fault.

A single figure per type would not do: where one input is a thousand times the others, as in every large trained model,
the rounding of the one weight that it meets decides over a whole column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..config import GPTConfig
from .points import Parameters, inputs_of, normalised, split
from .precision import block_bits, precision

# Below these a floating type has no relative precision left, only steps of this size (its subnormal numbers).
STEPS: Mapping[str, float] = {"float16": 2**-24, "float8_e4m3fn": 2**-9, "float8_e5m2": 2**-16}
BLOCK = 32  # weights that share a scale in GGUF's types


def spread(weight: Tensor, dtype: str) -> Tensor:
    """Standard deviation of each element's rounding error in a type."""
    if bits := block_bits(dtype):
        if weight.dim() != 2 or weight.shape[1] % BLOCK:
            return torch.zeros_like(weight)  # GGUF keeps vectors, and rows that no block fits, in float32
        largest = weight.reshape(-1, BLOCK).abs().amax(1, keepdim=True)
        step = largest / 2 ** (bits - 1)
        return (step / 12**0.5).expand(-1, BLOCK).reshape(weight.shape)
    return (precision(dtype).rounding * weight.abs()).clamp_min(STEPS.get(dtype, 0.0) / 12**0.5)


def expected_error(
    name: str, config: GPTConfig, weights: Parameters, rows: Mapping[str, Tensor], dtype: str
) -> Tensor | None:
    """Root mean square over the rows of each element's error, [N, width], if the weights were rounded to `dtype`.

    None for points without weights: they compute the same from the same inputs, whatever the type of the weights.
    """
    part = split(name)[1]
    function = VARIANCES.get(part, _linear)
    if function is None:
        return None

    def variance(parameter: str) -> Tensor:
        found = weights(parameter)
        return torch.zeros(()) if found is None else spread(found, dtype).square()

    return function(name, config, variance, rows).sqrt()


Variance = Callable[[str], Tensor]


def _linear(name: str, config: GPTConfig, variance: Variance, rows: Mapping[str, Tensor]) -> Tensor:
    x = rows[inputs_of(name, config)[0]]
    return x.square() @ variance(f"{name}.weight").T + variance(f"{name}.bias")


def _logits(name: str, config: GPTConfig, variance: Variance, rows: Mapping[str, Tensor]) -> Tensor:
    variances = rows["norm"].square() @ variance("tok_emb.weight" if config.tied else "head.weight").T
    return variances + variance("head.bias")


def _norm(name: str, config: GPTConfig, variance: Variance, rows: Mapping[str, Tensor]) -> Tensor:
    x = sum((rows[point] for point in inputs_of(name, config)), torch.zeros(()))
    x = normalised(x, config.norm, config.norm_eps)
    return x.square() * variance(f"{name}.weight") + variance(f"{name}.bias")


def _embedding(name: str, config: GPTConfig, variance: Variance, rows: Mapping[str, Tensor]) -> Tensor:
    tokens = variance("tok_emb.weight")[rows["ids"]]
    return tokens if config.rope else tokens + variance("pos_emb.weight")[rows["positions"]]


VARIANCES: Mapping[str, Callable[[str, GPTConfig, Variance, Mapping[str, Tensor]], Tensor] | None] = {
    "embedding": _embedding,
    "logits": _logits,
    "norm": _norm,
    "norm1": _norm,
    "norm2": _norm,
    "attn.context": None,
    "mlp.hidden": None,
    "mlp": None,
    "": None,
}
