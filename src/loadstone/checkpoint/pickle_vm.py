"""The machine that reads a pickle and executes nothing: its bytes, stack and memo, and the inert values it builds.

`pickle` lets a file name any importable function and have it called. Here no name is ever imported: a global is a
`GlobalRef`, a call or an instance is a `Record` of what was asked, and only the names in a closed table of handlers
become anything else. The opcodes are in `pickle_opcodes.py`.

What a file can make us spend is bounded by its length: every length field is checked against the bytes that remain,
and values that a handler copies are charged to a budget.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import FormatError

MAX_LINE = 1 << 20  # bytes in one text argument (protocol 0)
MAX_NAME = 1000  # characters in the name of a global
MAX_KEY_NODES = 256  # values inside one dictionary key; hashing a tuple recurses in C
# Python hashes numbers without a secret, so a file can choose keys that all collide: n of them take time n * n.
MAX_ODD_KEYS = 2000  # dictionary keys and set members of one pickle for which that is so
_SPREAD = 1 << 60  # integers up to here have hashes of their own

_UNHASHABLE = (list, dict, set, bytearray)

# Python 2's and numpy 2's names of the same things.
_RENAMED = MappingProxyType(
    {
        "__builtin__": "builtins",
        "copy_reg": "copyreg",
        "numpy._core.multiarray": "numpy.core.multiarray",
        "numpy._core.numeric": "numpy.core.numeric",
        "pathlib._local": "pathlib",
        "torch.tensor": "torch._tensor",
    }
)


def usual_module(module: str) -> str:
    """The name that today's Python and numpy 1 have for a module."""
    return _RENAMED.get(module, module)


def printable(text: str, limit: int = 120) -> str:
    """Text out of a file, safe to show: no control characters, no lone surrogates, not too long."""
    shown = repr(text[:limit])[1:-1]
    return shown + "..." if len(text) > limit else shown


@dataclass(frozen=True, slots=True)
class GlobalRef:
    """A name that the pickle refers to; it is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return printable(f"{self.module}.{self.name}")


@dataclass(slots=True, eq=False)
class Record:
    """What the file asks to be built by importing `module.name`: kept as data, never built.

    `called`: the pickle calls it with `args` (else: an instance made with `__new__`). `state` is what BUILD hands
    over, `items` what is appended, `entries` what is set by key.
    """

    module: str
    name: str
    args: tuple[Any, ...]
    called: bool
    state: Any = None
    items: list[Any] = field(default_factory=list)
    entries: dict[Any, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return printable(f"{self.module}.{self.name}")


class PickledDict(dict[Any, Any]):
    """An OrderedDict, defaultdict or Counter, with the attributes that the pickle sets on it (`_metadata`)."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = None


