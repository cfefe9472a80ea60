"""TensorFlow checkpoints as we write them, read by our own reader; real TensorFlow is asked in `peers/`."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bundle_writer
from bundle_checks import assert_reads
from loadstone.checkpoint.base import DTYPES
from loadstone.checkpoint.bundle_index import TYPES, read_index
from loadstone.checkpoint.protobuf import varint
from loadstone.checkpoint.sstable import read_table
from loadstone.checkpoint.tensor_bundle import TensorBundle
from loadstone.checkpoint.write_bundle import write_bundle
from loadstone.errors import LoadstoneError
from memory import MemoryCheckpoint
from writer_cases import aliased, assert_same, big_source, checkpoints, peak_growth

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8)
KNOWN = set(DTYPES) & set(TYPES.values())


@settings(max_examples=150, deadline=None)
@given(checkpoints(KNOWN, NAMES))
def test_any_checkpoint_comes_back(tmp_path_factory: pytest.TempPathFactory, source: MemoryCheckpoint) -> None:
    folder = tmp_path_factory.mktemp("tf")
    files = write_bundle(source, folder / "model.ckpt")
    assert sorted(files) == sorted(folder.iterdir())
    assert_same(TensorBundle(folder), source)


def test_the_index_is_that_of_the_independent_writer(tmp_path: Path) -> None:
    """Aligned as they are, float32 tensors lie without gaps: then both writers must say the same of them."""
    tensors = {n: a for n, a in sorted(bundle_writer.gpt2_tensors().items()) if n != "global_step"}
    (tmp_path / "ours").mkdir()
    write_bundle(MemoryCheckpoint(tensors), tmp_path / "ours/model.ckpt")
    bundle_writer.write_bundle(tmp_path / "theirs/model.ckpt", tensors)
    ours, theirs = (tmp_path / side / "model.ckpt.data-00000-of-00001" for side in ("ours", "theirs"))
    assert ours.read_bytes() == theirs.read_bytes()
    ours, theirs = (tmp_path / side / "model.ckpt.index" for side in ("ours", "theirs"))
    assert read_index(ours) == read_index(theirs)
    assert_reads(tmp_path / "ours", tensors)


def test_an_index_of_many_blocks_has_its_keys_sorted_by_their_bytes(tmp_path: Path) -> None:
    names = [f"model/{'h' * (i % 40)}/{i}/Größe" for i in range(3000)] + ["é", "z", "Z", "重み", "a/b", "a.b", "a"]
    source = MemoryCheckpoint({name: np.full(i % 3, i, np.float32) for i, name in enumerate(reversed(names))})
    write_bundle(source, tmp_path / "m")
    content = (tmp_path / "m.index").read_bytes()
    rows = [*read_table(memoryview(content))]
    assert [key for key, _ in rows] == sorted([b"", *(name.encode() for name in names)])
    assert len(content) < sum(len(key) + len(value) for key, value in rows)  # what keys share is stored once
    pos, handles = 0, list[int]()
    while len(handles) < 4:  # offset and size of the metaindex, of the index of the data blocks
        number, pos = varint(content[-48:], pos)
        handles.append(number)
    index = content[handles[2] : handles[2] + handles[3]]
    assert int.from_bytes(index[-4:], "little") > 20  # data blocks
    assert_same(TensorBundle(tmp_path), source)


def test_every_block_has_its_restart_points(tmp_path: Path) -> None:
    """TensorFlow looks names up by binary search over them; our reader walks every entry and would not notice."""
    source = MemoryCheckpoint({f"layer/{i:03d}": np.ones(1) for i in range(100)})
    write_bundle(source, tmp_path / "m")
    content = (tmp_path / "m.index").read_bytes()
    metaindex, _ = varint(content[-48:], 0)  # which follows the only data block and its trailer
    block = content[: metaindex - 5]
    count = int.from_bytes(block[-4:], "little")
    starts = struct.unpack_from(f"<{count}L", block, len(block) - 4 - 4 * count)
    assert count == 7  # 101 entries, every 16th
    assert list(starts) == sorted({*starts})
    for i, start in enumerate(starts):
        shared, pos = varint(block, start)
        size, pos = varint(block, pos)
        _, pos = varint(block, pos)
        assert shared == 0
        assert block[pos : pos + size] == (f"layer/{16 * i - 1:03d}".encode() if i else b"")


def test_ties_share_their_bytes_and_odd_sizes_are_aligned(tmp_path: Path) -> None:
    source = aliased({"odd": np.ones(3, np.int8), "w": np.ones((5, 4)), "c": np.ones(1, "c16")}, {"head": "w"})
    write_bundle(source, tmp_path / "m")
    bundle = TensorBundle(tmp_path)
    assert bundle.aliases == {"w": "head"}  # the index is sorted, and the first counts
    assert (tmp_path / "m.data-00000-of-00001").stat().st_size == 8 + 160 + 8 + 16
    assert all(bundle.read(name).base is not None for name in source.names())  # views: nothing had to be copied


@pytest.mark.parametrize("name", ["model.ckpt", 'a "b"', "back\\slash", "Größe-重み", "new\nline", "100%"])
def test_the_state_file_names_any_prefix(name: str, tmp_path: Path) -> None:
    write_bundle(MemoryCheckpoint({"w": np.ones(2)}), tmp_path / name)
    write_bundle(MemoryCheckpoint({"w": np.zeros(2)}), tmp_path / "zzz")
    write_bundle(MemoryCheckpoint({"w": np.ones(2)}), tmp_path / name)
    text = (tmp_path / "checkpoint").read_bytes()
    assert text.isascii()
    assert text.count(b"\n") == 2
    assert TensorBundle(tmp_path).read("w").tolist() == [1, 1]


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    source = MemoryCheckpoint(bundle_writer.gpt2_tensors())
    files = [[p.read_bytes() for p in write_bundle(source, tmp_path / "m")] for _ in range(2)]
    assert files[0] == files[1]


def test_zeros_and_empty_checkpoints(tmp_path: Path) -> None:
    for tensors in ({}, {"e": np.ones((0, 3), np.float32)}, {"z": np.zeros(20 << 20, np.uint8)}):
        write_bundle(MemoryCheckpoint(tensors), tmp_path / "m")
        assert_reads(tmp_path, tensors)
    assert (tmp_path / "m.data-00000-of-00001").stat().st_blocks == 0


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"": np.ones(2)}, r"cannot hold the tensor name ''"),
        ({"\0a": np.ones(2)}, r"cannot hold the tensor name '\\x00a'"),
        ({"a": np.ones(2, DTYPES["float8_e8m0fnu"])}, r"type it has no code for: 'a' \(float8_e8m0fnu\)"),
        ({"a": np.broadcast_to(np.float32(0), (1,) * 32).reshape((1,) * 32)[None, ...]}, r"'a' has 33 dimensions"),
    ],
)
def test_what_tensorflow_cannot_hold_is_refused_before_anything_is_written(
    tensors: dict[str, Any], text: str, tmp_path: Path
) -> None:
    with pytest.raises(LoadstoneError, match=rf"^memory: .*{text}"):
        write_bundle(MemoryCheckpoint(tensors), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("cast", "limit"), [(False, 20e6), (True, 20e6 + 12e6)])
def test_peak_memory_is_one_tensor(tmp_path: Path, cast: bool, limit: float) -> None:
    """96 MB in tensors of 24 MB: a transposed view costs chunks alone, a cast its own 12 MB."""
    assert peak_growth(big_source(tmp_path), tmp_path / "out", "write_bundle", "write_bundle", cast=cast) < limit
