"""The count of operations is torch's own, product by product, for every family and every way to train."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from loadstone.config import PRESETS, GPTConfig, Rope
from loadstone.config.families import GPT_NEOX_FIELDS, LLAMA_FIELDS
from loadstone.model import GPT
from loadstone.train.flops import count, palm_per_token

LLAMA: dict[str, Any] = {"architecture": "llama", "rope": Rope(), "d_ff": 56} | LLAMA_FIELDS
FAMILIES = {
    "gpt2": GPTConfig(50, 32, 32, 3, 4),
    "gpt2 untied, without biases": GPTConfig(50, 32, 32, 3, 4, tied=False, qkv_bias=False, mlp_bias=False),
    "llama": GPTConfig(50, 32, 32, 2, 4, **LLAMA),
    "llama with groups and wide heads": GPTConfig(50, 32, 32, 2, 4, n_kv_heads=2, head_dim=16, tied=False, **LLAMA),
    "qk norm, window": GPTConfig(50, 32, 32, 2, 4, n_kv_heads=2, window=5, qk_norm=True, **LLAMA),
    "gptj": GPTConfig(
        50,
        32,
        32,
        2,
        4,
        architecture="gptj",
        rope=Rope(dims=4),
        parallel_residual=True,
        shared_norm=True,
        tied=False,
        head_bias=True,
    ),
    "neox": GPTConfig(50, 32, 32, 2, 4, architecture="gpt_neox", rope=Rope(dims=4), **GPT_NEOX_FIELDS),
}
T = 24


def counted(config: GPTConfig, *, recompute: bool = False, trainable: Collection[str] | None = None) -> tuple[int, int]:
    """(forward, backward with recomputation) as torch counts them. The math kernels: flash ones compute some twice."""
    model = GPT(config).train()
    model.recompute = recompute
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable is None or name in trainable)
    ids = torch.randint(0, config.vocab_size, (2, T))
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            logits = model(ids)
        with FlopCounterMode(display=False) as backward:
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()  # type: ignore[no-untyped-call]
    return forward.get_total_flops() // 2, backward.get_total_flops() // 2


EXPERTS = {
    "mixtral": GPTConfig(50, 32, 32, 2, 4, n_experts=4, n_experts_used=2, **LLAMA),
    "experts of gpt2": GPTConfig(50, 32, 32, 2, 4, n_experts=3, n_experts_used=1),
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name: str, recompute: bool) -> None:
    """However the router shares the tokens out, their products are the same in all; frozen, it is an even share."""
    found = count(EXPERTS[name], T, recompute=recompute)
    assert (found.forward, found.backward + found.again) == counted(EXPERTS[name], recompute=recompute)
    config = EXPERTS[name]
    assert palm_per_token(config, T) < palm_per_token(replace(config, n_experts_used=config.n_experts), T)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_all_families(name: str, recompute: bool) -> None:
    found = count(FAMILIES[name], T, recompute=recompute)
    assert (found.forward, found.backward + found.again) == counted(FAMILIES[name], recompute=recompute)
    assert found.backward == 2 * found.forward
    assert found.total == found.forward + found.backward + found.again


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_whatever_is_frozen(data: st.DataObject) -> None:
    config = FAMILIES[data.draw(st.sampled_from(sorted(FAMILIES)))]
    names = [name for name, _ in GPT(config).named_parameters()]
    trainable = data.draw(st.sets(st.sampled_from(names), min_size=1, max_size=4))
    found = count(config, T, recompute=True, trainable=trainable)
    assert (found.forward, found.backward) == counted(config, trainable=trainable)
    _, backward = counted(config, recompute=True, trainable=trainable)
    assert found.backward <= backward <= found.backward + found.again


def test_freezing_the_first_half_saves_a_third_of_gpt2s_work() -> None:
    config = PRESETS["gpt2"]
    names = [name for name, _ in GPT(FAMILIES["gpt2"]).named_parameters()]
    assert "tok_emb.weight" in names
    last = [f"blocks.{i}.{n.split('.', 2)[2]}" for i in range(6, 12) for n in names if n.startswith("blocks.0.")]
    all_, half = count(config, 1024), count(config, 1024, trainable=last)
    assert 0.5 < half.total / all_.total < 0.75


def test_causal_attention_is_half_the_pairs_and_the_diagonal() -> None:
    config = FAMILIES["gpt2"]
    whole, causal = count(config, T).forward, count(config, T, causal=True).forward
    pairs = T * T - T * (T + 1) // 2
    assert whole - causal == config.n_layers * 4 * config.n_heads * config.head_dim * pairs


def test_gpt2s_published_figure() -> None:
    """nanoGPT's estimate_mfu: N = 124,439,808 less the positions, L H Q T = 12 x 768 x 1024."""
    n = 124_439_808 - 1024 * 768
    assert palm_per_token(PRESETS["gpt2"], 1024) == 6 * n + 12 * 12 * 768 * 1024
    untied = replace(PRESETS["gpt2"], tied=False)
    assert palm_per_token(untied, 1024) == palm_per_token(PRESETS["gpt2"], 1024)  # the table of ids multiplies nothing


@pytest.mark.parametrize("name", FAMILIES)
def test_the_convention_differs_from_the_exact_count_by_norms_and_biases_alone(name: str) -> None:
    config = FAMILIES[name]
    vectors = sum(p.numel() for p in GPT(config).parameters() if p.dim() == 1)
    assert palm_per_token(config, T) * T == count(config, T).total + 6 * vectors * T
