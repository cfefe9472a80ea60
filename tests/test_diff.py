"""Two checkpoints compared: nothing is said where the model is the same, and what differs is found, named, measured."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import dialects
from loadstone.checkpoint.arrays import row_blocks, same_bits
from loadstone.diff import Diff, diff, diff_lines
from loadstone.diff.sides import fingerprint
from loadstone.diff.values import measure, near, tolerance
from loadstone.load import open_source
from loadstone.weightmap import Identity
from memory import MemoryCheckpoint
from model_files import GPT2, tensors_of, write_gguf, write_hf, write_openai, write_torch
from small_models import CHECKPOINTS, CONFIGS, GPT2_WRITERS, LLAMA_WRITERS, META

Array = NDArray[Any]
ALL = [("gpt2", d) for d in GPT2_WRITERS] + [("llama", d) for d in LLAMA_WRITERS] + [("gpt_neox", "hf")]
QKV = "h.1.attn.c_attn.weight"


def opened(arrays: dialects.Tensors, architecture: str = "gpt2", **config: Any) -> Identity:
    return open_source(MemoryCheckpoint(arrays), config=CONFIGS[architecture] | config)


def changed(**arrays: Array) -> Identity:
    """GPT-2 in HuggingFace's layout with some tensors replaced; `h_1` stands for `h.1`."""
    return opened(GPT2 | arrays)


def bad(result: Diff) -> dict[str, tuple[str, str]]:
    """Parameter -> (status, hint), of all that are not equal."""
    return {entry.name: (entry.status, entry.hint) for entry in result.entries if entry.status != "equal"}


def text(result: Diff, **options: Any) -> str:
    return "\n".join(diff_lines(result, **options))


# -- the same model


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox"])
def test_the_same_model_is_the_same_in_every_pair_of_dialects(architecture: str) -> None:
    found = [dialect for kind, dialect in ALL if kind == architecture]
    for one, two in itertools.product(found, found):
        a, b = (open_source(CHECKPOINTS[architecture](d), config=CONFIGS[architecture]) for d in (one, two))
        result = diff(a, b)
        assert bad(result) == {}, (one, two)
        assert [field for field in result.config if one == two] == []
        assert {field.field for field in result.config if field.known} <= {"context_length"}
        assert result.counts == {"equal": len(result.entries)}


CONTAINERS: dict[str, Callable[[Path], Path]] = {
    "safetensors": lambda path: write_hf(path),
    "zip": lambda path: write_torch(path, tensors_of(dialects.gpt2_raschka(GPT2))),
    "legacy": lambda path: write_torch(path, {"model": tensors_of(dialects.gpt2_nanogpt(GPT2))}, legacy=True),
    "gguf": write_gguf,
    "bundle": write_openai,
}


def test_the_same_model_is_the_same_in_every_pair_of_containers(tmp_path: Path) -> None:
    config = {"n_heads": 4, "activation": "gelu_tanh"}
    opened = {name: open_source(write(tmp_path / name), config=config) for name, write in CONTAINERS.items()}
    for (one, a), (two, b) in itertools.product(opened.items(), opened.items()):
        result = diff(a, b)
        assert result.same, (one, two, bad(result), result.config)
        assert "52 equal bit for bit; same config" in text(result)


def test_the_callers_identities_are_not_changed() -> None:
    a, b = opened(dialects.gpt2_raschka(GPT2)), opened(GPT2)
    assert (a.config.tied, a.tie_is_known) == (False, False)
    assert diff(a, b).same
    assert (a.config.tied, a.tie_is_known) == (False, False)


# -- every difference is found and named


