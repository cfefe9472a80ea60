"""What writers share: the bytes of any array in chunks, files with holes, and what is refused beforehand."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadstone.checkpoint.base import DTYPES, Array, TensorInfo
from loadstone.checkpoint.streaming import CHUNK, Output, Transfer, chunks, same_bytes, stored_nbytes
from loadstone.errors import LoadstoneError
from memory import MemoryCheckpoint
from writer_cases import aliased, arrays


@settings(max_examples=300, deadline=None)
@given(arrays(DTYPES), st.integers(1, 100))
def test_chunks_are_the_bytes_in_order_and_none_too_large(array: Array, limit: int) -> None:
    parts = [bytes(chunk) for chunk in chunks(array, limit)]
    assert b"".join(parts) == array.tobytes()
    assert all(0 < len(part) <= max(limit, array.itemsize) for part in parts)


def test_a_contiguous_array_is_not_copied_and_a_transposed_one_a_few_rows_at_a_time() -> None:
    array = np.arange(6 << 20, dtype=np.float64).reshape(3 << 10, 2 << 10)  # 48 MB
    whole = array.tobytes()
    assert all(np.shares_memory(np.frombuffer(chunk, np.uint8), array) for chunk in chunks(array))
    for view in (array.T, array.reshape(1, 3 << 10, 2 << 10).transpose(0, 2, 1), array[:, ::2]):
        tracemalloc.start()
        count = sum(len(chunk) for chunk in chunks(view))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == view.nbytes
        assert peak < 2.1 * CHUNK
    assert array.tobytes() == whole


@settings(max_examples=300, deadline=None)
@given(arrays(DTYPES), st.data())
def test_arrays_are_the_same_if_and_only_if_every_bit_is(array: Array, data: st.DataObject) -> None:
    copy = array.copy()
    assert same_bytes(copy, array)  # `array` has whatever strides
    if array.size:
        at = data.draw(st.integers(0, copy.nbytes - 1))
        copy.reshape(-1).view(np.uint8)[at] ^= 1 << data.draw(st.integers(0, 7))
        assert not same_bytes(copy, array)
    assert not same_bytes(array, array[None])


def test_transposed_views_of_any_width_are_copied_and_compared_right() -> None:
    rng = np.random.default_rng(0)
    for rows, columns in [(1, 9000), (9000, 1), (17, 8193), (8193, 17), (700, 900)]:
        for dtype in (np.uint8, np.uint16, np.float32):
            view = rng.integers(0, 255, (columns, rows)).astype(dtype).T
            assert b"".join(map(bytes, chunks(view, 1 << 16))) == view.tobytes()
            assert same_bytes(np.ascontiguousarray(view), view)
            other = view.copy(order="C")
            other[-1, -1] += 1
            assert not same_bytes(other, view)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([1, 4095, 4096, 50_000]), st.sampled_from([0, 0, 7])), max_size=6))
def test_holes_read_as_zeros_and_the_size_is_right(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.mktemp("out") / "file"
    content = b"".join(bytes(size - 1) + bytes([last]) for size, last in parts)
    with Output(path) as output:
        for size, last in parts:
            output.write(bytes(size - 1) + bytes([last]))
        assert output.position == len(content)
        if content:
            output.patch(0, b"\1")
        output.pad(64)
    content = b"\1" * bool(content) + content[1:]
    assert path.read_bytes() == content + bytes(-len(content) % 64)


def test_a_file_is_continued_behind_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"header")
    with Output(tmp_path / "file", append=True) as output:
        output.pad(4)
        output.write(bytes(5000))
        output.write(b"end")
    assert (tmp_path / "file").read_bytes() == b"header\0\0" + bytes(5000) + b"end"


def test_zeros_take_no_room_on_the_disk(tmp_path: Path) -> None:
    with Output(tmp_path / "file") as output:
        for chunk in chunks(np.zeros(64 << 20, np.uint8)):
            output.write(chunk)
    stat = (tmp_path / "file").stat()
    assert stat.st_size == 64 << 20
    assert stat.st_blocks * 512 < 1 << 20


def test_aliases_are_not_counted_and_progress_is_told_after_each_tensor(tmp_path: Path) -> None:
    source = aliased({"a": np.ones((2, 3)), "b": np.ones(4, np.int8), "e": np.ones(0)}, {"tie": "a"})
    told: list[tuple[int, int]] = []
    transfer = Transfer(source, "a test", DTYPES, lambda done, total: told.append((done, total)))
    assert transfer.names == ["a", "b", "e"]
    with Output(tmp_path / "file") as output:
        for name in transfer.names:
            transfer.write(name, output)
    assert told == [(48, 52), (52, 52), (52, 52)]
    assert stored_nbytes(source) == 52


def test_what_a_container_cannot_hold_is_listed() -> None:
    source = MemoryCheckpoint({"a": np.ones(2, np.int8), "b\n": np.ones(2), "c": np.ones(2)})
    with pytest.raises(
        LoadstoneError,
        match=r"^memory: a test cannot hold 2 of its tensors, whose type it has no code for: 'b\\n' \(float64\), "
        r"'c' \(float64\)\. Choose another element type or format to write\.$",
    ):
        Transfer(source, "a test", ["int8"])
    with pytest.raises(
        LoadstoneError, match=r"cannot hold 1 of its tensors, whose names are not valid Unicode: '\\ud800'"
    ):
        Transfer(MemoryCheckpoint({"\ud800": np.ones(2)}), "a test", DTYPES)


def test_a_tensor_that_is_not_what_the_header_announced_is_never_written(tmp_path: Path) -> None:
    source = MemoryCheckpoint({"a": np.ones((2, 3))})
    for wrong in (TensorInfo((3, 2), "float64", 48), TensorInfo((2, 3), "int64", 48)):
        source.tensors["a"] = wrong
        announced = rf"'a' was announced as {wrong.dtype} of shape .*, and was read as float64 of shape \(2, 3\)"
        with Output(tmp_path / "file") as output, pytest.raises(LoadstoneError, match=announced):
            Transfer(source, "a test", DTYPES).write("a", output)
        assert (tmp_path / "file").stat().st_size == 0
