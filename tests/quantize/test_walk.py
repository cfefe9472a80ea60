"""The walk: block by block it is the model; moments are those of what the layers read; rows come as asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from extendable import FAMILIES, KNOWN, gpt2_like, hostile
from loadstone.calibrate import rows as rows_module
from loadstone.calibrate import walk as module
from loadstone.calibrate.measure import change, examination, nats
from loadstone.calibrate.rows import calibration_rows
from loadstone.calibrate.walk import walk
from loadstone.errors import LoadstoneError
from loadstone.model import GPT
from small_gpt import small_neox, tokens


def ids(rows: int = 6, length: int = 20, vocabulary: int = KNOWN) -> Tensor:
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_the_model_does_also_in_batches(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hostile(KNOWN, **FAMILIES[family])
    monkeypatch.setattr(module, "BATCH_TOKENS", 40)
    stages = list(walk(model, ids()))
    assert [len(batch) for batch in stages[0].inputs] == [2, 2, 2]
    with torch.no_grad():
        last = torch.cat([stages[-1].run(batch) for batch in stages[-1].inputs])
        assert torch.allclose(model.norm(last), model.hidden(ids()), atol=1e-5)


def test_neox_in_parallel_too() -> None:
    model = small_neox()
    (*_, last) = walk(model, tokens(4))
    with torch.no_grad():
        assert torch.allclose(model.norm(last.run(last.inputs[0])), model.hidden(tokens(4)), atol=1e-5)


def read_by(model: GPT, name: str, ids_BT: Tensor) -> Tensor:
    found: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, given: found.append(given[0].flatten(0, 1)))
    with torch.no_grad():
        model.hidden(ids_BT)
    handle.remove()
    return torch.cat(found)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_moments_are_of_what_each_layer_reads(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_TOKENS", 40)
    model = hostile(KNOWN, **FAMILIES[family])
    for stage in walk(model, ids()):
        moments, diagonals = stage.moments(), stage.moments(diagonal=True)
        attention = [f"blocks.{stage.index}.attn.{part}" for part in "qkv"]
        assert {moments.leaders[name] for name in attention} == {attention[0]}
        assert len(moments.grams) == 4  # q, k and v; out; up (and gate); down
        for name in stage.linears:
            x = read_by(model, name, ids())
            gram, diagonal = moments.of(name), diagonals.of(name)
            assert gram is not None
            assert diagonal is not None
            assert torch.allclose(gram, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
            assert torch.allclose(diagonal, gram.diagonal(), rtol=1e-4, atol=1e-6)


def test_steps_are_in_the_order_in_which_layers_read() -> None:
    stage = next(walk(hostile(KNOWN, **FAMILIES["llama"]), ids()))
    steps = [[name.removeprefix("blocks.0.") for name in step] for step in stage.steps()]
    assert [sorted(step) for step in steps] == [["attn.k", "attn.q", "attn.v"], ["attn.out"], ["mlp.gate", "mlp.up"],
                                                ["mlp.down"]]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_in_one_step(family: str) -> None:
    stage = next(walk(hostile(KNOWN, **FAMILIES[family]), ids()))
    names = [name for step in stage.steps() for name in step]
    assert sorted(names) == sorted(stage.linears)
    whole, alone = stage.moments(), stage.moments(stage.steps()[0])
    assert set(alone.leaders) == set(stage.steps()[0])
    for name in alone.leaders:
        assert torch.equal(whole.of(name), alone.of(name))  # type: ignore[arg-type]


def test_shifts_are_against_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_TOKENS", 40)
    model, name = hostile(KNOWN, **FAMILIES["llama"]), "blocks.1.mlp.down"
    once = read_by(model, name, ids())
    for stage in walk(model, ids(), remember=True):
        shift = stage.moments().shift_of(f"blocks.{stage.index}.attn.q")
        assert shift is not None
        assert bool(shift.any()) == (stage.index > 0)
        if stage.index == 0:
            stage.linears["blocks.0.mlp.down"].weight.data *= 2
        else:
            found = stage.moments([name]).shift_of(name)
            now = read_by(model, name, ids())
            assert found is not None
            assert torch.allclose(found, (once - now).T @ now / len(now), rtol=1e-3, atol=1e-5)


def test_experts_have_no_shift() -> None:
    """Another router may send them other tokens."""
    model = hostile(KNOWN, **FAMILIES["llama"], n_experts=4, n_experts_used=2)
    moments = next(walk(model, ids(), remember=True)).moments()
    assert {name for name in moments.leaders if moments.shift_of(name) is None} == {
        name for name in moments.leaders if ".mlp." in name
    }


def test_later_blocks_read_what_changed_ones_pass_on() -> None:
    model = hostile(KNOWN)
    before = [stage.inputs[0].clone() for stage in walk(model, ids())]
    after = []
    for stage in walk(model, ids()):
        after.append(stage.inputs[0].clone())
        if stage.index == 0:
            stage.linears["blocks.0.mlp.down"].weight.data *= 2
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


def test_a_layer_that_read_nothing_has_no_moments() -> None:
    stage = next(walk(hostile(KNOWN), ids()))
    moments = stage.moments()
    moments.leaders.pop("blocks.0.attn.q")
    assert moments.of("blocks.0.attn.q") is None


def test_a_model_that_computes_nan_is_refused() -> None:
    model = hostile(KNOWN)
    model.get_parameter("blocks.1.mlp.down.weight").data[0, 0] = torch.nan
    with pytest.raises(LoadstoneError, match="NaN or infinity on the calibration text"):
        next(walk(model, ids()))


# -- rows


def test_own_rows_differ_from_each_other_and_not_from_run_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = hostile(KNOWN + 20), gpt2_like()
    first = calibration_rows(model, tokenizer, "self", count=5)
    assert first.ids.shape == (5, model.config.context_length)
    assert len({tuple(row) for row in first.ids.tolist()}) == 5
    assert int(first.ids.max()) < KNOWN  # padding rows of the vocabulary are no text
    monkeypatch.setattr(rows_module, "_TOGETHER", 2)
    assert torch.equal(calibration_rows(model, tokenizer, "self", count=5).ids, first.ids)
    assert not torch.equal(calibration_rows(model, tokenizer, "self", count=5, seed=1).ids, first.ids)


def test_rows_of_a_text_are_spread_over_all_of_it(tmp_path: Path) -> None:
    model, tokenizer = hostile(KNOWN), gpt2_like()
    text = "".join(f"line {number} of the text\n" for number in range(500))
    (tmp_path / "a.txt").write_text(text)
    rows = calibration_rows(model, tokenizer, str(tmp_path / "a.txt"), count=4)
    whole = tokenizer.encode(text, add_special=False)
    assert rows.ids.shape == (4, 72)
    assert rows.ids[0].tolist() == whole[:72]
    assert rows.ids[-1].tolist() == whole[-72:]


def test_short_and_missing_texts(tmp_path: Path) -> None:
    model, tokenizer = hostile(KNOWN), gpt2_like()
    (tmp_path / "a.txt").write_text("some words")
    assert calibration_rows(model, tokenizer, str(tmp_path / "a.txt")).ids.shape[0] == 1
    (tmp_path / "b.txt").write_text("a")
    with pytest.raises(LoadstoneError, match=r"b\.txt: it has 1 tokens"):
        calibration_rows(model, tokenizer, str(tmp_path / "b.txt"))
    with pytest.raises(LoadstoneError, match="no tokenizer"):
        calibration_rows(model, None, str(tmp_path / "a.txt"))
    with pytest.raises(LoadstoneError, match=r"none\.txt"):
        calibration_rows(model, tokenizer, str(tmp_path / "none.txt"))


# -- before and after


def test_the_loss_on_own_text_rises_by_the_divergence() -> None:
    model, tokenizer = hostile(KNOWN, sigma=0.1), gpt2_like()
    what = examination(model, tokenizer)
    before = nats(model, what)
    other = hostile(KNOWN, sigma=0.1)
    with torch.no_grad():
        other.tok_emb.weight += 0.05 * torch.randn(other.tok_emb.weight.shape)
        rows = torch.tensor([list(request.ids) for request in what.requests])
        p, q = (each(rows[:, :-1])[..., :KNOWN].log_softmax(-1) for each in (model, other))
        divergence = float((p.exp() * (p - q)).sum(-1).mean())
    found = change(before, nats(other, what), what)
    assert found.low is not None
    assert found.high is not None
    assert found.low - 0.02 < float(torch.tensor(divergence).expm1()) < found.high + 0.02
    same = change(before, nats(model, what), what)
    assert same.relative == 0


def test_only_a_text_has_a_perplexity() -> None:
    with pytest.raises(LoadstoneError, match="texts: wikitext2"):
        examination(hostile(KNOWN), gpt2_like(), task="piqa")
