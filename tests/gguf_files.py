"""GGUF files written by hand, so that they can be wrong in one place."""

from __future__ import annotations

import struct
from collections.abc import Sequence

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def strings(values: Sequence[str | bytes]) -> bytes:
    """An array value of strings, its element type and length included."""
    return struct.pack("<IQ", STRING, len(values)) + b"".join(map(text, values))


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str | bytes, dims: Sequence[int], code: int, offset: int, n_dims: int | None = None) -> bytes:
    """A tensor info; `dims` with the fastest dimension first, as stored."""
    count = len(dims) if n_dims is None else n_dims
    return text(name) + struct.pack("<I", count) + struct.pack(f"<{len(dims)}QIQ", *dims, code, offset)


def gguf_file(
    pairs: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    n_tensors: int | None = None,
    n_pairs: int | None = None,
    alignment: int = 32,
) -> bytes:
    """The whole file. The counts are those of the sequences unless given."""
    counts = (len(tensors) if n_tensors is None else n_tensors, len(pairs) if n_pairs is None else n_pairs)
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join([*pairs, *tensors])
    return header + b"\0" * (-len(header) % alignment) + data
