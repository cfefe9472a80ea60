"""Hostile PyTorch files: nothing is run, nothing is imported, and the error says what the file asked for."""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hostile_pickle import (
    CALLS,
    COMMAND,
    EMPTY_ORDERED,
    FLOATS,
    SENTINEL,
    call,
    mapping,
    name,
    number,
    pickled,
    storage,
    tensor,
    text,
    tuple_of,
    write_legacy,
    write_zip,
)
from loadstone.checkpoint.torch_pickle import TorchPickle
from loadstone.errors import FormatError

NEVER = r"Loadstone never executes what a file contains; do not load it with other programs\."


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Every test runs in a folder where a payload that runs leaves its mark."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / SENTINEL).exists(), "the payload was run"
    assert "this" not in sys.modules
    assert "pty" not in sys.modules


def test_the_payload_is_live(here: Path) -> None:
    """Else the tests below prove nothing."""
    for payload in ("posix.system", "builtins.eval", "builtins.__import__"):
        pickle.loads(pickled(CALLS[payload]))
        (here / SENTINEL).unlink()


# -- calls instead of weights, among them, inside them, and beside them


@pytest.mark.parametrize("called", CALLS)
def test_a_call_is_the_whole_file(here: Path, called: str) -> None:
    for path in (write_zip(here / "m.pt", CALLS[called], {}), write_legacy(here / "l.pt", CALLS[called], {})):
        with pytest.raises(FormatError, match=rf"asks to call {called}.*\(\.\.\.\) and holds no weights\. {NEVER}"):
            TorchPickle(path)
    (here / "plain.pt").write_bytes(pickled(CALLS[called]))
    with pytest.raises(FormatError, match=rf"asks to call {called}"):
        TorchPickle(here / "plain.pt")


@pytest.mark.parametrize("called", CALLS)
def test_a_call_stands_among_the_weights(here: Path, called: str) -> None:
    args = [CALLS[called], number(0), tuple_of(number(2)), tuple_of(number(1)), b"\x89", EMPTY_ORDERED]
    rebuilt = [
        CALLS[called],
        call("torch._utils", "_rebuild_parameter", CALLS[called], b"\x88", EMPTY_ORDERED),
        call("torch._utils", "_rebuild_tensor_v2", *args),
        call("torch._utils", "_rebuild_tensor_v3", *args, name("torch", "uint16")),
        call("torch.nn.parameter", "Parameter", CALLS[called]),
        call("torch._tensor", "_rebuild_from_type_v2", name("torch", "Tensor"), CALLS[called], tuple_of(), b"}"),
        b"]" + CALLS[called] + b"a",
    ]
    for entry in rebuilt:
        path = write_zip(here / "m.pt", mapping(good=tensor(), w=entry))
        with pytest.raises(FormatError, match=rf"tensor 'w' would be made by calling {called}.*{NEVER}"):
            TorchPickle(path)


@pytest.mark.parametrize("called", CALLS)
def test_a_call_beside_the_weights_is_reported(here: Path, called: str) -> None:
    checkpoint = TorchPickle(write_zip(here / "m.pt", mapping(model=mapping(w=tensor()), x=CALLS[called])))
    assert checkpoint.read("w").tolist() == [[1, 2, 3], [4, 5, 6]]
    assert called in checkpoint.globals_seen
    assert checkpoint.notes[-1].startswith("the pickle asks for ")
    assert called in checkpoint.notes[-1]
    assert "do not load it with other programs" in checkpoint.notes[-1]


