"""Sorted string tables: the LevelDB file layout that TensorFlow uses for a checkpoint's `.index` file.

    data block | ... | metaindex block | index block | footer (48 bytes)

A block is a run of entries in key order, each `shared, unshared, value length` (varints), the key's new bytes and the
value, then the restart array (uint32 each) and its length; a trailer of one compression byte and a masked CRC32C
follows. The index block's values are the handles (offset, size) of the data blocks. Integers are little-endian.
Sources: LevelDB's `doc/table_format.md`, TensorFlow's `tsl/lib/io/{format,table_options}.h`, and Snappy's
`format_description.txt`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from crc32c import crc32c

from .protobuf import CorruptError, varint

MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
FOOTER_SIZE = 48
_TRAILER_SIZE = 5
# One 3-byte copy yields at most 64 bytes: no valid snappy stream grows more than 22-fold.
_SNAPPY_EXPANSION = 22
# A key is stored in full at every restart point, every 16th by default: honest keys expand less than this.
_KEY_EXPANSION = 64


class _Handle(NamedTuple):
    offset: int
    size: int


def masked(crc: int) -> int:
    """A checksum rotated and shifted so that it may itself lie in checksummed data (LevelDB's masking)."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def masked_crc32c(data: bytes | memoryview) -> int:
    return masked(crc32c(data))


def read_table(data: memoryview) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) pairs of a whole table file in key order; blocks are checked and decoded as they are reached.

    Raises CorruptError if anything is damaged, truncated or out of order.
    """
    if len(data) < FOOTER_SIZE or data[-len(MAGIC) :] != MAGIC:
        raise CorruptError(
            f"it does not end with the magic number {MAGIC[::-1].hex()} of a TensorFlow index: "
            f"another format, or cut short at {len(data)} bytes."
        )
    body, footer = data[:-FOOTER_SIZE], data[-FOOTER_SIZE : -len(MAGIC)]
    metaindex, pos = _handle(footer, 0)
    _block(body, metaindex)  # TensorFlow keeps nothing there; the checksum is worth a look
    index, _ = _handle(footer, pos)
    return _increasing(_data_entries(body, _block(body, index)))


def _data_entries(body: memoryview, index: bytes) -> Iterator[tuple[bytes, bytes]]:
    end = 0
    for _, value in _increasing(_block_entries(index)):
        handle, _ = _handle(value, 0)
        # Also what bounds the work: without it, a small file could name one large block a million times.
        if handle.offset < end:
            raise CorruptError(f"its data blocks overlap at byte {handle.offset}.")
        end = handle.offset + handle.size + _TRAILER_SIZE
        yield from _block_entries(_block(body, handle))


def _increasing(entries: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    last: bytes | None = None
    for key, value in entries:
        if last is not None and key <= last:
            raise CorruptError(f"its keys are not strictly increasing: {key[:80]!r} follows {last[:80]!r}.")
        yield key, value
        last = key


def _handle(data: bytes | memoryview, pos: int) -> tuple[_Handle, int]:
    offset, pos = varint(data, pos)
    size, pos = varint(data, pos)
    return _Handle(offset, size), pos


def _block(body: memoryview, handle: _Handle) -> bytes:
    """The uncompressed content of one block, its checksum verified."""
    end = handle.offset + handle.size
    if end + _TRAILER_SIZE > len(body):
        raise CorruptError(
            f"a block of {handle.size} bytes at byte {handle.offset} runs past the table's end at {len(body)}."
        )
    compression, stored = body[end], int.from_bytes(body[end + 1 : end + _TRAILER_SIZE], "little")
    found = masked_crc32c(body[handle.offset : end + 1])
    if found != stored:
        raise CorruptError(
            f"the block at byte {handle.offset} is damaged: CRC32C {stored:08x} expected, {found:08x} found."
        )
    if compression not in _DECOMPRESS:
        raise CorruptError(f"the block at byte {handle.offset} has the unknown compression type {compression}.")
    return _DECOMPRESS[compression](bytes(body[handle.offset : end]))


def _block_entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Entries of one block, front to back; the restart points serve binary search only."""
    restarts = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 - 4 * restarts
    if end < 0:
        raise CorruptError(f"a block of {len(block)} bytes cannot hold its {restarts} restart points.")
    key, pos, budget = b"", 0, _KEY_EXPANSION * len(block)
    while pos < end:
        shared, pos = varint(block, pos)
        unshared, pos = varint(block, pos)
        value_size, pos = varint(block, pos)
        value_start = pos + unshared
        if shared > len(key) or value_start + value_size > end:
            raise CorruptError(f"the entry after key {key[:80]!r} runs past the end of its block.")
        key = key[:shared] + block[pos:value_start]
        pos = value_start + value_size
        budget -= len(key)
        if budget < 0:
            raise CorruptError("its keys expand beyond all measure.")
        yield key, block[value_start:pos]


def snappy_decompress(data: bytes) -> bytes:
    """Raw snappy (no frames): literals, and copies of what was already written, which may overlap themselves."""
    size, pos = varint(data, 0)
    if size > _SNAPPY_EXPANSION * len(data):
        raise CorruptError(f"{len(data)} bytes of snappy data cannot hold the {size} bytes that they declare.")
    out = bytearray()
    while pos < len(data):
        tag = data[pos]
        kind, upper = tag & 3, tag >> 2
        # A literal shorter than 61 bytes has its length in the tag, a longer one in 1 to 4 bytes behind it.
        extra = (max(upper - 59, 0), 1, 2, 4)[kind]
        start = pos + 1 + extra
        operand = int.from_bytes(data[pos + 1 : start], "little")
        length = (1 + (operand if extra else upper), 4 + (upper & 7), 1 + upper, 1 + upper)[kind]
        pos = start if kind else start + length
        if pos > len(data):
            raise CorruptError("snappy data ends inside an element.")
        if kind == 0:
            out += data[start:pos]
            continue
        offset = operand | tag >> 5 << 8 if kind == 1 else operand
        if not 0 < offset <= len(out):
            raise CorruptError(f"a snappy copy reaches {offset} bytes back from byte {len(out)}.")
        begin = len(out) - offset
        pattern = out[begin : begin + length]
        out += (pattern * (length // len(pattern) + 1))[:length]
    if len(out) != size:
        raise CorruptError(f"snappy data holds {len(out)} bytes and declares {size}.")
    return bytes(out)


_DECOMPRESS: Mapping[int, Callable[[bytes], bytes]] = {0: bytes, 1: snappy_decompress}
