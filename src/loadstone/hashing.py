"""SHA-256 of tensors and files, and `Background`, which hashes files on other cores while the work goes on.

hashlib lets go of Python's lock, so threads are enough. One buffer is read into again and again: fresh ones of some
megabytes cost as many page faults as the hash costs time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any

from .checkpoint.base import Array
from .checkpoint.streaming import chunks

_READ = 1 << 18  # bytes: what is hashed is still in the cache
_THREADS = 2  # beside the one that reads, writes and compares
Description = dict[str, dict[str, Any]]  # name -> bytes, sha256


def hash_tensor(array: Array) -> str:
    """SHA-256 of a tensor's bytes in row-major order, whatever lies beneath."""
    digest = hashlib.sha256()
    for chunk in chunks(array):
        digest.update(chunk)
    return digest.hexdigest()


def hash_file(path: Path, advance: Callable[[int], None] = lambda nbytes: None) -> str:
    """SHA-256 of a file. `advance` is called with the bytes of each piece."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_READ))
    with path.open("rb", buffering=0) as file:
        while nbytes := file.readinto(buffer):
            digest.update(buffer[:nbytes])
            advance(nbytes)
    return digest.hexdigest()


def describe_files(paths: Iterable[Path], base: Path) -> Description:
    """Name relative to `base` -> size and hash."""
    return {path.relative_to(base).as_posix(): _described(path) for path in sorted(paths)}


def _described(path: Path, advance: Callable[[int], None] = lambda nbytes: None) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": hash_file(path, advance)}


class Background:
    """Threads that describe files. Leaving the block by an error stops them at once, and waits for that."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, "hashing")
        self._stopped = Event()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None:
            self._stopped.set()
        self._pool.shutdown(cancel_futures=kind is not None)

    def describe(self, files: Mapping[str, Path]) -> Callable[[], Description]:
        """Begin with the size and hash of each file; what is returned waits for them, and raises what went wrong."""
        begun = {name: self._pool.submit(_described, files[name], self._stop) for name in sorted(files)}
        return lambda: {name: future.result() for name, future in begun.items()}

    def _stop(self, nbytes: int) -> None:
        if self._stopped.is_set():
            raise InterruptedError
