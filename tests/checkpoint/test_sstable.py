"""The table of `.index` files, its snappy and its protobuf, against honest, damaged and hostile bytes."""

from __future__ import annotations

import struct
import time
from contextlib import suppress

import cramjam
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bundle_writer import MAGIC, block, framed, message, table, varint
from loadstone.checkpoint import protobuf
from loadstone.checkpoint.protobuf import CorruptError, Message
from loadstone.checkpoint.sstable import masked_crc32c, read_table, snappy_decompress

Pairs = list[tuple[bytes, bytes]]
SAMPLE: Pairs = [(f"model/h{i // 4:02d}/layer_{i:03d}/w".encode(), b"value %d" % i * 3) for i in range(60)]


def read(data: bytes) -> Pairs:
    return list(read_table(memoryview(data)))


def raw_table(index: bytes, *blocks: bytes) -> bytes:
    """A table of blocks as given (framed by the caller), with an index block of the caller's making."""
    body = b"".join(blocks)
    handles = [varint(len(body)), varint(8), varint(len(body) + 13), varint(len(index))]
    return body + framed(block([])) + framed(index) + b"".join(handles).ljust(40, b"\0") + MAGIC


def index_of(*handles: tuple[int, int]) -> bytes:
    return block([(b"%09d" % i, varint(offset) + varint(size)) for i, (offset, size) in enumerate(handles)], 1)


def one_block(content: bytes, compression: int = 0) -> bytes:
    return raw_table(index_of((0, len(content))), framed(content, compression))


# --- tables


@given(
    entries=st.dictionaries(st.binary(max_size=40), st.binary(max_size=60), max_size=60),
    block_size=st.integers(1, 2000),
    snappy=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_reads_what_was_written(entries: dict[bytes, bytes], block_size: int, snappy: bool) -> None:
    assert read(table(sorted(entries.items()), block_size, snappy)) == sorted(entries.items())


def test_shared_prefixes_and_several_blocks_are_what_the_sample_tests() -> None:
    data = table(SAMPLE, block_size=400)
    assert len(data) < sum(len(key) + len(value) for key, value in SAMPLE)  # prefixes are shared
    assert data.count(b"model/h") > 3  # and stored in full again in each block
    assert read(data) == SAMPLE


def test_masked_checksum_as_tensorflow_writes_it() -> None:
    """From a file of TensorFlow's: its empty metaindex block and the block's compression byte; and no bytes at all."""
    assert masked_crc32c(bytes.fromhex("000000000100000000")) == 0xB0A1F2C0
    assert masked_crc32c(b"") == 0xA282EAD8


@pytest.mark.parametrize("snappy", [False, True])
def test_every_flipped_bit_outside_the_footer_is_found(snappy: bool) -> None:
    data = table(SAMPLE[:12], block_size=200, snappy=snappy)
    for position in range(len(data) - 48):
        for bit in (0, 7):
            broken = bytearray(data)
            broken[position] ^= 1 << bit
            with pytest.raises(CorruptError, match=r"damaged: CRC32C [0-9a-f]{8} expected, [0-9a-f]{8} found"):
                read(bytes(broken))


def test_a_flipped_bit_in_the_footer_is_found_or_changes_nothing() -> None:
    data = table(SAMPLE[:12], block_size=200)
    found = 0
    for position in range(len(data) - 48, len(data)):
        for bit in range(8):
            broken = bytearray(data)
            broken[position] ^= 1 << bit
            try:
                assert read(bytes(broken)) == SAMPLE[:12]
            except CorruptError:
                found += 1
    assert found > 100


def test_every_truncation_is_found() -> None:
    data = table(SAMPLE[:12], block_size=200)
    for length in range(len(data)):
        with pytest.raises(CorruptError, match=f"magic number db4775248b80fb57 .* or cut short at {length} bytes"):
            read(data[:length])


@pytest.mark.parametrize("block_size", [1, 10_000], ids=["across blocks", "in one block"])
@pytest.mark.parametrize("keys", [[b"a", b"c", b"b"], [b"a", b"b", b"b"], [b"b", b"", b"c"]])
def test_keys_must_strictly_increase(keys: list[bytes], block_size: int) -> None:
    with pytest.raises(CorruptError, match=r"keys are not strictly increasing: b'.*' follows b'.'"):
        read(table([(key, b"v") for key in keys], block_size))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", r"block of 0 bytes cannot hold its 0 restart points"),
        (b"\1\0\0", r"block of 3 bytes cannot hold its 1 restart points"),
        (struct.pack("<I", 2**32 - 1), r"cannot hold its 4294967295 restart points"),
        (b"\1\1\1kv" + bytes(8), r"the entry after key b'' runs past the end"),  # shares a byte with no key
        (b"\0\5\5kv" + bytes(8), r"the entry after key b'' runs past the end"),
        (b"\0\1" + varint(2**63) + b"kv" + bytes(8), r"runs past the end of its block"),
        (b"\0\1" + b"\xff" * 12 + bytes(8), r"longer than 64 bits"),
        (b"\xff" * 3 + bytes(4), r"variable-length integer runs past the end|entry after key"),
    ],
)
def test_a_malformed_block_with_a_right_checksum(content: bytes, problem: str) -> None:
    with pytest.raises(CorruptError, match=problem):
        read(one_block(content))


