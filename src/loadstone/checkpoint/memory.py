"""Arrays in memory as a `Checkpoint`: what a writer takes when there is no file yet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .base import Array, Checkpoint, TensorInfo


class Arrays(Checkpoint):
    """Named arrays; `path` is what errors call them."""

    def __init__(self, path: Path, arrays: Mapping[str, Array]) -> None:
        super().__init__(path, "memory")
        self._arrays = arrays
        self.tensors = {name: TensorInfo(a.shape, a.dtype.name, a.nbytes) for name, a in arrays.items()}

    @property
    def folder(self) -> None:
        return None

    def read(self, name: str) -> Array:
        return self._arrays[name]
