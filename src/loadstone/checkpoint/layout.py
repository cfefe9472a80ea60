"""`layout`: every byte of a checkpoint's files and what it is there for: a tensor, or a part of the format.

Each format's runs add up to its file's size: what is not a tensor is measured from the headers that describe it, and a
remainder that nothing describes is called that.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FormatError, LoadstoneError
from .base import DTYPES, Checkpoint
from .bundle_index import Piece, read_index
from .datafile import DataFile
from .gguf import Gguf
from .pickle_vm import Record, printable
from .safetensors import Safetensors
from .shards import Sharded, stored_names
from .tensor_bundle import TensorBundle, find_index
from .torch_archive import Archive, open_archive
from .torch_pickle import TorchPickle
from .torch_state import find_weights
from .torch_values import TensorRef

UNCLAIMED = "bytes that nothing in the file describes"
UNUSED_STORAGE = "parts of storages that no tensor uses"
OPTIMIZER = "optimizer state"
_LOCAL_HEADER = struct.Struct("<26xHH")  # lengths of the name and of the extra field, which is torch's padding
_DESCRIPTOR, _DESCRIPTOR_SIZE = (
    1 << 3,
    24,
)  # the flag for a repetition of sizes and CRC behind the content; bytes at most


@dataclass(frozen=True, slots=True)
class Run:
    """`nbytes` bytes of `file`. If `is_tensor`, `what` is a name in the checkpoint's `tensors`; they may lie apart."""

    what: str
    nbytes: int
    file: Path
    is_tensor: bool = False


def layout(checkpoint: Checkpoint) -> list[Run]:
    """All runs of all files of a checkpoint; a file's runs add up to its size. Aliases take no bytes.

    Raises LoadstoneError for a checkpoint that lies in no file.
    """
    if isinstance(checkpoint, Sharded):
        runs = [run for part in checkpoint.parts.values() for run in layout(part)]
        if checkpoint.path not in {run.file for run in runs}:
            runs.append(Run("index of the shards", checkpoint.path.stat().st_size, checkpoint.path))
    elif isinstance(checkpoint, TensorBundle):
        runs = list(_bundle(checkpoint))
    else:
        file = checkpoint.path
        runs = [Run(what, nbytes, file, is_tensor) for what, nbytes, is_tensor in _single(checkpoint)]
        rest = file.stat().st_size - sum(run.nbytes for run in runs)
        if rest < 0:
            raise FormatError(file, f"its parts overlap: together they have {-rest:,} bytes more than the file.")
        runs.append(Run(UNCLAIMED, rest, file))
    return [run for run in runs if run.nbytes]


_Pieces = Iterator[tuple[str, int, bool]]  # what, bytes, whether it is a tensor


def _single(checkpoint: Checkpoint) -> _Pieces:
    if isinstance(checkpoint, Safetensors):
        return _safetensors(checkpoint)
    if isinstance(checkpoint, Gguf):
        return _gguf(checkpoint)
    if isinstance(checkpoint, TorchPickle):
        return _torch(checkpoint)
    raise LoadstoneError(
        f"{checkpoint.path}: this checkpoint lies in no file, so it has no size that could be explained."
    )


def _stored(checkpoint: Checkpoint) -> _Pieces:
    return ((name, checkpoint.tensors[name].nbytes, True) for name in stored_names(checkpoint))


def _safetensors(checkpoint: Safetensors) -> _Pieces:
    yield from _stored(checkpoint)
    header = DataFile(checkpoint.path).read(0, 8)
    yield "header: names, types, shapes and places", 8 + int.from_bytes(header, "little"), False


def _gguf(checkpoint: Gguf) -> _Pieces:
    yield from _stored(checkpoint)
    vocabulary = sum(size for key, size in checkpoint.key_bytes.items() if key.startswith("tokenizer."))
    keys, preamble = sum(checkpoint.key_bytes.values()), 4 + 4 + 8 + 8
    yield "vocabulary and tokenizer", vocabulary, False
    yield "metadata", preamble + keys - vocabulary, False
    yield "names, types, shapes and places of the tensors", checkpoint.header_bytes - preamble - keys, False
    align = checkpoint.metadata.get("general.alignment", 32)
    tensors = [checkpoint.tensors[name].nbytes for name in stored_names(checkpoint)]
    padding = sum(-nbytes % align for nbytes in (checkpoint.header_bytes, *tensors))
    gaps = checkpoint.path.stat().st_size - checkpoint.header_bytes - sum(tensors)
    yield f"padding to multiples of {align} bytes", min(padding, gaps), False


# -- PyTorch


