"""The pickle machine against Python's own: what `pickle` writes comes back, and what it would run does not run."""

from __future__ import annotations

import collections
import io
import itertools
import pickle
import struct
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostile_pickle import call, mapping, name, number, pickled, tensor, text, tuple_of
from loadstone.checkpoint.pickle_opcodes import MAX_STEPS, unpickle
from loadstone.checkpoint.pickle_plain import Budget, BudgetError, UnfoldingError, plain
from loadstone.checkpoint.pickle_vm import GlobalRef, PickleVM, Record
from loadstone.checkpoint.torch_state import find_weights
from loadstone.checkpoint.torch_values import HANDLERS, StorageTable
from loadstone.errors import FormatError


def machine(data: bytes) -> PickleVM:
    return PickleVM(data, Path("m.pt"), HANDLERS, StorageTable())


def read(data: bytes) -> Any:
    return unpickle(machine(data))


def read_value(value: bytes) -> Any:
    return read(pickled(value))


# -- the law: it reads what Python writes

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
keys = scalars | st.tuples(scalars, scalars) | st.complex_numbers(allow_nan=False)
values = st.recursive(
    scalars | st.sets(keys) | st.frozensets(keys) | st.binary().map(bytearray),
    lambda inner: st.lists(inner) | st.dictionaries(keys, inner) | st.lists(inner, max_size=5).map(tuple),
    max_leaves=25,
)


