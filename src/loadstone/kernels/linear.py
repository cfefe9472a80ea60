"""Float32 matrix products for training and scoring on an x86 CPU: oneDNN, where torch takes MKL.

Measured on an AMD EPYC (docs/performance.md): 10% faster for a layer of GPT-2, 40% for its head. Gradients of weights
stay with MKL: there the transposed operands cost oneDNN more than it gains. Bfloat16 products go through oneDNN anyway.
The last bits differ from `F.linear`, so a model called by itself and `verify` do not come here.

Shapes: N rows, K inputs, M outputs.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# What inductor calls for a linear layer; a build of torch without oneDNN lacks it.
ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
X86 = platform.machine().lower() in ("x86_64", "amd64")
COPIED = 256  # rows of x; for fewer, a copy of the weight takes longer than it saves


def product(a_NK: Tensor, b_KM: Tensor) -> Tensor:
    """a @ b, for an a whose rows lie in memory one after the other."""
    if _ours(a_NK) and _ours(b_KM):
        return ONEDNN(a_NK, b_KM.T, None, "none", [], "")  # type: ignore[misc]
    return a_NK @ b_KM


def linear(x: Tensor, weight_MK: Tensor, bias_M: Tensor | None) -> Tensor:
    """F.linear for training: [..., K] -> [..., M]. What needs no gradient costs no product in the backward pass."""
    plain = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling() or not torch.is_grad_enabled()
    if plain or not (_ours(x) and _ours(weight_MK)):
        return F.linear(x, weight_MK, bias_M)
    y: Tensor = _Linear.apply(x, weight_MK, bias_M)  # type: ignore[no-untyped-call]
    return y


def scoring_linear(x: Tensor, weight_MK: Tensor, bias_M: Tensor | None) -> Tensor:
    """F.linear without gradients: [..., K] -> [..., M].

    For many rows a weight that is a view (a part of a wider matrix, or transposed in a mapped file) is copied first.
    """
    return _scoring(x, weight_MK, bias_M, "none", "")


def scoring_linear_gelu(x: Tensor, weight_MK: Tensor, bias_M: Tensor | None) -> Tensor:
    """gelu_tanh(F.linear(...)) without gradients; oneDNN takes it while the product is in the cache."""
    return _scoring(x, weight_MK, bias_M, "gelu", "tanh")


def _scoring(x: Tensor, weight_MK: Tensor, bias_M: Tensor | None, then: str, how: str) -> Tensor:
    if x.numel() >= COPIED * x.shape[-1] and _float32_here(weight_MK):
        weight_MK = weight_MK.contiguous()
    if _ours(x) and _ours(weight_MK):
        return ONEDNN(x, weight_MK, bias_M, then, [], how)  # type: ignore[misc]
    y = F.linear(x, weight_MK, bias_M)
    return F.gelu(y, approximate=how) if then == "gelu" else y


def _ours(x: Tensor) -> bool:
    """A matrix that oneDNN is fast with: one without gaps.

    For a part of a wider matrix, as the q of a fused `c_attn` is, it takes its reference kernel (8 s instead of 8 ms
    for 2,048 tokens and a width of 256).
    """
    return _float32_here(x) and (x.is_contiguous() or (x.dim() > 1 and x.mT.is_contiguous()))


def _float32_here(x: Tensor) -> bool:
    """In this machine's memory, and no subclass: shards (DTensor) have products of their own."""
    plain = type(x) in (Tensor, torch.nn.Parameter)
    return ONEDNN is not None and X86 and plain and x.device.type == "cpu" and x.dtype == torch.float32


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_MK: Tensor, bias_M: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_MK)
        return ONEDNN(x, weight_MK, bias_M, "none", [], "")  # type: ignore[misc]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_MK = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        d_y_NM = d_y.flatten(0, -2)
        d_x = product(d_y_NM, weight_MK).view(x.shape) if for_x else None
        d_weight_MK = d_y_NM.T @ x.flatten(0, -2) if for_weight else None
        return d_x, d_weight_MK, d_y_NM.sum(0) if for_bias else None
