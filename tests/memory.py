"""A `Checkpoint` over a dict of arrays, so that maps and plans are tested without any file format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadstone.checkpoint.base import Checkpoint, TensorInfo


class MemoryCheckpoint(Checkpoint):
    def __init__(self, arrays: Mapping[str, NDArray[Any]], **attributes: Any) -> None:
        super().__init__(attributes.pop("path", Path("memory")), attributes.pop("format", "memory"))
        self.arrays = dict(arrays)
        self.tensors = {name: TensorInfo(a.shape, a.dtype.name, a.nbytes) for name, a in self.arrays.items()}
        self.__dict__.update(attributes)

    def read(self, name: str) -> NDArray[Any]:
        return self.arrays[self.aliases.get(name, name)]


def same(a: Mapping[str, NDArray[Any]], b: Mapping[str, NDArray[Any]]) -> bool:
    """Same names, shapes, types and bytes."""
    return a.keys() == b.keys() and all(
        a[k].shape == b[k].shape and a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a
    )
