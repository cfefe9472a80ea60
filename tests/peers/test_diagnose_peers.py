"""Diagnosis against live transformers models: every module of theirs is heard through the weight tables alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from faults import changed, heads_side_by_side, pairs, swapped, thirds
from loadstone.diagnose.bench import TIGHT, Bench, State
from loadstone.diagnose.points import Parameters, execution_order
from loadstone.diagnose.reference import find_reference, trace_source
from loadstone.diagnose.search import diagnose
from loadstone.diagnose.trace import save_trace
from loadstone.load import load_model, open_source
from loadstone.verify import verify

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default")

SIZES = {"vocab_size": 301, "bos_token_id": 1, "eos_token_id": 2}
WIDE = SIZES | {
    "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 6,
    "max_position_embeddings": 80,
}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", SIZES | {"n_positions": 80, "n_embd": 48, "n_layer": 3, "n_head": 4}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", WIDE | {"num_key_value_heads": 2}),
    "neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", WIDE | {"rotary_pct": 0.5}),
    "sequential neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", WIDE | {"use_parallel_residual": False}),
}


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A hostile random model as transformers writes it."""
    config, kind, options = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**options)).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_norm = "norm" in parameter_name or "ln_" in parameter_name
            parameter.normal_(1.0 if is_norm and parameter_name.endswith("weight") else 0.0, 0.2)
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_module_of_a_sound_model_agrees(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    identity = open_source(saved(name, tmp_path, dtype))
    model = load_model(identity)
    report = verify(identity, model, against="transformers")
    assert [check.name for check in report.checks if check.ok is False] == []
    trace = find_reference("transformers").trace(identity)
    bench, state = Bench(identity, trace), State(model.config, Parameters.of(model))
    points = bench.points(state)
    assert points == list(execution_order(model.config)), "every point is heard"
    assert max(bench.error(point, state).worst for point in points) < TIGHT / 5
    assert diagnose(identity, model, trace).findings == []


QKV = [f"gpt_neox.layers.{i}.attention.query_key_value.{leaf}" for i in range(3) for leaf in ("weight", "bias")]
FAULTS: dict[str, tuple[str, Any, dict[str, Any], list[tuple[str, str]]]] = {
    "gpt2: transposed": (
        "gpt2", changed(np.transpose, "transformer.h.1.attn.c_proj.weight"), {}, [("blocks.1.attn.out", "transpose")],
    ),
    "gpt2: q and k exchanged, ln_1 and ln_2 exchanged": (
        "gpt2",
        lambda w: swapped(("transformer.h.0.ln_1", "transformer.h.0.ln_2"))(
            changed(thirds((1, 0, 2), 1), "transformer.h.2.attn.c_attn.weight", "transformer.h.2.attn.c_attn.bias")(w)),
        {}, [("blocks.0.norm1", "exchanged norms"), ("blocks.2.attn.q", "qkv order")],
    ),
    "gpt2: head by head": (
        "gpt2",
        changed(heads_side_by_side(4), "transformer.h.1.attn.c_attn.weight", "transformer.h.1.attn.c_attn.bias"), {},
        [("blocks.1.attn.q", "qkv interleave")],
    ),
    "gpt2: erf": ("gpt2", None, {"activation": "gelu"}, [("blocks.0.mlp.hidden", "activation")]),
    "llama: rotary pairs": (
        "llama", changed(pairs(6), "model.layers.1.self_attn.q_proj.weight"), {},
        [("blocks.1.attn.q", "rotary layout")],
    ),
    "llama: theta": ("llama", None, {"rope": {"theta": 5e5}}, [("blocks.0.attn.context", "rotary theta")]),
    "llama: head count": (
        "llama", None, {"n_heads": 3, "n_kv_heads": 1, "head_dim": 16}, [("blocks.0.attn.context", "head count")],
    ),
    "neox: one after the other": (
        "neox", changed(lambda a: np.swapaxes(a.reshape(6, 3, 8, *a.shape[1:]), 0, 1).reshape(a.shape), *QKV), {},
        [(f"blocks.{i}.attn.q", "qkv interleave") for i in range(3)],
    ),
    "neox: sequential": ("neox", None, {"parallel_residual": False}, [("blocks.0.norm2", "parallel residual")]),
    "neox: rotary dims": ("neox", None, {"rope": {"dims": 8}}, [("blocks.0.attn.context", "rotary dims")]),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named_against_transformers(name: str, tmp_path: Path) -> None:
    family, plant, config, expected = FAULTS[name]
    good, bad = saved(family, tmp_path / "good"), saved(family, tmp_path / "bad")
    if plant:
        weights = plant(load_file(bad / "model.safetensors"))
        save_file({n: np.ascontiguousarray(a) for n, a in weights.items()}, bad / "model.safetensors", {"format": "pt"})
    identity = open_source(bad, config=config)
    model = load_model(identity)
    report = verify(identity, model, against=f"transformers:{good}")
    assert not report.ok
    assert report.diagnosis is not None
    assert report.diagnosis["complete"]
    found = diagnose(identity, model, find_reference(f"transformers:{good}").trace(identity))
    assert [(f.point, f.repair) for f in found.findings] == expected


def test_a_trace_of_transformers_serves_where_it_is_not_installed(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "model")
    trace = trace_source(f"transformers:{folder}", None)
    save_trace(trace, tmp_path / "t.safetensors")
    identity = open_source(folder)
    report = verify(identity, load_model(identity), against=str(tmp_path / "t.safetensors"))
    assert report.ok
    assert trace.has_activations
