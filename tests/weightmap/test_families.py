"""Every family against an independent forward pass, in every dialect, and what is caught if one detail is wrong."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import kin
from kin import KIN
from loadstone.config import GPTConfig
from loadstone.config.families import FAMILIES, SPARSE
from loadstone.convert import convert
from loadstone.load import load_model, open_source
from loadstone.model import GPT, Attention, Block, Experts
from loadstone.positions import rotate
from loadstone.weightmap import Translated, make_plan, table_for
from loadstone.weightmap.canonical import active_count, parameter_count
from loadstone.weightmap.ops import RotaryHalves
from memory import MemoryCheckpoint, same

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 89, 79, 32, 38, 46, 26, 43]
PLACES = [
    *((name, dialect) for name in KIN for dialect in ("hf", "gguf")),
    *((name, "stacked") for name, family in KIN.items() if family.experts),
]


def deviation(model: GPT, expected: NDArray[Any]) -> float:
    with torch.no_grad():
        return float(np.abs(model(torch.tensor([IDS]))[0].numpy() - expected).max())


def expected_of(name: str) -> NDArray[Any]:
    return kin.logits(KIN[name], kin.plain(KIN[name]), IDS)


@pytest.mark.parametrize(("name", "dialect"), PLACES)
def test_logits_equal_the_independent_forward_pass(name: str, dialect: str) -> None:
    identity = open_source(kin.checkpoint(KIN[name], dialect))
    # llama.cpp calls a Mistral `llama`, and its graph knows no window.
    architecture = "llama" if (name, dialect) == ("mistral", "gguf") else name
    assert identity.weight_map.name == f"{architecture}/{'gguf' if dialect == 'gguf' else 'hf'}"
    if architecture == "llama":
        identity = open_source(kin.checkpoint(KIN[name], dialect), config={"window": 5})
    assert deviation(load_model(identity), expected_of(name)) < 1e-4


def test_gptj_logits_equal_the_independent_forward_pass() -> None:
    tensors = kin.gptj_hf()
    identity = open_source(MemoryCheckpoint(tensors, metadata={"hf_config": kin.GPTJ_CONFIG}))
    assert identity.weight_map.name == "gptj/hf"
    assert deviation(load_model(identity), kin.gptj_logits(tensors, IDS)) < 1e-4


@pytest.mark.parametrize("name", KIN)
@pytest.mark.parametrize(("there", "back"), [("hf", "gguf"), ("gguf", "hf"), ("stacked", "hf"), ("stacked", "gguf")])
def test_one_dialect_becomes_the_other_bit_for_bit(name: str, there: str, back: str) -> None:
    if there == "stacked" and not KIN[name].experts:
        pytest.skip("has no experts")
    identity = open_source(kin.checkpoint(KIN[name], there))
    table = table_for(identity.config.architecture, back)
    translated = Translated(identity, table)
    found = {name: translated.read(name) for name in translated.tensors}
    assert same(found, kin.checkpoint(KIN[name], back).arrays)


@pytest.mark.parametrize("name", [name for name in KIN if KIN[name].experts])
def test_experts_one_by_one_in_an_old_gguf(name: str) -> None:
    """The first converters stored each expert by itself, under a number."""
    tensors = kin.as_gguf(KIN[name], kin.plain(KIN[name]))
    for stack in [tensor for tensor in tensors if "_exps" in tensor]:
        for e, matrix in enumerate(tensors.pop(stack)):
            tensors[stack.replace("_exps", f".{e}")] = matrix
    if name == "mixtral":
        identity = open_source(MemoryCheckpoint(tensors, metadata=kin.gguf_metadata(KIN[name])))
        assert deviation(load_model(identity), expected_of(name)) < 1e-4


@pytest.mark.parametrize("name", [*KIN, "gptj"])
def test_a_converted_folder_and_file_compute_the_same(name: str, tmp_path: Path) -> None:
    """Out to disk, with its config, and in again: hf for all, GGUF where llama.cpp has the family's graph."""
    if name == "gptj":
        source = MemoryCheckpoint(kin.gptj_hf(), metadata={"hf_config": kin.GPTJ_CONFIG})
    else:
        source = kin.checkpoint(KIN[name], "hf")
    wanted = load_model(open_source(source))(torch.tensor([IDS])).detach()
    targets = {"hf": tmp_path / "hf"} | ({"gguf": tmp_path / "model.gguf"} if FAMILIES[name].gguf else {})
    for to, place in targets.items():
        convert(source, place, to=to, parity=False, accept=("window",))
        identity = open_source(place, config={"window": 5} if name == "mistral" and to == "gguf" else None)
        assert torch.equal(load_model(identity)(torch.tensor([IDS])), wanted), to


# --- planted bugs: each leaves every shape alone, and must be seen

CONFIG_BUGS: dict[str, tuple[str, dict[str, Any]]] = {
    "window one too wide": ("mistral", {"window": 6}),
    "window one too narrow": ("mistral", {"window": 4}),
    "no window": ("mistral", {"window": 0}),
    "router weights as they come": ("mixtral", {"expert_weights_sum_to_one": False}),
    "one expert for each token": ("mixtral", {"n_experts_used": 1}),
    "three experts for each token": ("qwen3_moe", {"n_experts_used": 3}),
    "all of a head turned": ("phi3", {"rope": {"dims": 0}}),
    "another part of a head turned": ("phi3", {"rope": {"dims": 4}}),
}


@pytest.mark.parametrize("bug", CONFIG_BUGS)
def test_planted_config_bugs_are_caught(bug: str) -> None:
    name, fields = CONFIG_BUGS[bug]
    model = load_model(open_source(kin.checkpoint(KIN[name], "hf"), config=fields))
    assert deviation(model, expected_of(name)) > 1e-3