@pytest.mark.parametrize("compression", [2, 3, 255])
def test_an_unknown_compression_is_refused(compression: int) -> None:
    with pytest.raises(CorruptError, match=f"block at byte 0 has the unknown compression type {compression}"):
        read(one_block(block(SAMPLE), compression))


@pytest.mark.parametrize("handle", [(0, 10**6), (2**63, 5), (2**64 - 1, 2**64 - 1), (0, 2**40)])
def test_a_block_outside_the_file_is_refused(handle: tuple[int, int]) -> None:
    with pytest.raises(CorruptError, match=f"block of {handle[1]} bytes at byte {handle[0]} runs past the table's end"):
        read(raw_table(index_of(handle), framed(block(SAMPLE))))


def test_a_block_that_ends_where_its_trailer_should_be_is_refused() -> None:
    """The handle of the data block grows until it reaches, and then passes, the footer."""
    content = framed(block(SAMPLE))
    length = len(raw_table(index_of((0, 500)), content))
    for size in range(len(content) - 4, length):
        with pytest.raises(CorruptError, match=r"damaged|runs past the table's end"):
            read(raw_table(index_of((0, size)), content))


def test_a_block_named_twice_is_refused_before_it_is_decoded_twice() -> None:
    """A bomb otherwise: each mention of an empty block costs the reader a whole decompression."""
    empty = bytes(4_000_000) + struct.pack("<I", 1_000_000)  # nothing but restart points
    bomb = bytes(cramjam.snappy.compress_raw(empty))
    assert read(raw_table(index_of((0, len(bomb))), framed(bomb, 1))) == []
    with pytest.raises(CorruptError, match="data blocks overlap at byte 0"):
        read(raw_table(index_of((0, len(bomb)), (0, len(bomb))), framed(bomb, 1)))


def test_a_key_bomb_is_refused() -> None:
    """Each entry adds a byte to a key of 64 KiB: 300 KB of file would be 5 GB of keys."""
    entries = b"\0" + varint(2**16) + b"\0" + bytes(2**16)
    entries += b"".join(varint(2**16 + i) + b"\1\0x" for i in range(80_000))
    start = time.process_time()
    with pytest.raises(CorruptError, match="expand beyond all measure"):
        read(one_block(entries + bytes(4)))
    assert time.process_time() - start < 5


def test_reading_is_lazy() -> None:
    """A version 1 checkpoint of gigabytes is known by its first key; nothing after that is touched."""
    data = bytearray(table(SAMPLE, block_size=200))
    data[400] ^= 1
    rows = read_table(memoryview(data))
    assert next(rows) == SAMPLE[0]
    with pytest.raises(CorruptError, match="damaged"):
        list(rows)


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_any_block_content_is_read_or_refused(content: bytes) -> None:
    for data in (one_block(content), one_block(content, 1), raw_table(content, framed(block(SAMPLE[:3])))):
        with suppress(CorruptError):
            read(data)


# --- snappy

text = st.lists(st.sampled_from([b"abc", b"model/h1/", b"\0" * 70, b"x", b"\xff\0\1\2\3"]), max_size=80).map(b"".join)


@given(st.one_of(text, st.binary(max_size=3000)))
@example(bytes(200_000))
@example(bytes(range(256)) * 300)
@settings(max_examples=200, deadline=None)
def test_decompresses_what_cramjam_compresses(data: bytes) -> None:
    assert snappy_decompress(bytes(cramjam.snappy.compress_raw(data))) == data


def verdicts(data: bytes) -> tuple[bytes | None, bytes | None]:
    """What we and cramjam make of the bytes; None if refused."""
    try:
        ours: bytes | None = snappy_decompress(data)
    except CorruptError:
        ours = None
    try:
        return ours, bytes(cramjam.snappy.decompress_raw(data))
    except cramjam.DecompressionError:
        return ours, None


elements = st.one_of(
    st.binary(min_size=1, max_size=60).map(lambda b: bytes([len(b) - 1 << 2]) + b),  # literal
    st.binary(min_size=61, max_size=300).map(lambda b: bytes([61 << 2]) + struct.pack("<H", len(b) - 1) + b),
    st.builds(lambda n, o: bytes([n << 2 | 1 | o >> 8 << 5, o & 255]), st.integers(0, 7), st.integers(0, 2047)),
    st.builds(lambda n, o: bytes([n << 2 | 2]) + struct.pack("<H", o), st.integers(0, 63), st.integers(0, 99)),
    st.builds(lambda n, o: bytes([n << 2 | 3]) + struct.pack("<I", o), st.integers(0, 63), st.integers(0, 99)),
)


