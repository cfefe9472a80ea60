"""The `.index` file of a TensorFlow tensor bundle: which tensor lies at which bytes of which data shard.

A sorted string table from "" to a BundleHeaderProto and from each tensor's name to a BundleEntryProto. A partitioned
variable's entry lists its slices; each slice has an entry of its own under an encoded key that starts with a zero byte.
Sources: TensorFlow's `core/protobuf/tensor_bundle.proto`, `core/framework/{types,tensor_shape,tensor_slice,versions}
.proto`, `core/util/saved_tensor_slice_util.cc` (slice keys) and `core/lib/strings/ordered_code.cc` (their integers).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path

from ..errors import FormatError
from .base import DTYPES
from .datafile import DataFile
from .protobuf import CorruptError, Message
from .sstable import read_table

# TensorFlow's `DataType` by its number: a name from `DTYPES`, or, for what numpy cannot hold, TensorFlow's own name.
TYPES: Mapping[int, str] = dict(
    enumerate(
        "float32 float64 int32 uint8 int16 int8 string complex64 int64 bool qint8 quint8 qint32 bfloat16 qint16 "
        "quint16 uint16 complex128 float16 resource variant uint32 uint64 float8_e5m2 float8_e4m3fn float8_e4m3fnuz "
        "float8_e4m3b11fnuz float8_e5m2fnuz int4 uint4 int2 uint2 float4_e2m1fn".split(),
        start=1,
    )
)
MAX_INDEX = 100_000_000  # bytes; that of a model with 100,000 tensors has some 5 million
VERSION = 1  # of the tensor bundle format, since 2016
_SLICE = b"\0"  # the ordered code of 0, with which the key of every slice begins
_RESAVE = "Load it where it was written, and save it again in the usual form."
MAX_RANK = 32  # what every numpy can hold; TensorFlow's own limit is 254


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive bytes of one shard: a tensor, or one slice of a partitioned variable. `crc32c` is masked."""

    shard: int
    offset: int
    nbytes: int
    crc32c: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: its pieces, in order along `axis` (a partitioned variable has several, anything else just one)."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    axis: int = 0

    @property
    def readable(self) -> bool:
        """Whether numpy can hold it; strings, resources and 4-bit types it cannot."""
        return self.dtype in DTYPES


def read_index(path: Path) -> tuple[int, dict[str, Entry]]:
    """The number of data shards, and every tensor by name. Raises FormatError if the file is damaged or unsupported."""
    try:
        return _read(path)
    except CorruptError as error:
        raise FormatError(path, f"{error}", "If it was downloaded or copied, do that again.") from None


def _read(path: Path) -> tuple[int, dict[str, Entry]]:
    file = DataFile(path)
    if len(file) > MAX_INDEX:
        raise FormatError(path, f"it has {len(file):,} bytes, and no index has more than {MAX_INDEX:,}.", _RESAVE)
    rows = read_table(memoryview(file.map(0, len(file))))
    key, header = next(rows, (b"?", b""))
    if key != b"":
        raise CorruptError("it is a sorted string table without the header of a TensorFlow checkpoint.")
    shards = _shard_count(path, Message(header))
    table = dict(rows)
    entries = {_name(key): _entry(key, table) for key in table if not key.startswith(_SLICE)}
    for name, entry in entries.items():
        for piece in entry.pieces:
            if not 0 <= piece.shard < shards:
                raise CorruptError(f"tensor {name!r} lies in shard {piece.shard}, and there are {shards} shards.")
    _refuse_overlap(entries)
    return shards, entries


def _shard_count(path: Path, header: Message) -> int:
    # Both versions begin with the key "": field 1 is SavedTensorSlices.meta in V1, BundleHeaderProto.num_shards in V2.
    if header.has_bytes(1):
        raise FormatError(
            path,
            "it is a TensorFlow checkpoint of version 1 (before 2017), and Loadstone reads version 2.",
            "Load it in TensorFlow and save it again with tf.compat.v1.train.Saver(write_version=2).",
        )
    if header.integer(2) != 0:
        raise FormatError(path, "its tensors are big-endian, which Loadstone does not read.", _RESAVE)
    needed = max((version.integer(2) for version in header.messages(3)), default=0)
    if needed > VERSION:
        raise FormatError(
            path, f"it asks for version {needed} of the tensor bundle format; {VERSION} is known.", _RESAVE
        )
    if header.integer(1) < 1:
        raise CorruptError(f"its header declares {header.integer(1)} data shards.")
    return header.integer(1)


def _name(key: bytes) -> str:
    try:
        return key.decode()
    except UnicodeDecodeError:
        raise CorruptError(f"the tensor name {key!r} is not UTF-8.") from None


def _entry(key: bytes, table: Mapping[bytes, bytes]) -> Entry:
    try:
        message = Message(table[key])
        dtype = _dtype(message)
        shape = _shape(message, dtype)
        if not message.messages(7):
            return Entry(dtype, shape, (_piece(message, dtype, shape),))
        pieces, axis = _slices(key, message, dtype, shape, table)
        return Entry(dtype, shape, pieces, axis)
    except CorruptError as error:
        raise CorruptError(f"tensor {_name(key)!r}: {error}") from None


