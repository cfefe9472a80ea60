"""The head and the cross entropy in one: the loss of next tokens without the logits of the whole batch.

Shapes: B batch, T tokens, C d_model, V vocabulary, N rows with a target, R rows of one chunk.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.batch import IGNORED
from ..kernels.linear import product

CHUNK = 26_000_000  # logits that exist at one time, 104 MB in float32: 517 rows of GPT-2's vocabulary


def head_loss(hidden_BTC: Tensor, weight_VC: Tensor, targets_BT: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """SUM of the cross entropies over the targets that are not IGNORED, a float32 scalar.

    Equals `F.cross_entropy(hidden @ weight.T + bias, targets, reduction="sum")`, but only CHUNK logits exist at a time,
    and none for rows without a target: the gradients of hidden, weight and bias are made along with the loss. Under
    autocast the products run in its type, the softmax in float32.
    """
    targets_N = targets_BT.flatten()
    if torch.compiler.is_compiling():  # inductor has neither oneDNN's products nor a count of rows that data decide
        logits_NV = F.linear(hidden_BTC.flatten(0, -2), weight_VC, bias_V).float()
        return F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED, reduction="sum")
    kept_N = (targets_N != IGNORED).nonzero().squeeze(1)
    hidden_NC = hidden_BTC.flatten(0, -2)
    if len(kept_N) < len(targets_N):
        hidden_NC, targets_N = hidden_NC[kept_N], targets_N[kept_N]
    grad = torch.is_grad_enabled()
    loss: Tensor = _HeadLoss.apply(hidden_NC, weight_VC, bias_V, targets_N, grad)  # type: ignore[no-untyped-call]
    return loss


def perplexity(nats: float) -> float:
    """e to the power of a mean loss; infinite where a float cannot hold it."""
    return math.exp(nats) if nats < 700 else math.inf


def chunks(rows: int, vocabulary: int) -> list[slice]:
    """Slices of rows, of even length, whose logits are at most CHUNK."""
    size = max(1, CHUNK // vocabulary)
    size = -(-rows // max(1, -(-rows // size)))  # as even as can be: a short last chunk costs more than its rows
    return [slice(start, start + size) for start in range(0, rows, max(1, size))]


def _logits(rows_RC: Tensor, weight_VC: Tensor, bias_V: Tensor | None) -> Tensor:
    logits_RV = product(rows_RC, weight_VC.T)
    return logits_RV if bias_V is None else logits_RV.add_(bias_V)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NC: Tensor, weight_VC: Tensor, bias_V: Tensor | None, targets_N: Tensor, grad: bool
    ) -> Tensor:
        device = hidden_NC.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_NC.dtype
        for_hidden, for_weight, for_bias = (grad and needed for needed in ctx.needs_input_grad[:3])
        loss = torch.zeros((), device=hidden_NC.device)
        d_hidden_NC = torch.empty_like(hidden_NC) if for_hidden else None
        d_weight_VC: Tensor | None = None
        d_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if for_bias and bias_V is not None else None
        with torch.autocast(device, enabled=False):
            rows_NC, head_VC = hidden_NC.to(dtype), weight_VC.to(dtype)
            for chunk in chunks(len(targets_N), len(weight_VC)):
                scores_RV = F.log_softmax(_logits(rows_NC[chunk], head_VC, bias_V), dim=-1, dtype=torch.float32)
                targets_R1 = targets_N[chunk, None]
                loss -= scores_RV.gather(1, targets_R1).sum()
                if not (for_hidden or for_weight or for_bias):
                    continue
                scores_RV.exp_().scatter_add_(1, targets_R1, scores_RV.new_full(targets_R1.shape, -1.0))
                d_logits_RV = scores_RV.to(dtype)
                if d_bias_V is not None:
                    d_bias_V += scores_RV.sum(0)
                if d_hidden_NC is not None:
                    d_hidden_NC[chunk] = product(d_logits_RV, head_VC)
                if for_weight:
                    part_VC = d_logits_RV.T @ rows_NC[chunk]
                    d_weight_VC = part_VC.float() if d_weight_VC is None else d_weight_VC.add_(part_VC)
        if for_weight and d_weight_VC is None:  # no row has a target
            d_weight_VC = torch.zeros_like(weight_VC)
        d_weight_VC = None if d_weight_VC is None else d_weight_VC.to(weight_VC.dtype)
        d_bias_V = None if d_bias_V is None or bias_V is None else d_bias_V.to(bias_V.dtype)
        ctx.gradients = d_hidden_NC, d_weight_VC, d_bias_V
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        # Whoever holds no other reference may add the gradient of a tied embedding in place.
        gradients, ctx.gradients = ctx.gradients, ()
        return *(None if g is None else g.mul_(d_loss) for g in gradients), None, None
