"""PyTorch checkpoints as we write them without PyTorch, read by PyTorch and by our own reader."""

from __future__ import annotations

import math
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loadstone.checkpoint.base import DTYPES, Array
from loadstone.checkpoint.streaming import Output
from loadstone.checkpoint.torch_pickle import TorchPickle
from loadstone.checkpoint.write_torch import write_torch
from loadstone.checkpoint.zip_records import ZipRecords
from loadstone.errors import LoadstoneError
from memory import MemoryCheckpoint
from torch_files import TORCH_DTYPES, bits
from writer_cases import aliased, assert_same, big_source, checkpoints, peak_growth

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
PLAIN = st.recursive(
    SCALARS | st.integers(-(2**1999), 2**1999),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(SCALARS, inner, max_size=3)
    ),
    max_leaves=10,
)


def load(path: Path, **options: Any) -> Any:
    return torch.load(path, weights_only=True, **options)


@settings(max_examples=150, deadline=None)
@given(checkpoints(DTYPES, NAMES), st.booleans())
def test_any_checkpoint_comes_back(
    tmp_path_factory: pytest.TempPathFactory, source: MemoryCheckpoint, mmap: bool
) -> None:
    path = tmp_path_factory.mktemp("pt") / "m.pt"
    write_torch(source, path)
    state = load(path, mmap=mmap)
    assert list(state) == source.names()
    for name, info in source.tensors.items():
        tensor = state[name]
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, TORCH_DTYPES[info.dtype])
        assert tensor.stride() == torch.empty(info.shape).stride()
        assert bits(tensor) == source.read(name).tobytes()
    for alias, kept in source.aliases.items():
        assert state[alias].untyped_storage().data_ptr() == state[kept].untyped_storage().data_ptr()
    if source.tensors:
        assert_same(TorchPickle(path), source)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(max_size=5).filter(lambda key: key != "model"), PLAIN, max_size=4))
def test_plain_values_come_back_around_the_state_dict(
    tmp_path_factory: pytest.TempPathFactory, around: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("pt") / "m.pt"
    write_torch(MemoryCheckpoint({"w": np.ones((2, 3))}), path, around=around)
    found = load(path)
    assert list(found) == ["model", *around]
    assert torch.equal(found.pop("model")["w"], torch.ones(2, 3, dtype=torch.float64))
    assert repr(found) == repr(around)  # 1 is not True, nor is 0.0 -0.0


def test_a_training_checkpoint_is_what_torch_would_have_saved(tmp_path: Path) -> None:
    around = {"model_args": {"n_layer": 2, "bias": False, "dropout": 0.0}, "iter_num": 5, "best_val_loss": 1e9}
    write_torch(MemoryCheckpoint({"w": np.ones(3, np.float32)}), tmp_path / "ours", around=around, key="weights")
    state = load(tmp_path / "ours")
    assert torch.equal(state.pop("weights")["w"], torch.ones(3))
    assert state == around
    ours = TorchPickle(tmp_path / "ours")
    assert ours.metadata == around
    assert ours.notes == ["weights found under 'weights'"]
    torch.save({"weights": {"w": torch.ones(3)}, **around}, tmp_path / "theirs")
    assert ours.metadata == TorchPickle(tmp_path / "theirs").metadata


def test_the_pickle_asks_for_nothing_but_what_torch_rebuilds_tensors_with(tmp_path: Path) -> None:
    write_torch(MemoryCheckpoint({name: np.ones(2, dtype) for name, dtype in DTYPES.items()}), tmp_path / "m.pt")
    seen = set(TorchPickle(tmp_path / "m.pt").globals_seen)
    assert {name.split(".")[-1] for name in seen if "Storage" not in name and "float8" not in name} == {
        "OrderedDict", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "uint16", "uint32", "uint64",
    }  # fmt: skip
    pickled = zipfile.ZipFile(tmp_path / "m.pt").read("archive/data.pkl")
    assert max(opcode.proto for opcode, _, _ in pickletools.genops(pickled)) == 2


def test_a_module_loads_it_strictly_and_stays_tied(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7, bias=False), torch.nn.BatchNorm1d(7))
    model[1].weight = model[0].weight
    arrays = {name: value.numpy() for name, value in model.state_dict().items() if name != "1.weight"}
    write_torch(aliased(arrays, {"1.weight": "0.weight"}, list(model.state_dict())), tmp_path / "m.pt")
    for mmap in (True, False):
        state = load(tmp_path / "m.pt", mmap=mmap)
        other = torch.nn.Sequential(
            torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7, bias=False), torch.nn.BatchNorm1d(7)
        )
        other.load_state_dict(state, strict=True)
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model[:1].parameters(), strict=False))
        assert state["0.weight"].data_ptr() == state["1.weight"].data_ptr()


