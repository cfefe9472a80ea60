"""What one pickle would import and call, found without importing or calling anything.

The machine that reads checkpoints (`pickle_vm.py`) runs with no handlers at all, so that every call stays a record. It
is stricter than Python's: where it stops, Python may go on. So the rest is searched by `pickletools`, opcode by opcode,
which knows what is named but no longer what is done with it.
"""

from __future__ import annotations

import mmap
import pickletools
import warnings
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import FormatError
from .pickle_names import DANGEROUS, HARMLESS, UNKNOWN, VERDICTS, verdict
from .pickle_opcodes import MAX_STEPS, unpickle
from .pickle_vm import MAX_NAME, GlobalRef, PickleVM, Record, printable, usual_module

MAX_NAMES = 2000  # different names kept of one pickle; a real one has some tens
MAX_INSIDE = 4  # pickles within pickles: how deep is followed
_SHOWN, _DEPTH = 4, 3  # arguments, and nesting, in a rendered call
# They unpickle the bytes that they are given.
_INSIDE = frozenset(
    ("torch.storage._load_from_bytes", "pickle.loads", "_pickle.loads", "dill.loads", "cloudpickle.loads")
)
_FETCHED = frozenset(("builtins.getattr", "operator.attrgetter", "operator.methodcaller"))


@dataclass(slots=True)
class Named:
    """One global: how often it is called (or made an instance of, or given a state), and the first such call."""

    name: str
    verdict: str
    calls: int = 0
    example: str = ""


@dataclass(slots=True)
class PickleAudit:
    """One pickle's globals by name, in the order in which it names them, and remarks on what could not be followed."""

    names: dict[str, Named] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def add(self, name: str, found: str) -> Named | None:
        if name not in self.names and len(self.names) < MAX_NAMES:
            self.names[name] = Named(printable(name), found)
        return self.names.get(name)


def audit_pickle(path: Path, data: bytes | mmap.mmap, position: int = 0, depth: int = 0) -> tuple[PickleAudit, int]:
    """Audit the pickle at `position`; also the byte behind it, or the end of the data if it could not be followed."""
    machine = _Recorder(path, data, position, depth)
    try:
        unpickle(machine)
    except FormatError as error:
        stopped = machine.position
        machine.audit.remarks.append(
            f"it could be followed up to byte {stopped:,} only ({error.problem}); what is named after it is listed, "
            "and not whether it is called"
        )
        for name in _named_after(data, position):
            machine.audit.add(name, verdict(name))
        machine.position = len(data)
    if len(machine.audit.names) == MAX_NAMES:
        machine.audit.remarks.append(f"it names more than {MAX_NAMES:,} things: only these are listed")
    return machine.audit, machine.position


class _Recorder(PickleVM):
    """Reads a pickle and writes down every import and every call."""

    def __init__(self, path: Path, data: bytes | mmap.mmap, position: int, depth: int) -> None:
        super().__init__(data, path, {}, lambda _, pid: Record("persistent", "id", (pid,), True), position)
        self.audit, self.depth = PickleAudit(), depth

    def find_global(self, module: str, name: str) -> GlobalRef:
        found = super().find_global(module, name)
        full_name = f"{found.module}.{found.name}"
        self.audit.add(full_name, verdict(full_name))
        return found

    def call(self, callee: Any, args: Any, called: bool = True) -> Any:
        if isinstance(callee, GlobalRef):
            self.write_down(callee.module, callee.name, args, str(callee))
        elif isinstance(callee, Record):
            self.write_down(callee.module, callee.name.removesuffix("(...)") + "(...)", args, _render(callee))
        return super().call(callee, args, called)

    def set_state(self, target: Any, state: Any) -> None:
        if isinstance(target, Record):
            self.write_down(target.module, target.name, (state,), f"{_render(target)}.__setstate__")
        super().set_state(target, state)

    def write_down(self, module: str, name: str, args: Any, shown: str) -> None:
        """Count one call of `module.name`, where a name that ends in (...) stands for the result of a call."""
        full_name = f"{module}.{name}"
        base = full_name.removesuffix("(...)")
        found = verdict(base)
        if base != full_name:  # whatever that returns; what getattr returns has no name at all
            found = DANGEROUS if base in _FETCHED else max(UNKNOWN, found, key=VERDICTS.index)
        entry = self.audit.add(full_name, found)
        if entry is None:
            return
        entry.calls += 1
        arguments = args if isinstance(args, tuple) else (args,)
        if not entry.example and entry.verdict != HARMLESS:
            entry.example = f"{shown}({_listed(arguments, 1)})"
        if full_name in _INSIDE and arguments and isinstance(arguments[0], (bytes, bytearray)):
            self.look_inside(full_name, bytes(arguments[0]))

    def look_inside(self, name: str, data: bytes) -> None:
        if self.depth >= MAX_INSIDE:
            self.audit.remarks.append(f"{name} unpickles bytes that hold pickles again, deeper than is followed")
            return
        inner, _ = audit_pickle(self.path, data, 0, self.depth + 1)
        for entry in inner.names.values():
            kept = self.audit.add(entry.name, entry.verdict)
            if kept is not None:
                kept.calls += entry.calls
                kept.example = kept.example or entry.example
        self.audit.remarks += [f"{name} unpickles bytes: {remark}" for remark in inner.remarks]


