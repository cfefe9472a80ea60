"""The opcodes of a pickle as one closed table: how each reads its argument and what it does to the machine.

Semantics: CPython's `Lib/pickletools.py`, protocols 0 to 5. Left out, and so refused: the extension registry and
out-of-band buffers, which no checkpoint has.
"""

from __future__ import annotations

import codecs
import struct
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from .pickle_vm import GlobalRef, PickleVM, Record, printable

MAX_STEPS = 5_000_000  # opcodes in one pickle; a training checkpoint of GPT-2 XL has about 150,000
MAX_INT_BYTES = 256  # a product of two stays printable: Python prints no integer of more than 4300 digits

_Argument = Callable[[PickleVM], Any]
_Action = Callable[[PickleVM, Any], None]
_STOP = ord(".")


# -- actions


def _stack_global(vm: PickleVM, _: None) -> None:
    name, module = vm.pop(), vm.pop()
    if type(name) is not str or type(module) is not str:
        raise vm.fail("a global whose name is no text")
    vm.push(vm.find_global(module, name))


def _reduce(vm: PickleVM, _: None) -> None:
    args, callee = vm.pop(), vm.pop()
    vm.push(vm.call(callee, args))


def _newobj(vm: PickleVM, _: None) -> None:
    args, cls = vm.pop(), vm.pop()
    vm.push(vm.call(cls, args, called=False))


def _newobj_ex(vm: PickleVM, _: None) -> None:
    keywords, args, cls = vm.pop(), vm.pop(), vm.pop()
    if keywords and type(args) is tuple:
        vm.charge(len(args))
        args = (*args, keywords)
    vm.push(vm.call(cls, args, called=False))


def _obj(vm: PickleVM, _: None) -> None:
    items = vm.pop_mark()
    if not items:
        raise vm.fail("an object without a class")
    vm.push(vm.call(items[0], tuple(items[1:])))


def _build(vm: PickleVM, _: None) -> None:
    state, target = vm.pop(), vm.top()
    vm.set_state(target, state)


def _extend(vm: PickleVM, items: list[Any]) -> None:
    target = vm.top()
    if type(target) is list:
        target.extend(items)
    elif isinstance(target, Record):
        target.items.extend(items)
    else:
        raise vm.fail(f"it appends to a {type(target).__name__}")


def _add_items(vm: PickleVM, items: list[Any]) -> None:
    target = vm.top()
    if type(target) is not set:
        return _extend(vm, items)
    for item in items:
        vm.check_key(item)
        target.add(item)


def _set_items(vm: PickleVM, pairs: list[Any]) -> None:
    top = vm.top()
    target = top.entries if isinstance(top, Record) else top
    if not isinstance(target, dict) or len(pairs) % 2:
        raise vm.fail(f"it sets {len(pairs)} keys and values of a {type(top).__name__}")
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        vm.set_entry(target, key, value)


def _new_dict(vm: PickleVM, _: None) -> None:
    pairs = vm.pop_mark()
    vm.push({})
    _set_items(vm, pairs)


def _new_frozenset(vm: PickleVM, _: None) -> None:
    items = vm.pop_mark()
    for item in items:
        vm.check_key(item)
    vm.push(frozenset(items))


def _drop_mark(vm: PickleVM, _: None) -> None:
    vm.pop_mark()


def _mark(vm: PickleVM, _: None) -> None:
    vm.marks.append(vm.stack)
    vm.stack = []


def _pop_one(vm: PickleVM, _: None) -> None:
    if vm.stack:
        vm.stack.pop()
    else:
        vm.pop_mark()


def _get(vm: PickleVM, index: int) -> None:
    try:
        vm.stack.append(vm.memo[index])
    except KeyError:
        raise vm.fail(f"it recalls memo {index}, which was never stored") from None


def _put(vm: PickleVM, index: int) -> None:
    vm.memo[index] = vm.top()


