"""A destination is the old one or the new one: killed at every step, interrupted, out of space, side by side."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from loadstone.checkpoint import atomic
from loadstone.checkpoint.atomic import atomic_file, atomic_folder
from loadstone.errors import LoadstoneError

Atomic = Callable[..., AbstractContextManager[Path]]
BOTH = pytest.mark.parametrize("make", [atomic_file, atomic_folder])


def fill(temporary: Path, text: str) -> None:
    if temporary.is_dir():
        (temporary / "sub").mkdir()
        for name in ("a", "b", "sub/c"):
            (temporary / name).write_text(text)
    else:
        temporary.write_text(text)


def content(path: Path) -> str | None:
    """The text that is in every file, None if there is nothing. Fails if files differ, or one is missing."""
    if path.is_dir():
        assert sorted(str(p.relative_to(path)) for p in path.rglob("*")) == ["a", "b", "sub", "sub/c"]
        (text,) = {p.read_text() for p in path.rglob("*") if p.is_file()}
        return text
    return path.read_text() if path.exists() else None


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def run(make: Atomic, path: Path, write: Callable[[Path], object], **options: object) -> None:
    with make(path, **options) as temporary:
        write(temporary)


def text(value: str) -> Callable[[Path], None]:
    return lambda temporary: fill(temporary, value)


def never(_: Path) -> None:
    raise AssertionError("refused before the work")


def two_megabytes(temporary: Path) -> None:
    (temporary / "file" if temporary.is_dir() else temporary).write_bytes(bytes(2 << 20))


def replacing(make: Atomic) -> dict[str, bool]:
    return {"replace": True} if make is atomic_folder else {}


@BOTH
def test_nothing_appears_before_the_end_and_all_of_it_then(make: Atomic, tmp_path: Path) -> None:
    path = tmp_path / "out"
    with make(path) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(".out.partial-")
        fill(temporary, "1")
        assert not path.exists()
    assert content(path) == "1"
    with make(path, **replacing(make)) as temporary:
        fill(temporary, "2")
        assert content(path) == "1"
    assert content(path) == "2"
    assert names(tmp_path) == ["out"]


@BOTH
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, SystemExit, GeneratorExit])
@pytest.mark.parametrize("old", [True, False])
def test_an_exception_leaves_the_old_one_and_nothing_else(
    make: Atomic, error: type[BaseException], old: bool, tmp_path: Path
) -> None:
    path = tmp_path / "out"
    if old:
        run(make, path, text("old"))

    def interrupted(temporary: Path) -> None:
        fill(temporary, "new")
        raise error

    with pytest.raises(error):
        run(make, path, interrupted, **replacing(make))
    assert content(path) == ("old" if old else None)
    assert names(tmp_path) == ["out"] * old


# -- kills

_DRIVER = """
import os, signal, sys
from pathlib import Path
from loadstone.checkpoint import atomic
import test_atomic

kind, old, swap, folder = sys.argv[1], sys.argv[2] == "old", sys.argv[3] == "swap", Path(sys.argv[4])
path, make = folder / "out", getattr(atomic, f"atomic_{kind}")
options = test_atomic.replacing(make)
if not swap:
    atomic._exchange = lambda *_: False
left = -1  # audit events until the kill; negative: none

def count(event, _):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)

def run(text, limit=-1):
    global left
    left = limit
    with make(path, **options) as temporary:
        test_atomic.fill(temporary, text)
    left = -1

for limit in range(1, 1000):
    test_atomic.clear(path)
    if old:
        run("old")
    child = os.fork()
    if not child:
        run("new", limit)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    found = test_atomic.content(path)
    if found is None and old and not swap:  # between two renames: the next run puts the old one back
        try:
            with make(path, **options):
                raise InterruptedError
        except Exception:
            found = "restored " + str(test_atomic.content(path))
    print(found)
    if status == 0:
        break