@pytest.mark.parametrize(
    "value",
    [
        call("collections", "OrderedDict", CALLS["os.system"]),
        call("collections", "defaultdict", name("os", "system"), CALLS["os.system"]),
        call("builtins", "set", CALLS["os.system"]),
        call("torch", "Size", CALLS["os.system"]),
        tuple_of(text("storage"), CALLS["os.system"], text("0"), text("cpu"), number(6)) + b"Q",
        tuple_of(text("storage"), name("os", "system"), text("0"), text("cpu"), number(6)) + b"Q",
        CALLS["os.system"] + b"Q",
        call("numpy.core.multiarray", "scalar", call("numpy", "dtype", CALLS["os.system"]), text("x")),
        name("torch", "FloatStorage") + tuple_of(COMMAND) + b"R",
        b"}" + CALLS["os.system"] + tensor() + b"s",
    ],
)
def test_calls_as_arguments_of_what_is_known(here: Path, value: bytes) -> None:
    with pytest.raises(FormatError):
        TorchPickle(write_zip(here / "m.pt", mapping(x=value)))


def test_names_out_of_the_file_cannot_paint_the_terminal(here: Path) -> None:
    value = text("os") + text("\x1b[2J\nsystem") + b"\x93" + tuple_of() + b"R"
    with pytest.raises(FormatError) as error:
        TorchPickle(write_zip(here / "m.pt", value, {}))
    assert r"os.\x1b[2J\nsystem(...)" in str(error.value)
    assert str(error.value).isprintable()
    args = [storage(), number(0), tuple_of(number(2)), tuple_of(number(1)), b"\x89", EMPTY_ORDERED]
    painted = call("torch._utils", "_rebuild_tensor_v3", *args, text("torch") + text("\x1b[2J") + b"\x93")
    with pytest.raises(FormatError, match=r"tensor '\\x1b': its element type is \\x1b\[2J, which"):
        TorchPickle(write_zip(here / "m.pt", mapping(**{"\x1b": painted})))


# -- lies about storages and tensors


@pytest.mark.parametrize(
    ("held", "match"),
    [
        (storage("../../etc/passwd"), r"its pickle names the storage '\.\./\.\./etc/passwd', which it does not hold"),
        (storage("/etc/passwd"), "names the storage '/etc/passwd', which it does not hold"),
        (storage(numel=7), "storage '0' has 24 bytes; its pickle says 28"),
        (storage(numel=-6), "storage '0' is -6 elements of float32 here and something else elsewhere"),
        (storage(kind="DoubleStorage"), "storage '0' has 24 bytes; its pickle says 48"),
        (storage(kind="EvilStorage"), r"a storage of the unknown type torch\.EvilStorage"),
        (storage(module="os"), r"a storage of the unknown type os\.FloatStorage"),
        (storage(view=tuple_of(text("v"), number(4), number(3))), "a view that does not lie within the 6 elements"),
        (storage(view=number(3)), "a view that does not lie within"),
        (text("0") + b"Q", "a persistent id that is no storage"),
        (b"P0\n", "a persistent id that is no storage"),
        (tuple_of(text("storage")) + b"Q", "a persistent id that is no storage"),
        (tuple_of(text("object"), number(1)) + b"Q", "a persistent id that is no storage"),
    ],
)
def test_persistent_ids_that_lie(here: Path, held: bytes, match: str) -> None:
    with pytest.raises(FormatError, match=match):
        TorchPickle(write_zip(here / "m.pt", mapping(w=tensor(held))))
    with pytest.raises(FormatError):
        TorchPickle(write_legacy(here / "l.pt", mapping(w=tensor(held))))


def test_one_storage_with_two_types(here: Path) -> None:
    value = mapping(w=tensor(), v=tensor(storage(kind="IntStorage")))
    with pytest.raises(FormatError, match="storage '0' is 6 elements of int32 here and something else elsewhere"):
        TorchPickle(write_zip(here / "m.pt", value))