def flipped(array: Array, index: int, bit: int) -> Array:
    """One bit of one element turned over."""
    raw = bytearray(np.ascontiguousarray(array).tobytes())
    raw[index * array.itemsize + bit // 8] ^= 1 << bit % 8
    return np.frombuffer(bytes(raw), array.dtype).reshape(array.shape)


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(ALL), data=st.data())
def test_a_flipped_bit_in_any_tensor_is_found_and_named(kind: tuple[str, str], data: st.DataObject) -> None:
    architecture, dialect = kind
    whole = CHECKPOINTS[architecture](dialect)
    name = data.draw(st.sampled_from([name for name in sorted(whole.arrays) if "mask" not in name]))
    array = whole.arrays[name]
    damaged = flipped(array, data.draw(st.integers(0, array.size - 1)), data.draw(st.integers(0, 31)))
    a, b = (
        open_source(MemoryCheckpoint(arrays, metadata=whole.metadata), config=CONFIGS[architecture])
        for arrays in (whole.arrays, whole.arrays | {name: damaged})
    )
    result = diff(a, b)
    targets = {step.source: step.targets for step in b.plan.steps}.get(name, ("head.weight",))
    (found,) = (entry for entry in result.entries if entry.status != "equal")
    assert found.name in targets
    assert found.numbers is not None
    assert found.numbers.differing == 1
    assert not result.same


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(GPT2)), st.floats(1e-7, 10), st.integers(0, 5))
def test_diff_is_symmetric(name: str, sigma: float, seed: int) -> None:
    noise = np.random.default_rng(seed).standard_normal(GPT2[name].shape, dtype=np.float32) * np.float32(sigma)
    a, b = opened(GPT2), opened(GPT2 | {name: GPT2[name] + noise})
    one, two = diff(a, b), diff(b, a)
    assert {e.name: e.status for e in one.entries} == {e.name: e.status for e in two.entries}
    assert one.same == two.same
    for left, right in zip(one.entries, two.entries, strict=True):
        if left.numbers and right.numbers:
            swapped = asdict(right.numbers) | {"rms_a": right.numbers.rms_b, "rms_b": right.numbers.rms_a}
            assert asdict(left.numbers) == pytest.approx(swapped)


def test_missing_and_superfluous_tensors_are_only_in_one() -> None:
    lacking = {name: value for name, value in GPT2.items() if name != "h.2.ln_1.bias"}
    result = diff(opened(GPT2), opened(lacking))
    assert bad(result) == {"blocks.2.norm1.bias": ("only in A", "")}
    assert "B is not loadable as it is: missing 1: h.2.ln_1.bias" in text(result)
    assert bad(diff(opened(lacking), opened(GPT2))) == {"blocks.2.norm1.bias": ("only in B", "")}
    stray = diff(opened(GPT2 | {"adapter": np.ones(3, np.float32)}), opened(GPT2))
    assert not stray.same
    assert "claimed by no parameter" in text(stray)


def test_masks_are_mentioned_and_no_difference() -> None:
    result = diff(opened(dialects.gpt2_raschka(GPT2)), opened(GPT2))
    assert result.same
    assert "note         A also holds 3 x causal mask, a buffer" in text(result)


def test_a_broken_tie_is_compared_with_the_embedding_that_the_head_should_be() -> None:
    broken = dialects.gpt2_raschka(GPT2)
    broken["out_head.weight"] = broken["out_head.weight"] * 2
    result = diff(opened(GPT2), opened(broken))
    assert bad(result) == {"head.weight": ("different", "B is A times 2")}
    assert [(field.field, field.a, field.b) for field in result.config] == [("tied", True, False)]


def test_a_head_that_the_config_calls_tied_and_is_not_is_told_and_still_compared(tmp_path: Path) -> None:
    head = GPT2["wte.weight"][::-1].copy()
    a, b = (
        open_source(write_hf(tmp_path / n, GPT2 | {"lm_head.weight": w})) for n, w in (("a", head), ("b", head + 1))
    )
    result = diff(a, b)
    assert set(bad(result)) == {"head.weight"}
    assert "A is not loadable as it is" in text(result)
    assert diff(a, a).counts == {"equal": 53}


# -- what the difference is


def status(one: Array, two: Array, name: str = "h.1.attn.c_proj.weight") -> tuple[str, str]:
    (found,) = bad(diff(opened(GPT2 | {name: one}), opened(GPT2 | {name: two}))).values()
    return found


