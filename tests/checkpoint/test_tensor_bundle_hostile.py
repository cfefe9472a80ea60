"""Incomplete, damaged and hostile TensorFlow checkpoints: refused with the file and the tensor named, or read right."""

from __future__ import annotations

import struct
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bundle_checks import Tensors, read_all, same_bits
from bundle_writer import (
    entry,
    gpt2_tensors,
    header,
    masked_crc,
    message,
    of,
    slice_key,
    table,
    write_bundle,
    write_raw,
)
from loadstone.checkpoint.tensor_bundle import TensorBundle
from loadstone.errors import FormatError, LoadstoneError


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "124M" / "model.ckpt", gpt2_tensors(), shards=2, block_size=500)
    return tmp_path / "124M"


# --- incomplete and damaged files


def test_a_missing_shard_is_found_at_opening(gpt2: Path) -> None:
    (gpt2 / "model.ckpt.data-00001-of-00002").unlink()
    with pytest.raises(
        FormatError,
        match=r"data-00001-of-00002: this data shard is missing, and it should have "
        r"\d+ \(tensor 'model/.*' ends there\): the download is incomplete",
    ):
        TensorBundle(gpt2)


def test_shards_of_another_count_are_not_taken(gpt2: Path) -> None:
    (gpt2 / "model.ckpt.data-00001-of-00002").rename(gpt2 / "model.ckpt.data-00001-of-00003")
    with pytest.raises(FormatError, match="data-00001-of-00002: this data shard is missing"):
        TensorBundle(gpt2)


def test_a_truncated_shard_is_found_at_opening_whatever_its_length(tmp_path: Path) -> None:
    write_bundle(
        tmp_path / "m", {"a": np.ones(3, np.int8), "b": np.ones((2, 5), np.float16), "c": np.zeros(0, np.int8)}
    )
    shard = tmp_path / "m.data-00000-of-00001"
    whole = shard.read_bytes()
    for length in range(len(whole)):
        shard.write_bytes(whole[:length])
        with pytest.raises(FormatError, match=rf"has {length} bytes, and it should have 23 \(tensor '.' ends there\)"):
            TensorBundle(tmp_path)
    shard.write_bytes(whole + b"more")
    read_all(tmp_path)


def test_a_truncated_shard_whose_last_tensor_is_not_the_last_name(tmp_path: Path) -> None:
    index = write_raw(tmp_path, {b"a": of(bytes(8), offset=8), b"b": of(bytes(8))}, bytes(15))
    with pytest.raises(FormatError, match=r"has 15 bytes, and it should have 16 \(tensor 'a' ends there\)"):
        TensorBundle(index)


def test_a_flipped_byte_of_data_names_its_tensor_and_spares_the_others(tmp_path: Path) -> None:
    expected: Tensors = {"a": np.array(5, np.int64), "b/w": np.ones((2, 3), np.float16), "c": np.array([True, False])}
    write_bundle(tmp_path / "m", expected)
    shard = tmp_path / "m.data-00000-of-00001"
    whole = shard.read_bytes()
    owners = [name for name, array in expected.items() for _ in range(array.nbytes)]
    for position, owner in enumerate(owners):
        broken = bytearray(whole)
        broken[position] ^= 1 << position % 8
        shard.write_bytes(broken)
        bundle = TensorBundle(tmp_path)
        for name, array in expected.items():
            if name != owner:
                assert same_bits(bundle.read(name), array)
        for _ in range(2):  # asking again does not make it whole
            with pytest.raises(
                FormatError, match=rf"data-00000-of-00001: tensor '{owner}' \(\d+ bytes at offset .*CRC32C"
            ):
                bundle.read(owner)


def test_a_flipped_byte_of_a_slice_names_the_variable(tmp_path: Path) -> None:
    write_bundle(tmp_path / "m", {"w": np.ones((4, 6), np.float32)}, cuts={"w": (1, [2, 5])})
    shard = tmp_path / "m.data-00000-of-00001"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    with pytest.raises(FormatError, match=r"tensor 'w' \(16 bytes at offset 80\) is damaged"):
        TensorBundle(tmp_path).read("w")


def test_a_flipped_byte_of_the_index_is_found(tmp_path: Path) -> None:
    index = write_bundle(tmp_path / "m", {f"h{i}/w": np.ones(i, np.float32) for i in range(9)}, block_size=60)
    whole = index.read_bytes()
    for position in range(len(whole) - 48):
        broken = bytearray(whole)
        broken[position] ^= 1 << position % 8
        index.write_bytes(broken)
        with pytest.raises(FormatError, match=r"m\.index: the block at byte \d+ is damaged.* do that again"):
            TensorBundle(tmp_path)


