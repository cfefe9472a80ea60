"""Writing GGUF v3: header by the `gguf` package, then one tensor at a time in pieces, so that memory stays small.

The types are those that the package can encode: F32, F16, BF16, Q8_0, Q5_0, Q4_1 and Q4_0. llama-quantize's mixtures
need ggml.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import LoadstoneError
from .base import DTYPES, Array, Checkpoint, TensorInfo
from .streaming import Output, chunks
from .wording import shown

Types = Callable[[str, TensorInfo], str]
PLAIN: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
)
# elements, bytes
BLOCKS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"Q8_0": (32, 34), "Q5_0": (32, 22), "Q4_1": (32, 20), "Q4_0": (32, 18)}
)
FILE_TYPES: Mapping[str, int] = MappingProxyType(
    {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "BF16": 32}
)  # llama.h
KINDS: Mapping[str, str] = MappingProxyType(
    {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
)
_STEPS: Mapping[str, int] = MappingProxyType(
    {"Q8_0": 127, "Q5_0": 16, "Q4_1": 1, "Q4_0": 8}
)  # from 0 to the largest value
QUANTIZATION_VERSION = 2  # ggml's GGML_QNT_VERSION
_LONGEST_NAME = 63  # bytes; ggml keeps names in 64, with a zero behind
_PIECE = 1 << 20  # elements that are encoded at once
_EMBEDDINGS = ("token_embd.weight", "output.weight")


def default_types(kind: str) -> Types:
    """Which type each tensor gets, for a user's choice of `float32`, `float16`, `bfloat16`, `q8_0`, `q4_0` or `keep`.

    As llama.cpp's converter has it: vectors and position embeddings stay F32, for its norms and additions want that;
    rows that are no whole number of blocks become F16. With `q4_0` the token embedding and the head become Q8_0
    (llama-quantize makes them Q6_K, which the gguf package cannot encode). `keep` is the stored type, and F32 for
    what was decoded from blocks.
    Raises LoadstoneError for another kind.
    """
    if kind != "keep" and kind not in KINDS:
        raise LoadstoneError(f"GGUF has no dtype {kind!r} that can be written here; known: {', '.join(KINDS)}, keep.")

    def choose(name: str, info: TensorInfo) -> str:
        if len(info.shape) < 2 or name == "position_embd.weight":
            return "F32"
        wanted = KINDS.get(info.dtype, "F32") if kind == "keep" else KINDS[kind]
        if wanted in BLOCKS and info.shape[-1] % BLOCKS[wanted][0]:
            return "F16"
        return "Q8_0" if wanted == "Q4_0" and name in _EMBEDDINGS else wanted

    return choose


def write_gguf(
    source: Checkpoint,
    path: Path,
    metadata: Mapping[str, Any],
    *,
    types: Types,
    extra: Mapping[str, Array] = MappingProxyType({}),
    encoded: Mapping[str, Array] = MappingProxyType({}),
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write one GGUF file. `path` should be a temporary name: what stands there after an error is incomplete.

    Args:
        source: tensors under GGUF's names; aliases are not written.
        path: the file, which is overwritten.
        metadata: key-values, `general.architecture` among them. A whole number becomes an unsigned one where it can,
            a fraction float32, as llama.cpp wants it. What counts bytes and types is added.
        types: (name, info) -> type, one of `PLAIN` and `BLOCKS`; see `default_types`.
        extra: further tensors, small ones (`rope_freqs.weight`), written first.
        encoded: tensors of the source that are blocks already, [rows, bytes of a row], uint8; they are not read.
        progress: called with (bytes done, bytes in all) after each piece.

    Raises LoadstoneError, before anything is written, for metadata or a type that GGUF cannot hold; and for values
    beyond the range of their type when it meets them.
    """
    plan = {name: (TensorInfo(a.shape, a.dtype.name, a.nbytes), "F32") for name, a in extra.items()}
    plan |= {n: (info, types(n, info)) for n, info in source.tensors.items() if n not in source.aliases}
    sizes = {name: _nbytes(name, info, type_name) for name, (info, type_name) in plan.items()}
    alignment = _write_header(path, _with_types(metadata, plan, sizes), plan, sizes)
    done, total = 0, sum(sizes.values())
    with Output(path, append=True) as output:
        output.pad(alignment)
        for name, (_, type_name) in plan.items():
            given = encoded.get(name, extra.get(name))
            array = source.read(name) if given is None else given
            as_it_is = name in encoded or array.dtype == PLAIN.get(type_name)
            for piece in chunks(array) if as_it_is else _encoded(array, type_name, name):
                output.write(piece)
                done += len(piece)
                if progress:
                    progress(done, total)
            output.pad(alignment)


