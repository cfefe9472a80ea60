"""`Safetensors`: reads one safetensors file, zero-copy, bf16 and fp8 included.

On disk: the length of the header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, offsets), the bytes.
Accepts exactly the files that the `safetensors` library 0.8 accepts, whose rules are those of Rust's serde: numbers
of unsigned 64-bit range, no overflow, no lone surrogates, no holes, nesting of at most 127.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass
from math import isinf
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import FormatError
from .base import DTYPES, Array, Checkpoint, TensorInfo, view
from .datafile import DataFile
from .wording import few, shown

MAX_HEADER = 100_000_000  # bytes; the library's limit
_MAX_DEPTH = 127  # serde_json's
_USIZE = 1 << 64
_AGAIN = "Download or copy it again."
_FIELDS = ("dtype", "shape", "data_offsets")
# The header's name -> ours. F4 and F6 have none, as numpy has no types below a byte: they are listed, not read.
_NAMES: Mapping[str, str] = MappingProxyType(
    {"BOOL": "bool", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64"}
    | {"I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}
    | {"F16": "float16", "F32": "float32", "F64": "float64", "BF16": "bfloat16", "C64": "complex64"}
    | {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}
    | {"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"}
)
CODES: Mapping[str, str] = MappingProxyType({name: code for code, name in _NAMES.items()})  # ours -> the header's
_BITS: Mapping[str, int] = MappingProxyType(
    {code: DTYPES[name].itemsize * 8 for code, name in _NAMES.items()} | {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor of the header; offsets count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Safetensors(Checkpoint):
    """One safetensors file. A tie that `__metadata__` records becomes an alias.

    Raises:
        FormatError: the file is truncated, damaged, or no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, format="safetensors")
        self._data = DataFile(path)
        header = self._header()
        self._base = 8 + len(header)
        entries = self._entries(_parse(path, header))
        end = self._check_contiguous(entries)
        if end != (available := len(self._data) - self._base):
            raise self._wrong_size(entries, end, available)
        self._offsets = {name: self._base + entry.start for name, entry in entries.items()}
        for name, e in entries.items():
            self.tensors[name] = TensorInfo(e.shape, _NAMES.get(e.dtype, e.dtype), e.end - e.start, path.name)
        self.aliases = recorded_ties(self.metadata, entries)
        self.tensors |= {name: self.tensors[kept] for name, kept in self.aliases.items()}

    def read(self, name: str) -> Array:
        """A view of the file, mapped. Raises FormatError for the packed types F4 and F6, which numpy cannot hold."""
        info = self.info(name)
        if info.dtype not in DTYPES:
            problem = (
                f"tensor {shown(name)} is {info.dtype}, whose elements are smaller than a byte: numpy has no such type."
            )
            raise self._bad(problem, "Convert it to BF16 with the program that wrote it.")
        data = self._data.tensor(self._offsets[self.aliases.get(name, name)], info.nbytes)
        try:
            return view(data, 0, info.shape, DTYPES[info.dtype])
        except ValueError as error:  # an empty tensor with absurd dimensions, or more of them than numpy allows
            raise self._bad(f"tensor {shown(name)} has a shape that numpy cannot hold ({error}).") from None

    def _bad(self, problem: str, hint: str = _AGAIN) -> FormatError:
        return FormatError(self.path, problem, hint)

    def _header(self) -> bytes:
        size = len(self._data)
        if size < 8:
            raise self._bad(
                f"it has {size} bytes, and a safetensors file begins with the 8 bytes of its header's length."
            )
        length = int.from_bytes(self._data.read(0, 8), "little")
        if length > MAX_HEADER:
            raise self._bad(
                f"its first 8 bytes announce a header of {length:,} bytes, and safetensors allows {MAX_HEADER:,}: "
                "it is no safetensors file, or a damaged one."
            )
        if 8 + length > size:
            raise self._bad(f"it is truncated: its header announces {length:,} bytes but the file has {size:,}.")
        return self._data.read(8, length)

    def _entries(self, header: tuple[tuple[str, Any], ...]) -> dict[str, _Entry]:
        """The header's tensors in the order of their bytes; fills `metadata`. Of equal names the last counts."""
        times = Counter(name for name, _ in header)
        entries: dict[str, _Entry] = {}
        for name, value in header:
            if name != "__metadata__":
                entries[name] = self._entry(name, value)
            elif times[name] > 1:
                raise self._bad("its header has two __metadata__ entries.")
            elif value is not None:
                self.metadata = self._metadata(value)
        twice = [name for name, count in times.items() if count > 1]
        if twice:
            self.notes.append(f"the header lists {few(map(shown, twice))} more than once; the last entry counts")
        return dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))

    def _metadata(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, tuple) or not all(isinstance(text, str) for _, text in value):
            raise self._bad("the __metadata__ of its header should map strings to strings, and does not.")
        return dict(value)

    def _entry(self, name: str, value: Any) -> _Entry:
        # serde reads a struct from an array of its fields too, and an enum from {"F32": null}.
        pairs = tuple(zip(_FIELDS, value, strict=False)) if isinstance(value, list) and len(value) == 3 else value
        if not isinstance(pairs, tuple):
            raise self._bad(f"the header's entry of tensor {shown(name)} should be an object, and is {shown(value)}.")
        keys = [key for key, _ in pairs]
        for field in _FIELDS:
            if (times := keys.count(field)) != 1:
                raise self._bad(
                    f"the header's entry of tensor {shown(name)} has {times} fields {field!r}, instead of one."
                )
        fields = dict(pairs)
        dtype, shape, offsets = (fields[field] for field in _FIELDS)
        if isinstance(dtype, tuple) and [value for _, value in dtype] == [None]:
            dtype = dtype[0][0]
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise self._bad(f"tensor {shown(name)} has the unknown dtype {shown(dtype)}; known are {', '.join(_BITS)}.")
        if not _are_sizes(shape):
            raise self._bad(f"the shape of tensor {shown(name)} should be a list of sizes, and is {shown(shape)}.")
        if not _are_sizes(offsets) or len(offsets) != 2:
            raise self._bad(f"the data_offsets of tensor {shown(name)} should be two sizes, and are {shown(offsets)}.")
        return _Entry(dtype, tuple(shape), *offsets)

    def _check_contiguous(self, entries: dict[str, _Entry]) -> int:
        """The end of the last tensor. Raises FormatError at holes, overlaps, and shapes that do not fit their bytes."""
        end = 0
        for name, entry in entries.items():
            if entry.start != end:
                raise self._bad(
                    f"tensor {shown(name)} takes the bytes {entry.start:,} to {entry.end:,} of the data, and the one "
                    f"before it ends at {end:,}: the header leaves a hole or overlaps."
                )
            end = entry.end
            what = f"tensor {shown(name)} has the shape {shown(list(entry.shape))} of {entry.dtype}"
            bits = _bits(entry)
            if bits is None:
                raise self._bad(f"{what}, whose size overflows 64 bits.")
            if bits != 8 * (entry.end - entry.start):
                raise self._bad(f"{what}: {bits / 8:,g} bytes, and its offsets give it {entry.end - entry.start:,}.")
        return end

    def _wrong_size(self, entries: dict[str, _Entry], end: int, available: int) -> FormatError:
        if end < available:
            return self._bad(f"{available - end:,} bytes follow the last tensor, which no tensor of the header claims.")
        name = next(name for name, entry in entries.items() if entry.end > available)
        return self._bad(
            f"it is truncated by {end - available:,} bytes, at tensor {shown(name)}: its header announces "
            f"{self._base + end:,} bytes but the file has {len(self._data):,}."
        )


