"""Safetensors: what the `safetensors` library writes reads back bit for bit, as views of the file."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from loadstone.checkpoint.base import DTYPES
from loadstone.checkpoint.safetensors import Safetensors
from loadstone.errors import FormatError, LoadstoneError
from mapped import lies_in
from safetensors_files import agree, entry, one, pack

CODES = {
    **{"bool": "BOOL", "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64", "int8": "I8", "int16": "I16"},
    **{"int32": "I32", "int64": "I64", "float16": "F16", "float32": "F32", "float64": "F64", "bfloat16": "BF16"},
    **{"complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0"},
    **{"float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ"},
}

# -- what the library writes


@pytest.mark.parametrize("name", sorted(set(DTYPES) - {"complex128"}))
def test_every_dtype_of_the_library_reads_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    bits = np.random.default_rng(0).integers(0, 2 if name == "bool" else 256, (3, 5, 16), np.uint8)
    array = bits.view(DTYPES[name])
    code = CODES[name]
    header = json.dumps({"t": {"dtype": code, "shape": array.shape, "data_offsets": [0, array.nbytes]}})
    assert agree(tmp_path / "a", pack(header, array.tobytes()))
    found = Safetensors(tmp_path / "a")
    assert found.tensors["t"].dtype == name
    assert found.tensors["t"].file == "a"


def test_reads_what_the_library_saves(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "b.weight": rng.standard_normal((7, 3)).astype(np.float32),
        "a": rng.standard_normal(5).astype(ml_dtypes.bfloat16),
        "scalar": np.array(3, np.int64),
        "empty": np.zeros((0, 4), np.float16),
    }
    save_file(tensors, tmp_path / "x", metadata={"format": "pt", "step": "12"})
    found = Safetensors(tmp_path / "x")
    assert found.format == "safetensors"
    assert found.metadata == {"format": "pt", "step": "12"}
    with safe_open(tmp_path / "x", framework="np") as reference:
        assert set(found.names()) == set(reference.keys())
    for name, array in tensors.items():
        assert found.info(name).shape == array.shape
        assert found.read(name).dtype == array.dtype
        assert found.read(name).tobytes() == array.tobytes()


def test_real_file_with_a_tie(shared: Path) -> None:
    found = Safetensors(shared / "checkpoints/tinystories-656k-llama/model.safetensors")
    assert found.aliases == {"model.embed_tokens.weight": "lm_head.weight"}
    assert found.tensors["model.embed_tokens.weight"] == found.tensors["lm_head.weight"]
    assert np.array_equal(found.read("model.embed_tokens.weight"), found.read("lm_head.weight"))
    with safe_open(found.path, framework="np") as reference:
        assert set(reference.keys()) == set(found.names()) - {"model.embed_tokens.weight"}
        for name in reference.keys():  # noqa: SIM118
            assert np.array_equal(reference.get_tensor(name), found.read(name))


def test_tensors_come_in_file_order(tmp_path: Path) -> None:
    header = f'{{"z":{entry("U8", "[1]", "[2,3]")},"a":{entry()}}}'
    assert agree(tmp_path / "a", pack(header, b"xyz"))
    assert Safetensors(tmp_path / "a").names() == ["a", "z"]


def test_an_alias_needs_a_stored_tensor(tmp_path: Path) -> None:
    header = f'{{"__metadata__":{{"format":"pt","gone":"nowhere","a":"a","tied":"a"}},"a":{entry()}}}'
    assert agree(tmp_path / "a", pack(header, b"xy"))
    assert Safetensors(tmp_path / "a").aliases == {"tied": "a"}


# -- memory


def test_arrays_are_views_and_writing_never_reaches_the_file(tmp_path: Path) -> None:
    save_file({"a": np.arange(60_000, dtype=np.float32), "b": np.ones(3, np.float32)}, tmp_path / "x")
    before = (tmp_path / "x").read_bytes()
    found = Safetensors(tmp_path / "x")
    large, small = found.read("a"), found.read("b")
    assert (lies_in(large, tmp_path / "x"), lies_in(small, tmp_path / "x")) == (True, False)
    large[:] = small[:] = -1
    assert found.read("a")[7] == 7
    assert found.read("b").tolist() == [1] * 3
    assert (tmp_path / "x").read_bytes() == before


def test_unaligned_data_is_copied(tmp_path: Path) -> None:
    header = one("F32", "[1]", "[0,4]")
    for pad in range(4):
        assert agree(tmp_path / "a", pack(header + " " * pad, struct.pack("<f", 1.5)))
        assert Safetensors(tmp_path / "a").read("a").flags.aligned


def test_opening_a_large_file_reads_its_header_only(tmp_path: Path) -> None:
    size = 64 << 30
    with (tmp_path / "big").open("wb") as file:
        file.write(pack(json.dumps({"w": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}})))
        file.truncate(file.tell() + size)
    tracemalloc.start()
    begin = time.process_time()
    found = Safetensors(tmp_path / "big")
    array = found.read("w")
    assert array[-1] == 0
    assert time.process_time() - begin < 0.5
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_the_limit_of_the_header(tmp_path: Path) -> None:
    for length in (100_000_000, 100_000_001):
        raw = struct.pack("<Q", length) + b"{}" + b" " * (length - 2)
        assert agree(tmp_path / "a", raw) == (length == 100_000_000)
    with pytest.raises(FormatError, match="announce a header of 100,000,001 bytes, and safetensors allows 100,000,000"):
        Safetensors(tmp_path / "a")


def test_says_how_much_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "x"
    save_file({"a": np.ones(4, np.float32), "b": np.ones(4, np.float32)}, path)
    raw = path.read_bytes()
    path.write_bytes(raw[:-5])
    with pytest.raises(
        FormatError, match=f"truncated by 5 bytes, at tensor 'b': .* {len(raw)} bytes but .* {len(raw) - 5}"
    ):
        Safetensors(path)
    path.write_bytes(raw[:50])
    with pytest.raises(FormatError, match=r"truncated: its header announces .* bytes but the file has 50"):
        Safetensors(path)
    path.write_bytes(raw[:7])
    with pytest.raises(FormatError, match="it has 7 bytes"):
        Safetensors(path)
    path.write_bytes(b"")
    with pytest.raises(FormatError, match="the file is empty"):
        Safetensors(path)


def test_a_repeated_name_is_noted(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(pack(f'{{"a":{entry()},"a":{entry()}}}', b"xy"))
    assert Safetensors(tmp_path / "a").notes == ["the header lists 'a' more than once; the last entry counts"]


def test_packed_types_are_listed_and_not_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(pack(one("F4", "[4]"), b"xy"))
    found = Safetensors(tmp_path / "a")
    assert (found.info("a").dtype, found.info("a").nbytes) == ("F4", 2)
    with pytest.raises(FormatError, match="tensor 'a' is F4, whose elements are smaller than a byte"):
        found.read("a")


def test_unknown_name_and_impossible_shape(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(pack(f'{{"lm_head":{entry("U8", "[0,18446744073709551615]", "[0,0]")}}}'))
    found = Safetensors(tmp_path / "a")
    with pytest.raises(FormatError, match="'lm_head' has a shape that numpy cannot hold"):
        found.read("lm_head")
    with pytest.raises(LoadstoneError, match="there is no tensor 'lm_hea' among its 1; nearest: lm_head"):
        found.read("lm_hea")
