"""Every family against transformers, live and from its own files, and against llama.cpp where that has its graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loadstone.config import GPTConfig, from_hf
from loadstone.config.families import FAMILIES
from loadstone.config.to_hf import to_hf
from loadstone.convert import convert
from loadstone.diagnose.bench import Bench, State
from loadstone.diagnose.points import Parameters, execution_order
from loadstone.diagnose.reference import find_reference
from loadstone.generate import generate
from loadstone.load import load_model, open_source
from loadstone.model import GPT
from loadstone.verify import verify
from loadstone.weightmap import Identity

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default")

SIZES = {"vocab_size": 301, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
OLD = SIZES | {"n_positions": 80, "n_embd": 48, "n_layer": 3, "n_head": 4}
NEW = SIZES | {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 80, "head_dim": 8,
}  # fmt: skip
MOE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
PHI3 = {name: value for name, value in NEW.items() if name != "head_dim"}
PART = {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "rope_type": "default"}}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 20, "rope_theta": 1e6}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gptj": ("gptj", OLD | {"rotary_dim": 8}),
    "gptj, whole heads, narrow mlp": ("gptj", OLD | {"rotary_dim": 12, "n_inner": 70}),
    "mistral": ("mistral", NEW | {"sliding_window": 7}),
    "mistral, window of one": ("mistral", NEW | {"sliding_window": 1}),
    "mistral, window of all but one": ("mistral", NEW | {"sliding_window": 79}),
    "mistral, no window": ("mistral", NEW | {"sliding_window": None}),
    "mistral, wide heads": ("mistral", NEW | {"sliding_window": 9, "head_dim": 16}),
    "qwen2": ("qwen2", NEW),
    "qwen2, tied, yarn": ("qwen2", NEW | {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen2, windows": ("qwen2", NEW | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}),
    "qwen2, no layer has the window": (
        "qwen2", NEW | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3},
    ),
    "qwen3": ("qwen3", NEW),
    "qwen3, wide heads, biases": ("qwen3", NEW | {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen3, windows": ("qwen3", NEW | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}),
    "mixtral": ("mixtral", NEW | {"num_local_experts": 5}),
    "mixtral, one of three": ("mixtral", NEW | {"num_local_experts": 3, "num_experts_per_tok": 1}),
    "mixtral, all, windows": (
        "mixtral", NEW | {"num_local_experts": 3, "num_experts_per_tok": 3, "sliding_window": 5},
    ),
    "qwen3_moe": ("qwen3_moe", NEW | MOE),
    "qwen3_moe, weights as they come": ("qwen3_moe", NEW | MOE | {"norm_topk_prob": False, "num_experts_per_tok": 3}),
    "phi3": ("phi3", PHI3),
    "phi3, part of a head, window": ("phi3", PHI3 | {"sliding_window": 11} | PART),
}  # fmt: skip


def hostile(name: str) -> Any:
    """Random norms and biases and sigma 0.2: default initialisation hides whole classes of faults."""
    family, options = CASES[name]
    model_class = getattr(transformers, FAMILIES[family].hf)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**options)).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_norm = "norm" in parameter_name or "ln_" in parameter_name
            parameter.normal_(1.0 if is_norm and parameter_name.endswith("weight") else 0.0, 0.2)
    return model


def difference(ours: Any, theirs: Any, length: int) -> float:
    ids = torch.randint(0, 301, (2, length), generator=torch.Generator().manual_seed(length))
    with torch.inference_mode():
        return float((ours(ids) - theirs(ids, use_cache=False).logits).abs().max())


@pytest.mark.parametrize("name", CASES)
def test_logits_of_a_live_module(name: str) -> None:
    theirs = hostile(name)
    identity = open_source(theirs)
    assert identity.config.architecture == CASES[name][0]
    ours = load_model(identity)
    assert max(difference(ours, theirs, length) for length in (1, 7, 64, 80)) < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_its_own_files_and_ours_of_it(name: str, tmp_path: Path) -> None:
    """Saved by transformers, read by us; written by us, read by transformers: the config and the weights' bits."""
    theirs = hostile(name)
    theirs.save_pretrained(tmp_path / "theirs")
    identity = open_source(tmp_path / "theirs")
    assert difference(load_model(identity), theirs, 80) < 1e-4
    convert(tmp_path / "theirs", tmp_path / "ours", to="hf")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    state = again.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in theirs.state_dict().items())
    assert difference(load_model(identity), again.eval(), 80) < 1e-4
    again.config.save_pretrained(tmp_path)
    assert from_hf(json.loads((tmp_path / "config.json").read_text())) == identity.config


@pytest.mark.parametrize(
    "name", ["gptj", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "phi3, part of a head, window"]
)
def test_greedy_tokens(name: str) -> None:
    """With the cache, prompts of unequal length in one batch: each row is what transformers gives for it alone."""
    theirs = hostile(name)
    prompts = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20]]
    results = generate(load_model(open_source(theirs)), prompts, max_new_tokens=30)
    for prompt, result in zip(prompts, results, strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert result.ids == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["gptj", "mistral", "mixtral", "qwen3_moe, weights as they come"])
