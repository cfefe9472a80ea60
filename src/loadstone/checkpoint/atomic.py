"""`atomic_file` and `atomic_folder`: what a run writes appears under its name when it is complete, or never.

`open(path, "wb")`, with which the libraries of the field save, destroys the old file first and leaves a torn one when
the process is killed or the disk is full. Here everything goes to a hidden sibling (`.NAME.partial-XXXXXXXX`), is
flushed to the disk, and takes its name in one step.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..errors import LoadstoneError
from .wording import size_text

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_FULL = (errno.ENOSPC, errno.EDQUOT)
_ADVICE: Mapping[int, str] = {
    errno.EFBIG: "the file system, or a limit of this session (`ulimit -f`), allows no file as large as this one. "
    "Write smaller shards, or to another disk.",
    errno.EROFS: "the file system is read-only. Choose a place on another one.",
    errno.EACCES: "permission denied. Choose a place where you may write, or change the permissions there.",
    errno.EPERM: "the operation is not permitted there. Choose a place where you may write.",
    errno.ENOTEMPTY: "the folder is not empty. Choose a new one, or ask to replace it.",
}


@contextmanager
def atomic_file(path: Path, *, need: int = 0) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place when the block ends without an error.

    Args:
        path: the file to write or to replace; where it is a link, the file that the link names.
        need: bytes that will be written, compared with the free space beforehand.

    Raises:
        LoadstoneError: no space, no permission, no such folder, or a folder at `path`; `path` is then as it was. Any
            other exception of the block passes through, and leaves as little behind.
    """
    with _explained(path, need):
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            raise LoadstoneError(f"{path}: a file is to be written there, and it is something else. Choose a new name.")
        with _temporary(target, need, Path.touch) as temporary:
            yield temporary
            if target.exists():
                shutil.copymode(target, temporary)
            _flush(temporary)
            temporary.replace(target)
            _flush(target.parent)


@contextmanager
def atomic_folder(path: Path, *, replace: bool = False, need: int = 0) -> Iterator[Path]:
    """A temporary folder beside `path`, which takes its place when the block ends without an error.

    A folder with something in it is replaced only where `replace` says so: the two are exchanged in one step (in two
    where the system cannot do that), then the old one is removed. Otherwise like `atomic_file`.
    """
    with _explained(path, need):
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_dir():
            raise LoadstoneError(f"{path}: a folder is to be written there, and it is a file. Choose a new name.")
        if not replace and target.is_dir() and any(target.iterdir()):
            raise OSError(errno.ENOTEMPTY, "not empty")
        with _temporary(target, need, Path.mkdir) as temporary:
            yield temporary
            for folder, _, files in os.walk(temporary):
                for name in (*files, "."):
                    _flush(Path(folder, name))
            _put(temporary, target, replace)
            _flush(target.parent)


def _put(new: Path, target: Path, replace: bool) -> None:
    """Give a folder its name. Where one is replaced, `new` is afterwards the name of the old one."""
    try:
        new.rename(target)  # an empty folder gives way
    except OSError as error:
        if not replace or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _exchange(new, target):
            _exchange_in_steps(new, target)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names at once; False where the system, the C library or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    names = _AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second)
    return renameat2 is not None and renameat2(*names, _RENAME_EXCHANGE) == 0


def _exchange_in_steps(new: Path, target: Path) -> None:
    """Whoever is killed between the steps finds the old folder back under its name at the next run (`_clean_up`)."""
    aside = _hidden(target, "replaced")
    with _locked(target.parent, wait=True):
        target.rename(aside)
        try:
            new.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        aside.rename(new)


# -- the temporary sibling


@contextmanager
def _temporary(target: Path, need: int, make: Callable[[Path], None]) -> Iterator[Path]:
    with ExitStack() as stack:
        with _locked(target.parent, wait=True):  # or another run would take ours for abandoned before it is locked
            _clean_up(target)
            if need > shutil.disk_usage(target.parent).free:
                raise OSError(errno.ENOSPC, "not enough space")
            temporary = _hidden(target, "partial")
            stack.callback(_remove, temporary)
            make(temporary)
            stack.enter_context(_locked(temporary))
        yield temporary


def _hidden(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{secrets.token_hex(4)}")


def _clean_up(target: Path) -> None:
    """Remove what killed runs to the same target left behind; a living one holds the lock of its own."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(partial|replaced)-[0-9a-f]{{8}}")
    for entry in list(target.parent.iterdir()):
        match = pattern.fullmatch(entry.name)
        if match and match[1] == "replaced" and not target.exists():
            entry.rename(target)
        elif match:
            with suppress(OSError), _locked(entry) as abandoned:
                if abandoned:
                    _remove(entry)


@contextmanager
def _locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether we now hold the lock of a file or folder, which the kernel takes back from a killed process.

    Some network file systems have no such locks: then nobody's leavings are removed.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            locked = True
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _flush(path: Path) -> None:
    """Make sure that a file's content, or a folder's list of names, is on the disk before others rely on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- errors


@contextmanager
def _explained(path: Path, need: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LoadstoneError(f"{path}: it cannot be written: {_reason(path, error, need)}") from None


def _reason(path: Path, error: OSError, need: int) -> str:
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        return f"there is no folder {folder}. Make it first."
    if error.errno in _FULL:
        free = f"{size_text(shutil.disk_usage(folder).free)} are free in {folder}"
        needed = f"{size_text(need)} are needed and {free}" if need else free
        quota = " (a quota may allow less)" if error.errno == errno.EDQUOT else ""
        return f"the disk is full: {needed}{quota}. Make room, or write to another disk."
    return _ADVICE.get(error.errno or 0, f"{error}.")