SQUARE = GPT2["h.1.attn.c_proj.weight"]


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (SQUARE.T.copy(), ("different", "B is A transposed")),
        (SQUARE * 0, ("different", "all zeros in B")),
        (SQUARE * np.float32(-0.125), ("different", "B is A times -0.125")),
        (SQUARE + np.float32(0.1) * SQUARE.T, ("different", "")),
        (SQUARE * np.float32(1 + 1e-6), ("close", "")),
        (SQUARE.astype(np.float64), ("same values", "")),
        (SQUARE.astype(ml_dtypes.bfloat16), ("rounded", "B is A rounded to bfloat16")),
        (SQUARE.astype(ml_dtypes.bfloat16).astype(np.float32), ("rounded", "B is A rounded to bfloat16")),
        (SQUARE.astype(np.float16), ("rounded", "B is A rounded to float16")),
        (
            np.where(SQUARE[3, 3] == SQUARE, np.float32("nan"), SQUARE),
            ("different", "NaN or infinite in one of the two only: 1 of 1,024 elements"),
        ),
    ],
)
def test_what_explains_a_difference_is_said(made: Array, expected: tuple[str, str]) -> None:
    assert status(SQUARE, made) == expected
    back = {"B is A rounded to": "A is B rounded to", "in B": "in A", "-0.125": "-8"}
    hint = expected[1]
    for old, new in back.items():
        hint = hint.replace(old, new)
    assert status(made, SQUARE) == (expected[0], hint)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_ggml_blocks_are_recognised(kind: str) -> None:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    weight = GPT2["h.0.mlp.c_fc.weight"].T.copy()  # the blocks lie along the rows of [out, in]
    qtype = GGMLQuantizationType[kind]
    decoded = dequantize(quantize(weight, qtype), qtype).T.copy()
    assert status(weight.T.copy(), decoded, "h.0.mlp.c_fc.weight") == ("rounded", f"B is A rounded to {kind} blocks")


def test_zeros_of_another_sign_are_the_same_values() -> None:
    zeros = np.zeros_like(SQUARE)
    assert status(zeros, -zeros) == ("same values", "zeros of another sign, or NaNs of other bits")
    nan = SQUARE * np.float32("nan")
    assert (
        bad(diff(changed(**{QKV: GPT2[QKV] * np.float32("nan")}), changed(**{QKV: GPT2[QKV] * np.float32("nan")})))
        == {}
    )
    assert status(nan, SQUARE)[1].startswith("NaN or infinite in one of the two only: 1,024 of 1,024")


def test_exchanged_q_k_v_are_named() -> None:
    q, k, v = np.split(GPT2[QKV], 3, axis=1)
    result = diff(opened(GPT2), changed(**{QKV: np.concatenate([k, v, q], axis=1)}))
    assert bad(result) == {
        "blocks.1.attn.q.weight": ("different", "A has here what B has as blocks.1.attn.v.weight"),
        "blocks.1.attn.k.weight": ("different", "A has here what B has as blocks.1.attn.q.weight"),
        "blocks.1.attn.v.weight": ("different", "A has here what B has as blocks.1.attn.k.weight"),
    }


def test_exchanged_layers_are_named_and_folded() -> None:
    other = {
        name.replace("h.0.", "h.X.").replace("h.2.", "h.0.").replace("h.X.", "h.2."): v for name, v in GPT2.items()
    }
    result = diff(opened(GPT2), opened(other))
    assert len(bad(result)) == 32
    assert bad(result)["blocks.0.mlp.up.weight"][1] == "A has here what B has as blocks.2.mlp.up.weight"
    lines = text(result).splitlines()
    (at,) = (i for i, line in enumerate(lines) if line.startswith("  different    blocks.{0,2}.mlp.up.weight "))
    assert "A has here what B has as blocks.{0,2}.mlp.up.weight; differs by" in lines[at + 1]