def _tuple_of(count: int) -> _Action:
    return lambda vm, _: vm.push(tuple([vm.pop() for _ in range(count)][::-1]))


def _protocol(vm: PickleVM, version: int) -> None:
    if version > 5:
        raise vm.fail(f"pickle protocol {version}, where 5 is the newest")


def _frame(vm: PickleVM, size: int) -> None:
    if size > len(vm.data) - vm.position:
        raise vm.fail(f"a frame of {size:,} bytes is cut off")


# -- arguments


def _nothing(vm: PickleVM) -> None:
    return None


def _number(layout: str) -> _Argument:
    unpack, size = struct.Struct(layout).unpack, struct.calcsize(layout)
    return lambda vm: unpack(vm.take(size))[0]


def _sized(layout: str) -> _Argument:
    length = _number(layout)
    return lambda vm: vm.take(length(vm))


def _utf8(layout: str) -> _Argument:
    raw = _sized(layout)
    return lambda vm: vm.text(raw(vm))


def _python2_string(layout: str) -> _Argument:
    """Python 2's `str` is text or bytes: text where it can be, as `torch.load` reads it."""
    raw = _sized(layout)

    def argument(vm: PickleVM) -> str | bytes:
        data: bytes = raw(vm)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return data

    return argument


def _long(layout: str) -> _Argument:
    raw = _sized(layout)

    def argument(vm: PickleVM) -> int:
        data: bytes = raw(vm)
        if len(data) > MAX_INT_BYTES:
            raise vm.fail(f"an integer of {len(data):,} bytes")
        return int.from_bytes(data, "little", signed=True)

    return argument


def _decimal(parse: Callable[[bytes], Any]) -> _Argument:
    def argument(vm: PickleVM) -> Any:
        line = vm.line()
        try:
            if len(line) <= 2 * MAX_INT_BYTES:
                return parse(line)
        except ValueError:
            pass
        raise vm.fail(f"{printable(repr(line[:20]))} as a number")

    return argument


def _integer(line: bytes) -> int:
    return {b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line.removesuffix(b"L"))


def _memo_index(line: bytes) -> int:
    index = int(line)
    if not 0 <= index < 1 << 32:  # as in the binary opcodes; larger ones could be made to collide
        raise ValueError
    return index


