"""upcycle: what is defined changes nothing that it need not, and what is not defined is refused with the reason."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loadstone import GPT, LoadstoneError, Rope, load
from loadstone.certificate import check
from loadstone.errors import ConfigError
from loadstone.finetune.lora import LoRA, add_lora
from loadstone.save import save_model
from loadstone.upcycle import pooled, upcycle
from loadstone.weightmap.canonical import parameter_shapes
from small_gpt import copies, small_gpt, small_llama, tokens, train_plainly

Run = Callable[..., tuple[int, str, str]]
GROUPED: dict[str, Any] = {"n_kv_heads": 4}
MODELS: dict[str, Callable[[], GPT]] = {
    "gpt2": lambda: small_gpt(2),
    "gpt2, rotary": lambda: small_gpt(2, rope=Rope()),
    "llama": lambda: small_llama(2, **GROUPED),
    "mistral": lambda: small_llama(2, architecture="mistral", window=5, **GROUPED),
    "qwen3": lambda: small_llama(2, architecture="qwen3", qk_norm=True, **GROUPED),
    "parallel": lambda: small_gpt(2, parallel_residual=True, shared_norm=True, qkv_bias=False),
}


def logits(model: GPT) -> Tensor:
    with torch.no_grad():
        return model.eval()(tokens(3, 20))


def with_equal_heads(model: GPT, left: int) -> GPT:
    """Each K/V head as the first of its group."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".attn.k." in name or ".attn.v." in name:
                heads = parameter.view(left, 4 // left, -1)
                heads.copy_(heads[:, :1].clone().expand_as(heads))
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("experts", "used"), [(1, 1), (4, 1), (4, 2), (3, 3)])
def test_copied_experts_compute_what_the_mlp_did(name: str, experts: int, used: int) -> None:
    model = MODELS[name]()
    before, kept = logits(model), copies(model.named_parameters())
    changed = upcycle(model, {"n_experts": experts, "n_experts_used": used})
    torch.testing.assert_close(logits(changed), before, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(kept[name], value) for name, value in model.named_parameters())
    assert {name: tuple(p.shape) for name, p in changed.named_parameters()} == parameter_shapes(changed.config)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("left", [1, 2, 4])
def test_pooling_heads_that_are_equal_changes_nothing(name: str, left: int) -> None:
    model = with_equal_heads(MODELS[name](), left)
    changed = upcycle(model, {"n_kv_heads": left})
    assert changed.config.n_kv_heads == left
    torch.testing.assert_close(logits(changed), logits(model), rtol=1e-5, atol=1e-5)


def test_as_many_heads_as_before_is_the_identity_and_fewer_is_not() -> None:
    model = small_gpt(2)
    same = upcycle(model, {"n_kv_heads": 4})
    assert same.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), model.parameters(), strict=True))
    assert not torch.allclose(logits(upcycle(model, {"n_kv_heads": 2})), logits(model), atol=1e-2)


@given(left=st.integers(1, 4), share=st.integers(1, 4), width=st.integers(1, 5), bias=st.booleans(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_pooled_heads_are_the_means_of_neighbours(left: int, share: int, width: int, bias: bool, data: Any) -> None:
    shape = (left * share * width,) if bias else (left * share * width, 3)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    rows = torch.randn(shape, generator=generator)
    found = pooled(rows, left * share, left)
    for head in range(left):
        parts = [rows[(head * share + i) * width :][:width] for i in range(share)]
        torch.testing.assert_close(found[head * width :][:width], sum(parts) / share)
    assert torch.equal(pooled(rows, left * share, left * share), rows)


def test_in_steps_or_at_once_and_both_changes_together() -> None:
    model = small_llama(2, **GROUPED)
    once, steps = upcycle(model, {"n_kv_heads": 1}), upcycle(upcycle(model, {"n_kv_heads": 2}), {"n_kv_heads": 1})
    torch.testing.assert_close(logits(once), logits(steps))
    both = upcycle(model, {"n_kv_heads": 1, "n_experts": 4, "n_experts_used": 2})
    torch.testing.assert_close(logits(both), logits(once), rtol=1e-5, atol=1e-5)


def test_experts_part_in_training_and_the_source_stays() -> None:
    model = small_gpt(1)
    kept = copies(model.named_parameters())
    changed = upcycle(model, {"n_experts": 2, "n_experts_used": 1})
    train_plainly(changed.train(), 3)
    first, second = (changed.get_parameter(f"blocks.0.mlp.experts.{e}.up.weight") for e in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(kept["blocks.0.mlp.up.weight"], model.get_parameter("blocks.0.mlp.up.weight"))
    again = upcycle(model, {"n_experts": 2, "n_experts_used": 1}, seed=0)
    other = upcycle(model, {"n_experts": 2, "n_experts_used": 1}, seed=1)
    routers = [each.get_parameter("blocks.0.mlp.router.weight") for each in (again, other)]
    assert not torch.equal(*routers)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope": Rope()}, "positions are learned vectors"),
        ({"gated_mlp": True, "activation": "silu"}, "another activation.*gate is a third matrix"),
        ({"norm": "rmsnorm", "norm_bias": False}, "LayerNorm takes the mean away.*norm_bias.*no rule"),
        ({"d_model": 32}, "no rule makes the new weights"),
        ({"n_kv_heads": 3}, "n_heads 4 is not a multiple"),
        ({"n_experts": 4}, "n_experts_used 0 cannot be picked"),
        ({"n_experts": 2, "n_experts_used": 1, "expert_weights_sum_to_one": False}, "sum to less than one"),
        ({"experts": 2}, "no config field is called experts"),
    ],
)
def test_what_is_not_defined_is_refused_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){reason}"):
        upcycle(small_gpt(1), changes)