@given(st.lists(elements, max_size=8), st.data())
@settings(max_examples=500, deadline=None)
def test_every_kind_of_element_is_judged_as_cramjam_judges_it(parts: list[bytes], data: st.DataObject) -> None:
    """The declared size is right in most cases: it is what the elements add up to."""
    total = sum(_element_size(part) for part in parts)
    size = data.draw(st.sampled_from([total, total, total, max(total - 1, 0), total + 1]))
    ours, theirs = verdicts(varint(size) + b"".join(parts))
    assert ours == theirs


def _element_size(part: bytes) -> int:
    upper = part[0] >> 2
    return [len(part) - (3 if upper == 61 else 1), 4 + (upper & 7), 1 + upper, 1 + upper][part[0] & 3]


@given(text.filter(bool), st.data())
@settings(max_examples=500, deadline=None)
def test_damaged_snappy_is_judged_as_cramjam_judges_it(plain: bytes, data: st.DataObject) -> None:
    broken = bytearray(cramjam.snappy.compress_raw(plain))
    for _ in range(data.draw(st.integers(1, 3))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    length = data.draw(st.integers(1, len(broken)))
    declared, _ = protobuf.varint(bytes(broken) + b"\0", 0) if broken[:9] != b"\xff" * 9 else (2**63, 0)
    if declared < 2**20:  # cramjam allocates whatever is declared
        ours, theirs = verdicts(bytes(broken[:length]))
        assert ours == theirs


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "variable-length integer runs past the end"),
        (varint(2**32 - 1) + b"\0a", r"7 bytes of snappy data cannot hold the 4294967295 bytes"),
        (varint(2**63) + b"\0a", "cannot hold"),
        (b"\x05\x10abc", "ends inside an element"),
        (b"\x05\xf4\1", "ends inside an element"),
        (b"\x05\0a\x01", "ends inside an element"),
        (b"\x05\x01\x01", "copy reaches 1 bytes back from byte 0"),
        (b"\x05\0a\x01\x00", "copy reaches 0 bytes back from byte 1"),
        (b"\x05\0a\x01\x02", "copy reaches 2 bytes back from byte 1"),
        (b"\x04\0a\x01\x01", "holds 5 bytes and declares 4"),
        (b"\x06\0a\x01\x01", "holds 5 bytes and declares 6"),
    ],
)
def test_malformed_snappy_is_refused(data: bytes, problem: str) -> None:
    with pytest.raises(CorruptError, match=problem):
        snappy_decompress(data)


def test_long_copies_from_far_back_do_not_take_quadratic_time() -> None:
    """8 MiB of literal, then 50 000 copies of a byte from its very beginning."""
    size, count = 2**23, 50_000
    literal = bytes([62 << 2]) + (size - 1).to_bytes(3, "little") + bytes(size)
    copies = b"".join(bytes([3]) + struct.pack("<I", size + i) for i in range(count))
    start = time.process_time()
    assert snappy_decompress(varint(size + count) + literal + copies) == bytes(size + count)
    assert time.process_time() - start < 5


# --- protobuf


def test_message_fields_by_number() -> None:
    data = message((1, 5), (2, message((1, 7))), (1, 6), (3, -2), (2, b"")) + b"\x25\1\2\3\4" + b"\x29" + b"\1" * 8
    fields = Message(data)
    assert [fields.integer(n) for n in (1, 3, 4, 5, 9)] == [6, -2, 0x04030201, 0x0101010101010101, 0]
    assert [part.integer(1) for part in fields.messages(2)] == [7, 0]
    assert fields.integer(9, default=-1) == -1
    assert fields.messages(9) == []
    assert [fields.has_bytes(n) for n in (1, 2, 9)] == [False, True, False]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"\x08", "runs past the end of its data"),
        (b"\x08" + b"\xff" * 9 + b"\x02", "longer than 64 bits"),
        (b"\x12\x05abc", "runs past the end of its message"),
        (b"\x12" + varint(2**64 - 1), "runs past the end of its message"),
        (b"\x25\1\2\3", "runs past the end of its message"),
        (b"\x0b", "unknown wire type 3"),
        (b"\x0f", "unknown wire type 7"),
    ],
)
def test_a_malformed_message_is_refused(data: bytes, problem: str) -> None:
    with pytest.raises(CorruptError, match=problem):
        Message(data)


def test_a_field_of_the_wrong_kind_is_refused() -> None:
    fields = Message(message((1, 5), (2, b"")))
    with pytest.raises(CorruptError, match="field 2 of a protobuf message should be a number"):
        fields.integer(2)
    with pytest.raises(CorruptError, match="field 1 of a protobuf message should be a message"):
        fields.messages(1)
