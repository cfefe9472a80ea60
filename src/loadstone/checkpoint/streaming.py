"""What every writer shares: tensors as chunks of bytes, a file that leaves holes for zeros, one tensor at a time.

`np.ascontiguousarray` and `tobytes` would copy a whole tensor, the libraries' own writers hold a whole state dict:
here a transposed view of a mapped file is copied a few rows at a time, and a contiguous one not at all.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from ..errors import LoadstoneError
from .base import DTYPES, Array, Checkpoint
from .shards import stored_names
from .wording import few, shown

CHUNK = 8 << 20  # bytes: large enough for the disk, small beside a tensor
_COMPARED = 1 << 20  # bytes that are compared at once: they stay in the cache
_STRIP = 1 << 13  # elements of a strip
_AHEAD = 32 << 20  # bytes that wait to be written before the disk is told to begin
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h

Progress = Callable[[int, int], None]  # bytes done, bytes in all
Checksum = Callable[[memoryview, int], int]  # of more bytes, given the checksum so far: `zlib.crc32`, `crc32c.crc32c`


def chunks(array: Array, limit: int = CHUNK) -> Iterator[memoryview]:
    """The bytes of `array` in C order, at most `limit` (or one element) at once, copied only where its strides ask."""
    if array.flags.c_contiguous:
        flat = array.reshape(-1).view(np.uint8).data
        yield from (flat[start : start + limit] for start in range(0, len(flat), limit))
        return
    row = array.nbytes // len(array)
    if row > limit and array.ndim > 1:
        for part in array:
            yield from chunks(part, limit)
        return
    rows = max(limit // row, 1)
    for start in range(0, len(array), rows):
        yield _in_order(array[start : start + rows]).reshape(-1).view(np.uint8).data


def _in_order(rows: Array) -> Array:
    """A contiguous copy. A transposed view is copied in strips of columns: numpy by itself fills row by row, and takes
    one element of each cache line that it reads, which is two to four times slower.
    """
    if rows.ndim != 2 or abs(rows.strides[0]) >= abs(rows.strides[1]):
        return np.ascontiguousarray(rows)
    copy = np.empty(rows.shape, rows.dtype)
    width = max(_STRIP // len(rows), 16)
    for start in range(0, rows.shape[1], width):
        copy[:, start : start + width] = rows[:, start : start + width]
    return copy


def same_bytes(array: Array, other: Array) -> bool:
    """Whether two arrays of one shape and type are equal bit for bit, whatever their strides.

    `array` is contiguous, as what readers give nearly always is; else a copy of it is made.
    """
    if (array.shape, array.dtype) != (other.shape, other.dtype):
        return False
    flat, position = np.ascontiguousarray(array).reshape(-1).view(np.uint8), 0
    for chunk in chunks(other, _COMPARED):
        mine, theirs = flat[position : position + len(chunk)], np.frombuffer(chunk, np.uint8)
        if len(chunk) % 8 == 0:  # eight bytes at a time: memory's own speed
            mine, theirs = mine.view(np.uint64), theirs.view(np.uint64)
        if not np.array_equal(mine, theirs):
            return False
        position += len(chunk)
    return True


def stored_nbytes(source: Checkpoint) -> int:
    """Size of all tensors once written, aliases not counted: what the disk must have room for, but for headers."""
    return sum(_nbytes(source, name) for name in stored_names(source))


class Output:
    """A file under construction, written front to back; its zeros become holes where the file system has them.

    The disk begins to write at once, not only when all is done and flushed: both then work at the same time.

    Args:
        path: the file.
        append: keep what it holds, and write behind it.

    Attributes:
        position: bytes written so far, which is where the next ones go.
    """

    def __init__(self, path: Path, *, append: bool = False) -> None:
        self._file = path.open("r+b" if append else "wb", buffering=1 << 16)
        self.position = self._begun = self._file.seek(0, 2)

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._file:
            if kind is None:
                self._file.truncate(self.position)  # the last bytes may be a hole
                self._begin_writing()

    def write(self, data: bytes | memoryview) -> None:
        # Most tensors differ from zero at once; only for the others is the whole chunk looked at.
        if len(data) >= 4096 and not any(data[:64]) and not np.frombuffer(data, np.uint8).any():
            self._file.seek(len(data), 1)
        else:
            self._file.write(data)
        self.position += len(data)
        if self.position - self._begun >= _AHEAD:
            self._begin_writing()

    def _begin_writing(self) -> None:
        """Have the kernel send to the disk what has not been sent, without waiting for it; where it can do that."""
        if sync_file_range := getattr(ctypes.CDLL(None), "sync_file_range", None):
            begun, length = ctypes.c_int64(self._begun), ctypes.c_int64(self.position - self._begun)
            sync_file_range(self._file.fileno(), begun, length, _SYNC_FILE_RANGE_WRITE)
        self._begun = self.position

    def pad(self, multiple: int, filler: bytes = b"\0") -> None:
        self.write(filler * (-self.position % multiple))

    def patch(self, position: int, data: bytes) -> None:
        """Overwrite what was written before, such as a checksum that is known only now."""
        self._file.seek(position)
        self._file.write(data)
        self._file.seek(self.position)


class Transfer:
    """A checkpoint on its way into one container: what is to be stored, checked, and how far it is.

    Args:
        source: any checkpoint.
        container: what the errors call the format.
        dtypes: the element types that it can hold.
        progress: called after each tensor.

    Raises:
        LoadstoneError: a name or an element type that the container cannot hold. Nothing was written then.

    Attributes:
        names: the tensors to store, in the source's order: all but the aliases.
    """

    def __init__(
        self, source: Checkpoint, container: str, dtypes: Container[str], progress: Progress | None = None
    ) -> None:
        self.source, self.names = source, stored_names(source)
        self._container, self._progress = container, progress
        self._refuse("whose type it has no code for", [n for n in self.names if source.tensors[n].dtype not in dtypes])
        self._refuse("whose names are not valid Unicode", [name for name in source.tensors if not is_unicode(name)])
        self._done, self._total = 0, stored_nbytes(source)

    def nbytes(self, name: str) -> int:
        """Size of a tensor once written."""
        return _nbytes(self.source, name)

    def write(self, name: str, output: Output, checksum: Checksum | None = None) -> int:
        """Read one tensor and write its bytes; returns their checksum."""
        value = 0
        for chunk in chunks(self._read(name)):
            output.write(chunk)
            value = checksum(chunk, value) if checksum else 0
        self._done += self.nbytes(name)
        if self._progress:
            self._progress(self._done, self._total)
        return value

    def _read(self, name: str) -> Array:
        info, array = self.source.info(name), self.source.read(name)
        if (array.shape, array.dtype) != (info.shape, DTYPES[info.dtype]):
            raise LoadstoneError(
                f"{self.source.path}: tensor {shown(name)} was announced as {info.dtype} of shape {info.shape}, and "
                f"was read as {array.dtype} of shape {array.shape}."
            )
        return array

    def _refuse(self, why: str, names: list[str]) -> None:
        if names:
            listed = few(f"{shown(name)} ({self.source.tensors[name].dtype})" for name in names)
            problem = f"{self._container} cannot hold {len(names)} of its tensors, {why}: {listed}."
            raise LoadstoneError(f"{self.source.path}: {problem} Choose another element type or format to write.")


def _nbytes(source: Checkpoint, name: str) -> int:
    info = source.tensors[name]
    return info.size * DTYPES[info.dtype].itemsize if info.dtype in DTYPES else info.nbytes


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True
