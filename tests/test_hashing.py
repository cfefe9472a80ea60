"""Hashing beside other work: the same digests, errors told, and nothing goes on after a failure."""

from __future__ import annotations

import hashlib
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from loadstone import hashing
from loadstone.hashing import Background, describe_files, hash_file, hash_tensor

SIZES = [0, 1, hashing._READ - 1, hashing._READ, hashing._READ + 1, 3 * hashing._READ]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    rng = np.random.default_rng(0)
    for number, size in enumerate(SIZES):
        (tmp_path / f"{number}").write_bytes(rng.bytes(size))
    return {file.name: file for file in tmp_path.iterdir()}


def test_digests_are_sha256_of_the_whole_file(files: dict[str, Path], tmp_path: Path) -> None:
    with Background() as background:
        waiting = background.describe(files)
        found = waiting()
    assert found == describe_files(files.values(), tmp_path)
    for number, size in enumerate(SIZES):
        content = files[f"{number}"].read_bytes()
        assert found[f"{number}"] == {"bytes": size, "sha256": hashlib.sha256(content).hexdigest()}


def test_progress_adds_up_to_the_file(files: dict[str, Path]) -> None:
    for file in files.values():
        told: list[int] = []
        hash_file(file, told.append)
        assert sum(told) == file.stat().st_size


def test_a_tensor_is_hashed_in_its_own_order() -> None:
    array = np.arange(12, dtype=np.int16).reshape(3, 4)
    assert hash_tensor(array.T) == hashlib.sha256(array.T.tobytes()).hexdigest() != hash_tensor(array)


def test_what_goes_wrong_in_a_thread_is_told_to_whoever_waits(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), Background() as background:
        background.describe({"gone": tmp_path / "gone"})()


def test_a_failure_stops_the_threads_at_once(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 36)  # a minute of hashing, of a hole

    def fail() -> None:
        with Background() as background:
            background.describe({f"{number}": tmp_path / "large" for number in range(4)})
            raise ValueError("broken")

    before, start = threading.active_count(), time.monotonic()
    with pytest.raises(ValueError, match="broken"):
        fail()
    assert time.monotonic() - start < 5
    assert threading.active_count() == before
