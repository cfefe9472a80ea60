"""Writes PyTorch checkpoints (the zip archive of torch since 1.6) without PyTorch, a tensor at a time.

`torch.save` needs the whole state dict in memory, as `nn.Module`s or tensors. Here the pickle is made from the headers
alone and each storage is streamed behind it, at 64 bytes, so that `torch.load(mmap=True)` maps it. What the pickle can
say is a closed set: plain values and torch's own way of rebuilding tensors. Sources: `torch/serialization.py`,
`torch/_tensor.py` (`_reduce_ex_internal`), Python's `pickletools`.
"""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import accumulate
from operator import mul
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import LoadstoneError
from .base import DTYPES, Checkpoint, TensorInfo
from .streaming import Output, Progress, Transfer, is_unicode
from .torch_values import STORAGES
from .wording import shown
from .zip_records import ZipRecords

_UNTYPED = "UntypedStorage"
# Element type -> storage class; torch's newer types have none, and are rebuilt from bytes with their dtype beside.
_CLASSES: Mapping[str, str] = MappingProxyType(
    {dtype: name for name, (dtype, _) in STORAGES.items() if name != _UNTYPED and not dtype.startswith("q")}
    | dict.fromkeys(("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"), _UNTYPED)
    | dict.fromkeys(("float8_e4m3fnuz", "float8_e5m2fnuz"), _UNTYPED)
)
_MAX_DEPTH = 50  # of plain values; more means that they contain themselves
_MAX_BITS = 2000  # of an integer; the opcode that every reader knows has room for some more


def write_torch(
    source: Checkpoint,
    path: Path,
    *,
    around: Mapping[str, Any] | None = None,
    key: str = "model",
    progress: Progress | None = None,
) -> None:
    """Write a state dict, which `torch.load(weights_only=True)` reads. Aliases share the storage of what they alias.

    Args:
        source: what to write.
        path: the file.
        around: plain values of a training checkpoint (dict, list, tuple, str, int, float, bool, None), in which the
            state dict stands first, under `key`; None: the state dict alone.
        key: see `around`.
        progress: called after each tensor.

    Raises:
        LoadstoneError: a value in `around` is not plain, or is called `key`. Nothing was written then.
    """
    transfer = Transfer(source, "a PyTorch file", _CLASSES, progress)
    keys = {name: str(i) for i, name in enumerate(transfer.names)}
    state = _state_dict(source, keys)
    if around is not None:
        if key in around:
            raise LoadstoneError(f"{path}: {key!r} is the name of the state dict, and of a value to write beside it.")
        rest = [(_plain(name, "a key"), _plain(value, str(name))) for name, value in around.items()]
        state = b"}" + _items([(_text(key), state), *rest])
    with Output(path) as output:
        records = ZipRecords(output)
        # Without `.format_version` torch looks up where each record lies, instead of predicting its own writer.
        records.add("archive/data.pkl", b"\x80\x02" + state + b".")
        records.add("archive/byteorder", sys.byteorder.encode())
        for name, storage in keys.items():
            write = partial(transfer.write, name, output, zlib.crc32)
            records.stream(f"archive/data/{storage}", transfer.nbytes(name), write)
        records.add("archive/version", b"3\n")
        records.add("archive/.data/serialization_id", f"{records.checksum():040d}".encode())
        records.finish()


# -- the pickle


def _state_dict(source: Checkpoint, keys: Mapping[str, str]) -> bytes:
    entries = ((_text(n), _tensor(info, keys[source.aliases.get(n, n)])) for n, info in source.tensors.items())
    return _EMPTY_ORDERED_DICT + _items(entries)


def _tensor(info: TensorInfo, storage: str) -> bytes:
    """The call that rebuilds a contiguous tensor over the whole of a storage."""
    storage_class = _CLASSES[info.dtype]
    typed = storage_class != _UNTYPED
    count = info.size if typed else info.size * DTYPES[info.dtype].itemsize
    kind = _global("torch" if typed else "torch.storage", storage_class)
    place = _tuple(_text("storage"), kind, _text(storage), _text("cpu"), _integer(count)) + b"Q"  # a persistent id
    *strides, _ = accumulate((max(dim, 1) for dim in reversed((*info.shape, 1))), mul)
    shape, stride = (_tuple(*map(_integer, numbers)) for numbers in (info.shape, reversed(strides)))
    arguments = [place, _integer(0), shape, stride, _FALSE, _EMPTY_ORDERED_DICT]  # offset, requires_grad, hooks
    if typed:
        return _global("torch._utils", "_rebuild_tensor_v2") + _tuple(*arguments) + b"R"
    return _global("torch._utils", "_rebuild_tensor_v3") + _tuple(*arguments, _global("torch", info.dtype)) + b"R"


def _plain(value: Any, where: str, depth: int = 0) -> bytes:
    """A plain value; `where` is what errors call it."""
    kind, inner = type(value), depth + 1
    if depth <= _MAX_DEPTH:
        if kind in _SCALARS and _expressible(value):
            return _SCALARS[kind](value)
        if kind is dict:
            return b"}" + _items((_plain(k, where, inner), _plain(v, f"{where}.{k}", inner)) for k, v in value.items())
        if kind in _SEQUENCES:
            begin, end = _SEQUENCES[kind]
            return begin + b"".join(_plain(item, where, inner) for item in value) + end
    raise LoadstoneError(
        f"plain values of a checkpoint are dict, list, tuple, str, int (of {_MAX_BITS} bits), float, bool and None, "
        f"at most {_MAX_DEPTH} deep; {shown(where)} holds something else, of type {kind.__name__}. Leave it out."
    )


def _expressible(value: Any) -> bool:
    return is_unicode(value) if type(value) is str else type(value) is not int or value.bit_length() <= _MAX_BITS


def _items(pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Puts key-value pairs into the dictionary that stands before them."""
    return b"(" + b"".join(key + value for key, value in pairs) + b"u"


def _tuple(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    raw = text.encode()
    return b"X" + struct.pack("<L", len(raw)) + raw


def _integer(number: int) -> bytes:
    if -(1 << 31) <= number < 1 << 31:
        return b"J" + struct.pack("<l", number)
    size = number.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + number.to_bytes(size, "little", signed=True)


_FALSE = b"\x89"
_EMPTY_ORDERED_DICT = _global("collections", "OrderedDict") + b")R"
_SCALARS: Mapping[type, Callable[[Any], bytes]] = {
    type(None): lambda _: b"N",
    bool: lambda value: b"\x88" if value else _FALSE,
    int: _integer,
    float: lambda value: b"G" + struct.pack(">d", value),
    str: _text,
}
_SEQUENCES: Mapping[type, tuple[bytes, bytes]] = {list: (b"](", b"e"), tuple: (b"(", b"t")}