def test_the_archive_is_laid_out_as_torch_lays_it_out(tmp_path: Path) -> None:
    tensors: dict[str, Array] = {
        "a": np.arange(6, dtype=np.float32),
        "b": np.ones(3, np.int8),
        "e": np.ones((0, 2)),
        "c": np.ones(()),
    }
    write_torch(MemoryCheckpoint(tensors), tmp_path / "archive.pt")
    torch.save({name: torch.from_numpy(a) for name, a in tensors.items()}, tmp_path / "theirs.pt")
    ours, theirs = zipfile.ZipFile(tmp_path / "archive.pt"), zipfile.ZipFile(tmp_path / "theirs.pt")
    assert ours.testzip() is None
    assert_local_headers_agree(tmp_path / "archive.pt")
    named = {info.filename.replace("theirs/", "archive/"): info for info in theirs.infolist()}
    assert [info.filename for info in ours.infolist()] == [
        name for name in named if name.split("/")[1] not in (".format_version", ".storage_alignment")
    ]
    for info in ours.infolist():
        assert info.compress_type == zipfile.ZIP_STORED
        if "data.pkl" not in info.filename and "_id" not in info.filename:
            assert ours.read(info) == theirs.read(named[info.filename])
    assert len(ours.read("archive/.data/serialization_id")) == 40
    for tensor in load(tmp_path / "archive.pt", mmap=True).values():
        assert tensor.untyped_storage().data_ptr() % 64 == 0 or not tensor.numel()
    write_torch(MemoryCheckpoint(tensors), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "archive.pt").read_bytes()
    tensors["c"] = np.zeros(())
    write_torch(MemoryCheckpoint(tensors), tmp_path / "other")
    other = zipfile.ZipFile(tmp_path / "other").read("archive/.data/serialization_id")
    assert other != ours.read("archive/.data/serialization_id")


LOCAL = struct.Struct("<4s5H3L2H")


def assert_local_headers_agree(path: Path) -> None:
    """What precedes each record says the same as the directory, of which alone `zipfile` and torch make use."""
    with path.open("rb") as file, zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            file.seek(info.header_offset)
            signature, *_, crc, packed, size, name_length, extra_length = LOCAL.unpack(file.read(LOCAL.size))
            name, extra = file.read(name_length), file.read(extra_length)
            assert (signature, crc, name.decode()) == (b"PK\3\4", info.CRC, info.filename)
            assert file.tell() % 64 == 0
            if info.file_size >= 2**32 - 1:
                assert packed == size == 2**32 - 1
                assert struct.unpack_from("<2H2Q", extra) == (1, 16, info.file_size, info.file_size)
                extra = extra[20:]
            else:
                assert packed == size == info.file_size
            assert struct.unpack_from("<2sH", extra) == (b"FB", len(extra) - 4)


def test_more_than_four_gigabytes(tmp_path: Path) -> None:
    """One record beyond 32 bits, others behind it. The zeros take no room on the disk."""
    big = np.zeros((1 << 30) + 7, np.float32)
    write_torch(MemoryCheckpoint({"big": big, "small": np.arange(5.0)}), tmp_path / "m.pt")
    assert (tmp_path / "m.pt").stat().st_blocks * 512 < 1 << 20
    for state in (load(tmp_path / "m.pt", mmap=True), TorchPickle(tmp_path / "m.pt")):
        small = state["small"] if isinstance(state, dict) else state.read("small")
        assert small.tolist() == [0, 1, 2, 3, 4]
    assert state.info("big").shape == big.shape
    big_record, small_record = zipfile.ZipFile(tmp_path / "m.pt").infolist()[2:4]
    assert (big_record.file_size, small_record.file_size) == (big.nbytes, 40)
    assert small_record.header_offset > 1 << 32
    assert_local_headers_agree(tmp_path / "m.pt")


def test_more_than_65535_records(tmp_path: Path) -> None:
    count = 66_000
    with Output(tmp_path / "z") as output:
        records = ZipRecords(output)
        for i in range(count):
            records.add(f"archive/data/{i}", b"%d" % i)
        records.add("archive/version", b"3\n")
        records.finish()
    with zipfile.ZipFile(tmp_path / "z") as archive:
        assert len(archive.infolist()) == count + 1
        assert archive.read(f"archive/data/{count - 1}") == b"65999"
    reader = torch._C.PyTorchFileReader(str(tmp_path / "z"))
    assert reader.get_record("data/65999") == b"65999"


class Loop(list[Any]):
    pass


LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("around", "text"),
    [
        ({"a": {"b": [np.float64(3)]}}, r"'a\.b' holds something else, of type float64\. Leave it out"),
        ({"a": b"x"}, r"'a' holds something else, of type bytes"),
        ({"a": {(1, b""): 2}}, r"'a' holds something else, of type bytes"),
        ({"a": ["\ud800"]}, r"'a' holds something else, of type str"),
        ({b"x": 1}, r"'a key' holds something else, of type bytes"),
        ({"a": Loop()}, r"'a' holds something else, of type Loop"),
        ({"a": [2**100_000]}, r"int \(of 2000 bits\), .*'a' holds something else, of type int"),
        ({"a": LOOP}, r"at most 50 deep; 'a' holds something else, of type list"),
        ({"a": math}, r"'a' holds something else, of type module"),
        ({"model": 3}, r"m\.pt: 'model' is the name of the state dict, and of a value to write beside it"),
    ],
)
def test_what_is_not_plain_is_refused_before_anything_is_written(
    tmp_path: Path, around: dict[str, Any], text: str
) -> None:
    with pytest.raises(LoadstoneError, match=text):
        write_torch(MemoryCheckpoint({"w": np.ones(2)}), tmp_path / "m.pt", around=around)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("cast", "limit"), [(False, 20e6), (True, 20e6 + 12e6)])
def test_peak_memory_is_one_tensor(tmp_path: Path, cast: bool, limit: float) -> None:
    """96 MB in tensors of 24 MB: a transposed view costs chunks alone, a cast its own 12 MB."""
    assert peak_growth(big_source(tmp_path), tmp_path / "out", "write_torch", "write_torch", cast=cast) < limit
