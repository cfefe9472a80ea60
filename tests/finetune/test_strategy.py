"""Strategies: what each selects, that frozen is frozen to the bit, and that ties are never overlooked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import loadstone
from loadstone.convert import convert
from loadstone.errors import ConfigError
from loadstone.finetune.presets import strategy_for
from loadstone.finetune.selectors import Parts, depth
from loadstone.finetune.strategy import Phase, Strategy, untie
from loadstone.model import GPT
from loadstone.save import save_model
from small_gpt import Wrapped, copies, loss_of, small_gpt, small_llama, tokens

GPT2, LLAMA = small_gpt(12), small_llama(3)
EMBEDDINGS = {"tok_emb.weight", "pos_emb.weight"}


def blocks(model: GPT, *layers: int) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(tuple(f"blocks.{i}." for i in layers))}


# -- selectors


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("all", {name for name, _ in GPT2.named_parameters()}),
        ("embeddings", EMBEDDINGS),
        ("tok_emb", {"tok_emb.weight"}),
        ("pos_emb", {"pos_emb.weight"}),
        ("norm", {"norm.weight", "norm.bias"}),
        ("head", {"tok_emb.weight"}),
        ("blocks.1", blocks(GPT2, 1)),  # and not 10 and 11
        ("blocks.-1", blocks(GPT2, 11)),
        ("blocks.9-11", blocks(GPT2, 9, 10, 11)),
        ("blocks.-3-", blocks(GPT2, 9, 10, 11)),
        ("blocks.10-", blocks(GPT2, 10, 11)),
        ("blocks.-3--2", blocks(GPT2, 9, 10)),
        ("blocks.0.attn.q.weight", {"blocks.0.attn.q.weight"}),
    ],
)
def test_what_a_selector_selects(selector: str, expected: set[str]) -> None:
    assert Parts.of(GPT2).select(selector) == expected


def test_a_wrapped_gpt_answers_to_the_same_words() -> None:
    model = Wrapped(small_gpt(3))
    parts = Parts.of(model)
    assert parts.select("score") == {"score.weight"}
    assert parts.select("embeddings") == {f"gpt.{name}" for name in EMBEDDINGS}
    assert parts.select("blocks.-1") == {f"gpt.{name}" for name in blocks(model.gpt, 2)}
    assert [depth(model, name) for name in ("score.weight", "gpt.norm.bias", "gpt.blocks.2.attn.q.bias")] == [0, 0, 1]
    assert depth(model, "gpt.tok_emb.weight") == 4


@pytest.mark.parametrize(
    ("model", "text", "problem"),
    [
        (GPT2, "0:haed", r"'haed' is no selector and no parameter of this model. Selectors are all, embeddings"),
        (GPT2, "0:blocks.0.attn.c_attn.weight", "is no selector"),
        (GPT2, "0:blocks", "is no selector"),
        (GPT2, "0:blocks.9-12", "blocks are 0 to 11"),
        (GPT2, "0:blocks.-13-", r"0 to 11 \(or -12 to -1"),
        (GPT2, "0:blocks.5-3", "is empty"),
        (GPT2, "0:score", "no classifier"),
        (GPT2, "0:lora", "no adapter"),
        (LLAMA, "0:pos_emb", "rotary"),
        (Wrapped(small_gpt(2)), "0:head", "whose output layer is `score`"),
        (GPT2, "0:", "at least one selector"),
        (GPT2, "", "not known. Presets: full; head"),
        (GPT2, "fulll", "not known"),
        (GPT2, "0all", "is no start"),
        (GPT2, "0:norm;1e9:all", "is no start"),
        (GPT2, "5:all", "first phase must begin at 0"),
        (GPT2, "0:norm;20:all;10:embeddings", "out of order: 10:embeddings begins at 10, and 20:all"),
        (GPT2, "0:norm;1ep:blocks.1;1ep:all", "out of order"),
        (GPT2, "0:all;9:norm", r"phase 2 \(9:norm\) adds nothing.*nothing is frozen again"),
        (GPT2, "freeze", "0 to 12 in this model"),
        (GPT2, "freeze:13", "0 to 12 in this model; found '13'"),
        (GPT2, "last:-1", "found '-1'"),
        (GPT2, "full:3", "full takes nothing behind a colon"),
        (LLAMA, "gradual:1ep", "starts of phases 2 and 3"),
        (LLAMA, "gradual:2ep,1ep", "out of order"),
        (LLAMA, "gradual:0,5", "out of order"),
        (LLAMA, "gradual:one,two", "'one' is no start"),
        (GPT2, [], "first phase must begin at 0"),
        (GPT2, [{"at": 0}], "at, unit and train"),
        (GPT2, [{"at": 0, "train": ["all"], "lr": 1}], "at, unit and train"),
        (GPT2, [{"at": 0, "train": 7}], "a list of selectors"),
        (GPT2, [{"at": -1, "train": "all"}], "at must be a whole number"),
        (GPT2, [{"at": True, "train": "all"}], "at must be a whole number"),
        (GPT2, [{"at": 0, "unit": "day", "train": "all"}], "unit must be step or epoch"),
        (GPT2, {"at": 0}, "a list of phases"),
        (GPT2, 3, "a list of phases"),
    ],
)
def test_what_cannot_be_meant_is_one_paragraph(model: nn.Module, text: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        strategy_for(model, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("decay", [0, -1, 1.5, float("nan"), "1", True])
def test_a_layer_decay_out_of_range_is_refused(decay: Any) -> None:
    with pytest.raises(ConfigError, match="layer_decay must be above 0"):
        strategy_for(GPT2, layer_decay=decay)


def test_the_order_of_mixed_units_is_checked_once_the_epoch_has_a_length() -> None:
    strategy = strategy_for(GPT2, "0:norm;1ep:embeddings;300:all")
    assert [strategy.phase(step, 100) for step in (0, 99, 100, 299, 300, 10**6)] == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ConfigError, match=r"out of order: 300:all begins at 300, and 1ep:embeddings.*at 300"):
        strategy.phase(0, 300)
    for nothing in (None, 0):
        with pytest.raises(ConfigError, match="begins by epoch, and this data has no whole step"):
            strategy.phase(0, nothing)
    assert strategy_for(GPT2, "0:norm;5:all").phase(5, None) == 1


# -- presets


@pytest.mark.parametrize(
    ("model", "preset", "phases"),
    [
        (GPT2, "full", "0:all"),
        (GPT2, "freeze:6", "0:blocks.6-,norm"),
        (LLAMA, "freeze:2", "0:blocks.2-,norm,head"),
        (LLAMA, "freeze:3", "0:norm,head"),
        (GPT2, "last:2", "0:blocks.-2-,norm"),
        (LLAMA, "last:1", "0:blocks.-1-,norm,head"),
        (LLAMA, "last:0", "0:norm,head"),
        (LLAMA, "head", "0:head"),
        (LLAMA, "gradual", "0:head,norm;1ep:blocks.-1-;2ep:all"),
        (small_llama(9), "gradual:200,400", "0:head,norm;200:blocks.-3-;400:all"),
        (Wrapped(small_gpt(6)), "gradual:1ep,300", "0:score,norm;1ep:blocks.-2-;300:all"),
        (Wrapped(small_gpt(6)), "last:1", "0:blocks.-1-,norm,score"),
        (Wrapped(small_gpt(6)), "head", "0:score"),
    ],
)
def test_presets_become_plain_phases(model: nn.Module, preset: str, phases: str) -> None:
    strategy = strategy_for(model, preset)
    assert str(strategy) == phases
    assert strategy_for(model, phases) == strategy


def test_text_tables_and_json_say_the_same() -> None:
    text = strategy_for(LLAMA, "0:head, norm; 1ep:blocks.-1-; 2ep:all")
    table = [
        {"at": 0, "train": ["head", "norm"]},
        {"at": 1, "unit": "epoch", "train": ["blocks.-1-"]},
        {"at": 2, "unit": "epoch", "train": "all"},
    ]
    assert strategy_for(LLAMA, table) == text
    assert Strategy.from_json(text.to_json()) == text


WORDS = st.sampled_from(["all", "norm", "embeddings", "tok_emb", "blocks.0-3", "blocks.-2-", "blocks.1"])
PHASES = st.lists(st.tuples(st.integers(0, 50), st.lists(WORDS, min_size=1, max_size=3)), max_size=4)


@settings(max_examples=60, deadline=None)
@given(PHASES, st.floats(0.01, 1), st.booleans(), st.sampled_from(["step", "epoch"]))
def test_laws_of_strategies(phases: list[tuple[int, list[str]]], decay: float, untied: bool, unit: str) -> None:
    """JSON and text are faithful; the trainable set is a function of the step that only ever grows."""
    starts = sorted({at for at, _ in phases} | {0})
    words = [tuple(train) for _, train in phases] + [("norm",)] * len(starts)
    strategy = Strategy(tuple(map(Phase, starts, [unit] * len(starts), words)), decay, untied)
    assert Strategy.from_json(json.loads(json.dumps(strategy.to_json()))) == strategy
    sets = [strategy.trainable(GPT2, step, 3) for step in range(0, 160, 7)]
    assert all(first <= second for first, second in pairwise(sets))
    assert sets[-1] == strategy.ever_trainable(GPT2)
    scales = [strategy.lr_scale(GPT2, f"blocks.{i}.attn.q.weight") for i in range(12)]
    assert scales == sorted(scales)


def test_rates_fall_from_the_top_down() -> None:
    strategy = strategy_for(LLAMA, layer_decay=0.5)
    names = ("head.weight", "norm.weight", "blocks.2.mlp.up.weight", "blocks.0.norm1.weight", "tok_emb.weight")
    assert [strategy.lr_scale(LLAMA, name) for name in names] == [1, 1, 1 / 2, 1 / 8, 1 / 16]
    assert strategy_for(LLAMA).lr_scale(LLAMA, "tok_emb.weight") == 1


@pytest.mark.parametrize("values", [None, {}, {"phases": 3}, {"phases": [], "x": 1}, {"phases": [{"at": 0}]}])
def test_a_damaged_record_is_refused(values: Any) -> None:
    with pytest.raises(ConfigError, match="strategy"):
        Strategy.from_json(values)


# -- ties


@pytest.mark.parametrize("given_", ["head", "gradual", "0:head", "0:head,norm,pos_emb,blocks.0", "0:norm;5:head;9:all"])
def test_a_tied_head_cannot_learn_while_the_embedding_is_frozen(given_: str) -> None:
    with pytest.raises(ConfigError, match=r"one matrix \(tied\).*add `embeddings`.*untie them first") as caught:
        strategy_for(GPT2, given_)
    assert "976 parameters" in str(caught.value)  # 61 x 16


@pytest.mark.parametrize("first", ["head,embeddings", "tok_emb,head", "head,tok_emb.weight", "all,head"])
def test_the_first_way_out_trains_both(first: str) -> None:
    assert "tok_emb.weight" in strategy_for(GPT2, f"0:{first}").trainable(GPT2, 0, None)


def test_the_second_way_out_unties() -> None:
    model = small_gpt(6)
    strategy = strategy_for(model, "gradual", untie=True)
    assert "head.weight" in strategy.trainable(model, 0, 5)
    assert "head  " in strategy.describe(model)
    with pytest.raises(ConfigError, match=r"untie\(model\) first"):
        strategy.apply(model, 0, 5)
    assert untie(model)
    assert not untie(model)
    strategy.apply(model, 0, 5)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {"head.weight", "norm.weight", "norm.bias"}


def test_a_classifier_has_nothing_to_untie() -> None:
    with pytest.raises(ConfigError, match="no language-model head"):
        strategy_for(Wrapped(small_gpt(2)), untie=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untying_changes_no_logit_and_survives_every_file(dtype: torch.dtype, tmp_path: Path) -> None:
    model = small_gpt(3).to(dtype).eval()
    model.tok_emb.weight.requires_grad_(False)
    before = model(tokens())
    assert untie(model)
    assert model.head is not None
    assert not model.head.training
    assert not model.head.weight.requires_grad
    assert torch.equal(model(tokens()), before)
    save_model(model, tmp_path / "equal")
    # Equal copies stay two parameters: the config says so.
    assert json.loads((tmp_path / "equal" / "config.json").read_text())["tie_word_embeddings"] is False
    assert loadstone.load(tmp_path / "equal")[0].head is not None
    with torch.no_grad():
        model.head.weight += 0.25
    after = model(tokens())
    assert not torch.equal(after, before)
    save_model(model, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "m.gguf", to="gguf")
    convert(tmp_path / "hf", tmp_path / "m.pth", to="raschka")
    for path in ("hf", "m.gguf", "m.pth"):
        again, _ = loadstone.load(tmp_path / path, dtype=dtype)
        assert again.config.tied is False
        assert torch.equal(again(tokens()), after)


# -- training


def optimizer_for(model: nn.Module, fused: bool) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5, fused=fused)


def step_with(model: nn.Module, optimizer: torch.optim.Optimizer, number: int, *, to_none: bool = True) -> None:
    optimizer.zero_grad(set_to_none=to_none)
    loss_of(model, tokens(seed=number)).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("make", "text"),
    [
        (small_gpt, "freeze:3"),
        (small_gpt, "last:2"),
        (small_gpt, "0:embeddings"),
        (small_llama, "gradual:2,4"),
        (lambda: Wrapped(small_gpt(6)), "gradual:2,4"),
    ],
)
def test_frozen_parameters_move_by_exactly_zero(make: Callable[[], nn.Module], text: str, fused: bool) -> None:
    model = make()
    strategy, optimizer = strategy_for(model, text), optimizer_for(model, fused)
    start, last = copies(model.named_parameters()), max(phase.at for phase in strategy.phases)
    for number in range(last + 2):
        changed = strategy.apply(model, number, None)
        assert changed == any(phase.at == number for phase in strategy.phases)
        before = copies(model.named_parameters())
        step_with(model, optimizer, number)
        moved = {n for n, parameter in model.named_parameters() if not torch.equal(parameter, before[n])}
        assert moved == strategy.trainable(model, number, None)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start[name]) == (name not in strategy.ever_trainable(model))


@pytest.mark.parametrize("fused", [True, False])
def test_what_is_unfrozen_later_begins_with_moments_and_a_count_of_its_own(fused: bool) -> None:
    model = small_llama(3)
    strategy, optimizer = strategy_for(model, "gradual:3,5"), optimizer_for(model, fused)
    late = dict(model.named_parameters())["blocks.2.mlp.up.weight"]
    for number in range(3):
        strategy.apply(model, number, None)
        step_with(model, optimizer, number)
    assert late not in optimizer.state
    strategy.apply(model, 3, None)
    alone = late.detach().clone().requires_grad_()
    reference = torch.optim.AdamW([alone], lr=1e-2, weight_decay=0.5, fused=fused)
    for number in range(3, 7):
        strategy.apply(model, number, None)
        step_with(model, optimizer, number)
        assert late.grad is not None
        alone.grad = late.grad.clone()
        reference.step()
        assert torch.equal(late, alone)
    counts = {n: int(optimizer.state[p]["step"]) for n, p in model.named_parameters()}
    assert counts["head.weight"] == counts["norm.weight"] == 7
    assert counts["blocks.2.mlp.up.weight"] == 4
    assert counts["tok_emb.weight"] == counts["blocks.0.attn.q.weight"] == 2


@pytest.mark.parametrize("fused", [True, False])
def test_a_gradient_of_zero_would_not_be_frozen(fused: bool) -> None:
    """Why apply sets None: with a zero left behind, decay and moments go on."""
    for to_none in (True, False):
        model = small_llama(2)
        strategy, optimizer = strategy_for(model, "0:norm;1:all"), optimizer_for(model, fused)
        strategy.apply(model, 1, None)
        step_with(model, optimizer, 0)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.norm.weight.requires_grad_()
        before = copies(model.named_parameters())
        step_with(model, optimizer, 1, to_none=to_none)
        assert torch.equal(model.tok_emb.weight, before["tok_emb.weight"]) == to_none


def test_going_back_to_an_earlier_step_clears_the_gradients() -> None:
    """A resumed run may go back: what had a gradient and is frozen again must not move."""
    model = small_llama(2)
    strategy, optimizer = strategy_for(model, "0:norm;5:all"), optimizer_for(model, True)
    assert strategy.apply(model, 5, None) is False  # a new model is trainable throughout
    loss_of(model, tokens()).backward()  # type: ignore[no-untyped-call]
    assert strategy.apply(model, 4, None)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {"norm.weight"}
    before = copies(model.named_parameters())
    optimizer.step()
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == {"norm.weight"}


def test_a_resumed_run_has_the_same_phase() -> None:
    """Trainability follows from the step alone, not from an event that a resumed run has missed."""
    strategy = strategy_for(LLAMA, "gradual:1ep,2ep")
    for step in (0, 9, 10, 11, 19, 20, 21):
        fresh = small_llama(3)
        strategy.apply(fresh, step, 10)
        found = {name for name, parameter in fresh.named_parameters() if parameter.requires_grad}
        assert found == strategy.trainable(fresh, step, 10)
        assert len(found) == [2, 11, 30][strategy.phase(step, 10)]


# -- the table


@pytest.mark.parametrize(
    ("model", "text"), [(GPT2, "freeze:6"), (LLAMA, "gradual"), (Wrapped(small_gpt(6)), "gradual"), (GPT2, "full")]
)
def test_the_table_adds_up(model: nn.Module, text: str) -> None:
    strategy = strategy_for(model, text, layer_decay=0.5)
    table = strategy.describe(model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    rows = re.findall(r"^(\S+) +([\d,]+)  .*?(never|from phase \d)$", table, re.M)
    assert sum(int(count.replace(",", "")) for _, count, _ in rows) == sum(sizes.values())
    for index in range(len(strategy.phases)):
        learning = [
            int(c.replace(",", "")) for _, c, begins in rows if begins[-1].isdigit() and int(begins[-1]) <= index + 1
        ]
        expected = sum(sizes[name] for name in strategy.trained(Parts.of(model), index))
        assert sum(learning) == expected
        assert f"{expected:,} of {sum(sizes.values()):,} parameters learn" in table


def test_the_table_reads_well() -> None:
    table = strategy_for(GPT2, "freeze:9", layer_decay=0.5).describe(GPT2)
    assert table.splitlines() == [
        "phase 1, from step 0: blocks.9-, norm; 9,872 of 40,752 parameters learn (24.2%)",
        "             parameters  rate          learns",
        "tok_emb             976                never",
        "pos_emb             384                never",
        "blocks.0-8       29,520                never",
        "blocks.9-11       9,840  0.125 to 0.5  from phase 1",
        "norm                 32  1             from phase 1",
        "head: it is tok_emb (tied) and stays frozen with it",
    ]
