"""Faster ways to what torch computes, for training and scoring on the CPU; elsewhere torch itself is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..model import ACTIVATIONS, MLP, Attention, Linear
from . import attention, linear
from .memory import keep_freed_memory

__all__ = ["keep_freed_memory", "quick_scoring", "speed_up"]


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


@contextmanager
def quick_scoring(model: nn.Module) -> Iterator[None]:
    """Meanwhile the layers of a model compute with this package's products without gradients; afterwards as before."""
    before: list[tuple[nn.Module, str, Any]] = []

    def set_for_now(module: nn.Module, name: str, value: Any) -> None:
        before.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    for module in model.modules():
        if isinstance(module, Linear):
            set_for_now(module, "product", linear.scoring_linear)
    for module in model.modules():
        if isinstance(module, MLP) and _plain_gelu(module):
            set_for_now(module.up, "product", linear.scoring_linear_gelu)
            set_for_now(module, "activation", _unchanged)
    try:
        yield
    finally:
        for module, name, value in reversed(before):
            setattr(module, name, value)


def _plain_gelu(mlp: MLP) -> bool:
    """Nothing comes between the product and the GELU: no gate, and `up` is no adapter."""
    return type(mlp.up) is Linear and mlp.gate is None and mlp.activation is ACTIVATIONS["gelu_tanh"]


def _unchanged(x: Tensor) -> Tensor:
    return x