def _quoted(vm: PickleVM) -> str:
    line = vm.line()
    if len(line) < 2 or line[:1] not in (b"'", b'"') or line[:1] != line[-1:]:
        raise vm.fail("a string without its quotes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python deprecates the unknown escapes that a hostile file may hold
        try:
            return vm.text(codecs.escape_decode(line[1:-1])[0], "latin-1")
        except ValueError:
            raise vm.fail("a string with a broken escape") from None


def _escaped(vm: PickleVM) -> str:
    text = vm.text(vm.line(), "raw-unicode-escape")
    return vm.text(text.encode("utf-8", "surrogatepass"))  # refuses lone surrogates, as the other text opcodes do


def _two_lines(vm: PickleVM) -> GlobalRef:
    module = vm.text(vm.line())
    return vm.find_global(module, vm.text(vm.line()))


# -- the table: opcode -> (its argument, what it does)


def _constant(value: Any) -> tuple[_Argument, _Action]:
    return _nothing, lambda vm, _: vm.push(value)


def _fresh(make: Callable[[], Any]) -> tuple[_Argument, _Action]:
    return _nothing, lambda vm, _: vm.push(make())


def _pushes(argument: _Argument) -> tuple[_Argument, _Action]:
    return argument, PickleVM.push


_TABLE: Mapping[bytes, tuple[_Argument, _Action]] = {
    b"N": _constant(None),
    b"\x88": _constant(True),
    b"\x89": _constant(False),
    b")": _constant(()),
    b"]": _fresh(list),
    b"}": _fresh(dict),
    b"\x8f": _fresh(set),
    b"I": _pushes(_decimal(_integer)),
    b"L": _pushes(_decimal(_integer)),
    b"J": _pushes(_number("<i")),
    b"K": _pushes(_number("<B")),
    b"M": _pushes(_number("<H")),
    b"\x8a": _pushes(_long("<B")),
    b"\x8b": _pushes(_long("<I")),
    b"F": _pushes(_decimal(float)),
    b"G": _pushes(_number(">d")),
    b"S": _pushes(_quoted),
    b"T": _pushes(_python2_string("<I")),
    b"U": _pushes(_python2_string("<B")),
    b"V": _pushes(_escaped),
    b"X": _pushes(_utf8("<I")),
    b"\x8c": _pushes(_utf8("<B")),
    b"\x8d": _pushes(_utf8("<Q")),
    b"B": _pushes(_sized("<I")),
    b"C": _pushes(_sized("<B")),
    b"\x8e": _pushes(_sized("<Q")),
    b"\x96": _pushes(lambda vm: bytearray(_sized("<Q")(vm))),
    b"(": (_nothing, _mark),
    b"0": (_nothing, _pop_one),
    b"1": (_nothing, _drop_mark),
    b"2": (_nothing, lambda vm, _: vm.push(vm.top())),
    b"t": (_nothing, lambda vm, _: vm.push(tuple(vm.pop_mark()))),
    b"l": (_nothing, lambda vm, _: vm.push(vm.pop_mark())),
    b"d": (_nothing, _new_dict),
    b"\x91": (_nothing, _new_frozenset),
    b"\x85": (_nothing, _tuple_of(1)),
    b"\x86": (_nothing, _tuple_of(2)),
    b"\x87": (_nothing, _tuple_of(3)),
    b"a": (lambda vm: [vm.pop()], _extend),
    b"e": (PickleVM.pop_mark, _extend),
    b"\x90": (PickleVM.pop_mark, _add_items),
    b"s": (lambda vm: [vm.pop(), vm.pop()][::-1], _set_items),
    b"u": (PickleVM.pop_mark, _set_items),
    b"g": (_decimal(_memo_index), _get),
    b"h": (_number("<B"), _get),
    b"j": (_number("<I"), _get),
    b"p": (_decimal(_memo_index), _put),
    b"q": (_number("<B"), _put),
    b"r": (_number("<I"), _put),
    b"\x94": (lambda vm: len(vm.memo), _put),
    b"c": _pushes(_two_lines),
    b"\x93": (_nothing, _stack_global),
    b"R": (_nothing, _reduce),
    b"b": (_nothing, _build),
    b"i": (_two_lines, lambda vm, cls: vm.push(vm.call(cls, tuple(vm.pop_mark())))),
    b"o": (_nothing, _obj),
    b"\x81": (_nothing, _newobj),
    b"\x92": (_nothing, _newobj_ex),
    b"P": _pushes(lambda vm: vm.persistent_load(vm, vm.text(vm.line()))),
    b"Q": _pushes(lambda vm: vm.persistent_load(vm, vm.pop())),
    b"\x80": (_number("<B"), _protocol),
    b"\x95": (_number("<Q"), _frame),
}
_OPCODES = {key[0]: step for key, step in _TABLE.items()}


def unpickle(vm: PickleVM) -> Any:
    """The value of the pickle at `vm.position`, read up to its STOP. FormatError for anything not well-formed."""
    data, end = vm.data, len(vm.data)
    for _ in range(MAX_STEPS):
        if vm.position >= end:
            raise vm.fail("it ends before its STOP opcode")
        opcode = data[vm.position]
        vm.position += 1
        if opcode == _STOP:
            return vm.pop()
        step = _OPCODES.get(opcode)
        if step is None:
            raise vm.fail(f"0x{opcode:02x} is no opcode that a checkpoint needs")
        argument, action = step
        action(vm, argument(vm))
    raise vm.fail(f"it has more than {MAX_STEPS:,} opcodes")
