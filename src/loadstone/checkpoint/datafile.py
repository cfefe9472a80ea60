"""`DataFile`: one file of a checkpoint, opened once: exact reads for headers, and for each tensor a mapping of its own.

Mapping tensor by tensor keeps the address space of whoever streams through a file at its largest tensor, whatever the
size of the file. The descriptor stays open, so that all bytes come from the file that was checked at opening: one
that is replaced (renamed over) meanwhile is still read whole, one that is changed in place is noticed.
"""

from __future__ import annotations

import mmap
import os
import stat
import sys
import weakref
from pathlib import Path
from typing import BinaryIO

from ..errors import FormatError

# A mapping costs a system call, a page fault for every 16 pages at best, and an entry in the kernel's table of at most
# 65,530 a process. Up to some 64 KiB a copy is faster; that is every bias and norm, half of all tensors.
SMALL = 1 << 16  # bytes
# Python keeps a descriptor open for each mapping, and many systems allow 1,024. A model of more tensors that are all
# alive at once (loaded, not streamed) maps the rest through one mapping of each whole file.
MAX_MAPPINGS = 256
# Without it Linux refuses to map a file larger than the memory copy-on-write, as every page might be written to.
_NORESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
_AGAIN = "Wait until whatever writes it is done, and open it again."

_alive: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


class DataFile:
    """A regular file that is not empty, open for reading.

    Raises:
        FormatError: it is empty, or no regular file (a pipe is not waited for).
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # without NONBLOCK, opening a pipe waits for a writer
        weakref.finalize(self, os.close, self._fd)
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise FormatError(path, "it is no regular file, but a folder, a device or a pipe.", "Name a file.")
        if not status.st_size:
            raise FormatError(path, "the file is empty (0 bytes).", "Download or copy it again.")
        self._size, self._changed = status.st_size, status.st_mtime_ns
        self._whole: weakref.ref[mmap.mmap] | None = None

    def __len__(self) -> int:
        """Size in bytes when it was opened."""
        return self._size

    def read(self, offset: int, nbytes: int) -> bytes:
        """A copy of `nbytes` bytes, which the caller knows to be there.

        Raises FormatError if the file has changed since it was opened.
        """
        self._check_unchanged()
        pieces = []
        while nbytes:
            piece = os.pread(self._fd, nbytes, offset)  # at most 2 GiB at once, on Linux
            if not piece:
                raise FormatError(self.path, f"it ends at byte {offset:,}, and was longer when it was opened.", _AGAIN)
            pieces.append(piece)
            offset, nbytes = offset + len(piece), nbytes - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def stream(self) -> BinaryIO:
        """The whole file as Python's own readers want it; to be closed by the caller."""
        return os.fdopen(os.dup(self._fd), "rb")

    def map(self, offset: int, nbytes: int) -> mmap.mmap:
        """A copy-on-write mapping; `offset` is the start of a page. For a header: drop it when that is read.

        Raises FormatError if the file has changed since it was opened, or the address space does not suffice.
        """
        self._check_unchanged()
        flags, access = mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        try:
            return mmap.mmap(self._fd, nbytes, flags, access, offset=offset)
        except (OSError, ValueError) as error:
            problem = f"{nbytes:,} of its bytes cannot be mapped into memory ({error})."
            raise FormatError(self.path, problem, "Free memory, or raise the limit (ulimit -v).") from None

    def tensor(self, offset: int, nbytes: int) -> memoryview:
        """`nbytes` bytes for a tensor, which the caller knows to be there: writable, and never written to the file.

        Up to `SMALL` bytes are a copy, more a copy-on-write mapping, which lives as long as the view.
        Raises FormatError as `map` does.
        """
        if nbytes <= SMALL:
            return memoryview(bytearray(self.read(offset, nbytes)))
        if len(_alive) < MAX_MAPPINGS:
            start = offset % mmap.ALLOCATIONGRANULARITY
            mapped = self.map(offset - start, start + nbytes)
            _alive.add(mapped)
            return memoryview(mapped)[start:]
        whole = (self._whole() if self._whole else None) or self.map(0, self._size)
        self._whole = weakref.ref(whole)
        return memoryview(whole)[offset : offset + nbytes]

    def _check_unchanged(self) -> None:
        status = os.fstat(self._fd)
        if (status.st_size, status.st_mtime_ns) != (self._size, self._changed):
            raise FormatError(self.path, "it was changed while it was being read.", _AGAIN)
