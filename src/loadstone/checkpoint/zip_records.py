"""`ZipRecords`: writes the zip archive that torch reads: records stored as they are, each at a multiple of 64 bytes.

Python's `zipfile` can neither align what it stores nor leave holes for zeros. Fields of 4 bytes that are too small give
way to zip64's. Sources: PKWARE's APPNOTE.TXT, `torch/csrc/../caffe2/serialize/inline_container.cc` (the padding).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from .streaming import Output

ALIGNMENT = 64
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_MAX16, _MAX32 = 0xFFFF, 0xFFFFFFFF
_ZIP64 = 45  # the version of the format that brought it
_UTF8 = 1 << 11


@dataclass(frozen=True, slots=True)
class _Record:
    name: bytes
    offset: int
    nbytes: int
    crc: int


class ZipRecords:
    """An archive under construction; `finish` writes its directory."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._records: list[_Record] = []

    def add(self, name: str, content: bytes) -> None:
        def write() -> int:
            self._output.write(content)
            return zlib.crc32(content)

        self.stream(name, len(content), write)

    def stream(self, name: str, nbytes: int, write: Callable[[], int]) -> None:
        """A record of `nbytes`, which `write` appends to the output; it returns their CRC-32."""
        start, raw = self._output.position, name.encode()
        self._output.write(_local(raw, start, nbytes, crc=0))
        record = _Record(raw, start, nbytes, write())
        self._output.patch(start, _local(raw, start, nbytes, record.crc))
        self._records.append(record)

    def checksum(self) -> int:
        """Of all names and contents so far."""
        return zlib.crc32(b"".join(record.name + struct.pack("<L", record.crc) for record in self._records))

    def finish(self) -> None:
        start = self._output.position
        for record in self._records:
            self._output.write(_central(record))
        self._output.write(_end(len(self._records), start, self._output.position))


def _local(name: bytes, start: int, nbytes: int, crc: int) -> bytes:
    """What precedes a record's content at byte `start`: its length does not depend on the CRC."""
    wide = nbytes >= _MAX32
    extra = struct.pack("<2H2Q", 1, 16, nbytes, nbytes) if wide else b""
    # The padding is an extra field of its own, which has a name and a length.
    pad = -(start + _LOCAL.size + len(name) + len(extra) + 4) % ALIGNMENT
    extra += b"FB" + struct.pack("<H", pad) + b"Z" * pad
    short = min(nbytes, _MAX32)
    numbers = (_ZIP64 if wide else 0, _UTF8, 0, 0, 0, crc, short, short, len(name), len(extra))
    return _LOCAL.pack(b"PK\3\4", *numbers) + name + extra


def _central(record: _Record) -> bytes:
    """A record's entry in the directory at the end. Of sizes and offset, zip64 repeats those that are too large."""
    values = (record.nbytes, record.nbytes, record.offset)
    wide = [value for value in values if value >= _MAX32]
    extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    version = _ZIP64 if wide else 0
    *sizes, offset = (min(value, _MAX32) for value in values)
    numbers = (version, version, _UTF8, 0, 0, 0, record.crc, *sizes, len(record.name), len(extra), 0, 0, 0, 0, offset)
    return _CENTRAL.pack(b"PK\1\2", *numbers) + record.name + extra


def _end(count: int, start: int, end: int) -> bytes:
    """What follows the directory of `count` records, which lies at the bytes `start` to `end`."""
    size = end - start
    tail = b""
    if count >= _MAX16 or max(start, size) >= _MAX32:
        tail = _END64.pack(b"PK\6\6", _END64.size - 12, _ZIP64, _ZIP64, 0, 0, count, count, size, start)
        tail += _LOCATOR.pack(b"PK\6\7", 0, end, 1)
    short = min(count, _MAX16)
    return tail + _END.pack(b"PK\5\6", 0, 0, short, short, min(size, _MAX32), min(start, _MAX32), 0)
