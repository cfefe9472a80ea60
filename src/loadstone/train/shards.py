"""The training state of a checkpoint, written by one process as a file or by several as a part each.

One process writes `state.safetensors`; of N, the r-th writes `state-0000r-of-0000N.safetensors`, through PyTorch's
distributed checkpoint (torch.distributed.checkpoint.hf_storage). There a tensor may be a few of the rows, and the
header's `__metadata__` says under `DCP_SHARDING_INFO` where they belong: {name: {"saved_offsets": [row, 0, ...]}}.

Why not DCP's own reader and consolidation: the reader believes the offsets it finds, and the consolidation of torch
2.13 writes zeros for what has no dimension (AdamW's step counts) and fails on integers (random states).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..checkpoint import open_checkpoint
from ..checkpoint.base import Array, Checkpoint, TensorInfo
from ..checkpoint.wording import few, shown
from ..errors import FormatError

STATE = "state.safetensors"
_PART = re.compile(r"state-(\d{5})-of-(\d{5})\.safetensors")
_INFO, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # torch/distributed/checkpoint/_hf_utils.py
_HINT = "Remove this checkpoint to resume from the one before it."


def part_name(rank: int, size: int) -> str:
    """The file of one process of several."""
    return f"state-{rank + 1:05d}-of-{size:05d}.safetensors"


def open_state(folder: Path) -> Checkpoint:
    """The state that lies in a folder. Raises FormatError if a part is missing or does not fit the others."""
    if (folder / STATE).is_file():
        return open_checkpoint(folder / STATE)
    parts = {path for path in folder.glob("state-*") if _PART.fullmatch(path.name)}
    sizes = {int(path.stem[-5:]) for path in parts}
    wanted = [folder / part_name(rank, max(sizes)) for rank in range(max(sizes))] if sizes else [folder / STATE]
    if missing := [path.name for path in wanted if path not in parts]:
        raise FormatError(folder, f"of the training state, {few(missing)} is missing.", _HINT)
    return Parts(folder, [open_checkpoint(path) for path in wanted])


class _Rows(NamedTuple):
    """The rows `start` to `end` of a tensor, and the file that holds them; what has no dimension is one row."""

    start: int
    end: int
    info: TensorInfo
    file: Checkpoint


class Parts(Checkpoint):
    """The parts as one checkpoint; a tensor is put together when it is read."""

    def __init__(self, folder: Path, files: list[Checkpoint]) -> None:
        super().__init__(folder, "safetensors")
        self._rows: dict[str, list[_Rows]] = defaultdict(list)
        for file in files:
            starts = _starts(file)
            for name, info in file.tensors.items():
                end = starts[name] + (info.shape[0] if info.shape else 1)
                self._rows[name].append(_Rows(starts[name], end, info, file))
        for name, rows in self._rows.items():
            rows.sort(key=lambda part: (part.start, part.end))
            self.tensors[name] = self._joined(name, rows)

    def _joined(self, name: str, rows: list[_Rows]) -> TensorInfo:
        first, end = rows[0].info, 0
        for part in rows:
            same = part.info.dtype == first.dtype and part.info.shape[1:] == first.shape[1:]
            if part.start != end or not same or (not first.shape and len(rows) > 1):
                raise FormatError(
                    self.path,
                    f"of {shown(name)}, rows 0 to {end} are there, and {part.file.path.name} holds {part.info.dtype} "
                    f"{[*part.info.shape]} from row {part.start} on, which does not go on from there.",
                    _HINT,
                )
            end = part.end
        shape = (end, *first.shape[1:]) if first.shape else ()
        return TensorInfo(shape, first.dtype, sum(part.info.nbytes for part in rows))

    def read(self, name: str) -> Array:
        self.info(name)
        arrays = [part.file.read(name) for part in self._rows[name]]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _starts(file: Checkpoint) -> dict[str, int]:
    """The first row of each tensor of a part. Raises FormatError if that is not said, or more than rows are divided."""
    try:
        said = json.loads(file.metadata[_INFO])
        offsets: dict[str, Any] = {name: said[name][_OFFSETS] for name in file.tensors}
    except (KeyError, TypeError, ValueError, RecursionError):
        problem = f"its header does not say under {_INFO} what its tensors are parts of."
        raise FormatError(file.path, problem, _HINT) from None
    for name, value in offsets.items():
        good = isinstance(value, list) and len(value) == len(file.tensors[name].shape)
        if not good or any(type(at) is not int or at < 0 for at in value) or any(value[1:]):
            problem = f"{shown(name)} begins at {shown(value)}, and only rows are ever divided."
            raise FormatError(file.path, problem, _HINT)
    return {name: value[0] if value else 0 for name, value in offsets.items()}


def group(saved: Checkpoint, prefix: str) -> Iterator[tuple[str, Any]]:
    """(rest of the name, tensor) of all whose names begin with a prefix, one read at a time."""
    from ..load import to_tensor

    for name in saved.names():
        if name.startswith(prefix):
            yield name.removeprefix(prefix), to_tensor(saved.read(name))
