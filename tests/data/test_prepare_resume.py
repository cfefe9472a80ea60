"""Interrupted, killed, out of space or corrected: the next run goes on, and the result is byte-identical."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loadstone.data import encoding
from loadstone.data.prepare import prepare
from loadstone.errors import FormatError, LoadstoneError
from prepared_data import BPE, TEXTS, content


class StopError(Exception):
    pass


def stopping_after(calls: int) -> Callable[[int, int], None]:
    left = iter(range(calls))

    def progress(done: int, total: int) -> None:
        assert 0 <= done <= total
        if next(left, None) is None:
            raise StopError

    return progress


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many characters were encoded."""
    sizes: list[int] = []
    original = encoding._Encoder.__call__

    def call(self: Any, group: list[Any]) -> Any:
        sizes.append(sum(len(piece.text) for piece in group))
        return original(self, group)

    monkeypatch.setattr(encoding._Encoder, "__call__", call)
    return sizes


@pytest.mark.usefixtures("small_pieces")
def test_interrupted_after_any_group_the_next_run_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"validation": 0.2, "shard_tokens": 1500}
    prepare(source, tmp_path / "whole", BPE, **options)
    expected = content(tmp_path / "whole")
    sizes = counted(monkeypatch)
    total = sum(map(len, TEXTS))
    for stop in (0, 1, 4, 11):
        out = tmp_path / f"out{stop}"
        with pytest.raises(StopError):
            prepare(source, out, BPE, progress=stopping_after(stop), **options)
        assert not out.exists()
        sizes.clear()
        prepare(source, out, BPE, **options)
        assert content(out) == expected
        assert sum(sizes) < total - stop * 2900  # the groups up to there were not encoded again
        assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(f".out{stop}.")) == []


RUN = """
import os, signal, sys
sys.path[:0] = sys.argv[1].split(";")
import prepared_data as t
from loadstone.data.prepare import prepare
from loadstone.data import encoding
encoding._PIECE, encoding._GROUP = 200, 3000
flush, left = os.fsync, int(sys.argv[4])
def fsync(descriptor):
    global left
    flush(descriptor)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = fsync
prepare(sys.argv[2], sys.argv[3], t.BPE, validation=0.2, shard_tokens=1500)
"""


@pytest.mark.usefixtures("small_pieces")
def test_killed_again_and_again_the_result_is_byte_identical(source: Path, tmp_path: Path) -> None:
    """SIGKILL at the k-th flush of each process, on one thread, against one uninterrupted run on all."""
    prepare(source, tmp_path / "whole", BPE, validation=0.2, shard_tokens=1500)
    paths, out = ";".join(sys.path), tmp_path / "out"
    codes = []
    for flushes in (3, 13, 24, 41, 10_000):
        run = subprocess.run(
            [sys.executable, "-c", RUN, paths, str(source), str(out), str(flushes)],
            env={**os.environ, "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}, capture_output=True,
        )  # fmt: skip
        codes.append(run.returncode)
        if out.exists():
            break
    assert codes[:3] == [-signal.SIGKILL] * 3
    assert codes[-1] == 0, run.stderr.decode()
    assert content(out) == content(tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.usefixtures("small_pieces")
def test_what_was_changed_meanwhile_is_not_mixed(source: Path, tmp_path: Path) -> None:
    def interrupt() -> None:
        with pytest.raises(StopError):
            prepare(source, tmp_path / "out", BPE, progress=stopping_after(5))

    interrupt()
    lines = source.read_text().splitlines(keepends=True)
    source.write_text("".join(['{"text": "new"}\n', *lines[1:]]))  # the beginning: what was done is thrown away
    prepare(source, tmp_path / "out", BPE)
    prepare(source, tmp_path / "fresh", BPE)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")
    (tmp_path / "out" / "dataset.json").unlink()
    for name in ("out", "fresh"):
        for path in (tmp_path / name).iterdir():
            path.unlink()
    interrupt()
    source.write_text("".join([*source.read_text().splitlines(keepends=True)[:-1], '{"text": "newer"}\n']))  # the end
    prepare(source, tmp_path / "out", BPE)
    prepare(source, tmp_path / "fresh", BPE)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("change", [{"seed": 1}, {"validation": 0.4}, {"shard_tokens": 900}])
def test_other_arguments_begin_anew(source: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(StopError):
        prepare(source, tmp_path / "out", BPE, progress=stopping_after(5))
    prepare(source, tmp_path / "out", BPE, **change)
    prepare(source, tmp_path / "fresh", BPE, **change)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("damage", ["journal", "shard", "shorter"])
def test_a_damaged_work_folder_is_not_gone_on_from(source: Path, tmp_path: Path, damage: str) -> None:
    with pytest.raises(StopError):
        prepare(source, tmp_path / "out", BPE, progress=stopping_after(5))
    work = tmp_path / ".out.preparing"
    if damage == "journal":
        (work / "journal.json").write_text("{")
    elif damage == "shard":
        (work / "train-00000.bin").unlink()
    else:
        os.truncate(work / "train-00000.bin", 10)
    prepare(source, tmp_path / "out", BPE)
    prepare(source, tmp_path / "fresh", BPE)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


@pytest.mark.usefixtures("small_pieces")
def test_a_run_killed_at_its_very_end_leaves_links_that_are_never_written_into(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as killed:
        killed.setattr("shutil.rmtree", lambda *_, **__: None)
        prepare(source, tmp_path / "out", BPE)
    assert (tmp_path / ".out.preparing").exists()
    before = content(tmp_path / "out")
    with pytest.raises(StopError):
        prepare(source, tmp_path / "out", BPE, seed=5, force=True, progress=stopping_after(3))
    assert content(tmp_path / "out") == before
    prepare(source, tmp_path / "out", BPE, seed=5, force=True)
    assert content(tmp_path / "out") != before


@pytest.mark.usefixtures("small_pieces")
def test_a_full_disk_loses_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flush, left = os.fsync, iter(range(20))

    def full(descriptor: int) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LoadstoneError, match=r"the disk is full: .* are free in .*Make room, or write to another disk"):
        prepare(source, tmp_path / "out", BPE)
    monkeypatch.setattr(os, "fsync", flush)
    sizes = counted(monkeypatch)
    prepare(source, tmp_path / "out", BPE)
    assert sum(sizes) < sum(map(len, TEXTS)) - 3000
    prepare(source, tmp_path / "fresh", BPE)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_corrected_after_an_error_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_GROUP", 3000)
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    source = tmp_path / "texts.jsonl"
    source.write_text("".join([*lines[:-1], "{oops\n"]))
    with pytest.raises(FormatError, match="line 60: the line is no JSON"):
        prepare(source, tmp_path / "out", BPE)
    source.write_text("".join(lines))
    sizes = counted(monkeypatch)
    prepare(source, tmp_path / "out", BPE)
    assert sum(sizes) < sum(map(len, TEXTS)) / 2
    prepare(source, tmp_path / "fresh", BPE)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")
