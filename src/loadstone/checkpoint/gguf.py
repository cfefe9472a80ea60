"""`Gguf`: reads GGUF files (v2, v3, little-endian); plain types zero-copy, block-quantised types as float32.

On disk: magic, version, two counts, metadata key-values, tensor infos, padding, the tensors' bytes. Source: ggml's
`docs/gguf.md` and `src/gguf.cpp`. The blocks themselves are decoded by the `gguf` package, imported at the first read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError
from .base import DTYPES, Array, Checkpoint, TensorInfo, view
from .datafile import DataFile
from .gguf_header import AGAIN, BLOCKS, Entry, Header, KeyValues
from .wording import shown

_CHUNK = 1 << 17  # elements decoded at once: the pieces stay in cache, and no second copy of the tensor is made
_PLAIN: Mapping[str, str] = MappingProxyType(
    {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
    | {"I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}
)
_BLOCK_NAMES = frozenset(block.name for block in BLOCKS.values())


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
        header = Header(path, self._data)
        tensor_count = header.begin()
        self.metadata, self.notes = KeyValues(header.values, self._data), header.notes
        entries = header.entries(tensor_count)
        self.key_bytes, self.header_bytes = header.key_bytes, header.at
        align = self.metadata.get("general.alignment", 32)
        if type(align) is not int or align <= 0 or align & (align - 1):
            raise FormatError(path, f"its general.alignment is {shown(align)}, which is no power of two.", AGAIN)
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
            raise FormatError(self.path, problem, AGAIN) from None
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

    def _check_spans(self, entries: dict[str, Entry], base: int, align: int) -> dict[str, int]:
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
                raise FormatError(self.path, f"{where}, which is no multiple of the alignment {align}.", AGAIN)
            if entry.nbytes == 0:
                spans[name] = 0
                continue
            nbytes = max(following - entry.offset, 0) if entry.nbytes is None else entry.nbytes
            if (excess := entry.offset + nbytes - available) > 0:
                problem = (
                    f"it is truncated: tensor {shown(name)} lacks its last {min(excess, nbytes):,} of {nbytes:,} bytes."
                )
                raise FormatError(self.path, problem, AGAIN)
            if entry.offset + nbytes > following:
                problem = f"{where} and has {nbytes:,}, which overlaps {after} at {following:,}."
                raise FormatError(self.path, problem, AGAIN)
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
