"""`Checkpoint`: a container of named tensors, whatever the file format.

Opening one reads headers only; `read` maps one tensor. Nothing here imports torch, so that inspecting a file starts
in a blink. bf16 and fp8 are numpy arrays through `ml_dtypes`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..errors import LoadstoneError

Array = NDArray[Any]

# Our names for element types (numpy's own where numpy has one), and the numpy dtype that `read` returns for each.
DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {name: np.dtype(name) for name in ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64")}
    | {name: np.dtype(name) for name in ("int64", "float16", "float32", "float64", "complex64", "complex128")}
    | {
        "bfloat16": np.dtype(ml_dtypes.bfloat16),
        "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
        "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
        "float8_e8m0fnu": np.dtype(ml_dtypes.float8_e8m0fnu),
        "float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
        "float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
    }
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of one tensor.

    `dtype` is the stored element type: a key of `DTYPES`, or a block type such as `Q4_1` (then `read` dequantises to
    float32). `nbytes` is the size in the file. `file` is the shard that holds it.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: str = ""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass
class Checkpoint(ABC):
    """Named tensors of one checkpoint, read lazily.

    Attributes:
        path: the file or folder that was opened.
        format: `safetensors`, `pytorch-zip`, `pytorch-legacy`, `tensor-bundle` or `gguf`.
        tensors: name -> `TensorInfo`, in file order; aliases (tied tensors) included.
        aliases: name -> the other name in `tensors` whose bytes it shares (a tie that the file records).
        metadata: whatever else the file says: safetensors' `__metadata__`, GGUF's key-values, a training
            checkpoint's plain values (`model_args`, `iter_num`, ...).
        notes: remarks for the user, one line each: what was skipped or assumed while opening.
    """

    path: Path
    format: str = ""
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path | None:
        """Where configs and tokenizers lie beside the weights; None if these are in no folder."""
        return self.path if self.path.is_dir() else self.path.parent

    def names(self) -> list[str]:
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        """Header entry of one tensor. Raises LoadstoneError with the nearest names if there is none."""
        try:
            return self.tensors[name]
        except KeyError:
            from difflib import get_close_matches

            near = ", ".join(get_close_matches(name, self.tensors, n=3)) or "nothing similar"
            raise LoadstoneError(
                f"{self.path}: there is no tensor {name!r} among its {len(self.tensors)}; nearest: {near}."
            ) from None

    @abstractmethod
    def read(self, name: str) -> Array:
        """The tensor as an array of `info(name).shape`.

        Zero-copy where the container allows: the array is then a view of the file, of which just this tensor is mapped,
        copy-on-write (writing to it changes memory, never the file). Block-quantised types come back as float32.
        Raises FormatError if the bytes are damaged, or the file was changed since it was opened.
        """


def view(buffer: memoryview | bytes, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """A `shape` array over `buffer` at byte `offset`; a copy only if the offset breaks the type's alignment.

    The caller has checked that the bytes are there.
    """
    count = math.prod(shape)
    if count == 0:
        return np.empty(shape, dtype)
    array: Array = np.frombuffer(buffer, dtype, count, offset).reshape(shape)
    return array if array.flags.aligned else array.copy()
