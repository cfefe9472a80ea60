"""GGUF, written: the gguf package and our own reader find what was given; what cannot be written is refused first."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadstone.checkpoint.base import Array, TensorInfo
from loadstone.checkpoint.gguf import Gguf
from loadstone.checkpoint.write_gguf import FILE_TYPES, KINDS, default_types, write_gguf
from loadstone.errors import LoadstoneError
from memory import MemoryCheckpoint

gguf = pytest.importorskip("gguf")
ARCHITECTURE = {"general.architecture": "gpt2"}


def random(*shape: int, dtype: Any = np.float32, seed: int = 0) -> Array:
    array: Array = np.random.default_rng(seed).normal(0, 0.2, shape).astype(dtype)
    return array


def written(
    path: Path, arrays: dict[str, Array], kind: str = "float32", metadata: dict[str, Any] | None = None
) -> Gguf:
    write_gguf(MemoryCheckpoint(arrays), path, ARCHITECTURE | (metadata or {}), types=default_types(kind))
    return Gguf(path)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kind", ["keep", "float32", "float16", "bfloat16"])
def test_plain_types_hold_the_values_bit_for_bit(kind: str, dtype: Any, tmp_path: Path) -> None:
    arrays = {"blk.0.ffn_up.weight": random(7, 33, dtype=dtype), "output_norm.bias": random(33, dtype=dtype)}
    file = written(tmp_path / "m.gguf", arrays, kind)
    stored = np.dtype(dtype) if kind == "keep" else np.dtype(getattr(ml_dtypes, kind, None) or kind)
    for name, wanted in (("blk.0.ffn_up.weight", stored), ("output_norm.bias", np.dtype("float32"))):
        found, expected = file.read(name), arrays[name].astype(wanted)
        assert found.dtype == wanted
        assert found.tobytes() == expected.tobytes()
    assert file.metadata["general.file_type"] == FILE_TYPES[KINDS[stored.name]]


def test_bfloat16_keeps_every_bit_pattern(tmp_path: Path) -> None:
    """Through float32, as the gguf package does it, some of the NaNs would change."""
    bits = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    file = written(tmp_path / "m.gguf", {"w": bits.view(ml_dtypes.bfloat16)}, "keep")
    assert np.array_equal(file.read("w").view(np.uint16), bits)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
@pytest.mark.parametrize("rows", [1, 15, 17, 4099])
def test_blocks_are_those_of_the_gguf_package(kind: str, rows: int, tmp_path: Path) -> None:
    array = random(rows, 320)
    array[rows // 2] = 0  # a block of zeros has no scale
    path = tmp_path / "m.gguf"
    file = written(path, {"w": array}, kind)
    qtype = gguf.GGMLQuantizationType[KINDS[kind]]
    (tensor,) = gguf.GGUFReader(path).tensors
    assert tensor.tensor_type == qtype
    assert np.array_equal(tensor.data, gguf.quants.quantize(array, qtype))
    assert np.abs(file.read("w") - array).max() < (0.005 if kind == "q8_0" else 0.1)


def test_types_as_llama_cpp_wants_them() -> None:
    def chosen(kind: str, name: str, shape: tuple[int, ...], dtype: str = "float32") -> str:
        return default_types(kind)(name, TensorInfo(shape, dtype, 0))

    for kind in (*KINDS, "keep"):
        assert chosen(kind, "blk.0.attn_norm.weight", (64,), "bfloat16") == "F32"
        assert chosen(kind, "position_embd.weight", (9, 64), "float16") == "F32"
    matrices = ("token_embd.weight", "output.weight", "blk.0.ffn_up.weight")
    assert [chosen("q4_0", name, (8, 64)) for name in matrices] == ["Q8_0", "Q8_0", "Q4_0"]
    assert [chosen(kind, "blk.0.ffn_up.weight", (8, 65)) for kind in ("q4_0", "q8_0", "float32")] == [
        "F16",
        "F16",
        "F32",
    ]
    assert [chosen("keep", "w", (8, 64), dtype) for dtype in ("float16", "bfloat16", "float64", "Q4_1")] == [
        "F16", "BF16", "F32", "F32",
    ]  # fmt: skip
    with pytest.raises(LoadstoneError, match=r"no dtype 'q6_k' that can be written here; known: float32, .*q4_0, keep"):
        default_types("q6_k")


def test_both_readers_agree_about_names_order_shapes_and_extras(tmp_path: Path) -> None:
    arrays = {f"t{i}": random(*shape, seed=i) for i, shape in enumerate([(3, 5), (1,), (2, 3, 4), (6, 32), (7,)])}
    arrays["t5"] = random(64, 48).T  # a view that is not contiguous
    path, factors = tmp_path / "m.gguf", random(4)
    steps: list[tuple[int, int]] = []
    source = MemoryCheckpoint(arrays | {"head": arrays["t3"]}, aliases={"head": "t3"})
    write_gguf(
        source, path, ARCHITECTURE, types=default_types("keep"), extra={"rope_freqs.weight": factors},
        progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    expected = {"rope_freqs.weight": factors} | arrays
    ours, theirs = Gguf(path), gguf.GGUFReader(path)
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors] == list(expected)
    for tensor in theirs.tensors:
        assert np.array_equal(tensor.data, expected[tensor.name])
        assert np.array_equal(ours.read(tensor.name), expected[tensor.name])
        assert tensor.data_offset % 32 == 0
    total = sum(array.nbytes for array in expected.values())
    assert len(steps) == 7
    assert steps[-1] == (total, total)


VALUES = st.one_of(
    st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(width=32, allow_nan=False), st.text(max_size=9),
    st.lists(st.text(max_size=5), max_size=4), st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4),
    st.lists(st.floats(width=32, allow_nan=False), max_size=4), st.lists(st.booleans(), max_size=4),
    st.lists(st.integers(0, 2**64 - 1), max_size=4),
)  # fmt: skip


@given(st.dictionaries(st.text(min_size=1, max_size=20), VALUES, max_size=8))
@settings(max_examples=200, deadline=None)
def test_metadata_comes_back(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    for key in ("general.alignment", "general.architecture"):
        values.pop(key, None)
    found = written(path, {"w": random(2, 2)}, metadata=values).metadata
    assert {key: found[key] for key, value in values.items() if value != []} == {
        k: v for k, v in values.items() if v != []
    }


def test_metadata_has_the_types_that_llama_cpp_reads(tmp_path: Path) -> None:
    metadata = {
        "gpt2.context_length": 64, "gpt2.attention.layer_norm_epsilon": 1e-5, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.token_type": [1, 3], "tokenizer.ggml.scores": [0.0, -1.0], "tokenizer.ggml.tokens": ["a", ""],
        "general.name": "", "none": [],
    }  # fmt: skip
    path = tmp_path / "m.gguf"
    written(path, {"w": random(2, 2)}, metadata=metadata)
    fields = gguf.GGUFReader(path).fields
    kinds = {key: [kind.name for kind in fields[key].types] for key in metadata if key in fields}
    assert kinds == {
        "gpt2.context_length": ["UINT32"], "gpt2.attention.layer_norm_epsilon": ["FLOAT32"],
        "tokenizer.ggml.add_bos_token": ["BOOL"], "tokenizer.ggml.token_type": ["ARRAY", "INT32"],
        "tokenizer.ggml.scores": ["ARRAY", "FLOAT32"], "tokenizer.ggml.tokens": ["ARRAY", "STRING"],
        "general.name": ["STRING"],
    }  # fmt: skip
    assert fields["general.quantization_version"].contents() == 2


def test_a_token_that_is_half_a_character_keeps_its_bytes(tmp_path: Path) -> None:
    token = b"\xf0\x9f".decode("utf-8", "surrogateescape")
    file = written(tmp_path / "m.gguf", {"w": random(2, 2)}, metadata={"tokens": ["a", token]})
    assert file.metadata["tokens"] == ["a", token]


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_alignment(alignment: int, tmp_path: Path) -> None:
    arrays = {"a": random(3, 3), "b": random(5)}
    file = written(tmp_path / "m.gguf", arrays, metadata={"general.alignment": alignment})
    assert np.array_equal(file.read("b"), arrays["b"])
    assert all(tensor.data_offset % alignment == 0 for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors)


LONG = "blk." + "9" * 60
SMALL = {"w": random(2, 2)}


@pytest.mark.parametrize(
    ("arrays", "metadata", "types", "text"),
    [
        (SMALL, {"k": {"a": 1}}, "F32", "'k' is .*'a': 1.*for which GGUF has no type"),
        (SMALL, {"k": None}, "F32", "'k' is None, for which GGUF has no type"),
        (SMALL, {"k": 2**64}, "F32", "'k' is 18446744073709551616, for which"),
        (SMALL, {"k": 1e300}, "F32", r"'k' is 1e\+300, for which"),
        (SMALL, {"k": [1, "a"]}, "F32", "'k' is a list of things that share no type"),
        (SMALL, {"k": [[1]]}, "F32", "'k' is a list of things that share no type"),
        (SMALL, {"k": np.float32(1)}, "F32", "for which GGUF has no type"),
        (SMALL, {"k": "\ud800"}, "F32", "holds half a surrogate pair"),
        (SMALL, {"general.architecture": ""}, "F32", "needs general.architecture, a text; it has ''"),
        (SMALL, {"general.alignment": 24}, "F32", "must be a power of two from 8 on, not 24"),
        (SMALL, {}, "Q6_K", "tensor 'w': type 'Q6_K' cannot be written; known: F32, F16, BF16, Q8_0, Q5_0, Q4_1, Q4_0"),
        (SMALL, {}, "Q8_0", "tensor 'w': rows of 2 are no whole number of Q8_0's 32"),
        ({"w": np.ones((2, 2), np.int64)}, {}, "F32", "tensor 'w' holds int64; only floating point"),
        ({"w": random(1, 1, 1, 1, 1)}, {}, "F32", r"its shape is \(1, 1, 1, 1, 1\); GGUF holds 1 to 4 dimensions"),
        ({"w": random(0, 3)}, {}, "F32", "none of them empty"),
        ({"w": np.array(1.0)}, {}, "F32", "GGUF holds 1 to 4 dimensions"),
        ({LONG: random(2)}, {}, "F32", "GGUF allows 63 bytes for a name, and it has 64"),
    ],
)  # fmt: skip
def test_what_gguf_cannot_hold_is_refused_before_anything_is_written(
    arrays: dict[str, Array], metadata: dict[str, Any], types: str, text: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(LoadstoneError, match=text):
        write_gguf(MemoryCheckpoint(arrays), path, ARCHITECTURE | metadata, types=lambda name, info: types)
    assert not path.exists()


@pytest.mark.parametrize(
    ("kind", "value"), [("float16", 70_000), ("q8_0", 1e7), ("q4_0", 6e5), ("q8_0", np.nan), ("q4_0", np.inf)]
)  # fmt: skip
def test_values_beyond_the_type_are_not_made_infinite(kind: str, value: float, tmp_path: Path) -> None:
    array = random(40, 32)
    array[39, 5] = value
    with pytest.raises(LoadstoneError, match=rf"tensor 'w' holds values that {KINDS[kind]} cannot.*Choose float32"):
        written(tmp_path / "m.gguf", {"w": array}, kind)


def test_infinity_and_nan_stay_what_they_are_in_plain_types(tmp_path: Path) -> None:
    array = np.array([[np.inf, -np.inf, np.nan, 1]], np.float32)
    for kind in ("float32", "float16", "bfloat16"):
        assert np.array_equal(
            written(tmp_path / "m.gguf", {"w": array}, kind).read("w").astype("f4"), array, equal_nan=True
        )


@pytest.mark.parametrize("kind", ["float32", "float16", "q8_0", "q4_0"])
def test_a_large_view_is_never_copied_as_a_whole(kind: str, tmp_path: Path) -> None:
    array = np.zeros((2048, 16_384), np.float32).T  # 134 MB
    tracemalloc.start()
    written(tmp_path / "m.gguf", {"w": array}, kind)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6
