"""quantize: what is written is what was evaluated, for every family; estimates, budgets, the command, the map."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import Run
from extendable import FAMILIES, KNOWN, gpt2_like, hostile
from loadstone.calibrate.rows import Rows
from loadstone.calibrate.walk import walk
from loadstone.checkpoint import open_checkpoint
from loadstone.errors import LoadstoneError
from loadstone.load import load
from loadstone.model import GPT
from loadstone.quantize import run as run_module
from loadstone.quantize import write as write_module
from loadstone.quantize.blocks import TYPES, BlockType
from loadstone.quantize.budget import Choice, choose
from loadstone.quantize.gptq import gptq
from loadstone.quantize.grid import Rounded, nearest
from loadstone.quantize.run import Quantised, Settings, quantize
from loadstone.quantize.sensitivity import sensitivities
from loadstone.quantize.write import write_quantised
from loadstone.save import save_model

MORE = FAMILIES | {
    "gpt2 odd": {"d_ff": 40},
    "llama biases": FAMILIES["llama"] | {"qkv_bias": True},
    "llama wide heads": FAMILIES["llama"] | {"head_dim": 16},
}


def rows_of(model: GPT, count: int = 8) -> Rows:
    ids = torch.randint(0, KNOWN, (count, 40), generator=torch.Generator().manual_seed(0))
    return Rows(ids, "made")


def quantised(family: str, path: Path, **fields: Any) -> tuple[GPT, Quantised]:
    model = hostile(KNOWN, **MORE[family])
    done = quantize(model, Settings(**fields), rows_of(model))
    write_quantised(model, done, path, gpt2_like(), done.as_dict(), source=Path("source"))
    return model, done


@pytest.mark.parametrize("family", MORE)
@pytest.mark.parametrize("fields", [{"type": "Q4_0", "method": "gptq"}, {"budget_loss": 1.0, "type": "Q4_1"}])
def test_the_file_is_the_model_that_was_evaluated(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model, done = quantised(family, tmp_path / "q", **fields)
    read, tokenizer = load(tmp_path / "q")
    assert tokenizer is not None
    assert {name for name, _ in read.named_parameters()} == {name for name, _ in model.named_parameters()}
    for name, value in read.named_parameters():
        assert torch.equal(value, model.get_parameter(name)), name
    stored = open_checkpoint(tmp_path / "q").tensors
    assert {unit.name: (unit.type, unit.shape) for unit in done.units} == {
        unit.name: (stored[unit.name].dtype.replace("float16", "F16"), stored[unit.name].shape) for unit in done.units
    }
    assert sum(stored[unit.name].nbytes for unit in done.units) == done.nbytes


def test_the_gguf_package_reads_the_same(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model, _ = quantised("gpt2", tmp_path / "q", type="Q4_0", method="gptq")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "q" / "model.gguf").tensors}
    fused = tensors["blk.1.attn_qkv.weight"]
    values = gguf.quants.dequantize(fused.data, fused.tensor_type)
    ours = torch.cat([model.get_parameter(f"blocks.1.attn.{part}.weight") for part in "qkv"])
    assert np.array_equal(values, ours.detach().numpy())


def test_planted_blocks_of_another_order_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of q that are not turned as GGUF's rotary pairs want it."""
    monkeypatch.setattr(write_module, "apply", lambda ops, arrays, config, inverse: [np.concatenate(arrays)])
    with pytest.raises(LoadstoneError, match=r"not the model that was evaluated: blocks\.0\.attn\.q"):
        quantised("llama", tmp_path / "q", type="Q4_0")
    assert not (tmp_path / "q" / "model.gguf").exists()


def test_gptq_changes_the_model_less_than_nearest() -> None:
    model = hostile(KNOWN, **MORE["llama"])
    rows = rows_of(model, 24)
    with torch.no_grad():
        p = model(rows.ids).log_softmax(-1)
        lost = {}
        for method in ("rtn", "gptq"):
            other = hostile(KNOWN, **MORE["llama"])
            quantize(other, Settings("Q4_0", method), rows)
            lost[method] = float((p.exp() * (p - other(rows.ids).log_softmax(-1))).sum(-1).mean())
    assert lost["gptq"] < 0.9 * lost["rtn"]