def test_gradients(name: str) -> None:
    """Of every parameter, those of experts and router among them."""
    theirs = hostile(name)
    ours = load_model(open_source(theirs)).train()
    ids = torch.randint(0, 301, (2, 24), generator=torch.Generator().manual_seed(1))
    for logits in (ours(ids), theirs(ids).logits):
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
    for parameter in theirs.parameters():
        parameter.data = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    expected = dict(load_model(open_source(theirs)).named_parameters())  # gradients through the same tables
    for key, parameter in ours.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.allclose(found, expected[key], rtol=1e-3, atol=1e-6), key


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("mistral", {"window": 8}),
        ("mistral", {"window": 6}),
        ("mixtral", {"expert_weights_sum_to_one": False}),
        ("qwen3_moe, weights as they come", {"expert_weights_sum_to_one": True}),
        ("qwen3_moe", {"n_experts_used": 1}),
        ("gptj", {"rope": {"dims": 4}}),
        ("phi3, part of a head, window", {"rope": {"dims": 0}}),
        ("qwen2, windows", {"window": 0}),
    ],
)
def test_the_parity_check_can_fail(name: str, fields: dict[str, Any]) -> None:
    theirs = hostile(name)
    assert difference(load_model(open_source(theirs, config=fields)), theirs, 64) > 1e-3


# llama.cpp: GELU comes from a table in half precision, and it takes the tanh form where GPT-NeoX means erf.
GGUF = {
    "gpt2": (OLD, 2e-3),
    "gpt_neox": ({name: v for name, v in NEW.items() if name not in ("head_dim", "num_key_value_heads")}, 5e-3),
    "llama": (NEW, 1e-4),
    "mistral": (NEW | {"sliding_window": None}, 1e-4),
    "mixtral": (NEW | {"num_local_experts": 5}, 1e-4),
    "qwen2": (NEW, 1e-4),
    "qwen3": (NEW, 1e-4),
    "qwen3_moe": (NEW | MOE, 1e-4),
    "phi3": (PHI3 | PART, 1e-4),
}  # fmt: skip


@pytest.mark.parametrize("family", GGUF)
def test_llama_cpp_computes_the_same(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    options, tolerance = GGUF[family]
    monkeypatch.setitem(CASES, family, (family, options))
    theirs = hostile(family)
    theirs.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "model.gguf", to="gguf")
    ids = torch.randint(0, 301, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = theirs(ids).logits[0].numpy()
        again = load_model(open_source(tmp_path / "model.gguf"))(ids)[0].numpy()
    assert np.abs(again - expected).max() < 1e-4
    llama = llama_cpp.Llama(
        str(tmp_path / "model.gguf"), n_ctx=64, n_threads=1, verbose=False, type_k=0, type_v=0, logits_all=True
    )
    try:
        llama.eval(ids[0].tolist())
        found = np.array(llama.scores[:40], np.float32)
    finally:
        llama.close()
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


def test_our_config_of_each_family_builds_theirs(tmp_path: Path) -> None:
    """Fields that no published model sets are written so that transformers understands them."""
    for name, family in FAMILIES.items():
        options = next((o for f, o in CASES.values() if f == name), None)
        if options is None:
            continue
        config = from_hf({"model_type": name, **options})
        (tmp_path / "config.json").write_text(json.dumps(to_hf(config)))
        theirs = transformers.AutoConfig.from_pretrained(tmp_path)
        assert type(theirs) is getattr(transformers, family.hf).config_class
        assert from_hf(theirs.to_dict()) == config
        assert isinstance(config, GPTConfig)


@pytest.mark.parametrize(
    "name", ["gptj", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "phi3, part of a head, window"]
)
def test_verify_finds_the_fault_by_its_modules(name: str, tmp_path: Path) -> None:
    """Sound, every point agrees with transformers; with one damaged matrix, verify says no and names it."""
    hostile(name).save_pretrained(tmp_path)
    identity = open_source(tmp_path)
    model = load_model(identity)
    assert points_apart(identity, model) == {}
    with torch.no_grad():
        model.get_parameter("blocks.1.attn.v.weight")[3] *= 1.5
    assert "blocks.1.attn.v" in points_apart(identity, model)
    sound = [
        check.name
        for check in verify(identity, load_model(identity), against="transformers").checks
        if check.ok is False
    ]
    assert [name for name in sound if "loss" not in name] == []


def points_apart(identity: Identity, model: GPT) -> dict[str, float]:
    """Every point of our model from transformers' inputs, where it differs from what transformers made of them."""
    reference = find_reference("transformers").trace(identity)
    bench = Bench(identity, reference)
    state = State(identity.config, Parameters.of(model))
    points = bench.points(state)
    assert set(points) == set(execution_order(identity.config))
    errors = {point: bench.error(point, state).worst for point in points}
    return {point: error for point, error in errors.items() if error > 2e-5}
