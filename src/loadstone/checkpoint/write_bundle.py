"""Writes TensorFlow checkpoints (V2, "tensor bundles") without TensorFlow, a tensor at a time.

`tf.train.Saver` wants a session, or variables, that hold every tensor. Here the data are streamed first, their places
and checksums remembered, and the index is written last. TensorFlow has no ties: an alias is a second entry of the index
over the same bytes, which TensorFlow reads like any other.
Formats: `tensor_bundle.py`, `bundle_index.py`, `sstable.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from crc32c import crc32c

from ..errors import LoadstoneError
from .base import DTYPES, Checkpoint, TensorInfo
from .bundle_index import MAX_RANK, TYPES, VERSION
from .protobuf import BYTES, FIXED32, VARINT
from .sstable import FOOTER_SIZE, MAGIC, masked, masked_crc32c
from .streaming import Output, Progress, Transfer
from .wording import shown

_NUMBERS: Mapping[str, int] = MappingProxyType({name: number for number, name in TYPES.items() if name in DTYPES})
_BLOCK_SIZE = 4096  # bytes, LevelDB's default: any model's index then has several blocks
_RESTART_INTERVAL = 16  # entries, LevelDB's default


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor's bytes lie in the data file; `crc32c` is masked."""

    offset: int
    nbytes: int
    crc32c: int


def write_bundle(source: Checkpoint, prefix: Path, *, progress: Progress | None = None) -> list[Path]:
    """Write `PREFIX.data-00000-of-00001`, `PREFIX.index`, and `checkpoint`, which names the prefix, beside them.

    Returns the three files. Raises LoadstoneError for names and types that TensorFlow cannot have; nothing was written
    then.
    """
    transfer = Transfer(source, "a TensorFlow checkpoint", _NUMBERS, progress)
    _check(source)
    data = prefix.with_name(f"{prefix.name}.data-00000-of-00001")
    places: dict[str, _Place] = {}
    with Output(data) as output:
        for name in transfer.names:
            output.pad(DTYPES[source.tensors[name].dtype].itemsize)  # aligned, so that it can be mapped
            start = output.position
            crc = masked(transfer.write(name, output, crc32c))
            places[name] = _Place(start, transfer.nbytes(name), crc)
    entries = {
        name.encode(): _entry(info, places[source.aliases.get(name, name)]) for name, info in source.tensors.items()
    }
    index, state = prefix.with_name(f"{prefix.name}.index"), prefix.with_name("checkpoint")
    with Output(index) as output:
        _write_table(output, [(b"", _header()), *sorted(entries.items())])
    name = _escaped(prefix.name)
    state.write_text(f'model_checkpoint_path: "{name}"\nall_model_checkpoint_paths: "{name}"\n', encoding="ascii")
    return [data, index, state]


def _check(source: Checkpoint) -> None:
    for name, info in source.tensors.items():
        if not name or "\0" in name:  # the keys of the header, and of slices
            raise LoadstoneError(f"{source.path}: a TensorFlow checkpoint cannot hold the tensor name {shown(name)}.")
        if len(info.shape) > MAX_RANK:
            raise LoadstoneError(
                f"{source.path}: tensor {shown(name)} has {len(info.shape)} dimensions, and {MAX_RANK} are possible."
            )


def _escaped(name: str) -> str:
    """A string of protobuf's text format."""
    plain = set(range(0x20, 0x7F)) - set(b'"\\')
    return "".join(chr(byte) if byte in plain else f"\\{byte:03o}" for byte in name.encode("utf-8", "surrogateescape"))


# -- protocol buffers (BundleHeaderProto and BundleEntryProto of `core/protobuf/tensor_bundle.proto`)


def _header() -> bytes:
    return _integer(1, 1) + _message(3, _integer(1, VERSION))  # shards, version.producer


def _entry(info: TensorInfo, place: _Place) -> bytes:
    dims = b"".join(_message(2, _integer(1, dim)) for dim in info.shape)
    kind = _integer(1, _NUMBERS[info.dtype]) + _message(2, dims)
    checksum = _varint(6 << 3 | FIXED32) + struct.pack("<L", place.crc32c)
    return kind + _integer(4, place.offset) + _integer(5, place.nbytes) + checksum


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3 | VARINT) + _varint(value) if value else b""  # zero is what an absent field means


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | BYTES) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


# -- the sorted string table


def _write_table(output: Output, entries: Iterable[tuple[bytes, bytes]]) -> None:
    """Entries in the order of their keys as data blocks, an empty metaindex, the index of the blocks, the footer."""
    handles = []
    for run in _runs(entries):
        handles.append((run[-1][0], _append(output, _block(run, _RESTART_INTERVAL))))
    footer = _append(output, _block([], 1)) + _append(output, _block(handles, 1))
    output.write(footer.ljust(FOOTER_SIZE - len(MAGIC), b"\0") + MAGIC)


def _runs(entries: Iterable[tuple[bytes, bytes]]) -> Iterator[list[tuple[bytes, bytes]]]:
    """The entries of each data block: as many as reach the block size."""
    run, size = list[tuple[bytes, bytes]](), 0
    for key, value in entries:
        run.append((key, value))
        size += len(key) + len(value)
        if size >= _BLOCK_SIZE:
            yield run
            run, size = [], 0
    if run:
        yield run


def _block(entries: Iterable[tuple[bytes, bytes]], restart_interval: int) -> bytes:
    """Each key without what it shares with the one before, but for every `restart_interval`-th, which is whole."""
    out, restarts, last = bytearray(), [0], b""
    for i, (key, value) in enumerate(entries):
        if i and i % restart_interval == 0:
            restarts.append(len(out))
        shared = _shared(key, last) if i % restart_interval else 0
        out += _varint(shared) + _varint(len(key) - shared) + _varint(len(value)) + key[shared:] + value
        last = key
    return bytes(out) + struct.pack(f"<{len(restarts) + 1}L", *restarts, len(restarts))


def _shared(key: bytes, last: bytes) -> int:
    return next((i for i, (a, b) in enumerate(zip(key, last, strict=False)) if a != b), min(len(key), len(last)))


def _append(output: Output, block: bytes) -> bytes:
    """Write a block and its trailer; returns its handle."""
    handle = _varint(output.position) + _varint(len(block))
    content = block + b"\0"  # not compressed
    output.write(content + struct.pack("<L", masked_crc32c(content)))
    return handle