def recorded_ties(metadata: Mapping[str, Any], stored: Container[str]) -> dict[str, str]:
    """HuggingFace's writers drop a tensor that shares its bytes with another, and note {dropped name: kept name}.

    In `__metadata__` (safetensors/torch.py, `save_model`), or among the metadata of an index (huggingface_hub,
    `save_torch_state_dict`).
    """
    return {
        dropped: kept
        for dropped, kept in metadata.items()
        if dropped not in stored and isinstance(kept, str) and kept in stored
    }


def _bits(entry: _Entry) -> int | None:
    """Size of the tensor, None at overflow. As in Rust from the left: [2**63, 2, 0] overflows, [0, 2**63, 2] not."""
    bits = 1
    for factor in (*entry.shape, _BITS[entry.dtype]):
        bits *= factor
        if bits >= _USIZE:
            return None
    return bits


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int for size in value)  # bool is an int, and no size


def _parse(path: Path, header: bytes) -> tuple[tuple[str, Any], ...]:
    """The header as serde_json reads it. Objects come as tuples of pairs, so that equal keys stay visible."""
    try:
        text = header.decode()
        value = _DECODER.decode(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # Python lets lone surrogates pass; this does not
    except UnicodeDecodeError as error:
        raise FormatError(path, f"its header is not UTF-8 (byte {8 + error.start}).", _AGAIN) from None
    except UnicodeEncodeError:
        raise FormatError(path, "its header has a lone surrogate (an invalid \\u escape).", _AGAIN) from None
    except ValueError as error:
        raise FormatError(path, f"its header is not valid JSON: {error}.", _AGAIN) from None
    except RecursionError:
        value = None
    if not isinstance(value, tuple) or _nests_deeper(value, _MAX_DEPTH):
        problem = f"its header should be one JSON object, nested at most {_MAX_DEPTH} deep, and is not."
        raise FormatError(path, problem, _AGAIN)
    return value


def _nests_deeper(value: tuple[Any, ...], limit: int) -> bool:
    level: list[Any] = [value]
    for _ in range(limit):
        inner = (child for node in level for child in (node if isinstance(node, list) else (v for _, v in node)))
        level = [child for child in inner if isinstance(child, (list, tuple))]
        if not level:
            return False
    return True


def _integer(text: str) -> int | float:
    """An int only where serde's usize takes it; the rest (-0, 2**64) becomes a float, which no size is."""
    if len(text) <= 20 and text[0] != "-" and int(text) < _USIZE:
        return int(text)
    return _real(text)


def _real(text: str) -> float:
    value = float(text)
    if isinf(value):
        raise ValueError(f"the number {text[:20]} is out of range")
    return value


def _constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


_DECODER = json.JSONDecoder(
    object_pairs_hook=tuple, parse_int=_integer, parse_float=_real, parse_constant=_constant, strict=True
)
