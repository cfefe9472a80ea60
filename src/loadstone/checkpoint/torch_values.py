"""What the globals of a torch pickle mean: the closed table from a name to an inert value.

Formats: `torch/_utils.py` (the `_rebuild_*` functions), `torch/serialization.py` (persistent ids), and Python's own
containers. A name that is not in `HANDLERS` stays a `Record`; nothing is imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .base import DTYPES
from .pickle_vm import GlobalRef, Handler, PickledDict, PickleVM, Record, printable

MAX_DIMS = 32  # numpy 1's limit
MAX_REPEATED = 1 << 28  # bytes of a view that repeats its storage (stride 0); beyond, it is a memory bomb

# Storage class -> (element type of the tensors over it, bytes per element). An untyped storage counts bytes.
STORAGES: Mapping[str, tuple[str, int]] = {
    "DoubleStorage": ("float64", 8),
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
    "ComplexDoubleStorage": ("complex128", 16),
    "ComplexFloatStorage": ("complex64", 8),
    "UntypedStorage": ("uint8", 1),
    "QInt8Storage": ("qint8", 1),
    "QUInt8Storage": ("quint8", 1),
    "QInt32Storage": ("qint32", 4),
    "QUInt4x2Storage": ("quint4x2", 1),
    "QUInt2x4Storage": ("quint2x4", 1),
}
STORAGE_MODULES = ("torch", "torch.storage", "torch.cuda")


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A run of bytes in the file, by its key. `start` and `nbytes` are bytes within the storage of that key."""

    key: str
    dtype: str
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class TensorRef:
    """A tensor as the pickle describes it: a strided view of a storage, in elements of `dtype`. Not yet checked."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    flags: str = ""  # torch's lazy math bits ("conj", "neg"): the bytes are not the values

    @property
    def span(self) -> int:
        """Number of storage elements from the first that the tensor touches to the last."""
        return 0 if 0 in self.shape else 1 + sum((d - 1) * s for d, s in zip(self.shape, self.stride, strict=True))

    def problem(self) -> str:
        """Why this tensor cannot be read, or nothing."""
        if self.dtype not in DTYPES or self.flags:
            return f"its element type is {self.flags or printable(self.dtype)}, which Loadstone does not read"
        if len(self.shape) != len(self.stride) or len(self.shape) > MAX_DIMS:
            return f"it has {len(self.shape)} dimensions and {len(self.stride)} strides (at most {MAX_DIMS})"
        if min((self.offset, *self.shape, *self.stride)) < 0:
            return f"its offset {self.offset}, shape {self.shape} or strides {self.stride} are negative"
        itemsize = DTYPES[self.dtype].itemsize
        if math.prod(dim or 1 for dim in self.shape) * itemsize >= 1 << 62:
            return f"its shape {self.shape} is absurd"
        if 0 not in self.shape and (self.offset + self.span) * itemsize > self.storage.nbytes:
            end, has = (self.offset + self.span) * itemsize, self.storage.nbytes
            return f"it ends at byte {end:,} of storage '{printable(self.storage.key)}', which has {has:,} bytes"
        if math.prod(self.shape) * itemsize > max(self.storage.nbytes, MAX_REPEATED):
            return f"its shape {self.shape} repeats a storage of {self.storage.nbytes:,} bytes too often"
        return ""


ITEMSIZES: Mapping[str, int] = dict(STORAGES.values())


class StorageTable:
    """Turns persistent ids into `StorageRef`s and remembers the whole storages by key.

    The ids are ("storage", class, key, device, elements), in the format before torch 1.6 with a sixth field: None or
    the (key, first element, elements) of a view. The device is ignored: everything is read into memory.
    """

    def __init__(self) -> None:
        self.by_key: dict[str, StorageRef] = {}

    def __call__(self, vm: PickleVM, pid: Any) -> StorageRef | GlobalRef:
        match pid:
            case ("storage", GlobalRef() as kind, str() as key, _, int() as numel, *view):
                pass
            case ("module", GlobalRef() as module_class, *_):  # a class and its source text, which nobody needs
                return module_class
            case _:
                raise vm.fail("a persistent id that is no storage")
        if kind.module not in STORAGE_MODULES or kind.name not in STORAGES:
            raise vm.fail(f"a storage of the unknown type {kind}")
        dtype, itemsize = STORAGES[kind.name]
        whole = self.by_key.setdefault(key, StorageRef(key, dtype, 0, numel * itemsize))
        if numel < 0 or (whole.dtype, whole.nbytes) != (dtype, numel * itemsize):
            raise vm.fail(
                f"storage '{printable(key)}' is {numel:,} elements of {dtype} here and something else elsewhere"
            )
        match view:
            case [] | [None]:
                return whole
            case [(_, int() as first, int() as count)] if 0 <= first <= first + count <= numel:
                return StorageRef(key, dtype, first * itemsize, count * itemsize)
        raise vm.fail(f"a view that does not lie within the {numel:,} elements of storage '{printable(key)}'")


# -- tensors. What does not look as torch writes it stays a Record, which no weights may contain.


def _kept(name: str, args: tuple[Any, ...]) -> Record:
    module, _, function = name.rpartition(".")
    return Record(module, function, args, called=True)


def _rebuild_tensor(vm: PickleVM, args: tuple[Any, ...]) -> TensorRef | Record:
    match args:
        case (StorageRef() as storage, int() as offset, tuple() as shape, tuple() as stride, *rest):
            pass
        case _:
            return _kept("torch._utils._rebuild_tensor_v2", args)
    if not all(type(n) is int for n in (*shape, *stride)):
        return _kept("torch._utils._rebuild_tensor_v2", args)
    vm.charge(len(shape))
    return TensorRef(storage, offset, shape, stride, storage.dtype, _math_bits(rest, 2))


def _math_bits(rest: list[Any], index: int) -> str:
    bits = rest[index] if len(rest) > index else None
    return "+".join(str(bit) for bit in ("conj", "neg") if bits.get(bit)) if isinstance(bits, dict) else ""


def _rebuild_tensor_v3(vm: PickleVM, args: tuple[Any, ...]) -> TensorRef | Record:
    tensor = _rebuild_tensor(vm, args[:6])
    match args[6:]:
        case (GlobalRef(module="torch", name=dtype), *rest) if isinstance(tensor, TensorRef):
            flags = _math_bits(rest, 0)
            return TensorRef(tensor.storage, tensor.offset, tensor.shape, tensor.stride, dtype, flags)
    return _kept("torch._utils._rebuild_tensor_v3", args)


def _rebuild_parameter(vm: PickleVM, args: tuple[Any, ...]) -> TensorRef | Record:
    return args[0] if args and isinstance(args[0], TensorRef) else _kept("torch._utils._rebuild_parameter", args)


_TENSOR_HANDLERS: Mapping[str, Handler] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch.nn.parameter.Parameter": _rebuild_parameter,
}
_PLAIN_TENSOR_TYPES = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")


def _rebuild_from_type(vm: PickleVM, args: tuple[Any, ...]) -> TensorRef | Record:
    """A tensor with Python attributes. A subclass may mean something else by its bytes, so it stays a Record."""
    match args:
        case (GlobalRef() as rebuild, GlobalRef() as kind, tuple() as inner, *_) if str(kind) in _PLAIN_TENSOR_TYPES:
            handler = _TENSOR_HANDLERS.get(str(rebuild))
            if handler is not None:
                tensor: TensorRef | Record = handler(vm, inner)
                return tensor
    return _kept("torch._tensor._rebuild_from_type_v2", args)


def _size(vm: PickleVM, args: tuple[Any, ...]) -> tuple[Any, ...]:
    match args:
        case (tuple() as dims,):
            return dims
    raise vm.fail("a torch.Size that is no tuple")


def _device(vm: PickleVM, args: tuple[Any, ...]) -> str:
    return ":".join(str(part) for part in args if type(part) in (str, int))


# -- Python's containers


def _mapping(vm: PickleVM, args: tuple[Any, ...]) -> PickledDict:
    mapping = PickledDict()
    source = args[0] if args else ()
    if not isinstance(source, dict | list | tuple):
        raise vm.fail("a mapping made from something else than pairs")
    vm.charge(len(source))
    pairs = list(source.items()) if isinstance(source, dict) else source
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise vm.fail("a mapping made from something else than pairs")
        vm.set_entry(mapping, *pair)
    return mapping


def _members(vm: PickleVM, args: tuple[Any, ...]) -> list[Any]:
    match args:
        case ():
            return []
        case (list() | tuple() | set() | frozenset() as members,):
            vm.charge(len(members))
            for member in members:
                vm.check_key(member)
            return list(members)
    raise vm.fail("a set made from something else than a list")


def _bytes(vm: PickleVM, args: tuple[Any, ...]) -> bytes:
    """Protocol 2 has no bytes: it writes their latin-1 text and asks to encode that."""
    match args:
        case ():
            return b""
        case (bytes() | bytearray() as raw,):
            vm.charge(len(raw))
            return bytes(raw)
        case (str() as text, "latin1" | "latin-1"):
            vm.charge(len(text))
            try:
                return text.encode("latin-1")
            except UnicodeEncodeError:
                pass
    raise vm.fail("bytes made from something else than latin-1 text")


def _complex(vm: PickleVM, args: tuple[Any, ...]) -> complex:
    match args:
        case (float() as real, float() as imaginary):
            return complex(real, imaginary)
    raise vm.fail("a complex number that is not made of two floats")


HANDLERS: Mapping[str, Handler] = {
    **_TENSOR_HANDLERS,
    "torch._tensor._rebuild_from_type": _rebuild_from_type,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Size": _size,
    "torch.device": _device,
    "collections.OrderedDict": _mapping,
    "collections.Counter": _mapping,
    "collections.defaultdict": lambda vm, args: _mapping(vm, args[1:]),
    "builtins.dict": _mapping,
    "builtins.set": lambda vm, args: set(_members(vm, args)),
    "builtins.frozenset": lambda vm, args: frozenset(_members(vm, args)),
    "builtins.bytes": _bytes,
    "builtins.bytearray": lambda vm, args: bytearray(_bytes(vm, args)),
    "builtins.complex": _complex,
    "_codecs.encode": _bytes,
}