def test_gptq_sees_what_each_layer_reads_in_the_finished_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """All before it is rounded by then, in its own block too; and the shift is from the model as it was."""
    model, once, seen = hostile(KNOWN, **MORE["llama"]), hostile(KNOWN, **MORE["llama"]), []

    def remembering(weight: Tensor, gram: Tensor, kind: BlockType, shift: Tensor | None) -> Rounded:
        seen.append((gram, shift))
        return gptq(weight, gram, kind, shift)

    monkeypatch.setattr(run_module, "gptq", remembering)
    rows = rows_of(model)
    quantize(model, Settings("Q4_0", "gptq", embedding="F16"), rows)
    once.tok_emb.weight.data = model.tok_emb.weight.data
    steps = []
    for old, new in zip(walk(once, rows.ids), walk(model, rows.ids), strict=True):
        new.before = old
        found = new.moments()
        steps += [(found.of(names[0]), found.shift_of(names[0])) for names in new.steps()]
    assert len(seen) == len(steps)
    for handed, expected in zip(seen, steps, strict=True):
        for ours, theirs in zip(handed, expected, strict=True):
            assert ours is not None
            assert theirs is not None
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_eight_bits_twice_are_eight_bits_once() -> None:
    model = hostile(KNOWN)
    quantize(model, Settings())
    once = {name: value.clone() for name, value in model.named_parameters()}
    quantize(model, Settings())
    for name, value in model.named_parameters():
        assert torch.allclose(value, once[name], atol=1e-6), name


def test_errors_are_of_the_outputs() -> None:
    model = hostile(KNOWN)
    old = model.get_parameter("blocks.0.attn.out.weight").detach().clone()
    rows = rows_of(model)
    done = quantize(model, Settings("Q5_0"), rows)
    found = next(unit for unit in done.units if unit.name == "blk.0.attn_output.weight")
    wrong = model.get_parameter("blocks.0.attn.out.weight").detach() - old
    assert found.weight_error == pytest.approx(float(wrong.norm() / old.norm()), rel=1e-4)
    assert found.output_error is not None
    assert 0.2 * found.weight_error < found.output_error < 3 * found.weight_error
    assert found.loss == found.losses["Q5_0"] > found.losses["Q8_0"] > 0


def test_the_estimates_are_near_the_divergence_that_is_measured() -> None:
    model = hostile(KNOWN, sigma=0.06)
    ids = torch.randint(0, KNOWN, (32, 40), generator=torch.Generator().manual_seed(1))
    names = [name for name, value in model.named_parameters() if value.dim() == 2 and "pos" not in name]
    candidates = {name: {"Q4_0": nearest(model.get_parameter(name), TYPES["Q4_0"])} for name in names}
    estimated = sensitivities(model, candidates, ids)
    with torch.no_grad():
        p = model(ids).log_softmax(-1)
        total = 0.0
        for name in names:
            old = model.get_parameter(name).data
            model.get_parameter(name).data = candidates[name]["Q4_0"].values()
            measured = float((p.exp() * (p - model(ids).log_softmax(-1))).sum(-1).mean())
            model.get_parameter(name).data = old
            assert 0.25 * measured < estimated[name]["Q4_0"] < 4 * measured, name
            total += measured
    assert 0.6 * total < sum(each["Q4_0"] for each in estimated.values()) < 1.6 * total


# -- budgets

CHOICES = st.lists(
    st.tuples(st.integers(1, 50), st.floats(0, 1)), min_size=1, max_size=4, unique_by=lambda choice: choice[0]
).map(lambda found: [Choice(f"t{number}", *each) for number, each in enumerate(found)])


@settings(deadline=None, max_examples=60)
@given(st.lists(CHOICES, min_size=1, max_size=4), st.integers(0, 100))
def test_no_choice_within_the_size_is_better_by_more_than_one_step(all_choices: list[list[Choice]], more: int) -> None:
    units = {str(number): choices for number, choices in enumerate(all_choices)}
    most = sum(min(choice.nbytes for choice in choices) for choices in units.values()) + more
    chosen = choose(units, most_bytes=most)
    picked = [next(c for c in choices if c.type == chosen[unit]) for unit, choices in units.items()]
    assert sum(choice.nbytes for choice in picked) <= most
    fitting = [each for each in product(*units.values()) if sum(choice.nbytes for choice in each) <= most]
    best = min(sum(choice.loss for choice in each) for each in fitting)
    largest = max(max(c.loss for c in choices) - min(c.loss for c in choices) for choices in units.values())
    assert sum(choice.loss for choice in picked) <= best + largest + 1e-9