@pytest.mark.parametrize(
    ("offset", "shape", "stride", "match"),
    [
        (1, (2, 3), (3, 1), "it ends at byte 28 of storage '0', which has 24 bytes"),
        (0, (2, 3), (4, 1), "ends at byte 28"),
        (0, (7,), (1,), "ends at byte 28"),
        (1 << 62, (1,), (1,), "ends at byte 18,446,744,073,709,551,620"),
        (0, (1 << 40,), (0,), "repeats a storage of 24 bytes too often"),
        (0, (1 << 62,), (0,), "is absurd"),
        (0, (0, 1 << 62), (1, 1), "is absurd"),
        (5, (2, 3), (-3, 1), "are negative"),
        (-1, (2,), (1,), "are negative"),
        (0, (-2, -3), (3, 1), "are negative"),
        (0, (2, 3), (3,), "2 dimensions and 1 strides"),
        (0, (1,) * 40, (1,) * 40, "40 dimensions"),
    ],
)
def test_tensors_that_lie(here: Path, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], match: str) -> None:
    lying = tensor(None, offset, shape, stride)
    with pytest.raises(FormatError, match=f"tensor 'w': .*{match}"):
        TorchPickle(write_zip(here / "m.pt", mapping(ok=tensor(), w=lying)))
    beside = mapping(model=mapping(ok=tensor()), optimizer=lying)
    assert TorchPickle(write_zip(here / "m.pt", beside)).names() == ["ok"]


def test_strides_that_mean_nothing_may_be_anything(here: Path) -> None:
    path = write_zip(here / "m.pt", mapping(w=tensor(None, 4, (1, 2), (1 << 62, 1))))
    assert TorchPickle(path).read("w").tolist() == [[5, 6]]


@pytest.mark.parametrize(
    ("storages", "match"),
    [
        ({"0": (5, FLOATS)}, "storage '0' has 5 elements of float32; its pickle says otherwise"),
        ({"0": (-1, FLOATS)}, "storage '0' has -1 elements"),
        ({"0": (6, FLOATS[:-1])}, r"it ends at byte \d+, before the end of storage '0' at \d+\. It is cut off"),
        ({"1": (6, FLOATS)}, "its list of storages is not that of the tensors in its pickle"),
        ({"0": (6, FLOATS), "1": (6, FLOATS)}, "its list of storages is not that"),
        ({}, "its list of storages is not that"),
    ],
)
def test_legacy_storages_that_lie(here: Path, storages: dict[str, tuple[int, bytes]], match: str) -> None:
    with pytest.raises(FormatError, match=match):
        TorchPickle(write_legacy(here / "m.pt", mapping(w=tensor()), storages))


def test_legacy_files_of_another_version(here: Path) -> None:
    path = write_legacy(here / "m.pt", mapping(w=tensor()))
    path.write_bytes(path.read_bytes().replace(pickle.dumps(1001, 2), pickle.dumps(1002, 2)))
    with pytest.raises(FormatError, match="its protocol version is not 1001"):
        TorchPickle(path)


# -- modules that are none


def module(*parts: tuple[str, bytes]) -> bytes:
    groups = {"_parameters": b"}", "_buffers": b"}", "_modules": b"}", **dict(parts)}
    return name("__main__", "Net") + b")\x81" + mapping(**groups) + b"b"


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (module(("_modules", b"}" + text("a") + b"h\x09s"))[:-1] + b"b", "nest too deeply, or contain themselves"),
        (module(("_modules", mapping(a=tensor()))), "its module 'a' is no module"),
        (module(("_modules", mapping(a=CALLS["os.system"]))), "its module 'a' is no module"),
        (module(("_parameters", mapping(a=CALLS["os.system"]))), r"tensor 'a' would be made by calling os\.system"),
        (module(("_parameters", b"]")), r"asks|instance of __main__\.Net"),
    ],
    ids=["loop", "tensor", "call", "parameter", "list"],
)
def test_modules_that_lie(here: Path, value: bytes, match: str) -> None:
    looped = name("__main__", "Net") + b")\x81q\x09" + value[len(name("__main__", "Net")) + 2 :]
    with pytest.raises(FormatError, match=match):
        TorchPickle(write_zip(here / "m.pt", looped))