run("new")
print(*test_atomic.names(folder))
"""


def clear(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("kind", "old", "how", "expected"),
    [
        ("file", "fresh", "swap", {"None", "new"}),
        ("file", "old", "swap", {"old", "new"}),
        ("folder", "fresh", "swap", {"None", "new"}),
        ("folder", "old", "swap", {"old", "new"}),
        ("folder", "old", "steps", {"old", "restored old", "new"}),
    ],
)
def test_a_kill_at_any_step_leaves_the_old_or_the_new(
    kind: str, old: str, how: str, expected: set[str], tmp_path: Path
) -> None:
    """Every file operation of a run raises an audit event; the run is killed at the first, then at the second, ..."""
    command = [sys.executable, "-c", _DRIVER, kind, old, how, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    *found, left = done.stdout.splitlines()
    assert set(found) == expected
    assert found[-1] == "new"  # the one that was not killed
    assert len(found) > 10
    assert left == "out"


def test_a_living_run_keeps_its_partial_and_the_last_to_finish_wins(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with atomic_file(path) as first:
        first.write_text("first")
        with atomic_file(path) as second:
            second.write_text("second")
            assert first.exists()
        assert content(path) == "second"
    assert content(path) == "first"
    assert names(tmp_path) == ["out"]


def test_only_leavings_of_the_same_target_are_removed(tmp_path: Path) -> None:
    abandoned = [".out.partial-0123abcd", ".out.replaced-0123abcd"]
    others = [".out.partial-notes", ".out.partial", ".out2.partial-0123abcd", "out.partial-0123abcd"]
    for name in abandoned + others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    with atomic_folder(tmp_path / "out") as temporary:
        # The folder that a killed run had put aside is back under its name, as nothing had taken that yet.
        assert names(tmp_path) == sorted([*others, "out", temporary.name])
        assert names(tmp_path / "out") == ["file"]
        (tmp_path / "out/file").unlink()
    assert names(tmp_path) == sorted([*others, "out"])


# -- what may be replaced


def test_a_folder_with_something_in_it_is_replaced_only_on_request(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    run(atomic_folder, path, text("1"))  # an empty one gives way
    with pytest.raises(LoadstoneError, match=r"out: .* the folder is not empty\. Choose a new one, or ask to replace"):
        run(atomic_folder, path, never)
    assert content(path) == "1"
    late = tmp_path / "late"
    late.mkdir()
    with pytest.raises(LoadstoneError, match="the folder is not empty"):
        run(atomic_folder, late, lambda _: (late / "somebody's").touch())  # while we were writing
    assert names(late) == ["somebody's"]
    assert names(tmp_path) == ["late", "out"]


@pytest.mark.parametrize("swap", [True, False])
def test_without_an_exchange_two_renames_do_it(swap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not swap:
        monkeypatch.setattr("ctypes.CDLL", lambda _: object())  # a C library without renameat2
    path = tmp_path / "out"
    for value in ("1", "2"):
        run(atomic_folder, path, text(value), replace=True)
    assert content(path) == "2"
    assert names(tmp_path) == ["out"]


def test_a_failing_second_rename_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out"
    run(atomic_folder, path, text("old"))
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if ".partial-" in self.name and not target.exists():
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(LoadstoneError, match=r"cannot be written: .*Input/output error"):
        run(atomic_folder, path, text("new"), replace=True)
    assert content(path) == "old"
    assert names(tmp_path) == ["out"]


def test_a_file_and_a_folder_do_not_replace_each_other(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "folder", Path("/dev/null")):
        with pytest.raises(LoadstoneError, match=rf"^{path}: a file is to be written there, and it is something else"):
            run(atomic_file, path, never)
    with pytest.raises(LoadstoneError, match=r"file: a folder is to be written there, and it is a file"):
        run(atomic_folder, tmp_path / "file", never, replace=True)
    assert names(tmp_path) == ["file", "folder"]


def test_links_are_followed_and_permissions_kept(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    real = tmp_path / "elsewhere/real"
    real.write_text("old")
    real.chmod(0o640)
    (tmp_path / "link").symlink_to(real)
    with atomic_file(tmp_path / "link") as temporary:
        assert temporary.parent == real.parent
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert real.read_text() == "new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    (tmp_path / "folder link").symlink_to(tmp_path / "elsewhere")
    run(atomic_folder, tmp_path / "folder link", text("1"), replace=True)
    assert (tmp_path / "folder link").is_symlink()
    assert content(tmp_path / "elsewhere") == "1"


@BOTH
def test_bytes_are_on_the_disk_before_the_name_is(
    make: Atomic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flushed = tmp_path / "out", []
    fsync = os.fsync

    def watching(descriptor: int) -> None:
        fsync(descriptor)
        file = Path(f"/proc/self/fd/{descriptor}").readlink()
        flushed.append((file, path.exists()))

    monkeypatch.setattr(os, "fsync", watching)
    with make(path) as temporary:
        fill(temporary, "1")
    inside = ["", "sub", "a", "b", "sub/c"] if make is atomic_folder else [""]
    assert {(temporary / name, False) for name in inside} == set(flushed[:-1])
    assert flushed[-1] == (tmp_path, True)


# -- what the disk refuses


@BOTH
def test_too_little_space_is_known_beforehand(make: Atomic, tmp_path: Path) -> None:
    full = r"out: it cannot be written: the disk is full: 1152922 TB are needed and .* are free in .*\. Make room, or"
    with pytest.raises(LoadstoneError, match=full):
        run(make, tmp_path / "out", never, need=1 << 60)
    assert names(tmp_path) == []


@BOTH
def test_a_file_size_limit_is_explained(make: Atomic, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # Python ignores SIGXFSZ, so that EFBIG comes
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(LoadstoneError, match=r"out: it cannot be written: .*ulimit -f.*\. Write smaller shards"):
            run(make, tmp_path / "out", two_megabytes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == []


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount a small disk: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@BOTH
def test_a_full_disk_leaves_the_old_one_and_no_rubbish(make: Atomic, tmp_path: Path) -> None:
    with mounted(tmp_path, "size=1m"):
        run(make, tmp_path / "out", text("old"))
        with pytest.raises(LoadstoneError, match=r"the disk is full: 1\.. MB are free in .*\. Make room"):
            run(make, tmp_path / "out", two_megabytes, **replacing(make))
        assert content(tmp_path / "out") == "old"
        assert names(tmp_path) == ["out"]


@BOTH
def test_a_read_only_disk_is_explained(make: Atomic, tmp_path: Path) -> None:
    read_only = pytest.raises(LoadstoneError, match=r"the file system is read-only\. Choose a place on another one")
    with mounted(tmp_path, "ro"), read_only:
        run(make, tmp_path / "out", never)


def test_the_device_that_is_always_full(tmp_path: Path) -> None:
    with pytest.raises(LoadstoneError, match=r"the disk is full: .* are needed and .* are free in"):
        run(atomic_file, tmp_path / "out", lambda _: Path("/dev/full").write_bytes(b"x"), need=7)
    assert names(tmp_path) == []


@BOTH
@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_without_permission_is_explained(make: Atomic, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(LoadstoneError, match=r"permission denied\. Choose a place where you may write"):
        run(make, tmp_path / "out", never)
    tmp_path.chmod(0o700)


@BOTH
@pytest.mark.parametrize("parent", ["missing", "file"])
def test_a_missing_parent_is_explained(make: Atomic, parent: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LoadstoneError, match=rf"out: .* there is no folder .*{parent}\. Make it first"):
        run(make, tmp_path / parent / "out", never)
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("code", "why"), [(errno.EDQUOT, "a quota may allow less"), (errno.EACCES, "permission denied")]
)
def test_errors_while_writing_are_explained(code: int, why: str, tmp_path: Path) -> None:
    def failing(_: Path) -> None:
        raise OSError(code, os.strerror(code))

    with pytest.raises(LoadstoneError, match=rf"^[^\n]*out: it cannot be written: [^\n]*{why}[^\n]*$"):
        run(atomic_file, tmp_path / "out", failing)
    assert names(tmp_path) == []
