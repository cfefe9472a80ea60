"""What a GGUF file says before its tensors' bytes: key-values, and each tensor's name, type, shape and place.

Source: ggml's `docs/gguf.md`, `src/gguf.cpp` and `include/ggml.h`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from ..errors import FormatError
from .datafile import DataFile
from .wording import shown

VERSIONS = (2, 3)
MAX_HEADER = 100_000_000  # bytes; a vocabulary of 256k tokens takes some 10 million
_MAX_DIMS = 4  # ggml's
_MAX_DEPTH = 4  # of arrays in arrays, which the format allows and no program is known to write
_MANY = 64  # strings from which on a list stays in the file
_PIECE = 4096  # strings looked at together: many enough, and a bound for the memory that it takes
AGAIN = "Download or copy it again."


class Block(NamedTuple):
    """An element type of ggml: `size` elements share `nbytes` bytes."""

    name: str
    size: int
    nbytes: int


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
class Entry:
    """One tensor info; `offset` counts from the start of the data. `nbytes` is None for a type of unknown size."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int | None


@dataclass(frozen=True, slots=True)
class _Texts:
    """Where a list of strings lies in the file, and how its bytes become text."""

    offset: int
    nbytes: int
    count: int
    errors: str


class KeyValues(Mapping[str, Any]):
    """A file's key-values as plain Python values; `dict(...)` of it is all of them.

    A list of strings stays in the file and is made anew each time that it is asked for: GPT-2's vocabulary takes 10 MB
    and as long as all else that is done to open the file, and who only runs a model never looks at it.
    Asking raises FormatError if the file was changed meanwhile.
    """

    def __init__(self, values: Mapping[str, Any], file: DataFile) -> None:
        self._values, self._file = values, file

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if not isinstance(value, _Texts):
            return value
        raw = self._file.read(value.offset, value.nbytes)
        try:
            texts, end = _read_texts(raw, 0, value.count, value.errors)
        except (struct.error, OverflowError, UnicodeDecodeError):
            end = -1
        if end != value.nbytes:
            raise FormatError(self._file.path, "it was changed while it was being read.", AGAIN)
        return texts

    def __contains__(self, key: object) -> bool:  # a mapping's own would read the value
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:  # copies and pickles cannot share the open file
        return dict, (dict(self),)

    def __repr__(self) -> str:
        return f"<{len(self)} key-values of {self._file.path}>"


