"""Safetensors: exactly the files that the `safetensors` library accepts are accepted, with the same bytes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from loadstone.checkpoint.safetensors import Safetensors
from loadstone.errors import FormatError
from safetensors_files import BITS, agree, entry, one, pack

fuzz = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


# -- the judge on oddities, each of which the library was seen to accept or refuse

ACCEPTED = [
    ("{}", b""),
    ("{} \n\t\r", b""),
    (f' {{"a":{entry()}}}', b"xy"),
    (f'{{"":{entry()}}}', b"xy"),
    (f'{{"a":{entry()},"a":{entry()}}}', b"xy"),
    (f'{{"a":{entry("U8", "[9]", "[0,9]")},"a":{entry()}}}', b"xy"),
    ('{"a":["U8",[2],[0,2]]}', b"xy"),
    ('{"a":{"dtype":{"U8":null},"shape":[2],"data_offsets":[0,2]}}', b"xy"),
    (one(more='[1,{"y":null}],"x":1e300'), b"xy"),
    (one(more="[" * 125 + "]" * 125), b"xy"),
    (one(more="9" * 300), b"xy"),
    (one("U8", "[0,18446744073709551615,18446744073709551615]", "[0,0]"), b""),
    (one("U8", "[" + "1," * 70 + "2]"), b"xy"),
    (one("F4", "[4]"), b"xy"),
    (one("F6_E2M3", "[4]", "[0,3]"), b"xyz"),
    (f'{{"\\ud83d\\ude00":{entry()}}}', b"xy"),
    (f'{{"__metadata__":null,"a":{entry()}}}', b"xy"),
    ('{"__metadata__":{"a":"b","a":"c"}}', b""),
    (f'{{"e":{entry("U8", "[0]", "[0,0]")},"a":{entry()},"f":{entry("U8", "[0]", "[2,2]")}}}', b"xy"),
]
REFUSED = [
    ("", b"", "not valid JSON"),
    ("[]", b"", "one JSON object"),
    ("[null,{}]", b"", "one JSON object"),
    ("\ufeff{}", b"", "not valid JSON"),
    ("{}\0", b"", "not valid JSON"),
    ("{}", b"x", "1 bytes follow the last tensor"),
    (b'{"\xff":1}', b"", "not UTF-8 \\(byte 10\\)"),
    ('{"a":null}', b"", "'a' should be an object, and is None"),
    (f'{{"a":{entry()},"a":1}}', b"xy", "'a' should be an object, and is 1"),
    ('{"a":{"dtype":"U8","shape":[2]}}', b"xy", "'a' has 0 fields 'data_offsets'"),
    (one(more='1,"dtype":"U8"'), b"xy", "'a' has 2 fields 'dtype'"),
    (one("u8"), b"xy", "'a' has the unknown dtype 'u8'; known are BOOL, "),
    ('{"a":{"dtype":{"U8":1},"shape":[2],"data_offsets":[0,2]}}', b"xy", "unknown dtype"),
    (one("U8", "[2.0]"), b"xy", "should be a list of sizes, and is \\[2.0\\]"),
    (one("U8", "[true,2]"), b"xy", "should be a list of sizes"),
    (one("U8", "[-2]"), b"xy", "should be a list of sizes"),
    (one("U8", "[-0]", "[0,0]"), b"", "should be a list of sizes"),
    (one("U8", "[0,18446744073709551616]", "[0,0]"), b"", "should be a list of sizes"),
    (one("U8", "[2]", "[0,2,2]"), b"xy", "should be two sizes"),
    (one("U8", "[2]", "[2,0]"), b"xy", "the bytes 2 to 0"),
    (one("U8", "[2]", "[0,-2]"), b"xy", "should be two sizes"),
    ('{"e":' + entry() + "," + one("U8", "[2]", "[2,0]")[1:], b"xy", "2 bytes, and its offsets give it -2"),
    (one("U8", "[2]", "[1,3]"), b"xyz", "'a' takes the bytes 1 to 3 .* leaves a hole"),
    (f'{{"a":{entry()},"b":{entry()}}}', b"xy", "'b' takes the bytes 0 to 2 of the data, and .* ends at 2"),
    (one("F32"), b"xy", r"'a' has the shape \[2\] of F32: 8 bytes, and its offsets give it 2"),
    (one("F4", "[3]"), b"xy", "1.5 bytes"),
    (one("U8", "[4294967296,4294967296,0]", "[0,0]"), b"", "overflows 64 bits"),
    (one("F64", "[2305843009213693952]", "[0,0]"), b"", "overflows 64 bits"),
    (one("U8", "[" + "9," * 5000 + "9]"), b"xy", "overflows 64 bits"),
    (
        f'{{"a":{entry()},"b":{entry("F32", "[2]", "[2,10]")}}}',
        b"xyz",
        "truncated by 7 bytes, at tensor 'b': its header",
    ),
    (one(more="NaN"), b"xy", "NaN is no JSON number"),
    (one(more="1e999"), b"xy", "out of range"),
    (one(more="9" * 310), b"xy", "out of range"),
    (one(more="9" * 5000), b"xy", "out of range"),
    (one(more='"\\ud800"'), b"xy", "lone surrogate"),
    (one(more="[" * 126 + "]" * 126), b"xy", "nested at most 127 deep"),
    ('{"a":' + "[" * 100_000, b"", "nested at most 127 deep"),
    ('{"__metadata__":{"a":1}}', b"", "map strings to strings"),
    ('{"__metadata__":[]}', b"", "map strings to strings"),
    ('{"__metadata__":null,"__metadata__":{}}', b"", "two __metadata__"),
]


@pytest.mark.parametrize(("header", "data"), ACCEPTED)
def test_accepts_what_the_library_accepts(tmp_path: Path, header: str, data: bytes) -> None:
    assert agree(tmp_path / "a", pack(header, data))


@pytest.mark.parametrize(("header", "data", "text"), REFUSED)
def test_refuses_what_the_library_refuses(tmp_path: Path, header: str | bytes, data: bytes, text: str) -> None:
    assert not agree(tmp_path / "a", pack(header, data))
    with pytest.raises(FormatError, match=text):
        Safetensors(tmp_path / "a")


# -- fuzzing


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    save_file({"a": np.arange(4, dtype=np.float32), "b": np.ones((2, 3), np.int8)}, tmp_path / "x", {"k": "v"})
    raw = (tmp_path / "x").read_bytes()
    for length in range(1, len(raw)):
        assert not agree(tmp_path / "y", raw[:length])


dims = st.integers(0, 3) | st.sampled_from([2**32, 2**63, 2**64 - 1, 2**64, -1, 1.0, True, None, "1"])
valid_dims = st.integers(0, 4)


@st.composite
def headers(draw: st.DrawFn) -> tuple[str, int]:
    """A header that is right but for a few perturbations, and the size of its data."""
    broken = draw(st.integers(0, 3)) == 0
    pairs: list[tuple[str, Any]] = []
    end = 0
    for _ in range(draw(st.integers(0, 4))):
        dtype = draw(st.sampled_from([*BITS, "I4"] if broken else [*BITS]))
        shape = draw(st.lists(dims if broken else valid_dims, max_size=3))
        bits = BITS.get(dtype, 8)
        for dim in shape:
            bits *= dim if type(dim) is int and 0 <= dim < 100 else 1
        size = bits // 8 + (draw(st.sampled_from([0, 0, 0, 1, -1])) if broken else 0)
        value: Any = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        if broken:
            value = draw(st.sampled_from([value, value, value, value | {"extra": None}, list(value.values()), None]))
        pairs.append((draw(st.sampled_from("abc") | st.text(max_size=3)), value))
        end += size
    if draw(st.booleans()):
        texts = st.text(max_size=4)
        values = texts | st.none() | st.integers() if broken else texts
        pairs.append(("__metadata__", draw(st.dictionaries(texts, values, max_size=3) | st.none())))
    pairs = draw(st.permutations(pairs))
    ascii_only = draw(st.booleans())
    text = ",".join(
        f"{json.dumps(k, ensure_ascii=ascii_only)}:{json.dumps(v, ensure_ascii=ascii_only)}" for k, v in pairs
    )
    return draw(st.sampled_from(["", "", " "])) + "{" + text + "}" + " " * draw(st.integers(0, 8)), end


@fuzz
@given(headers(), st.integers(-1, 1), st.randoms(use_true_random=False))
def test_generated_headers(tmp_path: Path, header: tuple[str, int], extra: int, random: Any) -> None:
    text, size = header
    size = max(0, size + extra * (random.random() < 0.1))
    agree(tmp_path / "a", pack(text, random.randbytes(size)))


@fuzz
@given(st.data())
def test_mutated_bytes(tmp_path: Path, data: st.DataObject) -> None:
    text = f'{{"__metadata__":{{"k":"v"}},"a":{entry("F16", "[2,1]", "[0,4]")},"b":{entry("BF16", "[1]", "[4,6]")}}}'
    raw = bytearray(pack(text, b"123456"))
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.integers(0, len(raw) - 1))
        how = data.draw(st.sampled_from(["set", "insert", "delete", "digit", "bracket"]))
        if how == "set":
            raw[where] = data.draw(st.integers(0, 255))
        elif how == "delete":
            del raw[where]
        else:
            new = {"insert": b' \t,:"\\0a', "digit": b"0123456789-.eE", "bracket": b'{}[]",:'}[how]
            raw[where : where + (how != "insert")] = bytes([data.draw(st.sampled_from(new))])
    if data.draw(st.booleans()):  # let the mutation reach the JSON
        raw[:8] = struct.pack("<Q", max(0, len(raw) - 8 - 6))
    agree(tmp_path / "a", bytes(raw))


@fuzz
@given(st.binary(max_size=40))
def test_arbitrary_bytes(tmp_path: Path, raw: bytes) -> None:
    agree(tmp_path / "a", raw)
    agree(tmp_path / "a", pack(raw))