@settings(max_examples=150, deadline=None)
@given(value=values, protocol=st.integers(0, 5))
def test_it_reads_what_python_pickles(value: Any, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    vm = machine(data + b"rest")
    assert unpickle(vm) == value
    assert vm.position == len(data)


@pytest.mark.parametrize("protocol", range(6))
def test_shared_and_recursive_values_stay_so(protocol: int) -> None:
    shared: list[int] = [1]
    loop: dict[str, Any] = {}
    loop["self"] = loop
    loop["pair"] = (shared, shared)
    result = read(pickle.dumps(loop, protocol))
    assert result["self"] is result
    assert result["pair"][0] is result["pair"][1] == [1]


@pytest.mark.parametrize("protocol", range(6))
def test_classes_and_functions_stay_names(protocol: int) -> None:
    value = read(pickle.dumps([print, io.StringIO, collections.deque([1, 2], 3), slice(1, None)], protocol))
    assert value[:2] == [GlobalRef("builtins", "print"), GlobalRef("_io", "StringIO")]
    assert isinstance(value[2], Record)
    assert (value[2].module, value[2].name, value[2].items) == ("collections", "deque", [1, 2])
    assert (value[3].name, value[3].args) == ("slice", (1, None, None))


def test_python_2_strings() -> None:
    assert read(b"\x80\x02(U\x03abcU\x02\xff\xfeT\x01\x00\x00\x00ze.".replace(b"(", b"](")) == ["abc", b"\xff\xfe", "z"]
    assert read(b"(lp0\nS'it\\'s \\x41'\np1\naL12L\naI01\naF1.5\na.") == ["it's A", 12, True, 1.5]


def test_old_object_opcodes_and_keywords() -> None:
    made = [
        b"(K\x01ia.b\nC\n",
        b"(ca.b\nC\nK\x01o",
        b"ca.b\nC\n(K\x01t\x81",
        b"ca.b\nC\n(K\x01t}X\x01\x00\x00\x00kNs\x92",
    ]
    records = [read_value(opcodes) for opcodes in made]
    assert all(isinstance(r, Record) and (r.module, r.name) == ("a.b", "C") for r in records)
    assert [r.args for r in records] == [(1,), (1,), (1,), (1, {"k": None})]
    assert [r.called for r in records] == [True, True, False, False]


# -- malformed pickles


@pytest.mark.parametrize(
    ("opcodes", "match"),
    [
        (b"", "it takes a value from an empty stack"),
        (b"R", "an empty stack"),
        (b"K\x01\x85b", "it uses the top of an empty stack|it sets the state of a tuple|an empty stack"),
        (b"t", "closes a MARK that was never opened"),
        (b"(0K\x01e", "closes a MARK that was never opened"),
        (b"h\x07", "recalls memo 7, which was never stored"),
        (b"g99\n", "recalls memo 99"),
        (b"q\x01", "uses the top of an empty stack"),
        (b"\x82\x01", "0x82 is no opcode that a checkpoint needs"),
        (b"\x83\x01\x00", "0x83 is no opcode"),
        (b"\x84\x01\x00\x00\x00", "0x84 is no opcode"),
        (b"\x97", "0x97 is no opcode"),
        (b"\xff", "0xff is no opcode"),
        (b"\x80\x06", "pickle protocol 6, where 5 is the newest"),
        (b"\x8b\xff\xff\xff\x7f", r"a field of 2,147,483,647 bytes, where 1 are left"),
        (b"\x8e" + b"\xff" * 8, r"a field of 18,446,744,073,709,551,615 bytes"),
        (b"\x8d" + b"\xff" * 7 + b"\x7f", "a field of 9,223,372,036,854,775,807 bytes"),
        (b"\x96" + b"\xff" * 7 + b"\x7f", "a field of 9,223,372,036,854,775,807 bytes"),
        (b"T\xff\xff\xff\xff", "a field of 4,294,967,295 bytes"),
        (b"\x95" + b"\xff" * 8, r"a frame of 18,446,744,073,709,551,615 bytes is cut off"),
        (b"\x8b\x01\x01\x00\x00" + b"\x7f" * 257, "an integer of 257 bytes"),
        (b"I" + b"9" * 5000 + b"\n", "'999.* as a number"),
        (b"I1_\n", "as a number"),
        (b"Fnot\n", "as a number"),
        (b"g\xff\n", "as a number"),
        (b"Sabc\n", "a string without its quotes"),
        (b"S'\\xg'\n", "a string with a broken escape"),
        (b"V\\ud800\n", "text that is not utf-8"),
        (b"X\x01\x00\x00\x00\xff", "text that is not utf-8"),
        (b"X\x03\x00\x00\x00\xed\xa0\x80", "text that is not utf-8"),
        (b"cnewline never comes", "a text argument without an end"),
        (b"K\x01K\x02\x93", "a global whose name is no text"),
        (text("a" * 2000) + text("b") + b"\x93", "a global whose name has 2,002 characters"),
        (b"}]K\x01s", "a list as a dictionary key or set member"),
        (b"\x8f(}\x90", "a dict as a dictionary key"),
        (b"(]\x91", "a list as a dictionary key"),
        (b"}(K\x01u", "sets 1 keys and values of a dict"),
        (b"]K\x01K\x02s", "sets 2 keys and values of a list"),
        (b"}K\x01a", "appends to a dict"),
        (b"}(K\x01\x90", "appends to a dict"),
        (b"]}b", "sets the state of a list"),
        (name("os", "system") + b"}b", "sets the state of a GlobalRef"),
        (b"K\x01)R", "it calls a int"),
        (name("os", "system") + b"K\x01R", "a call whose arguments are no tuple"),
        (b"(o", "an object without a class"),
        (call("builtins", "bytearray", number(1 << 40)), "bytes made from something else than latin-1 text"),
        (call("_codecs", "encode", text("eval"), text("rot13")), "bytes made from something else than latin-1 text"),
        (call("_codecs", "encode", text("\u20ac"), text("latin1")), "bytes made from something else than latin-1"),
        (call("builtins", "set", number(3)), "a set made from something else"),
        (call("builtins", "complex", text("1e")), "a complex number that is not made of two floats"),
        (call("collections", "OrderedDict", number(5)), "a mapping made from something else than pairs"),
        (call("collections", "OrderedDict", b"]K\x01a"), "a mapping made from something else than pairs"),
        (call("torch", "Size", number(5)), "a torch.Size that is no tuple"),
    ],
)
def test_malformed_pickles_say_what_is_wrong(opcodes: bytes, match: str) -> None:
    tracemalloc.start()
    with pytest.raises(FormatError, match=r"^m\.pt: the pickle is damaged or hostile at byte \d+: .*(" + match + ")"):
        read_value(opcodes)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_pickle_without_stop_ends_in_an_error() -> None:
    with pytest.raises(FormatError, match="ends before its STOP"):
        read(b"\x80\x02N")


def test_too_many_opcodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadstone.checkpoint.pickle_opcodes.MAX_STEPS", 1000)
    with pytest.raises(FormatError, match="more than 1,000 opcodes"):
        read(b"N0" * 501 + b"N.")
    assert MAX_STEPS > 1_000_000


# -- bombs: deep, shared, copied, colliding (tens of thousands of equal hashes take minutes in a dictionary)

DEPTH = 100_000
DEEP = {
    "lists": b"]" * DEPTH + b"a" * (DEPTH - 1),
    "tuples": b")" + b"\x85" * DEPTH,
    "dicts": b"}K\x01" * DEPTH + b"}" + b"s" * DEPTH,
    "marks": b"(" * DEPTH + b"t" * DEPTH,
    "calls": name("a", "b") + b")R" * DEPTH,
    "instances": b"Nq\x000" + (name("a", "b") + b"h\x00\x85\x81q\x000") * DEPTH + b"h\x00",
    "states": (name("a", "b") + b")\x81") * DEPTH + b"b" * (DEPTH - 1),
    "frozensets": b"(" * DEPTH + b"\x91" * DEPTH,
    "equal frozensets": b"\x8f(" + (b"(" * DEPTH + b"\x91" * DEPTH) * 2 + b"\x90",
    "key": b"}" + b")" + b"\x85" * DEPTH + b"Ns",
    "member": b"\x8f()" + b"\x85" * DEPTH + b"\x90",
}
SHARED = {
    "shared": b"]q\x00" + b"(h\x00h\x00tq\x00" * 100,
    "shared key": b"}N\x85q\x00" + b"(h\x00h\x00tq\x00" * 100 + b"Ns",
    "loop list": b"]q\x00h\x00a",
    "loop dict": b"}q\x00" + text("x") + b"h\x00s",
    "loop state": name("a", "b") + b")\x81q\x00h\x00b",
    "encode": text("x" * 10_000) + b"q\x000](" + call("_codecs", "encode", b"h\x00", text("latin1")) * 5000 + b"e",
    "sets": b"](" + b"".join(map(number, range(500))) + b"eq\x000](" + call("builtins", "set", b"h\x00") * 2000 + b"e",
    "calls of a call": b"(" + b"N" * 5000 + b"tq\x000ca\nb\n" + b"h\x00R" * 5000,
    "names": text("m" * 400) + b"q\x000](" + b"".join(b"h\x00" + text(f"{i}") + b"\x93" for i in range(50_000)) + b"e",
}


def digest(bomb: bytes) -> None:
    """All that opening a file does: a value or FormatError, and then FormatError for there are no weights."""
    for value in (bomb, mapping(model=mapping(w=bomb))):
        with suppress(FormatError, UnfoldingError, BudgetError):
            root = read_value(value)
            with pytest.raises(FormatError):
                find_weights(Path("m.pt"), root, [])
            plain(root, Budget())


@pytest.mark.parametrize("bomb", DEEP)
def test_deep_nesting_is_no_recursion(bomb: str) -> None:
    digest(DEEP[bomb])


@pytest.mark.parametrize("bomb", SHARED)
def test_sharing_does_not_multiply(bomb: str) -> None:
    """Some hundred bytes that unfold to 2^100 values, or that are copied thousands of times."""
    start = time.process_time()
    tracemalloc.start()
    digest(SHARED[bomb])
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()
    assert time.process_time() - start < 10


def test_a_shared_value_is_walked_within_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand lists that share a thousand values: 10^6 steps for whoever walks each entry by itself."""
    monkeypatch.setattr(Budget.__init__, "__defaults__", (100_000,))
    shared = b"](" + b"N" * 1000 + b"eq\x000"
    entries = b"".join(text(f"k{i}") + b"]h\x00a" for i in range(1000))
    root = read_value(shared + b"}(" + text("w") + tensor() + entries + b"u")
    with pytest.raises(FormatError, match="unfold without end"):
        find_weights(Path("m.pt"), root, [])


# -- nonsense out of well-formed pieces: only FormatError may come out

PIECES = [bytes([code]) for code in range(256)] + [
    *(b"K\x01", b"h\x00", b"q\x00", b"\x8c\x01a", text("storage"), text("0"), text("model"), text("_parameters")),
    *(name("torch._utils", f) for f in ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")),
    *(name("torch", f) for f in ("FloatStorage", "Size", "float32", "Tensor", "device")),
    *(name("builtins", f) for f in ("set", "eval", "bytearray", "dict", "complex", "getattr")),
    *(name("collections", f) for f in ("OrderedDict", "defaultdict", "Counter")),
    *(name("numpy.core.multiarray", "scalar"), name("numpy", "dtype"), name("_codecs", "encode")),
    *(tuple_of(), tuple_of(number(2)), b"(", b"t", b"u", b"e", b"R", b"b", b"\x81", b"Q", b"\x93", b"i\n\n"),
]


@settings(max_examples=500, deadline=None)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=25), prefix=st.sampled_from([b"", b"}", b"NNN((("]))
def test_nonsense_raises_nothing_else(pieces: list[bytes], prefix: bytes) -> None:
    with suppress(FormatError):
        find_weights(Path("m.pt"), read(b"\x80\x02" + prefix + b"".join(pieces) + b"."), [])


@settings(max_examples=150, deadline=None)
@given(value=values, protocol=st.integers(0, 5), data=st.data())
def test_damaged_pickles_raise_nothing_else(value: Any, protocol: int, data: st.DataObject) -> None:
    raw = bytearray(pickle.dumps({"model": {"w": value}, "x": value}, protocol))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with suppress(FormatError):
        find_weights(Path("m.pt"), read(bytes(raw)), [])


def test_truncated_pickles() -> None:
    for protocol in range(6):
        raw = pickle.dumps({"a": [1, 2.5, "text", b"bytes", {3}], "b": 1 << 70}, protocol)
        for end in range(len(raw)):
            with pytest.raises(FormatError):
                read(raw[:end])


def test_numbers_of_every_width() -> None:
    """Struct layouts, signs and byte orders, beside the values that hypothesis is likely to draw."""
    edges = [
        sign * (1 << bits) + delta for bits, delta, sign in itertools.product((8, 16, 31, 32, 63), (-1, 0), (1, -1))
    ]
    assert [read(pickle.dumps(n, p)) for n in edges for p in range(6)] == [n for n in edges for _ in range(6)]
    assert read_value(b"G" + struct.pack(">d", 2.5)) == 2.5


P = 2**61 - 1  # Python's hash of an integer is its rest by this prime


def big(value: int) -> bytes:
    return b"\x8a\x0c" + value.to_bytes(12, "little")


def real(value: float) -> bytes:
    return b"G" + struct.pack(">d", value)


COLLIDING: dict[str, Callable[[int], bytes]] = {
    "integers": lambda i: big(i * P),
    "complex numbers": lambda i: call(
        "builtins", "complex", *(b"G" + struct.pack(">d", x) for x in (-1000003.0 * i, i))
    ),
    "tuples": lambda i: big(i * P) + b"\x85",
    "sets": lambda i: b"(" + big(i * P) + b"\x91",
}


@pytest.mark.parametrize("kind", COLLIDING)
@pytest.mark.parametrize("inside", ["dict", "set", "list to set"])
def test_keys_of_one_hash(kind: str, inside: str) -> None:
    keys = [COLLIDING[kind](i) for i in range(20_000)]
    bomb = {
        "dict": b"}(" + b"N".join(keys) + b"Nu",
        "set": b"\x8f(" + b"".join(keys) + b"\x90",
        "list to set": call("builtins", "set", b"](" + b"".join(keys) + b"e"),
    }[inside]
    start = time.process_time()
    with pytest.raises(
        FormatError, match=r"more than 2,000 dictionary keys or set members that can be made to collide"
    ):
        read_value(bomb)
    assert time.process_time() - start < 2


def test_the_usual_keys_are_not_counted() -> None:
    """Step numbers, a vocabulary with its ids, merges of two texts each."""
    value = (
        {i: str(i) for i in range(5000)}
        | {(f"a{i}", "b"): i for i in range(5000)}
        | {i / 2 + 0.25: 1 for i in range(5000)}
    )
    assert read(pickle.dumps(value)) == value


def test_a_long_key_is_paid_for_each_time() -> None:
    with pytest.raises(FormatError, match="copies the same values again and again"):
        read_value(b"(" + text("x") + b"N" * 250 + b"tq\x000}(" + b"h\x00N" * 100_000 + b"u")


@pytest.mark.parametrize("index", [-1, 1 << 32, P])
def test_a_memo_index_is_a_small_number(index: int) -> None:
    for opcode in ("p", "g"):
        with pytest.raises(FormatError, match="as a number"):
            read_value(b"N" + f"{opcode}{index}\n".encode())