def test_a_truncated_index_is_found_whatever_its_length(gpt2: Path) -> None:
    index = gpt2 / "model.ckpt.index"
    whole = index.read_bytes()
    for length in [0, 1, 7, 8, 47, 48, *range(50, len(whole), 97), len(whole) - 1]:
        index.write_bytes(whole[:length])
        problem = rf"the file is empty|does not end with the magic number .* cut short at {length} bytes"
        for path in (gpt2, index):
            with pytest.raises(FormatError, match=rf"model\.ckpt\.index: .*({problem})"):
                TensorBundle(path)


# --- hostile indexes, their checksums right


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        (b"w", of(bytes(8), shape=(-2,)), r"tensor 'w': its shape \(-2,\) is negative"),
        (b"w", of(bytes(8), shape=(-1, -2)), r"shape \(-1, -2\) is negative"),
        (b"w", of(bytes(8), shape=(2**62,)), r"beyond all memory"),
        (b"w", of(b"", shape=(0, 2**62, 2**62)), r"beyond all memory"),
        (b"w", of(bytes(4), shape=(1,) * 33), r"33 dimensions \(at most 32\)"),
        (b"w", of(bytes(8)).replace(b"\x12\x04\x12\x02\x08\x02", b"\x12\x02\x18\x01"), "of unknown rank"),
        (b"w", of(bytes(8), shape=(3,)), r"float32 of shape \(3,\) takes 12 bytes, and its entry declares 8"),
        (b"w", of(bytes(8), dtype=2), r"float64 of shape \(2,\) takes 16 bytes, and its entry declares 8"),
        (b"w", of(bytes(8), dtype=0), "tensor 'w': it has the unknown type number 0"),
        (b"w", of(bytes(8), dtype=101), "unknown type number 101"),
        (b"w", of(bytes(8), dtype=-1), "unknown type number -1"),
        (b"w", of(bytes(8), offset=-8), "8 bytes at offset -8"),
        (b"w", of(bytes(8), dtype=7, size=-8), "-8 bytes at offset 0"),
        (b"w", of(bytes(8), shard=1), "tensor 'w' lies in shard 1, and there are 1 shards"),
        (b"w", of(bytes(8), shard=-1), "lies in shard -1"),
        (b"w", of(bytes(8), offset=2**62), "has 16 bytes, and it should have 4611686018427387912"),
        (b"w", of(bytes(8), offset=9), r"has 16 bytes, and it should have 17 \(tensor 'w' ends there\)"),
        (b"w", b"\x0b", "tensor 'w'.*unknown wire type 3"),
        (b"w", b"\x08", "tensor 'w'.*runs past the end"),
        (b"w", message((1, b"x")), "tensor 'w': field 1 of a protobuf message should be a number"),
        (b"w", message((1, 1), (2, 5)), "tensor 'w': field 2 of a protobuf message should be a message"),
        (b"\xff\xfe", of(bytes(8)), "the tensor name .* is not UTF-8"),
        (b"", b"", "its header declares 0 data shards"),
        (b"", header(-1), "declares -1 data shards"),
        (b"", header(1, endianness=1), "big-endian, which Loadstone does not read"),
        (b"", header(1, min_consumer=2), "asks for version 2 of the tensor bundle format; 1 is known"),
        (b"", message((1, message((1, b"")))), r"checkpoint of version 1 .*tf\.compat\.v1\.train\.Saver"),
    ],
)
def test_a_hostile_entry_is_refused_at_opening(tmp_path: Path, name: bytes, content: bytes, problem: str) -> None:
    index = write_raw(tmp_path, {name: content}, bytes(16))
    with pytest.raises(FormatError, match=rf"m\.(index|data-00000-of-00001): .*{problem}"):
        TensorBundle(index)


@pytest.mark.parametrize("entries", [[], [(b"a", of(bytes(8)))]], ids=["nothing", "no header"])
def test_a_table_without_the_header_is_another_kind_of_file(tmp_path: Path, entries: list[tuple[bytes, bytes]]) -> None:
    (tmp_path / "m.index").write_bytes(table(entries))
    with pytest.raises(FormatError, match="without the header of a TensorFlow checkpoint"):
        TensorBundle(tmp_path)


