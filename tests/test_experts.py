"""Sparse experts: what is trained, frozen, adapted, compiled and scored is what the definition says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from loadstone.config import GPTConfig
from loadstone.errors import ConfigError
from loadstone.finetune.lora import LoRA, adapted, add_lora, merge
from loadstone.finetune.selectors import Parts
from loadstone.kernels import quick_scoring, speed_up
from loadstone.model import GPT, Experts
from small_gpt import loss_of, small_gpt, small_llama, tokens, train_plainly

SPARSE = {"n_experts": 4, "n_experts_used": 2}


def plainly(module: Experts, x: Tensor) -> Tensor:
    """Every expert on every token, weighted with zero unless it is picked."""
    shares = F.linear(x, module.router.weight).softmax(-1)
    lowest = shares.sort(-1, descending=True).values[..., module.n_used - 1, None]
    shares = torch.where(shares >= lowest, shares, 0.0)
    shares = shares / shares.sum(-1, keepdim=True) if module.sum_to_one else shares
    return sum((shares[..., e, None] * expert(x) for e, expert in enumerate(module.experts)), torch.zeros(()))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sum_to_one", [False, True])
@pytest.mark.parametrize("used", [1, 2, 4])
def test_values_and_gradients_equal_the_plain_definition(used: int, sum_to_one: bool, training: bool) -> None:
    model = small_llama(1, n_experts=4, n_experts_used=used, expert_weights_sum_to_one=sum_to_one).train(training)
    module = model.blocks[0].mlp
    assert isinstance(module, Experts)
    x = torch.randn(2, 7, 16, requires_grad=True)
    wanted = (x, *module.parameters())
    results = [
        torch.autograd.grad(y.square().sum(), wanted, allow_unused=True) for y in (module(x), plainly(module, x))
    ]
    torch.testing.assert_close(module(x), plainly(module, x), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) <= (not training)
        torch.testing.assert_close(torch.zeros_like(theirs) if ours is None else ours, theirs, rtol=1e-4, atol=1e-5)


def test_an_expert_without_tokens_has_a_gradient_of_zeros_in_training() -> None:
    """Ranks that add up gradients must agree on which there are; so does an optimizer's state."""
    model = small_llama(1, n_experts=8, n_experts_used=1).train()
    speed_up(model)
    model(torch.zeros(1, 1, dtype=torch.long)).sum().backward()
    touched = [bool(p.grad.any()) for n, p in model.named_parameters() if ".down." in n and p.grad is not None]
    assert len(touched) == 8
    assert sum(touched) == 1


@pytest.mark.parametrize("fields", [SPARSE, {"n_experts": 3, "n_experts_used": 1, "mlp_bias": True}])
def test_training_learns_and_its_kernels_give_torchs_gradients(fields: dict[str, int]) -> None:
    model, fast = small_gpt(2, **fields).train(), small_gpt(2, **fields).train()
    speed_up(fast)
    for one in (model, fast):
        loss_of(one, tokens()).backward()  # type: ignore[no-untyped-call]
    for (name, a), b in zip(model.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)
    before = loss_of(model, tokens(seed=0)).item()
    model.zero_grad()
    train_plainly(model, 20)
    assert loss_of(model, tokens(seed=0)).item() < before


def test_recomputation_and_packed_rows() -> None:
    model = small_llama(2, **SPARSE).train()
    loss_of(model, tokens()).backward()  # type: ignore[no-untyped-call]
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.recompute = True
    loss_of(model, tokens()).backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_adapters_stand_beside_every_expert_and_not_beside_the_router() -> None:
    model = small_llama(2, **SPARSE)
    before = model(tokens())
    names = add_lora(model, LoRA(rank=2, targets=("q", "up", "down")))
    assert [name for name in names if name.startswith("blocks.0.")] == [
        "blocks.0.attn.q",
        *(f"blocks.0.mlp.experts.{e}.{part}" for e in range(4) for part in ("up", "down")),
    ]
    assert torch.equal(model(tokens()), before)
    train_plainly(model.train(), 3)
    model.eval()
    trained = model(tokens())
    assert len(list(adapted(model))) == 2 * (1 + 8)
    merge(model)
    torch.testing.assert_close(model(tokens()), trained, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="'router' is no target"):
        LoRA(rank=2, targets=("router",))


def test_selectors_name_a_block_with_its_experts() -> None:
    parts = Parts.of(small_llama(2, **SPARSE))
    assert {"blocks.1.mlp.router.weight", "blocks.1.mlp.experts.3.gate.weight"} <= parts.select("blocks.1")


def test_scoring_kernels_give_the_same() -> None:
    model = small_gpt(2, **SPARSE).eval()
    with torch.inference_mode():
        expected = model(tokens())
        with quick_scoring(model):
            torch.testing.assert_close(model(tokens()), expected, rtol=1e-4, atol=1e-4)


def test_the_router_is_computed_in_float32_in_any_type() -> None:
    """Shares in bfloat16 would be multiples of 1/256."""
    module = small_llama(1, n_experts=4, n_experts_used=4).blocks[0].mlp
    assert isinstance(module, Experts)
    seen: list[torch.dtype] = []
    kept = F.softmax

    def watched(x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        seen.append(dtype)
        return kept(x, dim, dtype=dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "softmax", watched)
        assert module.bfloat16()(torch.randn(1, 3, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert seen == [torch.float32]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"n_experts": 4}, "n_experts_used 0 cannot be picked out of n_experts 4"),
        ({"n_experts": 2, "n_experts_used": 3}, "n_experts_used 3 cannot be picked out of n_experts 2"),
        ({"n_experts_used": 1}, "n_experts_used 1 cannot be picked out of n_experts 0"),
        ({"n_experts": -1, "n_experts_used": -1}, "n_experts must be a whole number"),
        ({"n_experts": True, "n_experts_used": True}, "n_experts must be a whole number"),
        ({"window": -1}, "window must be a number of tokens"),
        ({"window": 2.5}, "window must be a number of tokens"),
        ({"qk_norm": 1}, "qk_norm must be true or false"),
        ({"shared_norm": True}, "shared_norm needs parallel_residual"),
        ({"head_bias": True}, "head_bias needs tied = false"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        GPTConfig(61, 24, 16, 2, 4, **fields)  # type: ignore[arg-type]


def test_off_fields_cost_no_module() -> None:
    names = {name for name, _ in GPT(GPTConfig(61, 24, 16, 1, 4)).named_modules()}
    assert not any(part in name for name in names for part in ("router", "experts", "q_norm", "k_norm"))