def _named_after(data: bytes | mmap.mmap, position: int) -> list[str]:
    """Names in whatever follows, without following the stack: STACK_GLOBAL takes the last two texts."""
    names: dict[str, None] = {}
    texts: list[str] = []
    with warnings.catch_warnings(), suppress(Exception):  # whatever pickletools makes of a damaged pickle
        warnings.simplefilter("ignore")
        for opcode, argument, _ in islice(pickletools.genops(_Stream(data, position)), MAX_STEPS):  # type: ignore[arg-type]
            if opcode.name in ("GLOBAL", "INST"):
                texts = str(argument)[:MAX_NAME].split(" ", 1)
            if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL") and len(texts) > 1:
                names[f"{usual_module(texts[0])}.{texts[1]}"] = None
            elif isinstance(argument, str):
                texts = [*texts[-1:], argument[: MAX_NAME // 2]]
            if len(names) > MAX_NAMES:
                break
    return list(names)


class _Stream:
    """A file over `data` from `position` on, without a copy."""

    def __init__(self, data: bytes | mmap.mmap, position: int) -> None:
        self.data, self.position = data, position

    def read(self, count: int) -> bytes:
        if not 0 <= count <= len(self.data) - self.position:
            return b""
        piece = bytes(self.data[self.position : self.position + count])
        self.position += len(piece)
        return piece

    def readline(self) -> bytes:
        end = self.data.find(b"\n", self.position)
        return self.read((end + 1 if end >= 0 else len(self.data)) - self.position)

    def tell(self) -> int:
        return self.position


def _render(value: Any, depth: int = 0) -> str:
    """A value as short text that is safe to show. Nothing of the file's runs: no `repr` but of plain values."""
    if isinstance(value, str | bytes | bytearray):
        text = repr(bytes(value[:60]) if isinstance(value, bytearray) else value[:60])
        return text + "..." if len(value) > 60 else text
    if isinstance(value, GlobalRef):
        return str(value)
    if isinstance(value, Record):
        return f"{str(value).removesuffix('(...)')}({_listed(value.args, depth + 1)})"
    if isinstance(value, dict):
        return "{" + _listed([_Pair(*pair) for pair in islice(value.items(), _SHOWN + 1)], depth + 1) + "}"
    if isinstance(value, _Pair):
        return f"{_render(value.key, depth)}: {_render(value.value, depth)}"
    if isinstance(value, list | tuple | set | frozenset):
        return f"[{_listed(value, depth + 1)}]"
    return repr(value)[:60]


class _Pair(NamedTuple):
    key: Any
    value: Any


def _listed(values: Iterable[Any], depth: int) -> str:
    """The first few, and dots for the rest."""
    if depth > _DEPTH:
        return "..."
    shown = [_render(value, depth) for value in islice(values, _SHOWN + 1)]
    return ", ".join(shown[:_SHOWN] + ["..."] * (len(shown) > _SHOWN))
