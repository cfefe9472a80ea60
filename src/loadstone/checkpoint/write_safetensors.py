"""Writes safetensors: one file, or shards with HuggingFace's index, a tensor at a time.

`safetensors.torch.save_file` refuses tensors that share memory and wants all of them at once; `save_pretrained` holds
the whole model. Here a tie is dropped and noted where `safetensors.torch.save_model` and `huggingface_hub` note it, and
the same checkpoint gives the same bytes everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import LoadstoneError
from .base import DTYPES, Checkpoint
from .safetensors import CODES, MAX_HEADER, recorded_ties
from .streaming import Output, Progress, Transfer, is_unicode
from .wording import shown

_FORMAT: Mapping[str, str] = {"format": "pt"}  # without it, transformers refuses the file


def write_safetensors(
    source: Checkpoint,
    folder: Path,
    *,
    shard_size: int | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write `model.safetensors`, or `model-00001-of-0000N.safetensors` and so on with their index, into a folder.

    Args:
        source: what to write. Its aliases are not stored but recorded: {alias: kept name}.
        folder: where; it must exist.
        shard_size: bytes of tensors in one file at most (a larger tensor gets a file of its own); None: no limit.
        metadata: more entries for each file's `__metadata__`.
        progress: called after each tensor.

    Returns:
        The files written, the index last.

    Raises:
        LoadstoneError: names, types or metadata that safetensors cannot hold; nothing was written then.
    """
    transfer, common = _transfer(source, progress), _metadata(source, metadata)
    shards = _shards(transfer, shard_size)
    if len(shards) == 1:
        path = folder / "model.safetensors"
        _write(transfer, path, transfer.names, {**source.aliases, **common})
        return [path]
    files = [folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    total = sum(map(transfer.nbytes, transfer.names))
    index = {
        "metadata": {**source.aliases, "total_size": total},
        "weight_map": {name: file.name for file, names in zip(files, shards, strict=True) for name in names},
    }
    for file, names in zip(files, shards, strict=True):
        _write(transfer, file, names, common)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*files, path]


def write_safetensors_file(
    source: Checkpoint, path: Path, *, metadata: Mapping[str, str] | None = None, progress: Progress | None = None
) -> None:
    """Write one file, under any name. Arguments and errors are those of `write_safetensors`."""
    transfer, common = _transfer(source, progress), _metadata(source, metadata)
    _write(transfer, path, transfer.names, {**source.aliases, **common})


def _transfer(source: Checkpoint, progress: Progress | None) -> Transfer:
    transfer = Transfer(source, "safetensors", CODES, progress)
    if "__metadata__" in source.tensors:
        raise LoadstoneError(f"{source.path}: safetensors keeps the name '__metadata__' for itself. Rename the tensor.")
    return transfer


def _metadata(source: Checkpoint, more: Mapping[str, str] | None) -> dict[str, str]:
    """What each file's `__metadata__` says, checked: readers must find the ties noted beside it, and no others."""
    metadata = {**(more or {}), **_FORMAT}
    for key, value in metadata.items():
        if not (isinstance(key, str) and isinstance(value, str) and is_unicode(key + value)):
            raise LoadstoneError(f"{source.path}: safetensors' metadata are texts, and {shown(key)} is {shown(value)}.")
    stored = source.tensors.keys() - source.aliases.keys()
    found = recorded_ties({**source.aliases, **metadata, "total_size": ""}, stored)
    if wrong := found.items() ^ source.aliases.items():
        raise LoadstoneError(
            f"{source.path}: safetensors notes ties of tensors and other metadata side by side, and the entry "
            f"{shown(min(wrong)[0])} would be taken for the other. Rename it, or leave it out."
        )
    return metadata


def _shards(transfer: Transfer, limit: int | None) -> list[list[str]]:
    """The names for each file, in order: a file is closed before the tensor that would not fit."""
    shards, size = [list[str]()], 0
    for name in transfer.names:
        nbytes = transfer.nbytes(name)
        if limit is not None and shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def _write(transfer: Transfer, path: Path, names: Sequence[str], metadata: Mapping[str, str]) -> None:
    # Larger element types first, as the library does: then every tensor is aligned, and can be mapped.
    names = sorted(names, key=lambda name: -DTYPES[transfer.source.tensors[name].dtype].itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        info, start, end = transfer.source.tensors[name], end, end + transfer.nbytes(name)
        header[name] = {"dtype": CODES[info.dtype], "shape": list(info.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise LoadstoneError(
            f"{path}: its header would have {len(text):,} bytes, and safetensors allows {MAX_HEADER:,}. Write shards."
        )
    with Output(path) as output:
        output.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            transfer.write(name, output)