class PickleVM:
    """The state of reading one pickle out of `data`, from byte `position` on.

    Args:
        data: the bytes; may be a whole mapped file with much else behind the pickle.
        path: the file, for error texts.
        handlers: "module.name" -> what calling it yields. Everything else yields a `Record`.
        persistent_load: what a persistent id stands for.

    Attributes:
        position: the byte behind what was read.
        globals_seen: every global that the pickle names, in order, by its "module.name".
    """

    def __init__(
        self,
        data: bytes | mmap.mmap,
        path: Path,
        handlers: Mapping[str, Handler],
        persistent_load: Callable[[PickleVM, Any], Any],
        position: int = 0,
    ) -> None:
        self.data, self.path, self.position = data, path, position
        self.handlers, self.persistent_load = handlers, persistent_load
        self.globals_seen: dict[str, GlobalRef] = {}
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []  # the stacks below each open MARK
        self.memo: dict[int, Any] = {}
        self._budget = 2 * (len(data) - position) + (1 << 16)
        self._odd_keys = 0

    def fail(self, problem: str, hint: str = "Download or copy the file again.") -> FormatError:
        return FormatError(self.path, f"the pickle is damaged or hostile at byte {self.position}: {problem}.", hint)

    # -- the bytes

    def take(self, count: int) -> bytes:
        start, left = self.position, len(self.data) - self.position
        if count > left:
            raise self.fail(f"a field of {count:,} bytes, where {left:,} are left")
        self.position += count
        return self.data[start : self.position]

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.position, self.position + MAX_LINE)
        if end < 0:
            raise self.fail("a text argument without an end")
        return self.take(end + 1 - self.position)[:-1]

    def text(self, raw: bytes, encoding: str = "utf-8") -> str:
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            raise self.fail(f"text that is not {encoding}") from None

    # -- the stack

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise self.fail("it takes a value from an empty stack")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        """The values above the last MARK."""
        if not self.marks:
            raise self.fail("it closes a MARK that was never opened")
        items, self.stack = self.stack, self.marks.pop()
        return items

    def top(self) -> Any:
        if not self.stack:
            raise self.fail("it uses the top of an empty stack")
        return self.stack[-1]

    # -- values

    def find_global(self, module: str, name: str) -> GlobalRef:
        module = usual_module(module)
        full_name = f"{module}.{name}"
        if len(full_name) > MAX_NAME:
            raise self.fail(f"a global whose name has {len(full_name):,} characters")
        if full_name not in self.globals_seen:
            self.charge(len(full_name))
            self.globals_seen[full_name] = GlobalRef(module, name)
        return self.globals_seen[full_name]

    def charge(self, size: int) -> None:
        """Pay for a copy of `size` items or bytes; a pickle that copies the same value over and over goes broke."""
        self._budget -= size
        if self._budget < 0:
            raise self.fail("it copies the same values again and again")

    def check_key(self, key: Any) -> None:
        """Refuse what Python cannot hash, or cannot hash and compare without deep recursion or many collisions."""
        pending, seen = [key], 0
        while pending:
            node = pending.pop()
            seen += 1
            if isinstance(node, tuple | frozenset):
                pending.extend(islice(node, MAX_KEY_NODES))
            elif isinstance(node, _UNHASHABLE):
                raise self.fail(f"a {type(node).__name__} as a dictionary key or set member")
            if seen > MAX_KEY_NODES:
                raise self.fail("a dictionary key or set member that nests too much")
        self.charge(seen)
        self._odd_keys += not _hashes_apart(key)
        if self._odd_keys > MAX_ODD_KEYS:
            raise self.fail(f"more than {MAX_ODD_KEYS:,} dictionary keys or set members that can be made to collide")

    def set_entry(self, mapping: dict[Any, Any], key: Any, value: Any) -> None:
        if type(key) is not str:
            self.check_key(key)
        mapping[key] = value

    def call(self, callee: Any, args: Any, called: bool = True) -> Any:
        """What `callee(*args)` stands for: a handler's value, or a `Record`. Nothing is ever called."""
        if type(args) is not tuple:
            raise self.fail("a call whose arguments are no tuple")
        if isinstance(callee, GlobalRef):
            handler = self.handlers.get(f"{callee.module}.{callee.name}")
            return handler(self, args) if handler else Record(callee.module, callee.name, args, called)
        if isinstance(callee, Record):  # a call of a call's result, such as getattr(os, "system")("...")
            self.charge(len(args))
            return Record(callee.module, callee.name.removesuffix("(...)") + "(...)", (callee, *args), called)
        raise self.fail(f"it calls a {type(callee).__name__}")

    def set_state(self, target: Any, state: Any) -> None:
        """What `target.__setstate__(state)` stands for: the state is kept beside it."""
        if not isinstance(target, Record | PickledDict):
            raise self.fail(f"it sets the state of a {type(target).__name__}")
        target.state = state


def _hashes_apart(key: Any) -> bool:
    """Whether a file cannot choose many such keys of one hash; texts are hashed with a secret."""
    if type(key) is int:
        return -_SPREAD < key < _SPREAD
    if isinstance(key, tuple):
        return not key or isinstance(key[0], str | bytes)
    return not isinstance(key, frozenset | complex)


Handler = Callable[[PickleVM, tuple[Any, ...]], Any]