@pytest.mark.parametrize(
    ("second", "refused"),
    [
        (of(bytes(8), offset=8), False),
        (of(bytes(8)), False),
        (of(bytes(8), offset=7), True),
        (of(bytes(4), shape=(1,), offset=2), True),
        (of(bytes(8), shape=(2, 1)), True),
        (of(bytes(8), dtype=3), True),
        (of(bytes(8), crc=1), True),
        (of(bytes(8), shard=1), False),
        (of(b"", shape=(0,), offset=3), False),
    ],
)
def test_partial_overlap_is_refused(tmp_path: Path, second: bytes, refused: bool) -> None:
    index = write_raw(tmp_path, {b"a": of(bytes(8)), b"b": second}, bytes(16), shards=2)
    if refused:
        with pytest.raises(FormatError, match=r"m\.index: tensors '[ab]' and '[ab]' overlap in shard 0"):
            TensorBundle(index)
    else:
        assert set(read_all(index)) == {"a", "b"}


Extents = list[tuple[int, int]]
FULL = -1


@pytest.mark.parametrize(
    ("shape", "slices", "problem"),
    [
        ((4, 2), [[(0, 2), (0, 2)], [(2, 2), (0, 2)]], None),
        ((4, 2), [[(2, 2), (0, 2)], [(0, 2), (0, 2)]], None),
        ((4, 2), [[(0, 4), (0, 2)]], None),
        ((4, 2), [[(0, 4), (0, 1)], [(0, 4), (1, 1)]], None),
        ((4, 2), [[(0, 2), (0, 2)]], r"slices do not cover \(4, 2\) exactly along one axis"),
        ((4, 2), [[(0, 2), (0, 2)], [(1, 2), (0, 2)]], "do not cover"),
        (
            (4, 2),
            [[(0, 2), (0, 2)], [(0, 2), (0, 2)]],
            r"its slice \[\(0, 2\), \(0, 2\)\] is not in the index, or twice",
        ),
        ((4, 2), [[(0, 2), (0, 2)], [(2, 2), (0, 1)]], "do not cover"),
        ((4, 2), [[(0, 3), (0, 2)], [(2, 2), (0, 2)]], "do not cover"),
        ((4, 2), [[(0, 2), (1, 2)], [(2, 2), (1, 2)]], "do not cover"),
        ((4, 2), [[(0, 2), (0, 1)], [(0, 2), (1, 1)], [(2, 2), (0, 1)], [(2, 2), (1, 1)]], "do not cover"),
        ((4, 2), [[(0, 5), (0, 2)]], "do not cover"),
        ((4, 2), [[(0, 4)]], "it has 2 dimensions, and one of its slices has 1"),
        ((), [[]], "it is a scalar, and has slices"),
    ],
)
def test_slices_must_cover_the_variable(
    tmp_path: Path, shape: tuple[int, ...], slices: list[Extents], problem: str | None
) -> None:
    parts: dict[bytes, bytes] = {}
    data = b""
    for extents in slices:
        raw = bytes([len(data)]) * int(np.prod([size for _, size in extents]))
        parts[slice_key("w", extents)] = of(raw, 6, tuple(size for _, size in extents), offset=len(data))
        data += raw
    listed = [(7, message(*((1, message((1, low), (2, size))) for low, size in extents))) for extents in slices]
    index = write_raw(tmp_path, parts | {b"w": entry(6, shape, slices=listed)}, data)
    if problem:
        with pytest.raises(FormatError, match=f"tensor 'w': .*{problem}"):
            TensorBundle(index)
    else:
        assert read_all(index)["w"].shape == shape


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        (None, r"its slice \[\(0, 2\)\] is not in the index"),
        (of(bytes(2), 4, (2,)), r"its slice \[\(0, 2\)\] is stored with another type or shape"),
        (of(bytes(2), 6, (2, 1)), "stored with another type or shape"),
        (of(bytes(2), 6, (2,), size=3), "takes 2 bytes, and its entry declares 3"),
    ],
)
def test_a_slice_must_be_what_its_variable_says(tmp_path: Path, part: bytes | None, problem: str) -> None:
    listed = [(7, message((1, message((2, 2)))))]
    parts = {slice_key("w", [(0, 2)]): part} if part else {}
    index = write_raw(tmp_path, parts | {b"w": entry(6, (2,), slices=listed)}, bytes(9))
    with pytest.raises(FormatError, match=f"tensor 'w': .*{problem}"):
        TensorBundle(index)