def test_rotary_pairs_and_halves_are_named() -> None:
    """Meta's rows under HuggingFace's names: what a converter does that forgets to permute."""
    right, wrong = LLAMA_WRITERS["hf"](META), dialects._llama(META, 0, "model.layers")
    result = diff(opened(right, "llama"), opened(wrong, "llama"))
    assert {name.split(".")[3] for name in bad(result)} == {"q", "k"} or set(bad(result)) == {
        f"blocks.{i}.attn.{part}.weight" for i in range(3) for part in "qk"
    }
    assert {hint for _, hint in bad(result).values()} == {"B has the rows of A in rotary pairs instead of halves"}
    back = diff(opened(wrong, "llama"), opened(right, "llama"))
    assert {hint for _, hint in bad(back).values()} == {"B has the rows of A in rotary halves instead of pairs"}


def test_a_padded_vocabulary_and_a_matrix_the_other_way_are_named() -> None:
    padded = np.concatenate([GPT2["wte.weight"], np.zeros((27, 32), np.float32)])
    result = diff(opened(GPT2), changed(**{"wte.weight": padded}))
    assert bad(result)["tok_emb.weight"] == ("shape", "the first 101 rows are the same; B has 27 more, all zeros")
    assert not result.same
    turned = diff(opened(GPT2).checkpoint, MemoryCheckpoint(GPT2 | {QKV: GPT2[QKV].T.copy()}))
    assert bad(turned) == {QKV: ("shape", "B is A transposed")}


# -- config, tokenizer, types


def test_config_fields_are_compared_one_by_one(tmp_path: Path) -> None:
    a = open_source(write_hf(tmp_path / "a", eos_token_id=5))
    b = open_source(write_hf(tmp_path / "b", layer_norm_epsilon=1e-6, activation_function="gelu"))
    result = diff(a, b)
    assert bad(result) == {}
    assert not result.same
    lines = text(result)
    assert "2 config fields differ" in lines
    assert "config       norm_eps: 1e-05 in A, 1e-06 in B" in lines
    assert "config       activation: gelu_tanh in A, gelu in B" in lines
    assert [field.known for field in result.config if field.field == "eos_ids"] == [False]
    rotary = [replace(opened(META, "llama", rope={"theta": theta}), assumed=[]) for theta in (5e5, 5e5 + 0.01, 1e4)]
    assert diff(rotary[0], rotary[1]).same  # GGUF keeps float32
    assert "config       rope.theta: 500000 in A, 10000 in B" in text(diff(rotary[0], rotary[2]))


def test_an_assumed_value_is_no_difference(tmp_path: Path) -> None:
    a = open_source(write_hf(tmp_path / "a"))
    b = open_source(write_torch(tmp_path / "b.pth", tensors_of(dialects.gpt2_raschka(GPT2))))
    assert b.config.n_heads != 4
    result = diff(a, b)
    assert result.same
    assert "n_heads: 4 in A, 1 in B   (one of the files does not tell)" in text(result)