class Header:
    """A cursor over the header. Every length is compared with the bytes that are left before anything is made of it."""

    def __init__(self, path: Path, file: DataFile) -> None:
        self.path, self.size, self.at = path, len(file), 0
        self.end = min(self.size, MAX_HEADER)
        self.data = file.map(0, self.end)
        self.values: dict[str, Any] = {}
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
            if key in self.values:
                raise self._bad(f"{self._what} occurs twice.")
            self.values[key] = self._value(self._unpack(_U32))
            self.key_bytes[key] = self.at - start
        return tensors

    def entries(self, count: int) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        for number in range(count):
            self._what = f"the entry of tensor {number}"
            name = self._name()
            self._what = f"the entry of tensor {shown(name)}"
            if name in entries:
                raise self._bad(f"it has two tensors called {shown(name)}.")
            entries[name] = self._entry(name)
        return entries

    def _entry(self, name: str) -> Entry:
        dims = self._unpack(_U32)
        if dims > _MAX_DIMS:
            raise self._bad(f"tensor {shown(name)} has {dims:,} dimensions, and ggml allows {_MAX_DIMS}.")
        shape = tuple(self._unpack(_U64) for _ in range(dims))[::-1]  # stored with the fastest dimension first
        code, offset = self._unpack(_U32), self._unpack(_U64)
        if code not in BLOCKS:
            return Entry(_REMOVED.get(code, f"ggml type {code}"), shape, offset, None)
        block = BLOCKS[code]
        elements, row = 1, shape[-1] if shape else 1
        for dim in shape:
            elements *= dim
        if row % block.size:
            blocks = f"a multiple of the {block.size} in a block of {block.name}"
            raise self._bad(f"tensor {shown(name)} has rows of {row:,} elements, not {blocks}.")
        return Entry(block.name, shape, offset, elements // block.size * block.nbytes)

    def _check_version(self, version: int) -> None:
        if version & 0xFFFF == 0:
            raise self._bad(
                "it is a big-endian GGUF, and Loadstone reads little-endian ones.", "Convert it: gguf-convert-endian."
            )
        if version not in VERSIONS:
            problem = f"it is GGUF version {version}, and Loadstone reads {' and '.join(map(str, VERSIONS))}."
            raise self._bad(problem, "Convert the model again with today's llama.cpp, or update Loadstone.")

    def _bad(self, problem: str, hint: str = AGAIN) -> FormatError:
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
        begin = self._need(self._unpack(_U64))
        try:
            return str(self.data[begin : self.at], "utf-8")
        except UnicodeDecodeError:
            raise self._bad(f"the name of {self._what} is not UTF-8.") from None

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == _ARRAY:
            if depth == _MAX_DEPTH:
                raise self._bad(f"{self._what} has arrays nested deeper than {_MAX_DEPTH}.")
            return self._array(self._unpack(_U32), depth + 1)
        return self._strings(1)[0] if kind == _STRING else self._numbers(kind, 1)[0]

    def _array(self, kind: int, depth: int) -> list[Any] | _Texts:
        if kind == _ARRAY:
            return [self._value(_ARRAY, depth) for _ in range(self._count("arrays", 4 + 8))]
        if kind == _STRING:
            count = self._count("strings", 8)
            return self._pass_strings(count) if depth == 1 and count >= _MANY else self._strings(count)
        return self._numbers(kind, self._count("numbers", 1))

    def _numbers(self, kind: int, count: int) -> list[Any]:
        if kind not in _NUMBERS:
            raise self._bad(f"{self._what} has the unknown type {kind}.")
        dtype = np.dtype(_NUMBERS[kind])
        numbers: list[Any] = np.frombuffer(self.data, dtype, count, self._need(count * dtype.itemsize)).tolist()
        return numbers

    def _strings(self, count: int) -> list[str]:
        begin = self.at
        for _ in range(count):
            self._need(self._unpack(_U64))
        try:
            return _read_texts(self.data, begin, count, "strict")[0]
        except UnicodeDecodeError:
            self._note_broken()
            return _read_texts(self.data, begin, count, "surrogateescape")[0]

    def _note_broken(self) -> None:
        self.notes.append(f"{self._what} has strings that are not UTF-8; their bytes are kept as surrogate escapes")

    def _pass_strings(self, count: int) -> _Texts:
        """Find where a list of strings ends, and whether all of it is UTF-8: opening waits for some 100 000 of them."""
        begin, broken = self.at, False
        for done in range(0, count, _PIECE):
            broken |= self._pass_piece(min(count - done, _PIECE))
        if broken:
            self._note_broken()
        return _Texts(begin, self.at - begin, count, "surrogateescape" if broken else "strict")

    def _pass_piece(self, count: int) -> bool:
        """The strings are decoded together, with zeros for the lengths between them: whether that failed."""
        data, begin, at, length, places = self.data, self.at, self.at, _U64.unpack_from, []
        try:
            for _ in range(count):
                places.append(at - begin)
                at += 8 + length(data, at)[0]
        except (struct.error, OverflowError):
            at = self.end + 1
        self._need(at - begin)
        whole, of_lengths = np.frombuffer(bytearray(data[begin:at]), np.uint8), np.array(places, np.intp)
        for i in range(8):
            whole[of_lengths + i] = 0
        try:
            whole.tobytes().decode()
        except UnicodeDecodeError:
            return True
        return False


def _read_texts(data: bytes | mmap, at: int, count: int, errors: str) -> tuple[list[str], int]:
    """Strings that lie one behind the other, each after its length, and where they end.

    Raises UnicodeDecodeError if `errors` says so; struct.error or OverflowError if they are not those that were seen.
    """
    texts = []
    for _ in range(count):
        begin = at + 8
        at = begin + _U64.unpack_from(data, at)[0]
        texts.append(str(data[begin:at], "utf-8", errors))
    return texts, at
