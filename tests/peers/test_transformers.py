"""transformers as judge: hostile random models of every switch, live and from disk, greedy text, sampling filters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loadstone.generate import generate
from loadstone.load import load_model, open_source
from loadstone.sampling import Sampling, candidates, penalise
from loadstone.verify import verify

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default")

SIZES = {"vocab_size": 301, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = SIZES | {
    "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 80,
}  # fmt: skip
GPT2 = SIZES | {"n_positions": 80, "n_embd": 48, "n_layer": 3, "n_head": 4}
NEOX = SIZES | {
    "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 3,
    "max_position_embeddings": 80,
}  # fmt: skip
FAMILIES = {
    "GPT2": (GPT2, "GPT2LMHeadModel"),
    "Llama": (LLAMA, "LlamaForCausalLM"),
    "GPTNeoX": (NEOX, "GPTNeoXForCausalLM"),
}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 20, "rope_theta": 1e4,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 20, "rope_theta": 1e4}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {}),
    "gpt2, narrow mlp": ("GPT2", {"n_inner": 70}),
    "gpt2, erf gelu": ("GPT2", {"activation_function": "gelu"}),
    "gpt2, untied": ("GPT2", {"tie_word_embeddings": False}),
    "llama": ("Llama", {}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, mha": ("Llama", {"num_key_value_heads": 6}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("Llama", {"head_dim": 16}),
    "llama, linear rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama, llama3 rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama, yarn rope": ("Llama", {"rope_parameters": YARN}),
    "llama, another theta and eps": ("Llama", {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
                                               "rms_norm_eps": 1e-3}),
    "neox": ("GPTNeoX", {}),
    "neox, sequential": ("GPTNeoX", {"use_parallel_residual": False}),
    "neox, half of a head turned": ("GPTNeoX", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5,
                                                                    "rope_type": "default"}}),
    "neox, another activation": ("GPTNeoX", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3}),
}  # fmt: skip


def hostile(name: str) -> Any:
    """Random norms and biases and sigma 0.2: default initialisation hides whole classes of faults."""
    family, options = CASES[name]
    sizes, class_name = FAMILIES[family]
    config = getattr(transformers, f"{family}Config")(**(sizes | options))
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_norm = "norm" in parameter_name or "ln_" in parameter_name
            parameter.normal_(1.0 if is_norm and parameter_name.endswith("weight") else 0.0, 0.2)
    return model


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_logits_of_a_live_module(name: str) -> None:
    theirs = hostile(name)
    ours = load_model(open_source(theirs))
    for length in (1, 7, 64, 80):
        ids = torch.randint(0, 301, (2, length), generator=torch.Generator().manual_seed(length))
        assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "50KB"}], ids=["one file", "shards"])
@pytest.mark.parametrize("name", CASES)
def test_a_saved_folder_verifies_against_transformers(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    hostile(name).save_pretrained(tmp_path, **options)
    identity = open_source(tmp_path)
    report = verify(identity, load_model(identity), against="transformers")
    assert [check.name for check in report.checks if check.ok is False and "loss" not in check.name] == []
    assert [check.name for check in report.checks if "logits at length" in check.name] == [
        f"logits at length {length}" for length in (1, 7, 64, 80)
    ]


def test_the_parity_check_can_fail(tmp_path: Path) -> None:
    """One wrong field, of those that leave every shape alone, and verify says no."""
    hostile("gpt2").save_pretrained(tmp_path)
    identity = open_source(tmp_path, config={"activation": "gelu"})
    report = verify(identity, load_model(identity), against="transformers")
    assert not report.ok


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox"])
def test_greedy_tokens(name: str) -> None:
    theirs = hostile(name)
    prompts = [[5, 6, 7], [9], [11, 12, 13, 14, 15]]
    results = generate(load_model(open_source(theirs)), prompts, max_new_tokens=30)
    for prompt, result in zip(prompts, results, strict=True):
        ids = torch.tensor([prompt])
        expected = theirs.generate(ids, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert result.ids == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("seed", range(5))
def test_sampling_filters(seed: int) -> None:
    from transformers.generation import logits_process

    torch.manual_seed(seed)
    scores, history = torch.randn(3, 50) * 3, [[1, 2, 3], [4, 4], [5]]
    ids = torch.tensor([[1, 2, 3], [4, 4, 4], [5, 5, 5]])
    penalty = logits_process.RepetitionPenaltyLogitsProcessor(1.3)
    penalised = [torch.from_numpy(penalise(*row, 1.3)) for row in zip(scores.numpy(), history, strict=True)]
    assert torch.equal(torch.stack(penalised), penalty(ids, scores))
    for settings, warper in (
        ({"top_k": 7}, logits_process.TopKLogitsWarper(7)),
        ({"top_p": 0.8}, logits_process.TopPLogitsWarper(0.8)),
        ({"min_p": 0.1}, logits_process.MinPLogitsWarper(0.1)),
    ):
        expected = warper(ids, scores.clone()).softmax(dim=-1)
        for row, want in zip(scores.numpy(), expected, strict=True):
            kept, likely = candidates(row, [], Sampling(temperature=1.0, **settings))
            assert kept.tolist() == want.nonzero().flatten().tolist()
            torch.testing.assert_close(torch.from_numpy(likely), want[kept], rtol=1e-5, atol=0)


@pytest.mark.parametrize("folder", ["tinystories-656k-llama", "tiny-random-gpt2"])
def test_shared_checkpoints(folder: str) -> None:
    from conftest import shared_folder

    path = shared_folder() / "checkpoints" / folder
    if not path.is_dir():
        pytest.skip(f"needs the shared data at {path}")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ours = load_model(open_source(path))
    for length in (1, 7, 64, 512):
        ids = torch.randint(0, 1000, (1, length), generator=torch.Generator().manual_seed(length))
        with torch.inference_mode():
            assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-4