def _dtype(message: Message) -> str:
    number = message.integer(1)
    if number not in TYPES:
        raise CorruptError(f"it has the unknown type number {number}.")
    return TYPES[number]


def _shape(message: Message, dtype: str) -> tuple[int, ...]:
    dims = [dim.integer(1) for shape in message.messages(2) for dim in shape.messages(2)]
    itemsize = DTYPES[dtype].itemsize if dtype in DTYPES else 1
    if len(dims) > MAX_RANK or any(shape.integer(3) for shape in message.messages(2)):
        raise CorruptError(f"its shape has {len(dims)} dimensions (at most {MAX_RANK}), or is of unknown rank.")
    # The second test is numpy's own: even an empty array must have its other dimensions fit.
    if any(dim < 0 for dim in dims) or prod(max(dim, 1) for dim in dims) * itemsize >= 1 << 63:
        raise CorruptError(f"its shape {tuple(dims)} is negative or beyond all memory.")
    return tuple(dims)


def _piece(message: Message, dtype: str, shape: tuple[int, ...]) -> Piece:
    piece = Piece(message.integer(3), message.integer(4), message.integer(5), message.integer(6), shape)
    if piece.offset < 0 or piece.nbytes < 0:
        raise CorruptError(f"it has {piece.nbytes} bytes at offset {piece.offset}.")
    expected = prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else piece.nbytes
    if piece.nbytes != expected:
        raise CorruptError(f"{dtype} of shape {shape} takes {expected} bytes, and its entry declares {piece.nbytes}.")
    return piece


def _slices(
    key: bytes, message: Message, dtype: str, shape: tuple[int, ...], table: Mapping[bytes, bytes]
) -> tuple[tuple[Piece, ...], int]:
    """The slices of a partitioned variable in order, and the one axis that they cut (`tf.Variable` cuts no more)."""
    if not shape:
        raise CorruptError("it is a scalar, and has slices.")
    found: dict[bytes, tuple[list[int], Piece]] = {}
    for part in message.messages(7):
        extents = [(extent.integer(1), extent.integer(2, default=-1)) for extent in part.messages(1)]
        if len(extents) != len(shape):
            raise CorruptError(f"it has {len(shape)} dimensions, and one of its slices has {len(extents)}.")
        place = _slice_key(key, extents)
        if place not in table or place in found:
            raise CorruptError(f"its slice {extents} is not in the index, or twice.")
        sizes = tuple(dim if size == -1 else size for dim, (_, size) in zip(shape, extents, strict=True))
        stored = Message(table[place])
        if (_dtype(stored), _shape(stored, dtype)) != (dtype, sizes):
            raise CorruptError(f"its slice {extents} is stored with another type or shape.")
        found[place] = ([start for start, _ in extents], _piece(stored, dtype, sizes))
    ordered = sorted(found.values(), key=lambda item: item[0])
    cut = {axis for _, piece in ordered for axis, dim in enumerate(shape) if piece.shape[axis] != dim}
    axis = min(cut, default=0)
    ends = list(accumulate((piece.shape[axis] for _, piece in ordered), initial=0))
    starts = [[end if i == axis else 0 for i in range(len(shape))] for end in ends[:-1]]
    if len(cut) > 1 or ends[-1] != shape[axis] or starts != [start for start, _ in ordered]:
        raise CorruptError(f"its slices do not cover {shape} exactly along one axis.")
    return tuple(piece for _, piece in ordered), axis


def _slice_key(name: bytes, extents: Iterable[tuple[int, int]]) -> bytes:
    """The key of a slice's own entry: TensorFlow's ordered code of 0, the tensor's name, the rank, and each extent."""
    # The code escapes 0x00 and 0xff in the name; variables' names, being printable UTF-8, hold neither.
    bounds = [_signed(number) for extent in extents for number in extent]
    return _SLICE + name + b"\0\1" + _unsigned(len(bounds) // 2) + b"".join(bounds)


def _unsigned(number: int) -> bytes:
    size = (number.bit_length() + 7) // 8
    return bytes([size]) + number.to_bytes(size, "big")


def _signed(number: int) -> bytes:
    """Two's complement with 7 bits of room per byte, and as many leading bits flipped as there are bytes."""
    size = (number if number >= 0 else ~number).bit_length() // 7 + 1
    return ((number ^ -(1 << 7 * size)) & ((1 << 8 * size) - 1)).to_bytes(size, "big")


def _refuse_overlap(entries: Mapping[str, Entry]) -> None:
    """Two names may share all their bytes (a tie), never some of them. TensorFlow writes neither."""
    pieces = [(piece, entry.dtype, name) for name, entry in entries.items() for piece in entry.pieces if piece.nbytes]
    pieces.sort(key=lambda item: (item[0].shard, item[0].offset))
    for (left, left_type, left_name), (right, right_type, right_name) in pairwise(pieces):
        overlap = left.shard == right.shard and right.offset < left.offset + left.nbytes
        if overlap and (left, left_type) != (right, right_type):
            raise CorruptError(f"tensors {left_name!r} and {right_name!r} overlap in shard {left.shard}.")