def test_modules_that_share_themselves_into_a_bomb(here: Path) -> None:
    value = module() + b"q\x000"
    for _ in range(60):
        value += module(("_modules", mapping(a=b"h\x00", b=b"h\x00"))) + b"q\x000"
    with pytest.raises(FormatError, match="unfold without end"):
        TorchPickle(write_zip(here / "m.pt", value + b"h\x00"))


# -- the zip archive


def test_entries_that_share_bytes(here: Path) -> None:
    path = write_zip(here / "m.pt", mapping(w=tensor(), v=tensor(storage("1"))), {"0": FLOATS, "1": FLOATS})
    raw = bytearray(path.read_bytes())
    first, second = (raw.rindex(b"archive/data/" + key) for key in (b"0", b"1"))
    raw[second - 4 : second] = raw[first - 4 : first]  # the offset of the local header, in the directory
    path.write_bytes(raw)
    with pytest.raises(FormatError, match="two of its entries share the bytes at"):
        TorchPickle(path)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        (42, struct.pack("<I", 5), "does not lie where the zip directory says, at byte 5"),
        (42, struct.pack("<I", 0xFFFFFF), "does not lie where|directory cannot be read"),
        (8, struct.pack("<H", 1), "is encrypted or compressed in an unusual way"),
        (10, struct.pack("<H", 12), "is encrypted or compressed in an unusual way"),
        (20, struct.pack("<I", 1 << 30), "does not lie where"),
        (24, struct.pack("<I", 1 << 30), "declares 1,073,741,824 bytes and stores 24"),
        (24, struct.pack("<I", 23), "storage '0' has 23 bytes; its pickle says 24"),
        (10, struct.pack("<H", 8), "does not decompress"),
    ],
)
def test_a_directory_that_lies(here: Path, field: int, value: bytes, match: str) -> None:
    path = write_zip(here / "m.pt", mapping(w=tensor()))
    raw = bytearray(path.read_bytes())
    entry = raw.rindex(b"archive/data/0") - 46
    raw[entry + field : entry + field + len(value)] = value
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=match):
        TorchPickle(path).read("w")


def test_two_entries_of_one_name(here: Path) -> None:
    path = write_zip(here / "m.pt", mapping(w=tensor()))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("archive/data.pkl", pickled(CALLS["os.system"]))
    with pytest.raises(FormatError, match="two entries of its zip archive have the same name"):
        TorchPickle(path)


def test_byte_orders_that_nobody_has(here: Path) -> None:
    for order in (b"middle", b"little" * 1000):
        with pytest.raises(FormatError, match=r"its byte order is .* not little or big"):
            TorchPickle(write_zip(here / "m.pt", mapping(w=tensor()), byteorder=order))


# -- damage


def checkpoint_bytes(is_zip: bool) -> bytes:
    torch.manual_seed(0)
    value = {
        "model": {"a.w": torch.randn(3, 4).T, "b": torch.zeros(2).half()},
        "args": {"n": 3},
        "opt": [torch.ones(1)],
    }
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=is_zip)
    return buffer.getvalue()


WHOLE = {is_zip: checkpoint_bytes(is_zip) for is_zip in (True, False)}


@pytest.mark.parametrize("is_zip", [True, False])
def test_truncated_files(here: Path, is_zip: bool) -> None:
    raw = WHOLE[is_zip]
    for end in range(0, len(raw), 17):
        (here / "m.pt").write_bytes(raw[:end])
        with pytest.raises(FormatError):
            TorchPickle(here / "m.pt")


@settings(max_examples=400, deadline=None)
@given(is_zip=st.booleans(), data=st.data())
def test_flipped_bytes(tmp_path_factory: pytest.TempPathFactory, is_zip: bool, data: st.DataObject) -> None:
    raw = bytearray(WHOLE[is_zip])
    for _ in range(data.draw(st.integers(1, 5))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / "flipped.pt"
    path.write_bytes(raw)
    with suppress(FormatError):
        checkpoint = TorchPickle(path)
        for tensor_name in checkpoint.names():
            assert checkpoint.read(tensor_name).shape == checkpoint.info(tensor_name).shape
