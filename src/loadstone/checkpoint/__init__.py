"""Containers of named tensors: open any of them with `open_checkpoint`."""

from .base import Checkpoint, TensorInfo
from .opening import open_checkpoint

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]
