"""Safetensors as we write them, read by the `safetensors` library and by our own reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_model

from loadstone.checkpoint.base import DTYPES
from loadstone.checkpoint.opening import open_checkpoint
from loadstone.checkpoint.safetensors import CODES, Safetensors
from loadstone.checkpoint.write_safetensors import write_safetensors, write_safetensors_file
from loadstone.errors import LoadstoneError
from memory import MemoryCheckpoint
from safetensors_files import judge
from writer_cases import aliased, assert_same, big_source, checkpoints, peak_growth

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(
    lambda name: name not in ("__metadata__", "format", "total_size", "pt", "")
)
SMALL = {f"layers.{i}.weight": np.full((i + 1, 4), i, np.float32) for i in range(5)}


def raw(path: Path) -> dict[str, Any]:
    """The header."""
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


@settings(max_examples=150, deadline=None)
@given(checkpoints(CODES, NAMES), st.none() | st.integers(0, 300))
def test_any_checkpoint_comes_back(
    tmp_path_factory: pytest.TempPathFactory, source: MemoryCheckpoint, shard_size: int | None
) -> None:
    folder = tmp_path_factory.mktemp("st")
    files = write_safetensors(source, folder, shard_size=shard_size)
    assert sorted(files) == sorted(folder.iterdir())
    assert_same(open_checkpoint(files[-1]), source)
    judged: dict[str, Any] = {}
    for file in files:
        if file.suffix == ".safetensors":
            tensors = judge(file.read_bytes())
            assert tensors or not source.tensors  # no empty shard
            judged |= tensors or {}
    assert judged.keys() == source.tensors.keys() - source.aliases.keys()
    for name, found in judged.items():
        assert tuple(found["shape"]) == source.info(name).shape
        assert CODES[source.info(name).dtype] == found["dtype"]
        assert bytes(found["data"]) == source.read(name).tobytes()


def test_the_header_is_aligned_and_so_is_every_tensor(tmp_path: Path) -> None:
    tensors = {name: np.zeros(3, DTYPES[name]) for name in reversed([*CODES])}
    for extra in ("", "x", "xy", "xyz"):
        write_safetensors_file(MemoryCheckpoint(tensors | {f"t{extra}": np.zeros(1)}), tmp_path / "f")
        content = (tmp_path / "f").read_bytes()
        assert int.from_bytes(content[:8], "little") % 8 == 0
        header = raw(tmp_path / "f")
        assert header.pop("__metadata__") == {"format": "pt"}
        for name in tensors:
            assert header[name]["data_offsets"][0] % DTYPES[name].itemsize == 0
    write_safetensors_file(MemoryCheckpoint(tensors), tmp_path / "f", metadata={"format": "np", "who": "we"})
    with safe_open(tmp_path / "f", "np") as file:
        assert file.metadata() == {"format": "pt", "who": "we"}


def test_the_same_checkpoint_gives_the_same_bytes_in_the_sources_order(tmp_path: Path) -> None:
    for name in ("1", "2"):
        write_safetensors_file(MemoryCheckpoint(SMALL), tmp_path / name, metadata={"b": "1", "a": "2"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert Safetensors(tmp_path / "1").names() == list(SMALL)
    backwards = dict(reversed(SMALL.items()))
    write_safetensors_file(MemoryCheckpoint(backwards), tmp_path / "3")
    assert Safetensors(tmp_path / "3").names() == list(backwards)


def test_shards_are_filled_in_order_and_a_large_tensor_has_its_own(tmp_path: Path) -> None:
    source = aliased(SMALL, {"head": "layers.4.weight"})  # 16, 32, 48, 64 and 80 bytes
    files = write_safetensors(source, tmp_path, shard_size=64, metadata={"who": "we"})
    held = [[*raw(file)][1:] for file in files[:-1]]
    assert held == [["layers.0.weight", "layers.1.weight"]] + [[f"layers.{i}.weight"] for i in (2, 3, 4)]
    assert [file.name for file in files] == [
        *(f"model-{i:05d}-of-00004.safetensors" for i in (1, 2, 3, 4)),
        "model.safetensors.index.json",
    ]
    assert json.loads(files[-1].read_text()) == {
        "metadata": {"head": "layers.4.weight", "total_size": 240},
        "weight_map": {name: file.name for file, names in zip(files, held, strict=False) for name in names},
    }
    assert all(raw(file)["__metadata__"] == {"format": "pt", "who": "we"} for file in files[:-1])
    sharded = open_checkpoint(tmp_path)
    assert sharded.aliases == {"head": "layers.4.weight"}
    assert sharded.names() == [*SMALL, "head"]
    assert [p.name for p in write_safetensors(source, tmp_path, shard_size=240)] == ["model.safetensors"]
    even = MemoryCheckpoint({str(i): np.ones(2) for i in range(6)})
    files = write_safetensors(even, tmp_path, shard_size=32)
    assert [[*raw(file)][1:] for file in files[:-1]] == [["0", "1"], ["2", "3"], ["4", "5"]]


def test_ties_are_noted_as_the_library_notes_them(tmp_path: Path) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte = torch.nn.Embedding(5, 3)
            self.head = torch.nn.Linear(3, 5, bias=False)
            self.head.weight = self.wte.weight

    model = Tied()
    source = aliased({"head.weight": model.head.weight.detach().numpy()}, {"wte.weight": "head.weight"})
    write_safetensors_file(source, tmp_path / "ours")
    save_model(model, str(tmp_path / "theirs"), metadata={"format": "pt"})
    assert raw(tmp_path / "ours") == raw(tmp_path / "theirs")
    other = Tied()
    assert load_model(other, tmp_path / "ours") == (set(), [])
    assert torch.equal(other.wte.weight, model.wte.weight)


def test_torch_loads_every_type(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {n: rng.integers(0, 2, size=24, dtype=np.uint8).view(DTYPES[n]) for n in CODES}
    write_safetensors_file(MemoryCheckpoint(tensors), tmp_path / "f")
    for name, found in load_file(tmp_path / "f").items():
        assert found.dtype == getattr(torch, name)
        assert found.view(torch.uint8).numpy().tobytes() == tensors[name].tobytes()


@pytest.mark.parametrize(
    ("source", "metadata", "text"),
    [
        (MemoryCheckpoint({"z": np.zeros(2, np.complex128)}), {}, r"1 of its tensors, whose type .*'z' \(complex128\)"),
        (MemoryCheckpoint({"__metadata__": np.zeros(2)}), {}, r"keeps the name '__metadata__' for itself\. Rename"),
        (MemoryCheckpoint({"a": np.zeros(2)}), {"n": 3}, r"metadata are texts, and 'n' is 3"),
        (MemoryCheckpoint({"a": np.zeros(2)}), {"n": "\ud800"}, r"metadata are texts, and 'n' is"),
        (MemoryCheckpoint({"a": np.zeros(2)}), {"note": "a"}, r"the entry 'note' would be taken for the other"),
        (aliased({"a": np.zeros(2)}, {"format": "a"}), {}, r"the entry 'format' would be taken for the other"),
        (aliased({"a": np.zeros(2)}, {"total_size": "a"}), {}, r"the entry 'total_size' would be taken for the other"),
    ],
)
def test_what_safetensors_cannot_hold_is_refused_before_anything_is_written(
    tmp_path: Path, source: MemoryCheckpoint, metadata: dict[str, str], text: str
) -> None:
    with pytest.raises(LoadstoneError, match=rf"^memory: .*{text}"):
        write_safetensors(source, tmp_path, metadata=metadata)
    with pytest.raises(LoadstoneError, match=text):
        write_safetensors_file(source, tmp_path / "f", metadata=metadata)
    assert list(tmp_path.iterdir()) == []


def test_a_header_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        LoadstoneError, match=r"its header would have 100,000,\d{3} bytes, .* 100,000,000\. Write shards"
    ):
        write_safetensors_file(MemoryCheckpoint({"a": np.zeros(2)}), tmp_path / "f", metadata={"n": "x" * 10**8})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("cast", "limit"), [(False, 20e6), (True, 20e6 + 12e6)])
def test_peak_memory_is_one_tensor(tmp_path: Path, cast: bool, limit: float) -> None:
    """96 MB in tensors of 24 MB: a transposed view costs chunks alone, a cast its own 12 MB."""
    source = big_source(tmp_path)
    grown = peak_growth(source, tmp_path / "out", "write_safetensors", "write_safetensors_file", cast=cast)
    assert grown < limit