def test_odd_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 heads cannot be pooled into 4 equal groups"):
        upcycle(small_llama(1), {"n_kv_heads": 4})
    sparse = small_gpt(1, n_experts=2, n_experts_used=1)
    with pytest.raises(ConfigError, match="has 2 already"):
        upcycle(sparse, {"n_experts": 4})
    with pytest.raises(ConfigError, match="has 2 already"):
        upcycle(sparse, {"n_experts": 0, "n_experts_used": 0})
    assert upcycle(sparse, {"n_kv_heads": 2}).config.n_experts == 2
    adapted = small_gpt(1)
    add_lora(adapted, LoRA(2))
    with pytest.raises(LoadstoneError, match="Merge an adapter first"):
        upcycle(adapted, {"n_kv_heads": 2})


@pytest.mark.parametrize(
    ("name", "changes", "dialect"),
    [
        ("llama", {"n_experts": 4, "n_experts_used": 2}, "mixtral/hf"),
        ("llama", {"n_kv_heads": 2}, "llama/hf"),
        ("mistral", {"n_experts": 4, "n_experts_used": 2}, "mixtral/hf"),
        ("qwen3", {"n_experts": 4, "n_experts_used": 2}, "qwen3_moe/hf"),
        ("gpt2", {"n_experts": 4, "n_experts_used": 2}, "gpt2/loadstone"),
        ("gpt2", {"n_kv_heads": 2}, "gpt2/loadstone"),
    ],
)
def test_the_folder_is_certified_and_comes_back(
    name: str, changes: dict[str, int], dialect: str, tmp_path: Path
) -> None:
    changed = upcycle(MODELS[name](), changes)
    assert save_model(changed, tmp_path / "model")["written"]["dialect"] == dialect
    again, _ = load(tmp_path / "model")
    assert again.config == changed.config
    assert torch.equal(logits(again), logits(changed))
    assert all(found.ok for found in check(tmp_path / "model"))


def test_the_command(run: Run, tmp_path: Path) -> None:
    save_model(MODELS["llama"](), tmp_path / "old")
    status, out, err = run("upcycle", tmp_path / "old", tmp_path / "new", "--experts", 4, "--json")  # 2 of them used
    report = json.loads(out)
    assert (status, report["dialect"]) == (0, "mixtral/hf"), err
    assert report["logits_changed"] < 1e-5 < report["largest"]
    assert report["parameters"][0] == report["active"][0] < report["active"][1] < report["parameters"][1]
    status, out, err = run("upcycle", tmp_path / "new", tmp_path / "newer", "--kv-heads", 2)
    assert (status, err) == (0, "")
    assert all(text in out for text in ("logits     changed by at most", "mixtral/hf"))
    for arguments, text in (
        ((), "nothing is to be changed"),
        (("--change", "gated_mlp=false"), "gate is a third matrix"),
        (("--kv-heads", 3), "not a multiple"),
    ):
        status, out, err = run("upcycle", tmp_path / "new", tmp_path / "more", *arguments)
        assert (status, out) == (2, "")
        assert text in err
    assert "lies there" in run("upcycle", tmp_path / "new", tmp_path / "new", "--kv-heads", 2, "--force")[2]
    assert not (tmp_path / "more").exists()


def test_the_cookbook_in_a_tiny_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("refine", Path(__file__).parent.parent / "examples" / "refine.py")
    assert spec
    assert spec.loader
    refine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(refine)
    monkeypatch.setattr(refine, "BASE", {"n_layers": 1, "n_heads": 4, "d_model": 16, "context_length": 8})
    text = tmp_path / "text.txt"
    text.write_text("The river runs past the mill, and the mill grinds the corn.\n" * 20)
    where = [str(text), str(tmp_path / "runs"), "--steps", "12", "--seeds", "1", "--picture", str(tmp_path / "l.svg")]
    monkeypatch.setattr(sys, "argv", ["refine.py", *where])
    refine.main()
    rows = [line.split("|")[1].strip(" `") for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == ["gpt2", "rmsnorm", "gqa", "rope", "swiglu", "moe"]
    model, _ = load(tmp_path / "runs" / "moe-0" / "best")
    c = model.config
    assert (c.norm, c.n_kv_heads, bool(c.rope), c.gated_mlp, c.n_experts) == ("rmsnorm", 2, True, True, 4)
    assert b"<svg" in (tmp_path / "l.svg").read_bytes()