def test_budgets_that_cannot_be_met() -> None:
    units = {"a": [Choice("small", 10, 0.5), Choice("large", 20, 0.1)]}
    assert choose(units, most_loss=0.1) == {"a": "large"}
    assert choose(units, most_loss=0.5) == {"a": "small"}
    with pytest.raises(LoadstoneError, match=r"9 bytes are too few: .* take 10, 0 of these"):
        choose(units, most_bytes=9)
    fixed = Choice("F16", 5, 0.2)
    assert choose(units, fixed, most_bytes=25) == choose(units, fixed, most_loss=0.3) == {"a": "large"}
    with pytest.raises(LoadstoneError, match=r"14 bytes are too few: .* take 15, 5 of these"):
        choose(units, fixed, most_bytes=14)
    with pytest.raises(LoadstoneError, match="nats per token are lost even"):
        choose(units, most_loss=0.05)
    with pytest.raises(LoadstoneError, match="nats per token are lost even"):
        choose(units, most_bytes=15, most_loss=0.1)


def test_a_budget_of_size_is_kept_and_spent_where_it_helps() -> None:
    model = hostile(KNOWN)
    done = quantize(model, Settings(budget_size=32_000), rows_of(model))
    assert 30_500 < done.nbytes <= 32_000
    types = {unit.type for unit in done.units if "blk" in unit.name}
    assert len(types) > 1


# -- the command


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_model(hostile(KNOWN, **FAMILIES["llama"]), tmp_path / "source", gpt2_like())
    return tmp_path / "source"


def test_the_command(source: Path, tmp_path: Path, run: Run) -> None:
    arguments = ("--bits", 4, "--method", "gptq", "--rows", 4)
    status, out, error = run("quantize", source, tmp_path / "q", *arguments, "--json")
    assert status == 0, error
    report = json.loads(out)
    assert report["calibration"]["source"] == "the model's own text, seed 0"
    assert {unit["type"] for unit in report["units"]} == {"Q4_0", "Q8_0"}
    assert report["evaluation"]["perplexity_after"] > 0
    kept = json.loads((tmp_path / "q" / "quantize.json").read_text())
    assert kept["units"] == report["units"]
    assert run("generate", tmp_path / "q", "cat", "-n", 3)[0] == 0
    assert run("verify", "--certificate", tmp_path / "q" / "model.gguf")[0] == 0
    status, out, error = run("plot", tmp_path / "q", "--format", "png")
    assert status == 0, error
    assert (tmp_path / "q" / "plots" / "sensitivity.png").stat().st_size > 5_000
    assert run("quantize", source, tmp_path / "q")[0] == 2
    status, out, _ = run("quantize", source, tmp_path / "q", "--force", "--text", source / "config.json")
    assert status == 0
    assert "Q8_0" in out
    assert "perplexity" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--group", 64), "groups of 32"),
        (("--bits", 3), "there are 4, 5 and 8 bits"),
        (("--bits", 8, "--minimum"), "--minimum goes with 4"),
        (("--method", "awq"), "there are rtn, gptq"),
        (("--embedding", "q6_k"), "type Q6_K"),
        (("--budget-size", "1KB"), "bytes are too few"),
        (("--budget-size", "much"), "--budget-size much: expected a size"),
        (("--budget-loss", 0), "must be above 0"),
        (("--method", "gptq", "--calibration", "nowhere.txt"), "nowhere.txt"),
        (("--task", "piqa"), "texts: wikitext2"),
    ],
)
def test_refusals(arguments: tuple[Any, ...], message: str, source: Path, tmp_path: Path, run: Run) -> None:
    status, _, error = run("quantize", source, tmp_path / "q", "--rows", 2, *arguments)
    assert status == 2
    assert message in " ".join(error.split())
    assert not (tmp_path / "q" / "model.gguf").exists()


def test_places_that_are_refused_before_any_work(source: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model.safetensors").write_text("mine")
    for place, message in (("q.gguf", "DST is a folder"), ("full", "other things lie there"), ("source", "other")):
        status, _, error = run("quantize", source, tmp_path / place)
        assert (status, message in error) == (2, True), error
