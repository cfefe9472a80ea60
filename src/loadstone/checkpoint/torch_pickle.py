"""PyTorch checkpoints (`.pt`, `.pth`, `.bin`, `.ckpt`) without PyTorch, and without executing their pickle."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from .base import DTYPES, Array, Checkpoint, TensorInfo, view
from .datafile import DataFile
from .torch_archive import inflate, open_archive
from .torch_state import find_weights


class TorchPickle(Checkpoint):
    """What `torch.save` wrote: a state dict, a training checkpoint around one, or a whole pickled module.

    Both of torch's containers are read (`torch_archive.py`). Opening interprets the pickle as data (`pickle_vm.py`) and
    finds the storages; `read` maps them. Raises FormatError for a damaged or hostile file, for one without weights, and
    for one with several sets of them.

    Attributes:
        globals_seen: every "module.name" that the pickle asks to import, for an audit. None is imported.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file = DataFile(path)
        archive = open_archive(self._file)
        self.format, self.globals_seen = archive.format, archive.globals_seen
        self._regions, self._swapped = archive.regions, archive.swapped
        self._inflated: tuple[str, memoryview] | None = None  # the last compressed storage; tensors often share one
        weights = find_weights(path, archive.root, archive.globals_seen)
        self._refs, self.metadata, self.notes = weights.tensors, weights.metadata, weights.notes
        self._describe_tensors()

    def _describe_tensors(self) -> None:
        first: dict[tuple[object, ...], str] = {}
        for name, ref in self._refs.items():
            nbytes = math.prod(ref.shape) * DTYPES[ref.dtype].itemsize
            self.tensors[name] = TensorInfo(ref.shape, ref.dtype, nbytes, self.path.name)
            owner = first.setdefault((ref.storage, ref.offset, ref.shape, ref.stride, ref.dtype), name)
            if nbytes and owner != name:
                self.aliases[name] = owner

    def read(self, name: str) -> Array:
        """The tensor as a view of the file, mapped, with the strides that it was saved with.

        A copy only where the file is compressed, in the other byte order, or not aligned to the element type (usual in
        the format before torch 1.6).
        """
        self.info(name)
        ref = self._refs[name]
        dtype = DTYPES[ref.dtype]
        if not self.tensors[name].nbytes:
            return np.empty(ref.shape, dtype)
        start = ref.storage.start + ref.offset * dtype.itemsize
        flat = view(self._bytes(ref.storage.key, start, ref.span * dtype.itemsize), 0, (ref.span,), dtype)
        if self._swapped:
            flat = flat.byteswap()
        # The stride of a dimension of length 1 means nothing, and may be anything in the file.
        strides = [s * dtype.itemsize if d > 1 else 0 for d, s in zip(ref.shape, ref.stride, strict=True)]
        return np.ndarray(ref.shape, dtype, flat.view(np.uint8), 0, strides)

    def _bytes(self, key: str, start: int, nbytes: int) -> memoryview:
        """`nbytes` bytes of a storage, from its byte `start` on."""
        region = self._regions[key]
        if not region.deflated:
            return self._file.tensor(region.offset + start, nbytes)
        if self._inflated is None or self._inflated[0] != key:
            self._inflated = key, memoryview(bytearray(inflate(self._file, region)))
        return self._inflated[1][start : start + nbytes]