def planned_nbytes(source: Checkpoint, types: Types) -> int:
    """Bytes of all tensors as they would be written. Raises LoadstoneError for what cannot be."""
    stored = {name: info for name, info in source.tensors.items() if name not in source.aliases}
    return sum(_nbytes(name, info, types(name, info)) for name, info in stored.items())


def _nbytes(name: str, info: TensorInfo, type_name: str) -> int:
    """Size in the file. Raises LoadstoneError for what cannot be encoded so."""
    where = f"tensor {shown(name)}"
    if len(name.encode()) > _LONGEST_NAME:
        raise LoadstoneError(f"{where}: GGUF allows {_LONGEST_NAME} bytes for a name, and it has {len(name.encode())}.")
    if not 1 <= len(info.shape) <= 4 or not info.size:
        raise LoadstoneError(f"{where}: its shape is {info.shape}; GGUF holds 1 to 4 dimensions, none of them empty.")
    if info.dtype in DTYPES and np.dtype(DTYPES[info.dtype]).kind in "biuc":
        raise LoadstoneError(f"{where} holds {info.dtype}; only floating point can be written as {type_name}.")
    if type_name in PLAIN:
        return info.size * PLAIN[type_name].itemsize
    if type_name not in BLOCKS:
        raise LoadstoneError(f"{where}: type {type_name!r} cannot be written; known: {', '.join([*PLAIN, *BLOCKS])}.")
    elements, nbytes = BLOCKS[type_name]
    if info.shape[-1] % elements:
        raise LoadstoneError(f"{where}: rows of {info.shape[-1]} are no whole number of {type_name}'s {elements}.")
    return info.size // elements * nbytes


def _with_types(
    metadata: Mapping[str, Any], plan: Mapping[str, tuple[TensorInfo, str]], sizes: Mapping[str, int]
) -> dict[str, Any]:
    """The metadata, with what most of the bytes are and the version of the block formats."""
    share: dict[str, int] = {}
    for name, (_, type_name) in plan.items():
        share[type_name] = share.get(type_name, 0) + sizes[name]
    most = max(share, key=share.__getitem__, default="F32")
    return {"general.file_type": FILE_TYPES[most], "general.quantization_version": QUANTIZATION_VERSION, **metadata}


def _write_header(
    path: Path, metadata: Mapping[str, Any], plan: Mapping[str, tuple[TensorInfo, str]], sizes: Mapping[str, int]
) -> int:
    """Everything before the tensors' bytes. The alignment of these."""
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise LoadstoneError(f"GGUF metadata needs general.architecture, a text; it has {shown(architecture)}.")
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise LoadstoneError(f"GGUF metadata: general.alignment must be a power of two from 8 on, not {alignment!r}.")
    writer: Any = GGUFWriter(None, architecture)
    writer.data_alignment = alignment
    for key, value in metadata.items():
        typed = _typed(key, value)
        if typed and key != "general.architecture":
            kind, inner, plain = typed
            writer.add_key_value(key, plain, GGUFValueType[kind], GGUFValueType[inner] if inner else None)
    for name, (info, type_name) in plan.items():
        # float32 is only said because the package would take uint8 for bytes of blocks and convert the shape.
        writer.add_tensor_info(
            name, info.shape, np.dtype("float32"), sizes[name], raw_dtype=GGMLQuantizationType[type_name]
        )
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    return alignment


