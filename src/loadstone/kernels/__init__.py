"""Faster ways to what torch computes, for training and inference on the CPU; elsewhere torch itself is called."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from ..model import ACTIVATIONS, MLP, Attention, Linear
from . import attention, linear
from .memory import free_memory, keep_freed_memory
from .packed import PackedWeights, pack_for_inference
from .replacing import replaced

__all__ = ["PackedWeights", "free_memory", "keep_freed_memory", "pack_for_inference", "quick_scoring", "speed_up"]


def speed_up(model: nn.Module) -> None:
    """Let the layers of a model that is to be trained compute with the kernels of this package.

    Without gradients, and for whatever a kernel is not made for, they still call torch's functions: evaluation and
    generation give the same bits as before.
    """
    for module in model.modules():
        if isinstance(module, Linear):
            module.product = linear.linear
        elif isinstance(module, Attention):
            module.attend = attention.attention


def quick_scoring(model: nn.Module) -> AbstractContextManager[None]:
    """Meanwhile the layers of a model compute with this package's products without gradients; afterwards as before."""
    settings: list[tuple[nn.Module, str, Any]] = [
        (module, "product", linear.scoring_linear) for module in model.modules() if isinstance(module, Linear)
    ]
    for module in model.modules():
        if isinstance(module, MLP) and _plain_gelu(module):
            settings += [(module.up, "product", linear.scoring_linear_gelu), (module, "activation", _unchanged)]
    return replaced(settings)


def _plain_gelu(mlp: MLP) -> bool:
    """Nothing comes between the product and the GELU: no gate, and `up` is no adapter."""
    return type(mlp.up) is Linear and mlp.gate is None and mlp.activation is ACTIVATIONS["gelu_tanh"]


def _unchanged(x: Tensor) -> Tensor:
    return x
