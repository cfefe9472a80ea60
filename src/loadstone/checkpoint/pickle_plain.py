"""Plain Python values out of what a pickle held: the metadata of a checkpoint, without its tensors and classes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from .pickle_vm import Record

MAX_NODES = 200_000  # values in one entry of the metadata; sharing can make a small pickle unfold without end
MAX_WORK = 5_000_000  # values looked at in one file, each as often as it is met
MAX_DEPTH = 64

_SCALARS = (str, int, float, bool, complex, bytes, type(None))
_NAMESPACES = ("argparse.Namespace", "types.SimpleNamespace")
_PATHS = {
    "pathlib.Path": PurePosixPath,
    "pathlib.PosixPath": PurePosixPath,
    "pathlib.PurePosixPath": PurePosixPath,
    "pathlib.WindowsPath": PureWindowsPath,
    "pathlib.PureWindowsPath": PureWindowsPath,
}
_NUMBER = re.compile(r"[<>=|]?[biufc?]\d{0,2}")  # numpy type codes; never objects, strings, records


class UnfoldingError(Exception):
    """The value contains itself, or unfolds to more than `MAX_NODES`."""


class BudgetError(Exception):
    """The whole file unfolds to more than `MAX_WORK`."""


@dataclass(slots=True)
class Budget:
    """What walking one file's values may cost: they may be shared so that they unfold without end."""

    left: int = MAX_WORK

    def spend(self, work: int) -> None:
        self.left -= work
        if self.left < 0:
            raise BudgetError


def plain(value: Any, budget: Budget) -> Any:
    """`value` as numbers, text, lists and dicts with text keys.

    Instances become a dict of their attributes, with their class under `__class__` (but for plain namespaces); numpy
    scalars and arrays become numbers and lists; paths, and the names of classes and functions, become text.
    Raises UnfoldingError for what has no plain form of bounded size.
    """
    return _Plain(budget).convert(value, 0)


def state_of(record: Record) -> dict[Any, Any]:
    """The attributes of an instance. `__slots__` classes write the pair (`__dict__`, slots)."""
    return {key: value for part in state_parts(record) for key, value in part.items()}


def state_parts(record: Record) -> list[dict[Any, Any]]:
    pair = record.state if isinstance(record.state, tuple) and len(record.state) == 2 else (record.state,)
    return [part for part in pair if isinstance(part, dict)]


class _Plain:
    def __init__(self, budget: Budget) -> None:
        self.budget, self.nodes = budget, 0

    def convert(self, value: Any, depth: int) -> Any:
        self.spend(1)
        if depth > MAX_DEPTH:
            raise UnfoldingError
        if isinstance(value, _SCALARS):
            return value
        if isinstance(value, dict):
            return {self.key(key): self.convert(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self.convert(item, depth + 1) for item in value]
        if isinstance(value, bytearray):
            self.spend(len(value))
            return bytes(value)
        return self.record(value, depth) if isinstance(value, Record) else str(value)

    def spend(self, nodes: int) -> None:
        self.budget.spend(nodes)
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            raise UnfoldingError

    def key(self, key: Any) -> Any:
        """JSON knows text keys alone; the numbers, None and bool that it turns into text itself may stay."""
        return key if isinstance(key, str | int | float | type(None)) else _short(key)

    def record(self, record: Record, depth: int) -> Any:
        name = f"{record.module}.{record.name}"
        if name in _PATHS and all(type(part) is str for part in record.args):
            self.spend(sum(map(len, record.args)))
            return str(_PATHS[name](*record.args))
        if (array := numpy_value(record)) is not None:
            self.spend(array.size)
            return array.tolist()
        if record.entries:
            return self.convert(record.entries, depth + 1)
        if state := state_of(record):
            marker = {} if name in _NAMESPACES else {"__class__": str(record)}
            return marker | self.convert(state, depth + 1)
        if record.items:
            return self.convert(record.items, depth + 1)
        return f"{record}({', '.join(_short(arg) for arg in record.args[:4])})"


def _short(value: Any) -> str:
    """A value within a text: containers are not opened, since they may nest without end."""
    if isinstance(value, str | bytes):
        return repr(value[:60])
    return repr(value) if isinstance(value, int | float | None) else f"<{type(value).__name__}>"


# -- numpy: `numpy.core.multiarray.scalar(dtype, bytes)`, `_reconstruct` with a state, `_frombuffer` (protocol 5)


def numpy_value(record: Record) -> np.ndarray[Any, Any] | None:
    """The numeric array (or 0-d array, for a scalar) that a Record stands for; None if it is none, or is damaged."""
    match (f"{record.module}.{record.name}", record.args, record.state):
        case ("numpy.core.multiarray.scalar", (Record() as dtype, raw), _):
            return _array(dtype, (), False, raw)
        case ("numpy.core.multiarray._reconstruct", _, (_, tuple() as shape, Record() as dtype, fortran, raw)):
            return _array(dtype, shape, bool(fortran), raw)
        case ("numpy.core.numeric._frombuffer", (raw, Record() as dtype, tuple() as shape, order), _):
            return _array(dtype, shape, order == "F", raw)
    return None


def _array(record: Record, shape: tuple[Any, ...], fortran: bool, raw: Any) -> np.ndarray[Any, Any] | None:
    raw = raw.encode() if isinstance(raw, str) else raw
    dtype = _dtype(record)
    if dtype is None or not isinstance(raw, bytes | bytearray):
        return None
    if not all(type(dim) is int and dim >= 0 for dim in shape) or len(shape) > 32:
        return None
    if math.prod(shape) * dtype.itemsize != len(raw) or not raw:
        return None
    return np.frombuffer(raw, dtype).reshape(shape, order="F" if fortran else "C")


def _dtype(record: Record) -> np.dtype[Any] | None:
    """numpy.dtype(code, False, True) with the state (version, byte order, ...)."""
    match (record.module, record.name, record.args, record.state):
        case ("numpy", "dtype", (str() as code, *_), (_, str() as order, *_)) if _NUMBER.fullmatch(code):
            try:
                return np.dtype((order if order in "<>" else "") + code.lstrip("<>=|"))
            except TypeError:
                return None
    return None
