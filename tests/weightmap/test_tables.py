"""Every dialect's table: the same model comes out of all of them bit for bit, judged by an independent forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import reference
from loadstone.config import GPTConfig, Rope
from loadstone.config.families import FAMILIES, SPARSE
from loadstone.load import load_model, open_source
from loadstone.weightmap import TABLES, WeightMap, apply, make_plan, parameter_shapes
from loadstone.weightmap.gpt2 import HF, OPENAI
from loadstone.weightmap.ops import Op, RotaryHalves, SplitQKV, Squeeze, Transpose
from loadstone.weightmap.rules import Rule
from memory import MemoryCheckpoint, same
from small_models import (
    CHECKPOINTS,
    CONFIGS,
    GPT2,
    GPT2_WRITERS,
    LLAMA_WRITERS,
    META,
    NEOX,
    NEOX_CONFIG,
    gpt2_checkpoint,
    llama_checkpoint,
)


def gpt2_options(dialect: str) -> dict[str, Any]:
    heads = {} if dialect == "gguf" else {"n_heads": 4}
    return {"config": heads | ({"activation": "gelu_tanh"} if dialect == "nanogpt" else {})}


def logits(model: torch.nn.Module, ids: list[int]) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        return model(torch.tensor([ids]))[0].numpy()


IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 89, 79, 32, 38, 46, 26, 43]


@pytest.mark.parametrize("dialect", GPT2_WRITERS)
def test_gpt2_logits_equal_the_independent_forward_pass(dialect: str) -> None:
    identity = open_source(gpt2_checkpoint(dialect), **gpt2_options(dialect))
    assert (identity.weight_map.architecture, identity.weight_map.dialect) == ("gpt2", dialect)
    model = load_model(identity)
    assert identity.config.tied
    expected = reference.gpt2_logits(GPT2, IDS, n_heads=4)
    assert np.abs(logits(model, IDS) - expected).max() < 1e-4


@pytest.mark.parametrize("dialect", LLAMA_WRITERS)
def test_llama_logits_equal_the_independent_forward_pass(dialect: str) -> None:
    options: dict[str, Any] = {} if dialect == "gguf" else {"config": {"n_heads": 6, "head_dim": 8, "n_kv_heads": 2}}
    identity = open_source(llama_checkpoint(dialect), **options)
    assert (identity.weight_map.architecture, identity.weight_map.dialect) == ("llama", dialect)
    expected = reference.llama_logits(META, IDS, n_heads=6, n_kv_heads=2)
    assert np.abs(logits(load_model(identity), IDS) - expected).max() < 1e-4


@pytest.mark.parametrize("head", ["embed_out.weight", "lm_head.weight"])
def test_gpt_neox_logits_equal_the_independent_forward_pass(head: str) -> None:
    """Files call the head embed_out; the live module of transformers 5 calls it lm_head."""
    tensors = {name.replace("embed_out.weight", head): value for name, value in NEOX.items()}
    identity = open_source(MemoryCheckpoint(tensors), config=NEOX_CONFIG)
    assert identity.weight_map.name == "gpt_neox/hf"
    expected = reference.gpt_neox_logits(NEOX, IDS, n_heads=4, rotary=4)
    assert np.abs(logits(load_model(identity), IDS) - expected).max() < 1e-4


@pytest.mark.parametrize(
    "wrong",
    [{"parallel_residual": False}, {"rope": {"dims": 8}}, {"activation": "gelu_tanh"}, {"n_heads": 2, "head_dim": 24}],
)
def test_a_wrong_gpt_neox_config_is_seen(wrong: dict[str, Any]) -> None:
    identity = open_source(MemoryCheckpoint(NEOX), config=NEOX_CONFIG | wrong)
    expected = reference.gpt_neox_logits(NEOX, IDS, n_heads=4, rotary=4)
    assert np.abs(logits(load_model(identity), IDS) - expected).max() > 10 * TOLERANCE


def test_all_gpt2_dialects_load_to_the_same_bits() -> None:
    states = []
    for dialect in GPT2_WRITERS:
        model = load_model(open_source(gpt2_checkpoint(dialect), **gpt2_options(dialect)))
        states.append({name: p.detach().numpy() for name, p in model.named_parameters()})
    assert all(same(states[0], other) for other in states[1:])


FOREIGN = [table for table in TABLES if table.dialect != "loadstone"]


@pytest.mark.parametrize("table", FOREIGN, ids=lambda table: table.name)
def test_a_table_read_backwards_writes_the_dialect(table: WeightMap) -> None:
    """Export is the inverse of import: the model's parameters give back the very tensors."""
    checkpoint = CHECKPOINTS[table.architecture](table.dialect)
    identity = open_source(checkpoint, config=CONFIGS[table.architecture])
    model = load_model(identity)
    parameters = {name: p.detach().numpy() for name, p in model.named_parameters()}
    for step in identity.plan.steps:
        (back,) = apply(step.ops, [parameters[t] for t in step.targets], identity.config, inverse=True)
        assert np.array_equal(back, checkpoint.arrays[step.source]), step.source


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_a_table_names_every_parameter_of_its_architecture(table: WeightMap) -> None:
    config = GPTConfig(11, 12, 8, 2, 2, tied=table.dialect == "openai")
    if table.architecture != "gpt2":
        family = {"tied": False} | FAMILIES[table.architecture].fields
        family |= {"n_experts": 3, "n_experts_used": 1} if table.architecture in SPARSE else {}
        config = GPTConfig(11, 12, 8, 2, 2, architecture=table.architecture, rope=Rope(), **family)
    targets = [target for rule in table.expand(2, config.n_experts) for target in rule.target]
    assert set(parameter_shapes(config)) <= set(targets)
    assert len(targets) == len(set(targets))


