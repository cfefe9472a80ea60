"""GGUF: whatever is broken in a file, the error says what and where, and nothing but our errors comes out."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gguf_files import ARRAY, BOOL, STRING, U8, U16, U32, U64, gguf_file, pair, strings, tensor, text
from loadstone.checkpoint.gguf import Gguf
from loadstone.errors import FormatError


def opened(path: Path, raw: bytes) -> Gguf:
    path.write_bytes(raw)
    return Gguf(path)


W = tensor("w", [8], 0, 0)
KEY = pair("k", U8, b"\1")


def array(kind: int, count: int, raw: bytes = b"") -> list[bytes]:
    """The pairs of a file whose one key, `k`, is an array."""
    return [pair("k", ARRAY, struct.pack("<IQ", kind, count) + raw)]


def align(kind: int, raw: bytes) -> list[bytes]:
    return [pair("general.alignment", kind, raw)]


def infos(*tensors: bytes, data: int = 64) -> bytes:
    return gguf_file(tensors=tensors, data=bytes(data))


BROKEN = {
    "not gguf": (b"GGUX" + bytes(40), "does not begin with GGUF"),
    "version 1": (gguf_file(version=1), "GGUF version 1, and Loadstone reads 2 and 3. Convert the model again"),
    "version 4": (gguf_file(version=4), "GGUF version 4"),
    "big-endian": (gguf_file(version=3 << 24), "big-endian GGUF"),
    "many keys": (gguf_file(n_pairs=2**60), "announces 1,152,921,504,606,846,976 metadata keys, which the .* cannot"),
    "many tensors": (gguf_file(n_tensors=2**63), "announces 9,223,372,036,854,775,808 tensors, which"),
    "a key too few": (gguf_file([KEY], n_pairs=2, alignment=1), "its header announces 2 metadata keys, which the 14"),
    "a key cut off": (
        gguf_file([KEY, text("a key")], alignment=1),
        "file ends at 51 bytes, in the metadata key 'a key'",
    ),
    "long string": (gguf_file([pair("k", STRING, struct.pack("<Q", 2**63) + bytes(50))]), "in the metadata key 'k'"),
    "long first string": (
        gguf_file(array(STRING, 2, struct.pack("<Q", 2**64 - 1) + bytes(50))),
        "truncated: .* key 'k'",
    ),
    "far first string": (gguf_file(array(STRING, 2, struct.pack("<Q", 2**40) + bytes(50))), "truncated: .* key 'k'"),
    "long last string": (gguf_file(array(STRING, 2, text("a") + struct.pack("<Q", 60))), "truncated: .* key 'k'"),
    "long key": (gguf_file([struct.pack("<Q", 2**64 - 1) + bytes(50)]), "truncated: .*, in metadata key 0"),
    "long array": (gguf_file(array(U8, 2**50)), "'k' announces 1,125,899,906,842,624 numbers"),
    "wide array": (gguf_file(array(U64, 40, bytes(60))), "truncated: .*, in the metadata key 'k'"),
    "many strings": (gguf_file(array(STRING, 2**61)), "announces .* strings"),
    "many arrays": (gguf_file(array(ARRAY, 2**61)), "announces .* arrays"),
    "deep arrays": (gguf_file(array(ARRAY, 1, struct.pack("<IQ", ARRAY, 1) * 100_000)), "'k' .* nested deeper than 4"),
    "unknown kind": (gguf_file([pair("k", 13, bytes(8))]), "the metadata key 'k' has the unknown type 13"),
    "unknown element": (gguf_file(array(99, 1, bytes(8))), "'k' has the unknown type 99"),
    "key twice": (gguf_file([KEY, KEY]), "the metadata key 'k' occurs twice"),
    "key not UTF-8": (gguf_file([pair(b"\xff", U8, b"\1")]), "name of metadata key 0 is not UTF-8"),
    "tensor not UTF-8": (infos(tensor(b"\xff", [8], 0, 0)), "entry of tensor 0 is not UTF-8"),
    "tensor twice": (infos(W, W), "two tensors called 'w'"),
    "1000 dimensions": (infos(tensor("w", [1] * 1000, 0, 0)), "'w' has 1,000 dimensions, and ggml allows 4"),
    "2^32 dimensions": (infos(tensor("w", [], 0, 0, n_dims=2**32 - 1)), "4,294,967,295 dimensions"),
    "too large": (infos(tensor("w", [2**63] * 4, 0, 0)), "truncated: tensor 'w' lacks its last"),
    "one byte short": (infos(W, data=31), "tensor 'w' lacks its last 1 of 32 bytes"),
    "offset outside": (infos(tensor("w", [8], 0, 2**63)), "lacks its last 32 of 32 bytes"),
    "unaligned": (infos(tensor("w", [4], 0, 4)), "byte 4 of the data, .* no multiple of the alignment 32"),
    "overlap": (
        infos(tensor("v", [9], 0, 0), tensor("w", [8], 0, 32)),
        "byte 0 .* 36, which overlaps tensor 'w' at 32",
    ),
    "same place": (infos(W, tensor("v", [8], 0, 0)), "overlaps tensor"),
    "broken row": (
        infos(tensor("w", [48, 2], 2, 0)),
        "rows of 48 elements, not a multiple of the 32 in a block of Q4_0",
    ),
    "scalar block": (infos(tensor("w", [], 2, 0)), "rows of 1 elements"),
    "alignment 0": (gguf_file(align(U32, bytes(4))), "general.alignment is 0, which is no power of two"),
    "alignment 24": (gguf_file(align(U32, b"\x18\0\0\0")), "general.alignment is 24"),
    "alignment of text": (gguf_file(align(STRING, text("32"))), "general.alignment is '32'"),
    "alignment of truth": (gguf_file(align(BOOL, b"\1")), "general.alignment is True"),
    "alignment huge": (gguf_file(align(U64, struct.pack("<Q", 2**63)), [W], bytes(32)), "tensor 'w' lacks"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_explained(tmp_path: Path, case: str) -> None:
    raw, message = BROKEN[case]
    with pytest.raises(FormatError, match=message) as caught:
        opened(tmp_path / "x", raw)
    assert str(tmp_path / "x") in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_header_longer_than_any_vocabulary_is_refused(tmp_path: Path) -> None:
    # Sparse: without the limit its list would take 8 GB.
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", ARRAY, U8, 1 << 30)
    with (tmp_path / "x").open("wb") as file:
        file.write(head)
        file.truncate(2 << 30)
    with pytest.raises(FormatError, match="'k' announces 1,073,741,824 numbers"):
        Gguf(tmp_path / "x")
    with (tmp_path / "x").open("r+b") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IQ", STRING, 1 << 30))
    with pytest.raises(FormatError, match="its header is longer than 100,000,000 bytes, in the metadata key 'k'"):
        Gguf(tmp_path / "x")


def test_a_long_name_is_shortened_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        opened(tmp_path / "x", gguf_file([pair("k" * 10_000_000, 99, bytes(4))]))
    assert len(str(caught.value)) < 400


def sample() -> bytes:
    pairs = [
        pair("general.alignment", U32, struct.pack("<I", 32)),
        pair("s", STRING, text("abc")),
        pair("t", ARRAY, strings(["a", "bc"])),
        pair("n", ARRAY, struct.pack("<IQ3H", U16, 3, 1, 2, 3)),
    ]
    infos = [tensor("f", [4, 2], 0, 0), tensor("q", [32], 2, 32), tensor("e", [0], 0, 64)]
    return gguf_file(pairs, infos, bytes(range(50)))


def read_all(path: Path) -> None:
    with contextlib.suppress(FormatError):
        found = Gguf(path)
        for name in found.names():
            found.read(name)


def test_every_truncation_is_a_format_error(tmp_path: Path) -> None:
    raw = sample()
    opened(tmp_path / "x", raw)
    for length in range(1, len(raw)):
        with pytest.raises(FormatError):
            opened(tmp_path / "x", raw[:length])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=9)), min_size=1, max_size=3))
def test_mutated_bytes_raise_nothing_else(tmp_path: Path, changes: list[tuple[int, bytes]]) -> None:
    raw = bytearray(sample())
    for where, new in changes:
        raw[where : where + len(new)] = new
    (tmp_path / "x").write_bytes(raw)
    read_all(tmp_path / "x")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 60), st.sampled_from([0, 1, 0xFF, 2**31, 2**32 - 1, 2**63, 2**64 - 1]))
def test_every_length_field_may_lie(tmp_path: Path, word: int, value: int) -> None:
    raw = bytearray(sample())
    raw[4 * word : 4 * word + 8] = struct.pack("<Q", value)
    (tmp_path / "x").write_bytes(raw)
    read_all(tmp_path / "x")
