"""GGUF: the `gguf` package writes the files, and judges every number."""

from __future__ import annotations

import copy
import math
import os
import pickle
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gguf_files import ARRAY, F32, U16, U32, gguf_file, pair, strings, tensor
from loadstone.checkpoint.base import DTYPES
from loadstone.checkpoint.gguf import Gguf
from loadstone.checkpoint.gguf_header import BLOCKS
from loadstone.errors import FormatError
from mapped import lies_in

Q = GGMLQuantizationType
QUANTIZED = [t for t in Q if GGML_QUANT_SIZES[t][0] > 1]
PLAIN = [t for t in Q if GGML_QUANT_SIZES[t][0] == 1]


def _works(kind: GGMLQuantizationType, function: Any, array: Any) -> bool:
    try:
        function(array, kind)
    except NotImplementedError:
        return False
    return True


CAN_QUANTIZE = [
    t for t in QUANTIZED if _works(t, gguf.quants.quantize, np.ones((1, GGML_QUANT_SIZES[t][0]), np.float32))
]
CAN_DECODE = [
    t for t in QUANTIZED if _works(t, gguf.quants.dequantize, np.zeros((1, GGML_QUANT_SIZES[t][1]), np.uint8))
]
CANNOT_DECODE = [t for t in QUANTIZED if t not in CAN_DECODE]


def written(path: Path, tensors: dict[str, tuple[Any, Any]], **values: Any) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in values.items():
        writer.add_key_value(key.replace("__", "."), value, gguf.GGUFValueType.get_type(value))
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def opened(path: Path, raw: bytes) -> Gguf:
    path.write_bytes(raw)
    return Gguf(path)


# -- types


def test_the_table_of_blocks_is_ggufs() -> None:
    ours = {code: (block.name, block.size, block.nbytes) for code, block in BLOCKS.items()}
    assert ours == {t.value: (t.name, *GGML_QUANT_SIZES[t]) for t in Q}