# --- planted bugs: each makes a model of the right shapes with the wrong numbers, and must be seen


def swap(table: WeightMap, target: str, ops: tuple[Op, ...]) -> WeightMap:
    """The table with other ops for the rule that fills `target`."""
    rules = tuple(Rule(r.source, r.target, ops) if target in r.target else r for r in table.rules)
    return dataclasses.replace(table, rules=rules)


def exchange(table: WeightMap, a: str, b: str) -> WeightMap:
    """The table with the targets of two rules exchanged."""
    name = {a: b, b: a}
    rules = tuple(Rule(r.source, tuple(name.get(t, t) for t in r.target), r.ops) for r in table.rules)
    return dataclasses.replace(table, rules=rules)


Q, OUT = "blocks.{i}.attn.q.weight", "blocks.{i}.attn.out.weight"
NORMS = [f"blocks.{{i}}.norm{n}.{part}" for n in (1, 2) for part in ("weight", "bias")]
GPT2_BUGS: dict[str, Callable[[], WeightMap]] = {
    "square c_proj not transposed (hf)": lambda: swap(HF, OUT, ()),
    "square c_proj not transposed (openai)": lambda: swap(OPENAI, OUT, (Squeeze(),)),
    "q, k, v in another order (k, q, v)": lambda: swap(HF, Q, (Transpose(), SplitQKV("kqv"))),
    "q, k, v in another order (q, v, k)": lambda: swap(HF, Q, (Transpose(), SplitQKV("qvk"))),
    "q, k, v bias in another order": lambda: swap(HF, "blocks.{i}.attn.q.bias", (SplitQKV("kqv"),)),
    "q, k, v interleaved per head": lambda: swap(HF, Q, (Transpose(), SplitQKV(per_head=True))),
    "norm 1 and 2 exchanged": lambda: exchange(exchange(HF, NORMS[0], NORMS[2]), NORMS[1], NORMS[3]),
    "attention and MLP bias exchanged": lambda: exchange(HF, "blocks.{i}.attn.out.bias", "blocks.{i}.mlp.down.bias"),
    "norm weight and bias exchanged": lambda: exchange(HF, "norm.weight", "norm.bias"),
}
TOLERANCE = 1e-4


def deviation(
    table: WeightMap, config: GPTConfig, checkpoint: MemoryCheckpoint, expected: np.ndarray[Any, Any]
) -> float:
    identity = open_source(checkpoint, dialect=table.dialect, config=dataclasses.asdict(config) | {"rope": config.rope})
    identity.weight_map = table
    identity.plan = make_plan(config, checkpoint.tensors, table)
    return float(np.abs(logits(load_model(identity), IDS) - expected).max())