def test_vocabularies_are_compared(tmp_path: Path) -> None:
    folders = [write_hf(tmp_path / name) for name in "ab"]
    for folder, word in zip(folders, ("cat", "dog"), strict=True):
        vocab = {"<unk>": 0, word: 1, "zebra": 2}
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
        (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": []}))
    a, b = map(open_source, folders)
    result = diff(a, b)
    assert result.problems == ["the vocabularies differ: the first token that differs is 1: 'cat' in A, 'dog' in B"]
    assert not result.same
    assert diff(a, a).same
    (folders[1] / "tokenizer.json").write_text("{")
    assert "the tokenizers could not be compared" in text(diff(a, b))


def test_rtol_says_what_is_taken_for_the_same() -> None:
    rounded = {name: value.astype(ml_dtypes.bfloat16) for name, value in GPT2.items()}
    a, b = opened(GPT2), opened(rounded)
    assert not diff(a, b).same
    assert diff(a, b).counts == {"rounded": 52}
    assert diff(a, b, rtol=2**-8).same
    noisy = opened(GPT2 | {QKV: GPT2[QKV] * np.float32(1.001)})
    assert diff(a, noisy, rtol=2e-3).same
    assert not diff(a, noisy, rtol=1e-4).same
    barely = opened(GPT2 | {QKV: GPT2[QKV] + np.float32(1e-6)})
    assert {hint for _, hint in bad(diff(a, barely, rtol=0)).values()} == {""}  # not "what B has as" the same name


# -- what is not recognised


def test_unrecognised_files_are_compared_by_their_own_names() -> None:
    a = MemoryCheckpoint({"conv.weight": np.arange(12.0).reshape(3, 4), "steps": np.array(7), "none": np.zeros((0, 3))})
    assert diff(a, a).same
    assert "not by what they mean" in text(diff(a, a))
    b = MemoryCheckpoint(a.arrays | {"steps": np.array(8), "mean": np.ones(2, np.complex128)})
    assert {name: found[0] for name, found in bad(diff(a, b)).items()} == {"steps": "different", "mean": "only in B"}
    renamed = MemoryCheckpoint({"body.weight": a.arrays["conv.weight"]})
    hint = bad(diff(a, renamed))["conv.weight"]
    assert hint == ("only in A", "A has here what B has as body.weight")


def test_a_file_that_does_not_fit_its_config_is_compared_by_its_own_names() -> None:
    broken = opened(GPT2 | {QKV: GPT2[QKV][:, :-1]})
    result = diff(opened(GPT2), broken)
    assert bad(result) == {QKV: ("shape", "")}
    assert "B does not fit its own config: wrong shape" in text(result)


def test_lines_say_how_far_apart() -> None:
    noise = np.zeros_like(SQUARE)
    noise[3, 5] = SQUARE[3, 5] * 1e-6
    close = diff(opened(GPT2), changed(**{"h.1.attn.c_proj.weight": SQUARE + noise}))
    assert re.search(
        r"\n  close        blocks.1.attn.out.weight  32 x 32 float32\n"
        r" +differs by \d\S* x rms, at most \S+, in 1 of 1,024 elements, \d+ ulps$",
        text(close),
    )
    far = text(diff(opened(GPT2), changed(**{"h.1.attn.c_proj.weight": SQUARE.T.copy()})))
    assert re.search(r"\n +B is A transposed; differs by 1\.\d x rms, at most \S+, .*, cosine -?0\.0\d+$", far)
    every = text(diff(opened(GPT2), opened(GPT2)), fold=False).splitlines()
    assert sum(line.startswith("  equal") for line in every) == 52


def test_names_from_a_file_cannot_drive_the_terminal_or_break_the_folding() -> None:
    names = ["a\x1b[31m.weight", "layer." + "9" * 6000, "x.1.y.2", "{0}", "\udcff"]
    a = MemoryCheckpoint({name: np.ones(3, np.float32) for name in names})
    b = MemoryCheckpoint({name: np.zeros(3, np.float32) for name in names})
    assert "\x1b" not in text(diff(a, b)) + text(diff(a, b), fold=False)
    assert r"a\x1b[31m.weight" in text(diff(a, b))
    json.dumps(diff(a, b).as_dict())


# -- the numbers


floats = st.sampled_from(["float16", "float32", "float64", "bfloat16"])
shapes = st.sampled_from([(), (1,), (7,), (3, 5), (64, 33), (1, 4, 2), (0, 4)])


@settings(max_examples=60, deadline=None)
@given(floats, shapes, st.integers(0, 99), st.booleans())
def test_numbers_are_those_of_the_plain_formulas(dtype: str, shape: tuple[int, ...], seed: int, turn: bool) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal(shape).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype) for _ in range(2))
    a, b = (a.T, b.T) if turn else (a, b)
    found, x, y = measure(a, b), a.astype(np.float64), b.astype(np.float64)
    assert found.elements == a.size
    if not a.size:
        return
    assert found.differing == np.count_nonzero(x != y)
    assert found.max_abs == np.abs(x - y).max()
    assert found.rms_a == pytest.approx(np.sqrt((x * x).mean()))
    assert found.rms_difference == pytest.approx(np.sqrt(((x - y) ** 2).mean()))
    assert found.cosine == pytest.approx((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()))
    assert near(a, b, found.max_abs / found.largest * 1.001) or a.size > 1000
    assert not near(a, b, found.max_abs / found.largest * 0.5) or not found.differing


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 0x7F000000), st.integers(0, 0x7F000000))
def test_ulps_count_the_floats_in_between(one: int, two: int) -> None:
    a, b = (np.array([bits], np.int32).view(np.float32) for bits in (one, two))
    assert measure(a, b).max_ulps == measure(-a, -b).max_ulps == abs(one - two)
    assert measure(a, -b).max_ulps == one + two + 1  # there are two zeros


