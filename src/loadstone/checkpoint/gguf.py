"""`Gguf`: reads GGUF files (v2, v3, little-endian); plain types zero-copy, block-quantised types as float32.

On disk: magic, version, two counts, metadata key-values, tensor infos, padding, the tensors' bytes. Source: ggml's
`docs/gguf.md` and `src/gguf.cpp`. The blocks themselves are decoded by the `gguf` package, imported at the first read.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError
from .base import DTYPES, Array, Checkpoint, TensorInfo, view
from .datafile import DataFile
from .wording import shown

VERSIONS = (2, 3)
MAX_HEADER = 100_000_000  # bytes; a vocabulary of 256k tokens takes some 10 million
_MAX_DIMS = 4  # ggml's
_MAX_DEPTH = 4  # of arrays in arrays, which the format allows and no program is known to write
_CHUNK = 1 << 17  # elements decoded at once: the pieces stay in cache, and no second copy of the tensor is made
_AGAIN = "Download or copy it again."


class Block(NamedTuple):
    """An element type of ggml: `size` elements share `nbytes` bytes."""

    name: str
    size: int
    nbytes: int


_PLAIN: Mapping[str, str] = MappingProxyType(
    {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
    | {"I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}
)
# `enum ggml_type` of ggml.h. Here rather than from gguf.constants, whose import takes longer than opening a file.
BLOCKS: Mapping[int, Block] = MappingProxyType(
    {
        code: Block(*block)
        for code, block in {
            0: ("F32", 1, 4), 1: ("F16", 1, 2), 28: ("F64", 1, 8), 30: ("BF16", 1, 2),
            24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
            2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
            8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
            10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
            14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
            16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 22: ("IQ2_S", 256, 82), 18: ("IQ3_XXS", 256, 98),
            21: ("IQ3_S", 256, 110), 19: ("IQ1_S", 256, 50), 29: ("IQ1_M", 256, 56), 20: ("IQ4_NL", 32, 18),
            23: ("IQ4_XS", 256, 136), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
            39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
        }.items()
    }
)  # fmt: skip
_BLOCK_NAMES = frozenset(block.name for block in BLOCKS.values())
# Types that ggml has removed. Files with them exist, and nothing reads them any more.
_REMOVED: Mapping[int, str] = MappingProxyType(
    {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"}
    | {36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"}
)

# `enum gguf_type`: the numbers by their numpy type, then the two that have a length.
_NUMBERS: Mapping[int, str] = MappingProxyType(
    {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
)
_STRING, _ARRAY = 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor info; `offset` counts from the start of the data. `nbytes` is None for a type of unknown size."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int | None


class Gguf(Checkpoint):
    """One GGUF file. `metadata` holds its key-values as plain Python values.

    A string that is not UTF-8 (a token that is half a character, say) keeps its bytes as surrogate escapes:
    `text.encode("utf-8", "surrogateescape")` gives them back. `notes` says which key has such strings.

    Attributes:
        key_bytes: metadata key -> the bytes that it and its value take in the file.
        header_bytes: everything before the padding that precedes the tensors.

    Raises:
        FormatError: the file is truncated, damaged, or of another version or byte order.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, format="gguf")
        self._data = DataFile(path)
        header = _Header(path, self._data)
        tensor_count = header.begin()
        self.metadata, self.notes = header.metadata, header.notes
        entries = header.entries(tensor_count)
        self.key_bytes, self.header_bytes = header.key_bytes, header.at
        align = self.metadata.get("general.alignment", 32)
        if type(align) is not int or align <= 0 or align & (align - 1):
            raise FormatError(path, f"its general.alignment is {shown(align)}, which is no power of two.", _AGAIN)
        base = -(-header.at // align) * align
        spans = self._check_spans(entries, base, align)
        self._places = {name: base + entry.offset for name, entry in entries.items()}
        for name, e in entries.items():
            self.tensors[name] = TensorInfo(e.shape, _PLAIN.get(e.dtype, e.dtype), spans[name], path.name)

    def read(self, name: str) -> Array:
        """A view of the file, mapped, or float32 decoded from blocks.

        Raises FormatError for a block type that the installed `gguf` package cannot decode.
        """
        info = self.info(name)
        data = self._data.tensor(self._places[name], info.nbytes)
        try:
            if dtype := DTYPES.get(info.dtype):
                return view(data, 0, info.shape, dtype)
            out = np.empty(info.shape if info.dtype in _BLOCK_NAMES else 0, np.float32)
        except (ValueError, MemoryError) as error:  # an empty tensor with absurd dimensions, or a huge one
            problem = f"tensor {shown(name)} has a shape that numpy cannot hold ({error})."
            raise FormatError(self.path, problem, _AGAIN) from None
        try:
            _decode(np.frombuffer(data, np.uint8), info.dtype, out.reshape(-1))
        except (KeyError, NotImplementedError):
            problem = f"tensor {shown(name)} is {info.dtype}, which the gguf package cannot decode."
            hint = (
                "Update it (pip install -U gguf), or requantise the file: llama-quantize --allow-requantize ... Q8_0."
            )
            raise FormatError(self.path, problem, hint) from None
        return out

    def read_blocks(self, name: str) -> Array:
        """A block-quantised matrix as it is stored: bytes, [rows, bytes of a row]; a view of the file, mapped."""
        info = self.info(name)
        shape = (info.shape[0], info.nbytes // max(info.shape[0], 1))
        return view(self._data.tensor(self._places[name], info.nbytes), 0, shape, np.dtype(np.uint8))

    def _check_spans(self, entries: dict[str, _Entry], base: int, align: int) -> dict[str, int]:
        """Size in bytes of each tensor, which must lie inside the file, aligned, and share no byte with another."""
        available = len(self._data) - base
        spans: dict[str, int] = {}
        following, after = available, "the end of the file"
        # Backwards, as what is known of a type of unknown size is where the next tensor begins.
        for name, entry in sorted(
            entries.items(), key=lambda item: (item[1].offset, item[1].nbytes or 0), reverse=True
        ):
            where = f"tensor {shown(name)} begins at byte {entry.offset:,} of the data"
            if entry.offset % align:
                raise FormatError(self.path, f"{where}, which is no multiple of the alignment {align}.", _AGAIN)
            if entry.nbytes == 0:
                spans[name] = 0
                continue
            nbytes = max(following - entry.offset, 0) if entry.nbytes is None else entry.nbytes
            if (excess := entry.offset + nbytes - available) > 0:
                problem = (
                    f"it is truncated: tensor {shown(name)} lacks its last {min(excess, nbytes):,} of {nbytes:,} bytes."
                )
                raise FormatError(self.path, problem, _AGAIN)
            if entry.offset + nbytes > following:
                problem = f"{where} and has {nbytes:,}, which overlaps {after} at {following:,}."
                raise FormatError(self.path, problem, _AGAIN)
            spans[name] = nbytes
            following, after = entry.offset, f"tensor {shown(name)}"
        return spans


def _decode(blocks: NDArray[np.uint8], type_name: str, out: NDArray[np.float32]) -> None:
    """Decode bytes into the flat `out`. Raises KeyError or NotImplementedError for a type that gguf does not know."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    qtype = GGMLQuantizationType[type_name]
    size, nbytes = GGML_QUANT_SIZES[qtype]
    step = max(1, _CHUNK // size)
    with np.errstate(all="ignore"):  # a scale may be inf or nan; that is the file's value
        for i in range(0, len(out) // size, step):
            piece = blocks[i * nbytes : (i + step) * nbytes]
            out[i * size : (i + step) * size] = dequantize(piece.reshape(1, -1), qtype).reshape(-1)


class _Header:
    """A cursor over the header. Every length is compared with the bytes that are left before anything is made of it."""

    def __init__(self, path: Path, file: DataFile) -> None:
        self.path, self.size, self.at = path, len(file), 0
        self.end = min(self.size, MAX_HEADER)
        self.data = file.map(0, self.end)
        self.metadata: dict[str, Any] = {}
        self.key_bytes: dict[str, int] = {}
        self.notes: list[str] = []
        self._what = "its header"

    def begin(self) -> int:
        """Read everything before the tensor infos; the number of these."""
        if self.data[:4] != b"GGUF":
            raise self._bad("it does not begin with GGUF.")
        self.at = 4
        self._check_version(self._unpack(_U32))
        tensors = self._count("tensors", 8 + 4 + 4 + 8)
        for number in range(self._count("metadata keys", 8 + 4 + 1)):
            self._what, start = f"metadata key {number}", self.at
            key = self._name()
            self._what = f"the metadata key {shown(key)}"
            if key in self.metadata:
                raise self._bad(f"{self._what} occurs twice.")
            self.metadata[key] = self._value(self._unpack(_U32))
            self.key_bytes[key] = self.at - start
        return tensors

    def entries(self, count: int) -> dict[str, _Entry]:
        entries: dict[str, _Entry] = {}
        for number in range(count):
            self._what = f"the entry of tensor {number}"
            name = self._name()
            self._what = f"the entry of tensor {shown(name)}"
            if name in entries:
                raise self._bad(f"it has two tensors called {shown(name)}.")
            entries[name] = self._entry(name)
        return entries

    def _entry(self, name: str) -> _Entry:
        dims = self._unpack(_U32)
        if dims > _MAX_DIMS:
            raise self._bad(f"tensor {shown(name)} has {dims:,} dimensions, and ggml allows {_MAX_DIMS}.")
        shape = tuple(self._unpack(_U64) for _ in range(dims))[::-1]  # stored with the fastest dimension first
        code, offset = self._unpack(_U32), self._unpack(_U64)
        if code not in BLOCKS:
            return _Entry(_REMOVED.get(code, f"ggml type {code}"), shape, offset, None)
        block = BLOCKS[code]
        elements, row = 1, shape[-1] if shape else 1
        for dim in shape:
            elements *= dim
        if row % block.size:
            blocks = f"a multiple of the {block.size} in a block of {block.name}"
            raise self._bad(f"tensor {shown(name)} has rows of {row:,} elements, not {blocks}.")
        return _Entry(block.name, shape, offset, elements // block.size * block.nbytes)

    def _check_version(self, version: int) -> None:
        if version & 0xFFFF == 0:
            raise self._bad(
                "it is a big-endian GGUF, and Loadstone reads little-endian ones.", "Convert it: gguf-convert-endian."
            )
        if version not in VERSIONS:
            problem = f"it is GGUF version {version}, and Loadstone reads {' and '.join(map(str, VERSIONS))}."
            raise self._bad(problem, "Convert the model again with today's llama.cpp, or update Loadstone.")

    def _bad(self, problem: str, hint: str = _AGAIN) -> FormatError:
        return FormatError(self.path, problem, hint)

    def _need(self, nbytes: int) -> int:
        """Where the next `nbytes` bytes begin; the cursor moves behind them."""
        begin, self.at = self.at, self.at + nbytes
        if self.at > self.end:
            limit = "its header is longer than" if self.end < self.size else "it is truncated: the file ends at"
            raise self._bad(f"{limit} {self.end:,} bytes, in {self._what}.")
        return begin

    def _unpack(self, layout: struct.Struct) -> int:
        value: int = layout.unpack_from(self.data, self._need(layout.size))[0]
        return value

    def _count(self, what: str, each: int) -> int:
        """A count of things that take at least `each` bytes."""
        count = self._unpack(_U64)
        if count * each > self.end - self.at:
            problem = (
                f"{self._what} announces {count:,} {what}, which the {self.end - self.at:,} bytes after it cannot hold."
            )
            raise self._bad(problem)
        return count

    def _name(self) -> str:
        try:
            return self._texts(1, "strict")[0]
        except UnicodeDecodeError:
            raise self._bad(f"the name of {self._what} is not UTF-8.") from None

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == _ARRAY:
            if depth == _MAX_DEPTH:
                raise self._bad(f"{self._what} has arrays nested deeper than {_MAX_DEPTH}.")
            return self._array(self._unpack(_U32), depth + 1)
        return self._strings(1)[0] if kind == _STRING else self._numbers(kind, 1)[0]

    def _array(self, kind: int, depth: int) -> list[Any]:
        if kind == _ARRAY:
            return [self._value(_ARRAY, depth) for _ in range(self._count("arrays", 4 + 8))]
        if kind == _STRING:
            return self._strings(self._count("strings", 8))
        return self._numbers(kind, self._count("numbers", 1))

    def _numbers(self, kind: int, count: int) -> list[Any]:
        if kind not in _NUMBERS:
            raise self._bad(f"{self._what} has the unknown type {kind}.")
        dtype = np.dtype(_NUMBERS[kind])
        numbers: list[Any] = np.frombuffer(self.data, dtype, count, self._need(count * dtype.itemsize)).tolist()
        return numbers

    def _strings(self, count: int) -> list[str]:
        try:
            return self._texts(count, "strict")
        except UnicodeDecodeError:
            self.notes.append(f"{self._what} has strings that are not UTF-8; their bytes are kept as surrogate escapes")
            return self._texts(count, "surrogateescape")

    def _texts(self, count: int, errors: str) -> list[str]:
        """The hot loop of opening: a vocabulary has some 100 000 strings. The cursor stays if one cannot be decoded."""
        data, at, end, unpack = self.data, self.at, self.end, _U64.unpack_from
        texts = []
        for _ in range(count):
            begin = at + 8
            if begin > end or (at := begin + unpack(data, at)[0]) > end:
                self._need(end)  # raises
            texts.append(str(data[begin:at], "utf-8", errors))
        self.at = at
        return texts
