"""Safetensors files written by hand, and the verdict of the `safetensors` library on them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, deserialize

from loadstone.checkpoint.base import DTYPES
from loadstone.checkpoint.safetensors import Safetensors
from loadstone.errors import FormatError, LoadstoneError

BITS = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64},
    **{"U64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}


def pack(header: str | bytes, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype: str = "U8", shape: str = "[2]", offsets: str = "[0,2]", more: str = "") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}{more}}}'


def one(dtype: str = "U8", shape: str = "[2]", offsets: str = "[0,2]", more: str = "") -> str:
    """A header with one tensor, `a`; `more` is the JSON value of a field `x` that no reader knows."""
    return '{"a":' + entry(dtype, shape, offsets, f',"x":{more}' if more else "") + "}"


def ours(path: Path, raw: bytes) -> Safetensors | None:
    path.write_bytes(raw)
    try:
        return Safetensors(path)
    except FormatError:
        return None


def judge(raw: bytes) -> dict[str, Any] | None:
    try:
        return dict(deserialize(raw))  # type: ignore[no-untyped-call,unused-ignore]
    except SafetensorError:
        return None


def agree(path: Path, raw: bytes) -> bool:
    """Both accept and every tensor is the same byte for byte, or both refuse. Returns whether they accept."""
    expected, found = judge(raw), ours(path, raw)
    assert (expected is None) == (found is None), raw[8:200]
    if expected is None or found is None:
        return False
    assert set(found.tensors) - set(found.aliases) == set(expected)
    for name, want in expected.items():
        info = found.info(name)
        assert list(info.shape) == want["shape"]
        assert info.nbytes == len(want["data"])
        try:
            array = found.read(name)
        except LoadstoneError:
            assert info.dtype not in DTYPES or max(info.shape) >= 2**62 or len(info.shape) > 32
            continue
        assert (array.shape, array.dtype) == (info.shape, DTYPES[info.dtype])
        assert array.tobytes() == bytes(want["data"])
    return True
