"""LoRA: it begins as the base to the bit, learns beside it, and merges into a plain model with the base's names."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from loadstone.errors import ConfigError, LoadstoneError
from loadstone.finetune.lora import LoRA, LoRALinear, adapted, add_lora, merge, merged_copy
from loadstone.finetune.presets import strategy_for
from loadstone.finetune.selectors import find_gpt
from loadstone.finetune.strategy import untie
from loadstone.model import GPT, Linear
from loadstone.save import save_model
from loadstone.train.losses import head_loss
from small_gpt import Wrapped, copies, loss_of, small_gpt, small_llama, tokens, train_plainly

KINDS: list[Any] = [small_gpt, small_llama, lambda: Wrapped(small_gpt(3))]
EVERYTHING = ("q", "k", "v", "out", "gate", "up", "down", "head")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", KINDS)
def test_an_adapter_begins_by_changing_nothing(make: Any, dtype: torch.dtype) -> None:
    model = make().to(dtype)
    before, state, ids = model(tokens()), copies(model.named_parameters()), tokens()
    same = dict(model.named_parameters())
    layers = add_lora(model, LoRA(rank=4))
    assert torch.equal(model(ids), before)
    for name, parameter in model.named_parameters():
        if name.endswith(("lora_a", "lora_b")):
            assert parameter.requires_grad
            assert parameter.dtype == torch.float32  # an optimizer's steps vanish in bf16
        else:
            assert parameter is same[name]  # the base itself, under its own name
            assert not parameter.requires_grad
            assert torch.equal(parameter, state[name])
    assert len(layers) == sum(isinstance(m, Linear) for m in find_gpt(model)[1].blocks.modules())


@pytest.mark.parametrize(
    ("settings", "model"),
    [
        (LoRA(rank=4, alpha=32), small_gpt()),
        (LoRA(rank=4, alpha=3, targets=EVERYTHING), small_llama()),
        (LoRA(rank=2, alpha=8, rslora=True), Wrapped(small_gpt(3))),
        (LoRA(rank=1, targets=("v",)), small_llama()),
    ],
)
def test_merged_is_as_unmerged_and_has_the_base_s_names(settings: LoRA, model: nn.Module) -> None:
    names = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    start = copies(model.named_parameters())
    before = model(tokens())
    layers = add_lora(model, settings)
    train_plainly(model, 6)
    assert all(torch.equal(parameter, start[name]) for name, parameter in model.named_parameters() if name in start)
    trained = model(tokens()).detach()
    assert (trained - before).abs().max() > 0.1
    a, b = (dict(model.named_parameters())[f"{layers[0]}.lora_{x}"].detach().clone() for x in "ab")
    twin = merged_copy(model)
    done = merge(model)
    for plain in (model, twin):
        assert (plain(tokens()) - trained).abs().max() < 1e-5
        assert [(name, tuple(parameter.shape)) for name, parameter in plain.named_parameters()] == names
        assert not any(isinstance(module, LoRALinear) for module in plain.modules())
    # By hand, for one layer: W + scale * B A, in that order.
    scale = settings.alpha / (math.sqrt(settings.rank) if settings.rslora else settings.rank)
    name = f"{layers[0]}.weight"
    expected = start[name] + scale * (b @ a)
    torch.testing.assert_close(dict(model.named_parameters())[name].detach(), expected, rtol=0, atol=1e-6)
    assert done.layers == len(layers)
    assert done.update > 0.01
    assert done.lost < 1e-4


def test_only_the_adapter_learns_and_its_b_first() -> None:
    model = small_llama()
    add_lora(model, LoRA(rank=2))
    loss_of(model, tokens()).backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (not name.endswith(("lora_a", "lora_b")))
        if name.endswith("lora_a"):
            assert parameter.grad is not None
            assert not parameter.grad.any()  # B is zero
        if name.endswith("lora_b"):
            assert parameter.grad is not None
            assert parameter.grad.any()


def test_the_strategy_lora_trains_the_adapter_and_a_classifier_s_score() -> None:
    model = Wrapped(small_gpt(2))
    layers = add_lora(model, LoRA(rank=2))
    strategy = strategy_for(model, "lora")
    strategy.apply(model, 0, None)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{layer}.lora_{x}" for layer in layers for x in "ab"} | {"score.weight"}
    assert "blocks.0-1 (lora)" in strategy.describe(model)
    assert strategy.lr_scale(model, f"{layers[0]}.lora_a") == 1


def test_the_gradient_is_that_of_the_formula() -> None:
    """Against autograd of W + scale * B A written out, in double."""
    base = Linear(7, 5, bias=True).double()
    torch.manual_seed(3)
    for parameter in base.parameters():
        parameter.data.normal_()
    layer = LoRALinear(base, LoRA(rank=3, alpha=5))
    layer.lora_b.data.normal_()
    a, b = layer.lora_a.detach().clone().requires_grad_(), layer.lora_b.detach().clone().requires_grad_()
    x = torch.randn(4, 7, dtype=torch.float64)
    loss = layer(x).square().sum()
    expected = (x @ (base.weight + 5 / 3 * b @ a).T + base.bias).square().sum()
    torch.testing.assert_close(loss, expected)
    for got, want in zip(
        torch.autograd.grad(loss, [layer.lora_a, layer.lora_b]), torch.autograd.grad(expected, [a, b]), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_the_head_s_adapter_reaches_a_loss_that_uses_its_matrix_alone() -> None:
    model = small_llama()
    add_lora(model, LoRA(rank=2, targets=("head",)))
    assert model.head is not None
    assert [name for name, _ in adapted(model)] == ["head"]
    dict(model.named_parameters())["head.lora_b"].data.normal_()
    ids = tokens()
    hidden, targets = model.hidden(ids[:, :-1]), ids[:, 1:]
    fused = head_loss(hidden, model.head.weight, targets)
    plain = loss_of(model, ids) * targets.numel()
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(model.head(hidden), model.logits(hidden))
    fused.backward()  # type: ignore[no-untyped-call]
    parameters = dict(model.named_parameters())
    assert {name for name, p in parameters.items() if p.grad is not None} == {"head.lora_a", "head.lora_b"}
    assert parameters["head.lora_a"].grad is not None
    assert parameters["head.lora_a"].grad.any()


def test_dropout_is_on_the_adapter_s_input_and_in_training_only() -> None:
    model = small_gpt(2)
    layers = add_lora(model, LoRA(rank=2, dropout=0.5))
    for layer in layers:
        dict(model.named_parameters())[f"{layer}.lora_b"].data.normal_()
    model.train()
    assert not torch.equal(model(tokens()), model(tokens()))
    model.eval()
    first = model(tokens())
    assert torch.equal(first, model(tokens()))
    merge(model)
    assert (model(tokens()) - first).abs().max() < 1e-4


def test_bf16_under_autocast_and_without() -> None:
    model = small_llama().bfloat16()
    add_lora(model, LoRA(rank=4, targets=EVERYTHING))
    train_plainly(model, 3, lr=1e-3)
    plain = model(tokens())
    assert plain.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(tokens())
        loss_of(model, tokens()).backward()  # type: ignore[no-untyped-call]
    assert (plain.float() - cast.float()).abs().max() < 0.2


def test_rounding_to_bf16_is_measured() -> None:
    """Small updates of bf16 weights are rounded away; the merge says so, and in float32 they stay."""
    lost = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = small_llama(seed=5).bfloat16().to(dtype)
        add_lora(model, LoRA(rank=2))
        torch.manual_seed(0)
        for _, layer in adapted(model):
            layer.lora_a.data.normal_(0, 0.1)
            layer.lora_b.data.normal_(0, 1e-4)
        lost[dtype] = merge(model).lost
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert lost[torch.float32] < 0.01
    assert lost[torch.bfloat16] > 0.5


def test_merging_leaves_the_base_s_tensors_alone_and_keeps_flags() -> None:
    model = small_gpt(2)
    model.eval()
    base = dict(model.named_parameters())
    before = copies(base.items())
    first, second = add_lora(model, LoRA(rank=2, targets=("out",)))
    base[f"{second}.weight"].requires_grad_()
    model.get_parameter(f"{first}.lora_b").data.normal_()
    merge(model)
    assert all(torch.equal(base[name], before[name]) for name in base)  # they may be a mapped file's pages
    assert not torch.equal(model.get_parameter(f"{first}.weight"), before[f"{first}.weight"])
    assert not model.get_parameter(f"{first}.weight").requires_grad
    assert model.get_parameter(f"{second}.weight").requires_grad
    assert model.get_parameter(f"{first}.bias") is base[f"{first}.bias"]
    assert not model.get_submodule(first).training
    assert merge(model).layers == 0


def test_a_merged_copy_leaves_the_model_in_training() -> None:
    model = small_gpt(2)
    add_lora(model, LoRA(rank=2))
    train_plainly(model, 2)
    before = model(tokens())
    twin = merged_copy(model)
    assert twin.tok_emb.weight is model.tok_emb.weight  # shared, not copied
    assert len(list(adapted(model))) == 12
    assert torch.equal(model(tokens()), before)
    train_plainly(model, 1)
    assert not torch.equal(model(tokens()), before)


def test_an_unmerged_model_is_not_written_as_if_it_were_the_base(tmp_path: Any) -> None:
    model = small_gpt(2)
    add_lora(model, LoRA(rank=2))
    with pytest.raises(LoadstoneError, match="lora_a"):
        save_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_compiles() -> None:
    model = small_gpt(1, tied=False)
    add_lora(model, LoRA(rank=2, targets=("linear", "head")))
    for _, layer in adapted(model):
        layer.lora_b.data.normal_()
    run = torch.compile(lambda ids: model(ids), backend="eager")
    torch.testing.assert_close(run(tokens()), model(tokens()))


def tied(**fields: Any) -> GPT:
    return small_gpt(2, **fields)


@pytest.mark.parametrize(
    ("model", "settings", "problem"),
    [
        (tied, {"targets": ("head",)}, r"token embedding \(tied\).*untie the two first"),
        (tied, {"targets": ("gate",)}, "has no gate"),
        (tied, {"targets": ("tok_emb",)}, "'tok_emb' is no target.*0:lora,embeddings"),
        (tied, {"targets": ("c_attn",)}, "is no target; targets are linear, q, k"),
        (tied, {"targets": ()}, "at least one kind"),
        (tied, {"rank": 0}, "rank must be a positive whole number"),
        (tied, {"rank": 2.0}, "rank must be"),
        (tied, {"rank": 17}, r"rank 17 is more than blocks.0.attn.q has \(16 x 16\)"),
        (tied, {"alpha": 0}, "alpha must be a positive number"),
        (tied, {"alpha": math.nan}, "alpha must be"),
        (tied, {"alpha": math.inf}, "alpha must be"),
        (tied, {"dropout": 1}, "dropout must be at least 0 and below 1"),
        (tied, {"rslora": 1}, "rslora must be true or false"),
        (small_llama, {"targets": ("head",), "dropout": 0.1}, "knows no dropout"),
    ],
)
def test_what_cannot_be_an_adapter_is_refused_before_anything_changes(
    model: Any, settings: dict[str, Any], problem: str
) -> None:
    made = model()
    names = [name for name, _ in made.named_parameters()]
    with pytest.raises(ConfigError, match=problem) as caught:
        add_lora(made, LoRA(**settings))
    assert "\n" not in str(caught.value)
    assert [name for name, _ in made.named_parameters()] == names
    assert all(parameter.requires_grad for parameter in made.parameters())


def test_one_adapter_at_a_time_and_a_head_of_its_own_can_have_one() -> None:
    model = small_gpt(2)
    untie(model)
    before = model(tokens())
    assert add_lora(model, LoRA(rank=2, targets=("head", "linear", "q")))[-1] == "head"
    assert torch.equal(model(tokens()), before)
    with pytest.raises(ConfigError, match="has an adapter already"):
        add_lora(model, LoRA())
