"""Traces and comparisons: what is stored comes back, damage is told, and the figures mean what they say."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file
from typer.testing import CliRunner

import dialects
from faults import FAULTS, GPT2, opened
from loadstone.cli import command_line
from loadstone.diagnose.compare import compare, model_logits
from loadstone.diagnose.precision import loosest, precision, rounded_to
from loadstone.diagnose.reference import find_reference, trace_source
from loadstone.diagnose.trace import (
    LIMIT,
    Trace,
    default_lengths,
    is_trace,
    kept_positions,
    load_trace,
    prompt_ids,
    save_trace,
)
from loadstone.errors import LoadstoneError
from loadstone.load import load_model, open_source
from loadstone.verify import verify
from model_files import write_hf


@pytest.fixture(scope="module")
def trace() -> Trace:
    return trace_source("sound", opened("gpt2/hf"))


@pytest.fixture(scope="module")
def stored(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "t.safetensors"
    save_trace(trace, path)
    return path


def test_lengths() -> None:
    assert default_lengths(1024) == [1, 7, 64, 1024]
    assert default_lengths(40) == [1, 7, 40]
    assert default_lengths(131072) == [1, 7, 64, LIMIT]


@pytest.mark.parametrize("vocab", [1, 2, 101, 50257, 128256])
def test_prompts_are_fixed_spread_and_leave_out_the_padding(vocab: int) -> None:
    ids = prompt_ids(vocab, 2048)
    assert torch.equal(ids, prompt_ids(vocab, 2048))
    assert 0 <= int(ids.min()) <= int(ids.max()) < max(1, vocab - min(vocab // 8, 128))
    if vocab > 2048:
        assert len(set(ids.tolist())) > 2000
        assert torch.histc(ids.double(), 8, 0, vocab).min() > 200
        assert not torch.equal(prompt_ids(vocab, 7), prompt_ids(vocab, 64)[:7])


def test_prompts_never_change() -> None:
    """A stored trace brings its ids along, but two programs that compare live must agree on them."""
    assert prompt_ids(50257, 7).tolist() == [36664, 17517, 48498, 29351, 10203, 41184, 22037]


def test_kept_positions_hold_the_first_and_the_last() -> None:
    assert kept_positions(7).tolist() == list(range(7))
    kept = kept_positions(1024)
    assert (len(kept), int(kept[0]), int(kept[-1])) == (64, 0, 1023)
    assert len(set(kept.tolist())) == 64


def test_a_trace_comes_back_as_it_was(trace: Trace, stored: Path) -> None:
    found = load_trace(stored)
    assert (found.config, found.stored, found.origin) == (trace.config, "float32", f"{stored} (of sound)")
    for ours, theirs in zip(found.prompts, trace.prompts, strict=True):
        assert torch.equal(ours.ids, theirs.ids)
        assert torch.equal(ours.positions, theirs.positions)
        assert torch.equal(ours.logits, theirs.logits)
        assert ours.activations.keys() == theirs.activations.keys()
        assert all(torch.equal(ours.activations[key], value) for key, value in theirs.activations.items())
    with safe_open(stored, "np") as file:  # any other program can read it too
        assert set(file.metadata()) >= {"loadstone_trace", "trace"}
        assert file.get_tensor("prompts.64.activations.blocks.1.attn.q").shape == (64, 32)


def test_what_is_stored_of_a_long_prompt_is_bounded(trace: Trace) -> None:
    longest = trace.prompts[-1]
    assert len(longest.ids) == 72
    assert longest.logits.shape == (64, 101)
    assert set(longest.activations) == {"embedding"}


def test_a_trace_knows_itself(stored: Path, tmp_path: Path) -> None:
    assert is_trace(stored)
    assert not is_trace(write_hf(tmp_path / "model"))
    assert not is_trace(tmp_path / "nothing")
    assert find_reference(str(stored)).path == stored


def edited(stored: Path, path: Path, change: Any) -> Path:
    with safe_open(stored, "np") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata())  # noqa: SIM118
    change(tensors, metadata)
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, path, metadata)
    return path


def set_to(name: str, value: Any) -> Any:
    return lambda tensors, metadata: tensors.update({name: value})


def describe(**fields: Any) -> Any:
    def change(tensors: Any, metadata: dict[str, str]) -> None:
        facts = json.loads(metadata["trace"])
        facts["config"] |= fields
        metadata["trace"] = json.dumps(facts)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.pop("loadstone_trace"), "this is no trace"),
        (lambda t, m: m.update(loadstone_trace="99"), "version '99'; this Loadstone reads version 1"),
        (lambda t, m: m.pop("trace"), "its description cannot be read"),
        (lambda t, m: m.update(trace="[" * 5000), "its description cannot be read"),
        (lambda t, m: m.update(trace='{"config": {}, "stored": "float32", "origin": ""}'), "its config lacks"),
        (describe(n_layers=-1), "n_layers must be a positive whole number"),
        (describe(n_layers=10**12), "has what no such model computes"),
        (describe(vocab_size=100), "do not have the shapes of its model"),
        (lambda t, m: t.pop("prompts.7.activations.blocks.1.norm1"), "lacks something"),
        (describe(n_layers=1), "has what no such model computes"),
        (lambda t, m: [t.pop(name) for name in list(t)], "holds no prompts"),
        (lambda t, m: t.pop("prompts.7.logits"), "length 7 lacks something"),
        (set_to("prompts.7.activations.blocks.0.attn.z", np.zeros((7, 32), np.float32)), "no such model computes"),
        (set_to("prompts.7.logits", np.zeros((7, 100), np.float32)), "do not have the shapes"),
        (set_to("prompts.7.logits", np.zeros((7, 101), np.float16)), "do not have the shapes"),
        (set_to("prompts.7.ids", np.full(7, 101)), "out of range"),
        (set_to("prompts.7.ids", np.full(7, -1)), "out of range"),
        (set_to("prompts.7.positions", np.full(7, 7)), "out of range"),
        (set_to("prompts.7.activations.norm", np.zeros((6, 32), np.float32)), "do not have the shapes"),
        (set_to("prompts.7.activations.norm", np.zeros((7, 31), np.float32)), "do not have the shapes"),
    ],
)  # fmt: skip
def test_a_damaged_trace_is_told(stored: Path, tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(LoadstoneError, match=message):
        load_trace(edited(stored, tmp_path / "t.safetensors", change))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_mutated_trace_loads_or_is_refused(stored: Path, data: st.DataObject) -> None:
    raw = bytearray(stored.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path = stored.with_name("mutated.safetensors")
    path.write_bytes(raw)
    with contextlib.suppress(LoadstoneError):
        load_trace(path)


def test_a_file_that_cannot_be_written_leaves_the_old_one(trace: Trace, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_text("old")

    class Torn:
        def numpy(self) -> Any:
            raise KeyboardInterrupt

    torn: Any = Torn()
    prompt = dataclasses.replace(trace.prompts[1], logits=torn)
    with pytest.raises(KeyboardInterrupt):
        save_trace(dataclasses.replace(trace, prompts=[prompt]), path)
    with pytest.raises(LoadstoneError):
        save_trace(trace, tmp_path / "no folder" / "t.safetensors")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_figures_of_a_comparison(trace: Trace) -> None:
    model = load_model(opened("gpt2/hf"))
    sound = compare(model_logits(model), trace, dtype="float32", limit=72)
    assert [(p.length, p.ok, p.max_abs, p.kl, p.top1) for p in sound] == [(n, True, 0, 0, 1) for n in (1, 7, 64, 72)]
    shifted = compare(lambda i, p: model_logits(model)(i, p) + 0.5, trace, dtype="float32", limit=64)
    assert [p.length for p in shifted] == [1, 7, 64]
    for parity, prompt in zip(shifted, trace.prompts, strict=False):
        assert not parity.ok
        assert parity.max_abs == pytest.approx(0.5, rel=1e-4)
        assert parity.relative == pytest.approx(0.5 / float(prompt.logits.abs().max()), rel=1e-4)
        assert parity.kl == pytest.approx(0, abs=1e-9)  # the softmax does not see a constant
        assert parity.top1 == 1
    flipped = compare(lambda i, p: -model_logits(model)(i, p), trace, dtype="bfloat16", limit=1)[0]
    assert (flipped.top1, flipped.ok) == (0, False)
    p = trace.prompts[0].logits.double().log_softmax(-1)
    q = (-trace.prompts[0].logits).double().log_softmax(-1)
    assert flipped.kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-6)
    assert flipped.kl != pytest.approx(float((q.exp() * (q - p)).sum()), rel=1e-3)
    broken = compare(lambda i, p: model_logits(model)(i, p) * math.nan, trace, dtype="float32", limit=1)[0]
    assert not broken.ok


def test_the_looser_type_decides() -> None:
    assert loosest(["float32", "bfloat16", "float16"]) == "bfloat16"
    assert loosest(["Q8_0", "Q4_0", "float32"]) == "Q4_0"
    assert precision("Q4_K").rounding > precision("Q6_K").rounding > precision("Q8_0").rounding > 1e-3


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "Q8_0", "Q4_0", None])
def test_rounding_is_recognised_and_as_large_as_the_table_says(name: str | None) -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)) * 0.2
    rounded = weight
    if name and name.startswith("Q"):
        import gguf

        kind = getattr(gguf.GGMLQuantizationType, name)
        rounded = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind))
    elif name:
        rounded = weight.to(getattr(torch, name)).float()
    assert rounded_to(rounded) == name
    if name:
        error = float((rounded - weight).square().mean().sqrt() / weight.square().mean().sqrt())
        assert error == pytest.approx(precision(name).rounding, rel=0.3)


def test_the_command_writes_a_trace_and_verifies_against_it(tmp_path: Path) -> None:
    run, good = CliRunner().invoke, write_hf(tmp_path / "good", GPT2, n_positions=72)
    fault = FAULTS["gpt2: one square matrix transposed"]
    bad = write_hf(tmp_path / "bad", fault.plant(dict(GPT2)), n_positions=72)
    path = tmp_path / "t.safetensors"
    result = run(command_line(), ["trace", str(good), "-o", str(path)])
    assert result.exit_code == 0
    assert "prompts of 1, 7, 64, 72 tokens, 35 modules" in result.output
    result = run(command_line(), ["verify", str(good), "--against", str(path)])
    assert (result.exit_code, "diagnosis" in result.output) == (0, False)
    assert "usually gives a relative difference of" in result.output
    result = run(command_line(), ["verify", str(bad), "--against", str(path)])
    assert result.exit_code == 1
    assert "1. h.2.attn.c_proj.weight: transposed; this file stores [out, in]" in result.output
    assert "this repair restores the logits at all lengths" in result.output
    result = run(command_line(), ["verify", str(bad), "--against", str(path), "--json"])
    data = json.loads(result.stdout)
    assert data["ok"] is False
    assert data["diagnosis"]["causes"][0]["tensors"] == ["h.2.attn.c_proj.weight"]
    result = run(
        command_line(), ["trace", str(good), "-o", str(path), "--lengths", "3,9", "--no-activations", "--json"]
    )
    assert json.loads(result.stdout)["lengths"] == [3, 9]
    assert load_trace(path).has_activations is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--lengths", "a"], "expected whole numbers"), (["--lengths", "73"], "the context limit of this model, 72"),
     (["--lengths", "0,7"], "from 1 to the context limit")],
)  # fmt: skip
def test_bad_lengths(tmp_path: Path, arguments: list[str], message: str) -> None:
    good = write_hf(tmp_path / "good", GPT2, n_positions=72)
    result = CliRunner().invoke(command_line(), ["trace", str(good), "-o", str(tmp_path / "t"), *arguments])
    assert isinstance(result.exception, LoadstoneError)
    assert message in str(result.exception)


def test_a_trace_of_another_vocabulary_is_refused(trace: Trace, tmp_path: Path) -> None:
    save_trace(trace, tmp_path / "t.safetensors")
    folder = write_hf(tmp_path / "small", dialects.gpt2_hf(vocab=60, context=72), n_positions=72, vocab_size=60)
    identity = open_source(folder)
    with pytest.raises(LoadstoneError, match="vocabulary is 101 there and 60 here"):
        verify(identity, load_model(identity), against=str(tmp_path / "t.safetensors"))