@pytest.mark.parametrize("kind", CAN_QUANTIZE, ids=lambda t: t.name)
def test_a_quantised_tensor_is_decoded_as_gguf_does(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    block, _ = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    # Longer than one piece of the decoder, and no multiple of it.
    source = (rng.standard_normal((3, 191, block * math.ceil(512 / block))) * 0.2).astype(np.float32)
    data = gguf.quants.quantize(source, kind)
    found = Gguf(written(tmp_path / "x.gguf", {"w": (data, kind), "after": (np.ones(3, np.float32), None)}))
    assert (found.info("w").shape, found.info("w").dtype, found.info("w").nbytes) == (
        source.shape,
        kind.name,
        data.nbytes,
    )
    got, want = found.read("w"), gguf.quants.dequantize(data, kind)
    assert got.dtype == np.float32
    assert got.shape == source.shape
    assert got.tobytes() == want.tobytes()
    assert np.abs(got - source).max() < 0.5
    assert found.read("after").tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", CAN_DECODE, ids=lambda t: t.name)
def test_random_blocks_are_decoded_as_gguf_does(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    block, nbytes = GGML_QUANT_SIZES[kind]
    shape = (37, 2 * block)
    data = np.random.default_rng(1).integers(0, 256, (37, 2 * nbytes), np.uint8)
    raw = gguf_file(tensors=[tensor("w", shape[::-1], kind.value, 0)], data=data.tobytes())
    with np.errstate(all="ignore"):
        want = gguf.quants.dequantize(data, kind)
    got = opened(tmp_path / "x", raw).read("w")
    assert got.shape == shape
    assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("kind", CANNOT_DECODE, ids=lambda t: t.name)
def test_a_type_that_gguf_cannot_decode_is_listed(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    block, nbytes = GGML_QUANT_SIZES[kind]
    raw = gguf_file(tensors=[tensor("w", [block, 2], kind.value, 0)], data=bytes(2 * nbytes))
    found = opened(tmp_path / "x", raw)
    assert (found.info("w").dtype, found.info("w").nbytes) == (kind.name, 2 * nbytes)
    with pytest.raises(
        FormatError, match=rf"tensor 'w' is {kind.name}, which the gguf package cannot decode. Update it"
    ):
        found.read("w")


@pytest.mark.parametrize(("code", "name"), [(4, "Q4_2"), (33, "Q4_0_8_8"), (36, "IQ4_NL_4_4"), (57, "ggml type 57")])
def test_removed_and_newer_types_are_listed(tmp_path: Path, code: int, name: str) -> None:
    infos = [tensor("w", [32, 2], code, 32), tensor("a", [8], 0, 0), tensor("z", [8], 0, 96)]
    found = opened(tmp_path / "x", gguf_file(tensors=infos, data=bytes(128)))
    assert (found.info("w").dtype, found.info("w").shape, found.info("w").nbytes) == (name, (2, 32), 64)
    assert found.read("z").shape == (8,)
    with pytest.raises(FormatError, match=f"tensor 'w' is {name}, which"):
        found.read("w")


def test_plain_types(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
    names |= {f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)}
    assert sorted(names) == sorted(t.name for t in PLAIN)
    infos, data = [], b""
    arrays = {}
    for kind in PLAIN:
        arrays[kind.name] = rng.integers(0, 256, (3, 5 * DTYPES[names[kind.name]].itemsize), np.uint8)
        infos.append(tensor(kind.name, [5, 3], kind.value, len(data)))
        data += arrays[kind.name].tobytes() + b"\0" * (-arrays[kind.name].size % 32)
    found = opened(tmp_path / "x", gguf_file(tensors=infos, data=data))
    for name, array in arrays.items():
        got = found.read(name)
        assert (got.shape, got.dtype.name, found.info(name).dtype) == ((3, 5), names[name], names[name])
        assert got.tobytes() == array.tobytes()


def test_large_tensors_are_mapped_and_writing_never_reaches_the_file(tmp_path: Path) -> None:
    w, b = np.arange(40_000, dtype=np.float32).reshape(200, 200), np.ones(3, np.float32)
    path = written(tmp_path / "x", {"b": (b, None), "w": (w, None)})
    before = path.read_bytes()
    found = Gguf(path)
    array, small = found.read("w"), found.read("b")
    assert (lies_in(array, path), lies_in(small, path)) == (True, False)
    assert np.array_equal(array, w)
    array[:] = small[:] = -1
    assert path.read_bytes() == before
    assert found.read("b").tolist() == [1] * 3


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    infos = [
        tensor("s", [], 0, 0),
        tensor("e", [0, 4], 0, 32),
        tensor("q", [32, 0], 2, 32),
        tensor("b", [0, 2**63], 2, 32),
    ]
    found = opened(tmp_path / "x", gguf_file(tensors=infos, data=struct.pack("<f", 2.5) + bytes(28)))
    assert found.read("s") == np.float32(2.5)
    assert found.read("e").shape == (4, 0)
    assert found.read("q").shape == (0, 32)
    with pytest.raises(FormatError, match="'b' has a shape that numpy cannot hold"):
        found.read("b")


def test_bf16_from_ggufs_writer(tmp_path: Path) -> None:
    source = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    found = Gguf(written(tmp_path / "x", {"w": (gguf.quants.quantize(source, Q.BF16), Q.BF16)}))
    assert np.array_equal(found.read("w"), source.astype(ml_dtypes.bfloat16))


# -- metadata


def test_metadata_of_every_type(tmp_path: Path) -> None:
    kinds = gguf.GGUFValueType
    writer = gguf.GGUFWriter(tmp_path / "x", "llama")
    values: list[tuple[str, Any, Any]] = [
        ("u8", 200, kinds.UINT8), ("i8", -100, kinds.INT8), ("u16", 60_000, kinds.UINT16), ("i16", -9, kinds.INT16),
        ("u32", 2**32 - 1, kinds.UINT32), ("i32", -(2**31), kinds.INT32), ("u64", 2**64 - 1, kinds.UINT64),
        ("i64", -(2**63), kinds.INT64), ("f32", 0.5, kinds.FLOAT32), ("f64", 1e-300, kinds.FLOAT64),
        ("yes", True, kinds.BOOL), ("no", False, kinds.BOOL), ("text", "größe\n\0", kinds.STRING),
    ]  # fmt: skip
    for key, value, kind in values:
        writer.add_key_value(key, value, kind)
    writer.add_array("strings", ["", "a", "Ġä"])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("floats", [0.5, float("inf")])
    writer.add_array("flags", [True, False])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = Gguf(tmp_path / "x")
    want = {key: value for key, value, _ in values} | {"general.architecture": "llama", "strings": ["", "a", "Ġä"]}
    want |= {"numbers": [1, -2, 3], "floats": [0.5, float("inf")], "flags": [True, False]}
    assert found.metadata == want
    assert {key: type(value) for key, value in found.metadata.items()} == {
        key: type(value) for key, value in want.items()
    }
    assert (found.format, found.tensors, found.notes) == ("gguf", {}, [])


def test_nested_and_empty_arrays(tmp_path: Path) -> None:
    inner = struct.pack("<IQ2H", U16, 2, 7, 8)
    nested = struct.pack("<IQ", ARRAY, 2) + inner + strings(["x"])
    found = opened(tmp_path / "x", gguf_file([pair("n", ARRAY, nested), pair("e", ARRAY, struct.pack("<IQ", F32, 0))]))
    assert found.metadata == {"n": [[7, 8], ["x"]], "e": []}


def test_broken_characters_of_a_vocabulary_survive(tmp_path: Path) -> None:
    tokens = [b"ok", b"\xe4\xb8", "ä".encode()]
    found = opened(tmp_path / "x", gguf_file([pair("tokens", ARRAY, strings(tokens))]))
    assert [token.encode("utf-8", "surrogateescape") for token in found.metadata["tokens"]] == tokens
    assert found.metadata["tokens"][2] == "ä"
    assert len(found.notes) == 1
    assert "the metadata key 'tokens' has strings that are not UTF-8" in found.notes[0]


# Pieces of characters, and lengths whose own first byte (128 to 191) could pass for the end of one.
BROKEN = st.binary(max_size=4) | st.sampled_from([b"\xc3", b"\xe4\xb8", b"\xa9", b"a" * 127, b"b" * 169, b"c" * 300])


@given(
    few=st.lists(BROKEN | st.text(max_size=4).map(str.encode), max_size=6),
    times=st.sampled_from([1, 1, 20, 20, 1100]),  # kept, passed over at once, passed over in pieces
    nested=st.booleans(),
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_strings_come_back_and_broken_ones_are_told(
    tmp_path: Path, few: list[bytes], times: int, nested: bool
) -> None:
    texts = few * times
    value = struct.pack("<IQ", ARRAY, 1) + strings(texts) if nested else strings(texts)
    found = opened(tmp_path / "x", gguf_file([pair("k", ARRAY, value), pair("after", U16, b"\7\0")]))
    (read,) = found.metadata["k"] if nested else [found.metadata["k"]]
    assert [text.encode("utf-8", "surrogateescape") for text in read] == texts
    assert bool(found.notes) == any(is_broken(text) for text in texts)
    assert found.metadata["after"] == 7


def is_broken(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return True
    return False


def test_a_vocabulary_takes_memory_for_as_long_as_it_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(gguf_file([pair("tokens", ARRAY, strings([f"token{i}" for i in range(50_000)]))]))
    tracemalloc.start()
    found = Gguf(tmp_path / "x")
    held = tracemalloc.get_traced_memory()[0]
    tokens = found.metadata["tokens"]
    looking = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(tokens) == 50_000
    assert held < 100_000 < 3_000_000 < looking


def test_a_vocabulary_of_a_file_that_was_changed_meanwhile(tmp_path: Path) -> None:
    before = gguf_file([pair("tokens", ARRAY, strings(["a", "b"] * 50))])
    found, path = opened(tmp_path / "x", before), tmp_path / "x"
    path.write_bytes(before + b"more")
    assert "tokens" in found.metadata
    with pytest.raises(FormatError, match="changed while it was being read"):
        found.metadata["tokens"]


@pytest.mark.parametrize("now", [b"\1" + bytes(7) + b"\xff", b"\0" + bytes(7) + b"a", b"\1" + bytes(6) + b"\xffa"])
def test_a_change_that_nobody_could_notice_raises_nothing_else(tmp_path: Path, now: bytes) -> None:
    """Of the same size and time: another character, another length."""
    path, raw = tmp_path / "x", gguf_file([pair("tokens", ARRAY, strings(["a"] * 100))])
    found, status = opened(path, raw), path.stat()
    path.write_bytes(raw.replace(b"\1" + bytes(7) + b"a", now))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(FormatError, match="changed while it was being read"):
        found.metadata["tokens"]


def test_copies_of_the_metadata_need_no_file(tmp_path: Path) -> None:
    found = opened(
        tmp_path / "x", gguf_file([pair("tokens", ARRAY, strings(["a", "b"] * 50)), pair("n", U16, b"\7\0")])
    )
    copies = [pickle.loads(pickle.dumps(found.metadata)), copy.deepcopy(found.metadata), dict(found.metadata)]
    assert repr(found.metadata) == f"<2 key-values of {tmp_path / 'x'}>"
    del found
    assert copies == [{"tokens": ["a", "b"] * 50, "n": 7}] * 3


def test_a_vocabulary_opens_in_a_blink(tmp_path: Path) -> None:
    tokens = [f"Ġtoken{i}" for i in range(50_000)]
    raw = gguf_file(
        [pair("tokens", ARRAY, strings(tokens)), pair("ids", ARRAY, struct.pack("<IQ", U32, 50_000) + bytes(200_000))]
    )
    (tmp_path / "x").write_bytes(raw)
    times = []
    for _ in range(3):
        begin = time.process_time()
        found = Gguf(tmp_path / "x")
        times.append(time.process_time() - begin)
    assert found.metadata["tokens"] == tokens
    assert min(times) < 0.15


def test_opening_does_not_import_gguf(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(gguf_file(tensors=[tensor("w", [4], 0, 0)], data=bytes(16)))
    code = (
        "import sys; from pathlib import Path; from loadstone.checkpoint import open_checkpoint\n"
        f"open_checkpoint({str(tmp_path / 'x')!r}).read('w')\n"
        "assert not {'gguf', 'torch', 'safetensors', 'crc32c'} & set(sys.modules), 'slow start'"
    )
    source = Path(__file__).parents[2] / "src"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(source)})


def test_version_2_and_other_alignments(tmp_path: Path) -> None:
    path = written(tmp_path / "x", {"w": (np.arange(8, dtype=np.float32), None)})
    raw = bytearray(path.read_bytes())
    assert struct.unpack_from("<I", raw, 4) == (3,)
    raw[4] = 2
    assert opened(path, bytes(raw)).read("w").tolist() == list(range(8))
    for alignment in (1, 8, 64, 4096):
        key = pair("general.alignment", U32, struct.pack("<I", alignment))
        infos = [tensor("a", [2], 24, 0), tensor("b", [2], 0, max(2, alignment))]
        data = b"\x05\x06".ljust(max(2, alignment), b"\0") + struct.pack("<2f", 1, 2)
        found = opened(path, gguf_file([key], infos, data, alignment=alignment))
        assert (found.read("a").tolist(), found.read("b").tolist()) == ([5, 6], [1, 2])


def test_opening_a_large_file_reads_its_header_only(tmp_path: Path) -> None:
    rows = 1 << 19
    raw = gguf_file(tensors=[tensor("w", [32768, rows], 8, 0)])  # 18 GB of Q8_0
    with (tmp_path / "big").open("wb") as file:
        file.write(raw)
        file.truncate(len(raw) + rows * 1024 * 34)
    tracemalloc.start()
    begin = time.process_time()
    found = Gguf(tmp_path / "big")
    assert time.process_time() - begin < 0.3
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert found.info("w").size == rows * 32768


def test_decoding_needs_little_more_than_the_result(tmp_path: Path) -> None:
    shape = (1024, 4096)
    raw = gguf_file(tensors=[tensor("w", shape[::-1], 3, 0)], data=bytes(1024 * 4096 // 32 * 20))
    found = opened(tmp_path / "x", raw)
    found.read("w")  # imports gguf
    tracemalloc.start()
    array = found.read("w")
    assert tracemalloc.get_traced_memory()[1] < array.nbytes + (4 << 20)
    tracemalloc.stop()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
        st.tuples(
            st.sampled_from(["<f4", "<f2", "<f8", "<i1", "<i4"]), st.lists(st.integers(1, 5), min_size=1, max_size=4)
        ),
        max_size=5,
    ),
    st.dictionaries(
        st.text(min_size=1, max_size=9), st.text() | st.booleans() | st.lists(st.text(), min_size=1), max_size=4
    ),
)
def test_whatever_the_writer_writes(tmp_path: Path, tensors: dict[str, Any], values: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    arrays = {name: (rng.standard_normal(shape) * 9).astype(dtype) for name, (dtype, shape) in tensors.items()}
    values.pop("general.architecture", None)
    path = tmp_path / "x"
    writer = gguf.GGUFWriter(path, "gpt2")
    for key, value in values.items():
        writer.add_array(key, value) if isinstance(value, list) else writer.add_key_value(
            key, value, gguf.GGUFValueType.get_type(value)
        )
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = Gguf(path)
    assert {key: value for key, value in found.metadata.items() if key != "general.architecture"} == values
    assert found.names() == list(arrays)
    for name, array in arrays.items():
        assert found.read(name).dtype == array.dtype
        assert np.array_equal(found.read(name), array)