SEEDS: dict[bytes, bytes] = {
    b"": header(1),
    b"a": of(bytes(8)),
    b"b": of(bytes(2), 10, (1, 2), offset=8),
    b"s": entry(7, (), offset=10, size=3),
    b"w": entry(6, (4,), slices=[(7, message((1, message((2, 4)))))]),
    slice_key("w", [(0, 4)]): of(bytes(4), 6, (4,), offset=12),
}


@given(st.sampled_from(sorted(SEEDS)), st.data())
@settings(max_examples=400, deadline=None)
def test_mutated_entries_with_right_checksums_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, key: bytes, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("bundle")
    value = bytearray(SEEDS[key])
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(value) - 1))
        value[position : position + data.draw(st.integers(0, 1))] = data.draw(st.binary(max_size=2)) or b"\0"
    index = write_raw(folder, SEEDS | {key: bytes(value)}, bytes(16))
    with suppress(LoadstoneError):
        read_all(index)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_damage_is_found_or_changes_nothing(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("bundle")
    expected = {name: array for name, array in gpt2_tensors().items() if "h0" in name or name == "global_step"}
    write_bundle(folder / "m", expected, block_size=300, snappy=data.draw(st.booleans()))
    files = sorted(folder.iterdir())
    for _ in range(data.draw(st.integers(1, 4))):
        file = data.draw(st.sampled_from(files))
        content = bytearray(file.read_bytes())
        start = data.draw(st.integers(0, len(content) - 1))
        stop = start + data.draw(st.sampled_from([0, 1, 1, 1, 1, 4, 5000]))
        content[start:stop] = data.draw(st.binary(max_size=6))
        file.write_bytes(content or b"\0")
    with suppress(LoadstoneError):
        bundle = TensorBundle(folder)
        for name in bundle.names():
            with suppress(LoadstoneError):
                assert same_bits(bundle.read(name), expected[name])


def test_a_slice_named_many_times_is_decoded_once(tmp_path: Path) -> None:
    """30 000 mentions of a slice whose entry is a megabyte of unknown fields."""
    stored = of(bytes(2), 6, (2,)) + message((99, 1)) * 300_000
    listed = [(7, message((1, message((2, 2)))))] * 30_000
    index = write_raw(tmp_path, {slice_key("w", [(0, 2)]): stored, b"w": entry(6, (2,), slices=listed)}, bytes(2))
    start = time.process_time()
    with pytest.raises(FormatError, match="or twice"):
        TensorBundle(index)
    assert time.process_time() - start < 5


def test_a_bomb_of_shard_numbers_is_refused_at_once(tmp_path: Path) -> None:
    entries = {b"%06d" % i: of(b"\0", 6, (1,), shard=i) for i in range(20_000)}
    index = tmp_path / "m.index"
    index.write_bytes(table([(b"", header(2**31 - 1)), *sorted(entries.items())], block_size=1))
    start = time.process_time()
    with pytest.raises(FormatError, match=r"m\.data-00000-of-2147483647: this data shard is missing"):
        TensorBundle(index)
    assert time.process_time() - start < 10


def test_a_checksum_of_more_than_32_bits_is_a_mismatch(tmp_path: Path) -> None:
    wide = of(bytes(8)).removesuffix(struct.pack("<I", masked_crc(bytes(8))))[:-1] + message((6, 2**40))
    bundle = TensorBundle(write_raw(tmp_path, {b"w": wide}, bytes(8)))
    with pytest.raises(FormatError, match=r"tensor 'w' .* is damaged: masked CRC32C 10000000000 expected"):
        bundle.read("w")


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    """Neither those of data shards, nor those behind which the prefix of a `checkpoint` file lies."""
    private, folder = tmp_path / "private", tmp_path / "folder"
    folder.mkdir()
    write_bundle(private / "m", {"w": np.ones(3, np.float32)})
    for file in private.iterdir():
        (folder / file.name).symlink_to(file)
    assert TensorBundle(folder).read("w").tolist() == [1, 1, 1], "all of it is a link to one folder"
    for name in ("checkpoint", "m.index"):
        (folder / name).unlink()
        (folder / name).write_bytes((private / name).read_bytes())
    with pytest.raises(FormatError, match=r"it names 'm.data-00000-of-00001', which is a link out of its folder, to"):
        TensorBundle(folder)
    (folder / "sub").symlink_to(private)
    (folder / "checkpoint").write_text('model_checkpoint_path: "sub/m"')
    with pytest.raises(FormatError, match=r"it names 'sub/m.index', which is a link out of its folder, to"):
        TensorBundle(folder)