def test_nan_and_infinity_in_the_same_place_are_equal() -> None:
    a = np.array([np.nan, np.inf, -np.inf, 1.0, np.nan], np.float32)
    b = flipped(a, 0, 0) + np.array([0, 0, 0, 0.5, 0], np.float32)
    found = measure(a, flipped(b, 4, 1))
    assert (found.differing, found.unmatched, found.max_abs) == (1, 0, 0.5)
    found = measure(a, -a)
    assert (found.differing, found.unmatched) == (3, 2)
    assert near(a, a.copy(), 0)
    assert not near(a, -a, 10)


def test_pieces_cover_everything_once() -> None:
    for shape in ((), (3,), (200_000,), (700, 300), (2, 100_000), (3, 4, 5)):
        array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
        for view in (array, array.T):
            found = np.concatenate([np.asarray(x).reshape(-1) for (x,) in row_blocks(view)])
            assert sorted(found) == sorted(array.reshape(-1))
        for (x,) in row_blocks(array.T, by_rows=True):
            assert x.shape[1:] == array.T.shape[1:] or not shape


def test_same_bits() -> None:
    a = np.random.default_rng(0).standard_normal((300, 400)).astype(np.float32)
    assert same_bits(a, a.copy())
    assert same_bits(a.T, np.ascontiguousarray(a.T))
    assert not same_bits(a, a.T)
    assert not same_bits(a, a.astype(np.float64))
    assert not same_bits(np.zeros(3, np.float32), np.zeros(3, np.float64))
    assert not same_bits(a, flipped(a, a.size - 1, 0))
    assert not same_bits(np.zeros(2, np.float32), -np.zeros(2, np.float32))
    assert same_bits(np.zeros((0, 3)), np.zeros((0, 3)))
    assert same_bits(np.full(2, 1j), np.full(2, 1j))
    assert not same_bits(np.full(2, 1j), np.full(2, 2j))


def test_fingerprints() -> None:
    a = np.random.default_rng(0).standard_normal((30, 40)).astype(np.float32)
    assert fingerprint(a) == fingerprint(a.astype(ml_dtypes.bfloat16))
    assert fingerprint(a) != fingerprint(a.T)
    assert fingerprint(np.ones((5, 5))) is None
    assert fingerprint(np.ones((0, 5))) is None
    assert fingerprint(np.array(3.0)) is None


@pytest.mark.parametrize("kind", ["float64", "float32", "bfloat16", "Q8_0", "Q6_K", "Q4_1", "IQ2_XS", "float8_e4m3fn"])
def test_the_coarser_type_sets_the_tolerance(kind: str) -> None:
    assert tolerance("float64", kind) == tolerance(kind, "float64") == tolerance(kind) > 0
    assert tolerance("int64") == 0


# -- memory and the command line


def test_only_one_pair_of_tensors_is_held(tmp_path: Path) -> None:
    """Peak memory of a comparison stays far below the 64 MB of either model."""
    import subprocess

    big = {f"layer.{i}": np.full((1024, 1024), i, np.float32) for i in range(16)}
    paths = []
    for name in "ab":
        from safetensors.numpy import save_file

        save_file(big | ({"layer.3": big["layer.3"] + 1} if name == "b" else {}), tmp_path / name)
        paths.append(str(tmp_path / name))
    code = """
import resource, sys
from loadstone.checkpoint import open_checkpoint
from loadstone.diff import diff
import loadstone.diff.hints, loadstone.load
a, b = map(open_checkpoint, sys.argv[1:])
limit = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + 40_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
assert diff(a, b).counts == {"different": 1, "equal": 15}
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code, *paths], check=True)


def test_progress_reaches_its_end() -> None:
    seen: list[tuple[int, int]] = []
    diff(opened(GPT2), opened(GPT2), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    assert seen == sorted(seen)
