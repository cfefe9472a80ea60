"""verify --against: what could not be compared is said, and nothing passes because it was left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dialects
from loadstone.diagnose.reference import trace_source
from loadstone.diagnose.trace import load_trace, save_trace
from loadstone.errors import FormatError, LoadstoneError
from loadstone.load import load_model, open_source
from loadstone.verify import VerifyReport, verify
from model_files import GPT2, tensors_of, write_hf, write_torch

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "good")


def stored(source: Path, path: Path, lengths: list[int] | None = None) -> str:
    save_trace(trace_source(str(source), open_source(source), lengths), path)
    return str(path)


def judged(source: Any, against: Any, **options: Any) -> VerifyReport:
    identity = open_source(source)
    return verify(identity, load_model(identity, **options), against=str(against))


def said(report: VerifyReport, name: str) -> tuple[bool | None, str]:
    (check,) = [check for check in report.checks if check.name == name]
    return check.ok, check.detail


def test_a_shorter_context_is_told_and_does_not_pass_for_verified(good: Path, tmp_path: Path) -> None:
    short = write_hf(tmp_path / "short", GPT2 | {"wpe.weight": GPT2["wpe.weight"][:20].copy()}, n_positions=20)
    report = judged(short, stored(good, tmp_path / "t.safetensors"))
    assert said(report, "lengths of the reference") == (
        None, "lengths 40 are beyond the context of 20 here, and were not compared",
    )  # fmt: skip
    assert "context_length is 20 here and 40 there" in said(report, "config against the reference")[1]
    nothing = judged(short, stored(good, tmp_path / "t40.safetensors", [40]))
    assert said(nothing, "lengths of the reference")[0] is False
    assert not nothing.ok


def test_rows_of_the_vocabulary_that_are_not_there_are_told(good: Path, tmp_path: Path) -> None:
    cut = write_hf(tmp_path / "cut", GPT2 | {"wte.weight": GPT2["wte.weight"][:96].copy()}, vocab_size=96)
    ok, detail = said(judged(cut, good), "vocabulary of the reference")
    assert ok is None
    assert "5 rows of the reference's vocabulary are not here: its padding, or lost" in detail


def test_a_config_that_differs_is_told_even_where_rounding_hides_it(good: Path, tmp_path: Path) -> None:
    other = write_hf(tmp_path / "other", layer_norm_epsilon=1e-6)
    assert said(judged(other, good), "config against the reference") == (
        None, "norm_eps is 1e-06 here and 1e-05 there",
    )  # fmt: skip
    assert not [check for check in judged(good, good).checks if "against" in check.name]


def test_what_was_only_assumed_of_the_reference_is_told(good: Path, tmp_path: Path) -> None:
    bare = write_torch(tmp_path / "r.pth", tensors_of(dialects.gpt2_raschka(GPT2)))
    for against in (bare, stored(bare, tmp_path / "t.safetensors")):
        ok, detail = said(judged(good, against), "config of the reference")
        assert ok is None
        assert "was only assumed: n_heads = 1" in detail


def test_the_users_own_rounding_is_no_damage(good: Path) -> None:
    report = judged(good, good, dtype="bfloat16")
    assert report.ok
    assert report.diagnosis is None
    assert "rounded to bfloat16 on loading" in said(report, "modules against the reference")[1]


def test_an_exchanged_embedding_and_head_are_not_called_tied(tmp_path: Path) -> None:
    head = GPT2["wte.weight"][::-1].copy() * 1.5
    good = write_hf(tmp_path / "good", GPT2 | {"lm_head.weight": head}, tie_word_embeddings=False)
    swapped = GPT2 | {"wte.weight": head, "lm_head.weight": GPT2["wte.weight"]}
    report = judged(write_hf(tmp_path / "bad", swapped, tie_word_embeddings=False), good)
    assert not report.ok
    assert "tied=true" not in "\n".join(report.explanation)


def test_a_model_that_computes_nan_leaves_no_trace(tmp_path: Path) -> None:
    broken = GPT2 | {"ln_f.bias": GPT2["ln_f.bias"] * float("nan")}
    with pytest.raises(LoadstoneError, match="it computes NaN or infinity"):
        stored(write_hf(tmp_path / "nan", broken), tmp_path / "t.safetensors")
    assert not (tmp_path / "t.safetensors").exists()


def test_a_trace_that_holds_nan_or_a_type_that_is_none_is_refused(good: Path, tmp_path: Path) -> None:
    trace = trace_source("good", open_source(good))
    trace.stored = "rubbish"
    save_trace(trace, tmp_path / "t.safetensors")
    with pytest.raises(FormatError, match="no element type is called 'rubbish'"):
        load_trace(tmp_path / "t.safetensors")
    trace = trace_source("good", open_source(good))
    file = Path(stored(good, tmp_path / "t.safetensors"))
    needle = trace.prompts[1].logits.numpy().tobytes()
    data = file.read_bytes()
    assert data.count(needle) == 1
    file.write_bytes(data.replace(needle, torch.full_like(trace.prompts[1].logits, float("nan")).numpy().tobytes()))
    with pytest.raises(FormatError, match="length 7 holds NaN or infinity"):
        load_trace(file)


def test_trace_overwrites_no_checkpoint_and_an_empty_reference_is_none(run: Run, good: Path, tmp_path: Path) -> None:
    weights = (good / "model.safetensors").read_bytes()
    status, _, error = run("trace", good, "-o", good / "model.safetensors")
    assert (status, (good / "model.safetensors").read_bytes()) == (2, weights)
    assert "is no trace, so it is left alone" in error
    for _ in range(2):  # a trace may be written anew
        assert run("trace", good, "-o", tmp_path / "t.safetensors")[0] == 0
    status, _, error = run("verify", good, "--against", "")
    assert status == 2
    assert "no reference is named" in error


def test_the_new_commands_answer_with_their_status(run: Run, good: Path, tmp_path: Path) -> None:
    status, out, _ = run("convert", good, tmp_path / "m.pth", "--to", "raschka")
    assert status == 0
    assert "parity     logits at lengths 1, 7, 40" in out
    assert run("diff", good, tmp_path / "m.pth")[0] == 0
    assert run("verify", "--certificate", tmp_path / "m.pth")[1].endswith("as certified\n")
    data = bytearray((tmp_path / "m.pth").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "m.pth").write_bytes(data)
    status, out, _ = run("verify", "--certificate", tmp_path / "m.pth", "--json")
    assert (status, '"ok": false' in out) == (1, True)
    assert run("verify", "--certificate", tmp_path / "m.pth", "--against", good)[0] == 2
    assert run("inspect", good, "--why-size")[1].startswith(f"{good}")
    assert "verdict    harmless" in run("inspect", "--audit", tmp_path / "m.pth")[1]
    assert run("inspect", "--audit", "--why-size", tmp_path / "m.pth")[0] == 2
    assert run("convert", good, tmp_path / "x", "--to", "hf", "--shard-size", "many")[0] == 2


def test_weights_that_are_no_numbers_are_not_diagnosed(good: Path, tmp_path: Path) -> None:
    broken = GPT2 | {"h.1.ln_1.bias": GPT2["h.1.ln_1.bias"] * float("nan")}
    report = judged(write_hf(tmp_path / "nan", broken), good)
    assert not report.ok
    assert said(report, "modules against the reference") == (None, "not asked, as the weights hold NaN or infinity")
