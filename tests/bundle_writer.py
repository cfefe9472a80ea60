"""Writes TensorFlow tensor bundles, for tests: numpy arrays -> `.index`, `.data-0000?-of-0000?` and `checkpoint`.

Plain on purpose, and written apart from the reader: it shares no code with it. Real TensorFlow reads what it writes
(`peers/test_tensorflow.py`). The lower layers (`table`, `message`, `entry`) are there to build hostile files.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import cramjam
import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

MAGIC = bytes.fromhex("57fb808b247547db")
DATA_TYPES = {
    **{
        "float32": 1,
        "float64": 2,
        "int32": 3,
        "uint8": 4,
        "int16": 5,
        "int8": 6,
        "complex64": 8,
        "int64": 9,
        "bool": 10,
    },
    **{"bfloat16": 14, "uint16": 17, "complex128": 18, "float16": 19, "uint32": 22, "uint64": 23},
    **{"float8_e5m2": 24, "float8_e4m3fn": 25, "float8_e4m3fnuz": 26, "float8_e5m2fnuz": 28},
}
Fields = Iterable[tuple[int, "int | bytes"]]


def masked_crc(data: bytes) -> int:
    crc: int = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32


def varint(value: int) -> bytes:
    value %= 2**64
    out = bytearray()
    while value >= 128:
        out.append(value % 128 + 128)
        value //= 128
    return bytes([*out, value])


def message(*fields: tuple[int, int | bytes]) -> bytes:
    """A protobuf message: an int is a varint, bytes are a string or an embedded message."""
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            out += varint(number << 3 | 2) + varint(len(value)) + value
    return out


def header(shards: int = 1, endianness: int = 0, min_consumer: int = 0) -> bytes:
    version = message((1, 1), (2, min_consumer)) if min_consumer else message((1, 1))
    return message((1, shards), (2, endianness), (3, version))


def entry(
    dtype: int, shape: Iterable[int], shard: int = 0, offset: int = 0, size: int = 0, crc: int = 0, slices: Fields = ()
) -> bytes:
    dims = message(*((2, message((1, dim))) for dim in shape))
    place = message((1, dtype), (2, dims), (3, shard), (4, offset), (5, size))
    return place + varint(6 << 3 | 5) + struct.pack("<I", crc) + message(*slices)


def slice_key(name: str, extents: Iterable[tuple[int, int]]) -> bytes:
    """Key of one slice of a partitioned variable; numbers below 8192 only."""
    numbers = [number for extent in extents for number in extent]
    code = b"".join(bytes([0x80 + n]) if n < 64 else struct.pack(">H", 0xC000 + n) for n in numbers)
    return b"\0" + name.encode() + b"\0\1" + bytes([1, len(numbers) // 2]) + code


def block(entries: Iterable[tuple[bytes, bytes]], restart_interval: int = 16) -> bytes:
    out, restarts, last = b"", [], b""
    for i, (key, value) in enumerate(entries):
        shared = 0
        if i % restart_interval == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    restarts = restarts or [0]
    return out + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def framed(content: bytes, compression: int = 0) -> bytes:
    """A block as it lies in the file: the (already compressed) content, its type and its checksum."""
    return content + bytes([compression]) + struct.pack("<I", masked_crc(content + bytes([compression])))


def table(entries: Iterable[tuple[bytes, bytes]], block_size: int = 4096, snappy: bool = False) -> bytes:
    """A whole table file. Takes the entries in the order given, so that a test may disorder them."""
    out = bytearray()

    def append(content: bytes) -> bytes:
        """Add one block with its trailer; returns its handle."""
        content = bytes(cramjam.snappy.compress_raw(content)) if snappy else content
        place = varint(len(out)) + varint(len(content))
        out.extend(framed(content, int(snappy)))
        return place

    handles: list[tuple[bytes, bytes]] = []
    waiting: list[tuple[bytes, bytes]] = []
    for pair in entries:
        waiting.append(pair)
        if len(block(waiting)) >= block_size:
            handles.append((pair[0], append(block(waiting))))
            waiting = []
    if waiting:
        handles.append((waiting[-1][0], append(block(waiting))))
    footer = append(block([])) + append(block(handles, restart_interval=1))
    return bytes(out) + footer.ljust(40, b"\0") + MAGIC


def write_bundle(
    prefix: Path,
    tensors: Mapping[str, NDArray[Any]],
    *,
    shards: int = 1,
    block_size: int = 4096,
    snappy: bool = False,
    cuts: Mapping[str, tuple[int, list[int]]] | None = None,
) -> Path:
    """Write `tensors` as the checkpoint `prefix`, spread over `shards` files in turn; returns the `.index` file.

    `cuts` partitions variables: name -> (axis, the positions at which to cut it).
    """
    data = [bytearray() for _ in range(shards)]
    entries: dict[bytes, bytes] = {b"": header(shards)}

    def store(array: NDArray[Any]) -> bytes:
        shard = len(entries) % shards
        raw = array.tobytes()
        place = (shard, len(data[shard]), len(raw), masked_crc(raw))
        data[shard] += raw
        return entry(DATA_TYPES[array.dtype.name], array.shape, *place)

    for name, array in tensors.items():
        if name not in (cuts or {}):
            entries[name.encode()] = store(array)
            continue
        axis, positions = (cuts or {})[name]
        slices = []
        for start, stop in zip([0, *positions], [*positions, array.shape[axis]], strict=True):
            extents = [(start, stop - start) if i == axis else (0, dim) for i, dim in enumerate(array.shape)]
            entries[slice_key(name, extents)] = store(array.take(range(start, stop), axis))
            slices.append((7, message(*((1, message((1, low), (2, size))) for low, size in extents))))
        entries[name.encode()] = entry(DATA_TYPES[array.dtype.name], array.shape, slices=slices)

    prefix.parent.mkdir(parents=True, exist_ok=True)
    for shard, content in enumerate(data):
        prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{shards:05d}").write_bytes(content)
    index = prefix.with_name(f"{prefix.name}.index")
    index.write_bytes(table(sorted(entries.items()), block_size, snappy))
    prefix.with_name("checkpoint").write_text(f'model_checkpoint_path: "{prefix.name}"\n')
    return index


def write_raw(folder: Path, entries: Mapping[bytes, bytes], data: bytes = b"", shards: int = 1) -> Path:
    """An index of entries as given, beside shards that all hold `data`."""
    for shard in range(shards):
        (folder / f"m.data-{shard:05d}-of-{shards:05d}").write_bytes(data)
    index = folder / "m.index"
    index.write_bytes(table(sorted(({b"": header(shards)} | dict(entries)).items())))
    return index


def of(values: NDArray[Any] | bytes, dtype: int = 1, shape: tuple[int, ...] = (2,), **place: Any) -> bytes:
    """The entry of one whole tensor, its size and checksum right unless `place` says otherwise."""
    raw = values if isinstance(values, bytes) else values.tobytes()
    return entry(dtype, shape, **{"size": len(raw), "crc": masked_crc(raw)} | place)


def gpt2_tensors(seed: int = 0) -> dict[str, NDArray[Any]]:
    """A two-layer GPT-2 in OpenAI's names, with Adam slots and `global_step` as a training run keeps them."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model/wte": (11, 4), "model/wpe": (5, 4), "model/ln_f/g": (4,)}
    for i in range(2):
        shapes |= {f"model/h{i}/attn/c_attn/w": (1, 4, 12), f"model/h{i}/attn/c_attn/b": (12,)}
        shapes |= {f"model/h{i}/mlp/c_fc/w": (1, 4, 16), f"model/h{i}/ln_1/g": (4,)}
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    slots = {
        f"{name}/Adam{m}": rng.normal(size=w.shape).astype(np.float32)
        for name, w in weights.items()
        for m in ("", "_1")
    }
    return {"global_step": np.array(7, np.int64), **weights, **slots}