def _typed(key: str, value: Any) -> tuple[str, str, Any] | None:
    """(type, element type, value) of one key-value; None for an empty list, which GGUF readers do not agree about.

    Raises LoadstoneError for what GGUF has no type for.
    """
    if not isinstance(value, (list, tuple)):
        kind = _kind([value])
        if kind is None:
            raise LoadstoneError(f"GGUF metadata: {shown(key)} is {shown(value)}, for which GGUF has no type.")
        return kind, "", _raw(value)
    if not value:
        return None
    kind = _kind(value)
    if kind is None:
        raise LoadstoneError(f"GGUF metadata: {shown(key)} is a list of things that share no type that GGUF has.")
    # Token types and the like are int32 by custom, and llama.cpp insists.
    return "ARRAY", "INT32" if kind == "UINT32" and max(value) < 2**31 else kind, [_raw(item) for item in value]


def _kind(values: list[Any] | tuple[Any, ...]) -> str | None:
    """GGUF's type that holds all the values."""
    found = {type(value) for value in values}
    if found == {bool}:
        return "BOOL"
    if found <= {str, bytes}:
        return "STRING"
    if found == {int}:
        ranges = {"UINT32": (0, 2**32), "INT32": (-(2**31), 2**31), "UINT64": (0, 2**64), "INT64": (-(2**63), 2**63)}
        return next((k for k, (low, high) in ranges.items() if low <= min(values) and max(values) < high), None)
    return "FLOAT32" if found <= {int, float} and all(map(_fits_float32, values)) else None


def _fits_float32(value: float) -> bool:
    try:
        struct.pack("<f", value)
    except OverflowError:
        return False
    return True


def _raw(value: Any) -> Any:
    """Texts as bytes: a token that is half a character is kept in surrogate escapes (see `checkpoint.gguf`)."""
    if not isinstance(value, str):
        return value
    try:
        return value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise LoadstoneError(f"GGUF metadata: {shown(value)} holds half a surrogate pair, which is no text.") from None


def _pieces(array: Array) -> Iterator[Array]:
    """Rows of the array, some at a time: a transposed view is never made contiguous as a whole."""
    rows = array.reshape(-1, array.shape[-1]) if array.ndim != 2 else array
    step = max(1, _PIECE // rows.shape[1])
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def _encoded(array: Array, type_name: str, name: str) -> Iterator[bytes]:
    """The bytes in another type, some rows at a time. Raises LoadstoneError if a value does not fit it."""
    return (_encoded_rows(piece, type_name, name) for piece in _pieces(array))


def _encoded_rows(piece: Array, type_name: str, name: str) -> bytes:
    if type_name in PLAIN:
        with np.errstate(over="ignore", invalid="ignore"):
            cast = piece.astype(PLAIN[type_name])
        if np.isinf(cast).any() and not np.isinf(piece).any():
            raise _beyond(name, type_name)
        return cast.tobytes()
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize

    values = np.ascontiguousarray(piece, np.float32)
    # A block's scale is float16: the largest value over 127 (Q8_0), 16 (Q5_0) or 8 (Q4_0); Q4_1 has the minimum as one.
    if not np.abs(values).max() / _STEPS[type_name] < 65504:  # false for NaN as well
        raise _beyond(name, type_name)
    blocks: Array = quantize(values, GGMLQuantizationType[type_name])
    return blocks.tobytes()


def _beyond(name: str, type_name: str) -> LoadstoneError:
    return LoadstoneError(
        f"tensor {shown(name)} holds values that {type_name} cannot (too large, or not a number). Choose float32."
    )
