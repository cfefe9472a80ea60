"""Causal attention in bfloat16 for training on the CPU, at short contexts: twice as fast as torch's flash kernel there.

Flash attention computes the probabilities twice to keep none of them, and its CPU kernel works on blocks too small for
bfloat16 products. Up to LONGEST tokens we keep the probabilities (2 bytes each, the lower triangle's blocks only) and
multiply whole heads. Scores and softmax are float32, as in the flash kernel, so the errors are the same.

Shapes: B batch, H query heads, K key/value heads, T tokens, D head_dim, R query rows of a block, S keys up to its end.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LONGEST = 1024  # tokens; there the probabilities of a GPT-2 layer take 14 MB per row of the batch
BLOCKS = (
    4  # query rows see the keys up to their block's end; the gradients of keys are sums over as many bfloat16 terms
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    enable_gqa: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention of [B, H, T, D] and [B, K, T, D], or in training the kernel of this file."""
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)) and not torch.compiler.is_compiling()
    short = is_causal and attn_mask is None and not dropout_p and q.shape[2] == k.shape[2] <= LONGEST
    if not (training and short and q.device.type == "cpu" and _dtype(q) == torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, enable_gqa=enable_gqa)
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    heads = (x.to(torch.bfloat16).reshape(-1, *x.shape[2:]) for x in (q, k, v))
    with torch.autocast("cpu", enabled=False):
        y_GTD: Tensor = _Causal.apply(*heads)  # type: ignore[no-untyped-call]
    return y_GTD.view(q.shape)


def _dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _blocks(tokens: int) -> list[tuple[int, int]]:
    size = max(128, -(-tokens // BLOCKS))
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


class _Causal(torch.autograd.Function):
    """Of contiguous bfloat16 [G, T, D], where G = B * H counts the heads of all rows."""

    @staticmethod
    def forward(ctx: Any, q_GTD: Tensor, k_GTD: Tensor, v_GTD: Tensor) -> Tensor:
        q32, k32 = q_GTD.float(), k_GTD.float()
        y_GTD, scale, weights = torch.empty_like(v_GTD), q_GTD.shape[-1] ** -0.5, []
        for start, end in _blocks(q_GTD.shape[1]):
            hidden_RS = q32.new_full((end - start, end), -math.inf).triu(1 + start)
            scores_GRS = torch.baddbmm(hidden_RS, q32[:, start:end], k32[:, :end].mT, alpha=scale)
            weights.append(F.softmax(scores_GRS, dim=-1).to(v_GTD.dtype))
            y_GTD[:, start:end] = torch.bmm(weights[-1], v_GTD[:, :end])
        ctx.save_for_backward(q_GTD, k_GTD, v_GTD, *weights)
        return y_GTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_GTD: Tensor) -> tuple[Tensor, ...]:
        q_GTD, k_GTD, v_GTD, *weights = ctx.saved_tensors
        d_y_GTD = d_y_GTD.contiguous()
        d_q, d_k, d_v = torch.empty_like(q_GTD), torch.zeros_like(k_GTD), torch.zeros_like(v_GTD)
        for (start, end), weights_GRS in zip(_blocks(q_GTD.shape[1]), weights, strict=True):
            d_block = d_y_GTD[:, start:end]
            d_weights_GRS = torch.bmm(d_block, v_GTD[:, :end].mT)
            d_scores_GRS = torch._softmax_backward_data(d_weights_GRS, weights_GRS, -1, weights_GRS.dtype)
            d_v[:, :end] += torch.bmm(weights_GRS.mT, d_block)
            d_k[:, :end] += torch.bmm(d_scores_GRS.mT, q_GTD[:, start:end])
            d_q[:, start:end] = torch.bmm(d_scores_GRS, k_GTD[:, :end])
        scale = q_GTD.shape[-1] ** -0.5
        return d_q.mul_(scale), d_k.mul_(scale), d_v