def _torch(checkpoint: TorchPickle) -> _Pieces:
    file = DataFile(checkpoint.path)
    archive = open_archive(file)
    weights = find_weights(checkpoint.path, archive.root, archive.globals_seen).tensors
    left = {key: region.stored for key, region in archive.regions.items()}
    for name in stored_names(checkpoint):
        yield name, _take(left, weights[name], checkpoint.tensors[name].nbytes), True
    others: Counter[str] = Counter()
    known = set(map(id, weights.values()))
    for label, ref in _other_tensors(archive.root):
        if id(ref) not in known and not ref.problem():
            others[label] += _take(left, ref, math.prod(ref.shape) * DTYPES[ref.dtype].itemsize)
    yield from ((label, nbytes, False) for label, nbytes in others.items())
    yield UNUSED_STORAGE, sum(left.values()), False
    yield from (_zip if archive.format == "pytorch-zip" else _legacy)(file, archive)


def _take(left: dict[str, int], ref: TensorRef, nbytes: int) -> int:
    """What a tensor takes of a storage that others may have taken from: tensors that overlap are counted once."""
    taken = min(left[ref.storage.key], nbytes)
    left[ref.storage.key] -= taken
    return taken


def _other_tensors(root: Any) -> Iterator[tuple[str, TensorRef]]:
    """Every tensor in the file with what its keys say of it. Each container once: they may contain themselves."""
    pending: list[tuple[str, str, Any]] = [("", "", root)]  # the outermost key, the innermost, the value
    seen = set[int]()
    while pending:
        first, last, node = pending.pop()
        if isinstance(node, TensorRef):
            yield _label(first, last), node
        elif isinstance(node, dict | list | tuple | set | frozenset | Record) and id(node) not in seen:
            seen.add(id(node))
            pending += [(first or key, key or last, item) for key, item in _inside(node)]


def _inside(node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        return ((key if isinstance(key, str) else "", item) for key, item in node.items())
    if isinstance(node, Record):
        return (("", item) for item in (node.args, node.state, node.items, node.entries))
    return (("", item) for item in node)


def _label(first: str, last: str) -> str:
    if "optim" in first.lower():
        return f"{OPTIMIZER}: {printable(last, 40)}"
    return f"tensors under '{printable(first, 40)}'" if first else "tensors without a name"


def _zip(file: DataFile, archive: Archive) -> _Pieces:
    with file.stream() as stream, zipfile.ZipFile(stream) as directory:
        infos, start = directory.infolist(), directory.start_dir
    storages = {region.offset for region in archive.regions.values()}
    infos.sort(key=lambda info: info.header_offset)
    headers = 0
    for info, following in zip(infos, [*(info.header_offset for info in infos[1:]), start], strict=True):
        begin = _content(file, info)
        headers += begin - info.header_offset
        if info.flag_bits & _DESCRIPTOR:
            headers += min(max(following - begin - info.compress_size, 0), _DESCRIPTOR_SIZE)
        if begin not in storages or not info.compress_size:
            is_pickle = info.filename.split("/")[-1] == "data.pkl"
            yield (
                "pickle: names, types, shapes and plain values" if is_pickle else "small zip records",
                info.compress_size,
                False,
            )
    yield "zip headers of its records, with padding", headers, False
    yield "zip directory", len(file) - start, False


def _content(file: DataFile, info: zipfile.ZipInfo) -> int:
    """Where a record's content begins, behind its header."""
    if not 0 <= info.header_offset <= len(file) - _LOCAL_HEADER.size:
        raise FormatError(file.path, f"its record {printable(info.filename)} does not lie in the file.")
    lengths = _LOCAL_HEADER.unpack(file.read(info.header_offset, _LOCAL_HEADER.size))
    return info.header_offset + _LOCAL_HEADER.size + sum(lengths)


def _legacy(file: DataFile, archive: Archive) -> _Pieces:
    regions = archive.regions.values()
    first = min((region.offset - 8 for region in regions), default=len(file))
    yield "pickles: names, types, shapes and plain values", first, False
    yield "lengths of the storages", 8 * len(regions), False


# -- TensorFlow


def _bundle(checkpoint: TensorBundle) -> Iterator[Run]:
    index = find_index(checkpoint.path)
    yield Run("index: names, types, shapes, places and checksums", index.stat().st_size, index)
    shards, entries = read_index(index)
    prefix = index.name.removesuffix(".index")
    files = [index.with_name(f"{prefix}.data-{i:05d}-of-{shards:05d}") for i in range(shards)]
    left = {i: file.stat().st_size for i, file in enumerate(files) if file.is_file()}
    seen = set[Piece]()
    for name, entry in entries.items():
        for piece in entry.pieces:
            if piece in seen or not piece.nbytes:  # an alias
                continue
            seen.add(piece)
            left[piece.shard] -= piece.nbytes
            what = name if entry.readable else f"{entry.dtype} values, which are no numbers"
            yield Run(what, piece.nbytes, files[piece.shard], entry.readable)
    yield from (Run(UNCLAIMED, nbytes, files[i]) for i, nbytes in left.items())