@pytest.mark.parametrize("bug", GPT2_BUGS)
def test_planted_gpt2_table_bugs_are_caught(bug: str) -> None:
    table = GPT2_BUGS[bug]()
    checkpoint = gpt2_checkpoint(table.dialect)
    config = open_source(checkpoint, config={"n_heads": 4}).config
    expected = reference.gpt2_logits(GPT2, IDS, n_heads=4)
    sound = HF if table.dialect == "hf" else OPENAI
    assert deviation(sound, config, checkpoint, expected) < TOLERANCE
    assert deviation(table, config, checkpoint, expected) > 10 * TOLERANCE


@pytest.mark.parametrize("field", [{"activation": "gelu"}, {"n_heads": 8}, {"norm_eps": 1e-2}], ids=str)
def test_planted_gpt2_config_bugs_are_caught(field: dict[str, Any]) -> None:
    checkpoint = gpt2_checkpoint("hf")
    config = open_source(checkpoint, config={"n_heads": 4} | field).config
    expected = reference.gpt2_logits(GPT2, IDS, n_heads=4)
    assert deviation(HF, config, checkpoint, expected) > 5 * TOLERANCE


@pytest.mark.parametrize("bias", ["ln_f.bias", "h.1.attn.c_attn.bias", "h.2.mlp.c_fc.bias", "h.0.ln_2.bias"])
def test_a_lost_bias_is_caught_by_numbers_and_by_the_plan(bias: str) -> None:
    zeroed = GPT2 | {bias: np.zeros_like(GPT2[bias])}
    model = load_model(open_source(MemoryCheckpoint(zeroed), config={"n_heads": 4}))
    assert np.abs(logits(model, IDS) - reference.gpt2_logits(GPT2, IDS, n_heads=4)).max() > 10 * TOLERANCE
    lost = MemoryCheckpoint({name: value for name, value in GPT2.items() if name != bias})
    assert not open_source(lost, config={"n_heads": 4}).plan.clean


LLAMA_BUGS: dict[str, tuple[str, str, tuple[Op, ...]]] = {
    "q rows left in pairs (meta)": ("meta", Q, ()),
    "k rows left in pairs (gguf)": ("gguf", "blocks.{i}.attn.k.weight", ()),
    "q rows permuted as k's": ("meta", Q, (RotaryHalves("n_kv_heads"),)),
    "q rows permuted though they are halves (hf)": ("hf", Q, (RotaryHalves("n_heads"),)),
}


@pytest.mark.parametrize("bug", LLAMA_BUGS)
def test_planted_rotary_bugs_are_caught(bug: str) -> None:
    dialect, target, ops = LLAMA_BUGS[bug]
    checkpoint = llama_checkpoint(dialect)
    sound = open_source(checkpoint, config={"n_heads": 6, "head_dim": 8, "n_kv_heads": 2})
    expected = reference.llama_logits(META, IDS, n_heads=6, n_kv_heads=2)
    assert deviation(sound.weight_map, sound.config, checkpoint, expected) < TOLERANCE
    assert deviation(swap(sound.weight_map, target, ops), sound.config, checkpoint, expected) > 10 * TOLERANCE


@pytest.mark.parametrize("table", ["meta", "hf", "gguf"])
def test_gate_and_up_exchanged_is_caught(table: str) -> None:
    checkpoint = llama_checkpoint(table)
    sound = open_source(checkpoint, config={"n_heads": 6, "head_dim": 8, "n_kv_heads": 2})
    expected = reference.llama_logits(META, IDS, n_heads=6, n_kv_heads=2)
    wrong = exchange(sound.weight_map, "blocks.{i}.mlp.gate.weight", "blocks.{i}.mlp.up.weight")
    assert deviation(wrong, sound.config, checkpoint, expected) > 10 * TOLERANCE


def test_a_double_claim_is_refused_when_the_table_is_built() -> None:
    with pytest.raises(ValueError, match="claimed twice: a"):
        WeightMap("x", "y", (Rule("a", ("b",)), Rule("a", ("c",))))
    with pytest.raises(ValueError, match="claimed twice: b"):
        WeightMap("x", "y", (Rule("a", ("b",)), Rule("c", ("b",))))


def test_path_is_only_a_label() -> None:
    """A folder called gpt2-xl does not make its content XL."""
    checkpoint = MemoryCheckpoint(GPT2, path=Path("gpt2-xl/llama/model.gguf"))
    assert open_source(checkpoint, config={"n_heads": 4}).config.n_layers == 3