def with_table(source: MemoryCheckpoint, target: str, *ops: Any) -> GPT:
    """The model of a table in which one rule has other ops."""
    identity = open_source(source)
    table = identity.weight_map
    rules = tuple(dataclasses.replace(rule, ops=ops) if target in rule.target else rule for rule in table.rules)
    identity.plan = make_plan(identity.config, source.tensors, dataclasses.replace(table, rules=rules))
    return load_model(identity)


@pytest.mark.parametrize("part", ["q", "k"])
def test_pairs_taken_for_halves_are_caught(part: str) -> None:
    target = f"blocks.{{i}}.attn.{part}.weight"
    gptj = MemoryCheckpoint(kin.gptj_hf(), metadata={"hf_config": kin.GPTJ_CONFIG})
    assert deviation(with_table(gptj, target), kin.gptj_logits(gptj.arrays, IDS)) > 1e-3
    permuted = RotaryHalves("n_heads" if part == "q" else "n_kv_heads")
    qwen = kin.checkpoint(KIN["qwen2"], "gguf")
    assert deviation(with_table(qwen, target, permuted), expected_of("qwen2")) > 1e-3


def test_all_of_a_head_permuted_where_a_part_turns_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    gptj = MemoryCheckpoint(kin.gptj_hf(), metadata={"hf_config": kin.GPTJ_CONFIG})
    permute = RotaryHalves._permute

    def whole(self: RotaryHalves, array: NDArray[Any], config: GPTConfig, split: tuple[int, int]) -> NDArray[Any]:
        return permute(self, array, dataclasses.replace(config, rope=None), split)

    monkeypatch.setattr(RotaryHalves, "_permute", whole)
    assert deviation(load_model(open_source(gptj)), kin.gptj_logits(gptj.arrays, IDS)) > 1e-3


def test_norm_of_q_and_k_after_the_turn_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(open_source(kin.checkpoint(KIN["qwen3"], "hf")))
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    norms = iter([norm for attention in attentions for norm in (attention.q_norm, attention.k_norm)])

    def turned_then_normed(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        norm = next(norms)
        assert norm is not None
        return norm(rotate(x, cos, sin))

    monkeypatch.setattr("loadstone.model.rotate", turned_then_normed)
    for attention in attentions:
        attention.q_norm = None
    assert deviation(model, expected_of("qwen3")) > 1e-3


def test_another_norm_for_the_mlp_of_gptj_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = kin.gptj_hf()
    model = load_model(open_source(MemoryCheckpoint(tensors, metadata={"hf_config": kin.GPTJ_CONFIG})))
    for block in model.blocks:
        assert isinstance(block, Block)
        block.norm2 = model.norm  # of the same shape
    assert deviation(model, kin.gptj_logits(tensors, IDS)) > 1e-3


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_in_another_order_are_caught(name: str) -> None:
    model = load_model(open_source(kin.checkpoint(KIN[name], "hf")))
    for block in model.blocks:
        assert isinstance(block.mlp, Experts)
        block.mlp.experts = torch.nn.ModuleList([*block.mlp.experts][::-1])
    assert deviation(model, expected_of(name)) > 1e-3


@pytest.mark.parametrize("bias", ["lm_head.bias", "transformer.h.1.mlp.fc_in.bias"])
def test_a_lost_bias_of_gptj_is_caught_by_the_plan(bias: str) -> None:
    left = {name: value for name, value in kin.gptj_hf().items() if name != bias}
    assert not open_source(MemoryCheckpoint(left, metadata={"hf_config": kin.GPTJ_CONFIG})).plan.clean


# --- what a bare file shows


@pytest.mark.parametrize("name", ["qwen3", "phi3", "mixtral", "qwen3_moe", "gptj"])
def test_a_bare_file_is_recognised_by_its_tensors(name: str) -> None:
    tensors = kin.gptj_hf() if name == "gptj" else kin.as_hf(KIN[name], kin.plain(KIN[name]))
    heads = {"n_heads": 6} if name == "gptj" else {"n_heads": 6, "head_dim": 8, "n_kv_heads": 2}
    identity = open_source(MemoryCheckpoint(tensors), config=heads)
    assert identity.config.architecture == name
    assert identity.plan.clean
    assert any("n_experts_used = 2" in line for line in identity.assumed) == (name in SPARSE)


def test_counts_of_a_sparse_model_are_all_and_active() -> None:
    """By hand: of five experts two take part in a token."""
    config = open_source(kin.checkpoint(KIN["mixtral"], "hf")).config
    expert = 3 * kin.WIDTH * kin.D_FF
    whole = sum(array.size for array in kin.as_hf(KIN["mixtral"], kin.plain(KIN["mixtral"])).values())
    assert parameter_count(config) == whole
    assert active_count(config) == whole - kin.LAYERS * 3 * expert
    dense = open_source(kin.checkpoint(KIN["qwen2"], "hf")).config
    assert active_count(dense) == parameter_count(dense)


def test_the_page_of_dialects_is_current() -> None:
    """docs/dialects.md is what docs/dialects.py makes of the tables."""
    folder = Path(__file__).parents[2] / "docs"
    code = [sys.executable, str(folder / "dialects.py")]
    environment = {**os.environ, "PYTHONPATH": str(folder.parent / "src")}
    made = subprocess.run(code, capture_output=True, text=True, check=True, env=environment)
    assert made.stdout == (folder / "dialects.md").read_text(), "run: python docs/dialects.py > docs/dialects.md"


def test_attention_has_no_norm_where_the_field_is_off() -> None:
    block = GPT(GPTConfig(11, 12, 8, 1, 2)).blocks[0]
    assert isinstance(block.attn, Attention)
    assert block.attn.q_norm is block.attn.k_norm is None
