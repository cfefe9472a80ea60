"""prune: exact shares, the masks' definitions, smaller models that compute what they should, zeros that stay zero."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import Run
from extendable import FAMILIES, KNOWN, gpt2_like, hostile
from loadstone.calibrate.rows import Rows
from loadstone.errors import LoadstoneError
from loadstone.load import load
from loadstone.model import GPT
from loadstone.prune import recover as recover_module
from loadstone.prune.masks import mask_of
from loadstone.prune.recover import recover
from loadstone.prune.run import Settings, prune
from loadstone.prune.structure import kept_of, without_heads, without_layers
from loadstone.save import save_model
from loadstone.train.settings import Settings as Training

IDS = torch.randint(0, KNOWN, (6, 40), generator=torch.Generator().manual_seed(0))
ROWS = Rows(IDS, "made")
TEXT = "The dog sings, the cat sings, and 12 birds sing; the house is old. " * 200


# -- masks


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 24), st.floats(0.01, 0.99), st.booleans(), st.booleans())
def test_so_many_go_and_they_are_the_least(M: int, K: int, sparsity: float, wanda: bool, alike: bool) -> None:
    generator = torch.Generator().manual_seed(M * K)
    weight = torch.randn(M, K, generator=generator)
    weight = weight.sign() if alike else weight
    norms = torch.rand(K, generator=generator) + 0.1 if wanda else None
    mask = mask_of(weight, sparsity, norms_K=norms)
    scores = weight.abs() * (norms if norms is not None else 1.0)
    for kept, values in zip(mask, scores, strict=True) if wanda else [(mask.flatten(), scores.flatten())]:
        assert int((~kept).sum()) == int(sparsity * kept.numel() + 1e-9)
        if (~kept).any() and kept.any():
            assert float(values[~kept].max()) <= float(values[kept].min())


def test_wanda_spares_a_small_weight_of_a_large_input() -> None:
    weight, norms = torch.tensor([[0.1, 1.0, 0.5, 0.6]]), torch.tensor([100.0, 0.1, 1.0, 1.0])
    assert mask_of(weight, 0.5, norms_K=norms).tolist() == [[True, False, False, True]]
    assert mask_of(weight, 0.5).tolist() == [[False, True, False, True]]


def test_two_of_four() -> None:
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    mask = mask_of(weight, 0.5, two_of_four=True).reshape(5, -1, 4)
    assert bool((mask.sum(-1) == 2).all())
    groups = weight.abs().reshape(5, -1, 4)
    assert bool((groups.where(mask, 9.0).amin(-1) >= groups.where(~mask, 0.0).amax(-1)).all())


@pytest.mark.parametrize("structure", ["none", "2:4"])
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("family", ["gpt2", "llama untied"])
def test_zeros_are_where_the_masks_say(structure: str, method: str, family: str) -> None:
    model, old = (hostile(KNOWN, **FAMILIES[family]) for _ in range(2))
    done = prune(model, Settings(0.5, method, structure), ROWS)
    assert done.zeros == sum(mask.numel() // 2 for mask in done.masks.values())
    assert set(done.masks) == {f"{name}.weight" for name in done.parts}
    for name, value in model.named_parameters():
        mask = done.masks.get(name, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(value, old.get_parameter(name).where(mask, 0.0)), name
    assert "tok_emb.weight" not in done.masks
    assert "head.weight" not in done.masks


def test_wanda_loses_less_than_magnitude_where_inputs_differ() -> None:
    def lost(method: str) -> float:
        model = hostile(KNOWN, **FAMILIES["llama"])
        with torch.no_grad():
            for block in model.blocks:
                block.norm1.weight[:8] *= 30  # type: ignore[union-attr, index, operator]
                block.norm2.weight[:8] *= 30  # type: ignore[union-attr, index, operator]
            before = model(IDS).log_softmax(-1)
            prune(model, Settings(0.3, method), ROWS)
            return float((before.exp() * (before - model(IDS).log_softmax(-1))).sum(-1).mean())

    assert lost("wanda") < 0.8 * lost("magnitude")


# -- smaller models


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_heads_is_with_silent_heads(family: str, method: str) -> None:
    fields = FAMILIES[family] | ({"qkv_bias": True} if family == "llama untied" else {})
    model = hostile(KNOWN, **fields)
    done = prune(model, Settings(0.5, method, "heads"), ROWS)
    config, smaller = model.config, done.model.config
    assert (smaller.n_kv_heads, smaller.n_heads) == (config.n_kv_heads // 2, config.n_heads // 2)
    assert smaller.head_dim == config.head_dim
    width = config.n_heads * config.head_dim // config.n_kv_heads
    with torch.no_grad():
        for index, groups in done.kept_heads.items():
            silent = [group for group in range(config.n_kv_heads) if group not in groups]
            for group in silent:
                model.blocks[index].attn.out.weight[:, group * width : (group + 1) * width] = 0  # type: ignore
        assert same(done.model(IDS), model(IDS))
    assert done.parameters < done.parameters_before


def test_the_loudest_heads_stay() -> None:
    model = hostile(KNOWN, **FAMILIES["llama"])
    with torch.no_grad():
        model.blocks[0].attn.out.weight[:, :16] *= 0.01  # type: ignore[union-attr, index, operator]
        model.blocks[1].attn.v.weight[8:] *= 0.01  # type: ignore[union-attr, index, operator]
    assert prune(model, Settings(0.5, "wanda", "heads"), ROWS).kept_heads == {0: [1], 1: [0]}


def test_without_layers_is_the_others_one_after_the_other() -> None:
    model = hostile(KNOWN, n_layers=4)
    with torch.no_grad():
        for part in (model.blocks[2].attn.out, model.blocks[2].mlp.down):  # type: ignore[union-attr]
            part.weight.mul_(1e-3)  # type: ignore[union-attr, operator]
            part.bias.mul_(1e-3)  # type: ignore[union-attr, operator]
    done = prune(model, Settings(0.25, "wanda", "layers"), ROWS)
    assert done.kept_layers == [0, 1, 3]
    assert done.model.config.n_layers == 3
    other = without_layers(model, [0, 1, 3])
    del model.blocks[2]
    with torch.no_grad():
        assert torch.equal(other(IDS), model(IDS))


def test_what_cannot_be_taken_apart_is_refused() -> None:
    model = hostile(KNOWN)
    assert isinstance(without_heads(model, {0: [0], 1: [1]}), GPT)
    model.get_submodule("blocks.1.attn").register_parameter("sinks", torch.nn.Parameter(torch.zeros(4)))
    cuts: list[Callable[[], GPT]] = [lambda: without_heads(model, {0: [0], 1: [1]}), lambda: without_layers(model, [1])]
    for cut in cuts:
        with pytest.raises(LoadstoneError, match=r"attn\.sinks: it is of a kind that cannot be taken apart"):
            cut()
    with pytest.raises(LoadstoneError, match="takes out 0"):
        kept_of([1.0, 2.0], 0.1, "blocks")
    with pytest.raises(LoadstoneError, match="There is only one"):
        kept_of([1.0], 0.9, "blocks")


# -- recovery


def test_what_is_zero_stays_zero_and_the_rest_learns(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    model = hostile(KNOWN, **FAMILIES["llama"])
    done = prune(model, Settings(0.6), ROWS)
    before = {name: value.clone() for name, value in model.named_parameters()}
    losses: list[float] = []
    recover(
        model, gpt2_like(), done.masks, [str(tmp_path / "text.txt")],
        Training(steps=12, batch_size=4, length=32, lr=1e-2, eval_every=0, log_every=1), near=tmp_path,
        listeners=[lambda kind, record: losses.append(record["loss"]) if kind == "step" else None],
    )  # fmt: skip
    assert losses[-1] < losses[0] - 0.5
    for name, mask in done.masks.items():
        now = model.get_parameter(name)
        assert not now[~mask].any(), name
        assert float((now[mask] != before[name][mask]).float().mean()) > 0.9
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]  # the run's folder is gone


def test_planted_without_the_hooks_zeros_would_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    model = hostile(KNOWN)
    done = prune(model, Settings(0.6), ROWS)
    monkeypatch.setattr(Tensor, "register_hook", lambda *_: type("Handle", (), {"remove": lambda self: None})())
    settings = Training(steps=2, batch_size=4, length=32, eval_every=0)
    recover_module.recover(model, gpt2_like(), done.masks, [str(tmp_path / "text.txt")], settings, near=tmp_path)
    assert any(model.get_parameter(name)[~mask].any() for name, mask in done.masks.items())


# -- the command


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_model(hostile(KNOWN, **FAMILIES["llama"]), tmp_path / "source", gpt2_like())
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "source"


@pytest.mark.parametrize("structure", ["none", "2:4", "heads", "layers"])
def test_the_command(structure: str, source: Path, tmp_path: Path, run: Run) -> None:
    arguments = ("--sparsity", 0.5, "--structure", structure, "--rows", 4, "--text", tmp_path / "text.txt")
    recovery = ("--recover", 2, "--data", tmp_path / "text.txt", "--batch-size", 2, "--length", 16)
    status, out, error = run("prune", source, tmp_path / "p", *arguments, *recovery, "--json")
    assert status == 0, error
    report = json.loads(out)
    assert set(report["evaluation"]) == {"pruned", "recovered"}
    model, tokenizer = load(tmp_path / "p")
    assert tokenizer is not None
    assert sum(value.numel() for value in model.parameters()) == report["parameters"]
    linears = [value for name, value in model.named_parameters() if value.dim() == 2 and "blocks" in name]
    if structure in ("none", "2:4"):
        assert report["zeros"] == sum(int((value == 0).sum()) for value in linears) > 0
    else:
        assert report["parameters"] < report["parameters_before"]
    assert json.loads((tmp_path / "p" / "config.json").read_text())["head_dim"] == 8
    assert run("verify", "--certificate", tmp_path / "p")[0] == 0
    status, out, _ = run("prune", source, tmp_path / "p", *arguments, "--force")
    assert status == 0
    assert "pruned:" in out


def test_gpt2_without_heads_keeps_our_names_and_says_why(tmp_path: Path, run: Run) -> None:
    save_model(hostile(KNOWN), tmp_path / "source", gpt2_like())
    arguments = ("--sparsity", 0.5, "--structure", "heads", "--method", "magnitude")
    status, out, error = run("prune", tmp_path / "source", tmp_path / "p", *arguments)
    assert status == 0, error
    assert "written under our own names" in out
    assert "head_dim" in out
    assert load(tmp_path / "p")[0].config.n_heads == 2
    status, _, error = run("convert", tmp_path / "p", tmp_path / "hf", "--to", "hf")
    assert status == 2
    assert "head_dim" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sparsity", 0), "above 0 and below 1"),
        (("--sparsity", 1), "above 0 and below 1"),
        (("--sparsity", 0.4, "--structure", "2:4"), "--sparsity 0.5, not 0.4"),
        (("--sparsity", 0.5, "--structure", "rows"), "there are none, 2:4, heads, layers"),
        (("--sparsity", 0.5, "--method", "sparsegpt"), "there are magnitude, wanda"),
        (("--sparsity", 0.1, "--structure", "layers"), "takes out 0"),
        (("--sparsity", 0.5, "--recover", 5), "go together"),
    ],
)
def test_refusals(arguments: tuple[Any, ...], message: str, source: Path, tmp_path: Path, run: Run) -> None:
    status, _, error = run("prune", source, tmp_path / "p", "--rows", 2, *arguments)
    assert status == 2
    assert message in " ".join(error.split())
    assert not (tmp_path / "p").exists()
