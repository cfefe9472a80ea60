"""The real checkpoints in ../shared, against the independent forward pass in numpy, and the story that one tells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import reference
from loadstone.generate import generate_text
from loadstone.load import load, load_model, open_source
from loadstone.verify import verify

STORIES, RANDOM = "checkpoints/tinystories-656k-llama", "checkpoints/tiny-random-gpt2"


def ids_of_length(length: int, vocab: int) -> list[int]:
    return np.random.default_rng(length).integers(0, vocab, length).tolist()


def meta_names(tensors: reference.Tensors, heads: int, kv_heads: int) -> reference.Tensors:
    """HuggingFace's Llama tensors as Meta's, by hand: halves back to neighbouring pairs."""
    names = {
        "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
        "norm": "norm",
    }  # fmt: skip
    found = {"tok_embeddings.weight": tensors["lm_head.weight"]}
    for name, value in tensors.items():
        for old, new in names.items():
            if name.endswith(f".{old}.weight") and (old != "norm" or name == "model.norm.weight"):
                if old.endswith(("q_proj", "k_proj")):
                    parts = np.split(value, heads if old.endswith("q_proj") else kv_heads)
                    pairs = [np.stack(np.split(part, 2), axis=1).reshape(part.shape) for part in parts]
                    value = np.concatenate(pairs)
                found[name.removeprefix("model.").replace(old, new)] = value
    return found


@pytest.mark.parametrize("length", [1, 7, 64, 512])
def test_tinystories_logits(shared: Path, length: int) -> None:
    folder = shared / STORIES
    identity = open_source(folder)
    model = load_model(identity)
    assert "one storage" in identity.plan.tie  # lm_head is stored, embed_tokens recorded as its alias
    ids = ids_of_length(length, 2048)
    weights = meta_names(load_file(folder / "model.safetensors"), 8, 4)
    with torch.no_grad():
        ours = model(torch.tensor([ids]))[0].numpy()
    assert np.abs(ours - reference.llama_logits(weights, ids, 8, 4, eps=1e-6)).max() < 1e-4


@pytest.mark.parametrize("length", [1, 7, 64, 512])
def test_tiny_random_gpt2_logits(shared: Path, length: int) -> None:
    folder = shared / RANDOM
    model = load_model(open_source(folder))
    tensors = load_file(folder / "model.safetensors")
    weights = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    ids = ids_of_length(length, 1000)
    with torch.no_grad():
        ours = model(torch.tensor([ids]))[0].numpy()
    assert np.abs(ours - reference.gpt2_logits(weights, ids, 4)).max() < 1e-4


def test_tinystories_tells_a_story_and_verifies(shared: Path) -> None:
    identity = open_source(shared / STORIES)
    model, tokenizer = load(shared / STORIES)
    assert tokenizer is not None
    text = generate_text(model, tokenizer, "Once upon a time", max_new_tokens=60)
    assert text.startswith("Once upon a time")
    assert "little girl" in text
    assert len(set(text.split())) > 15
    report = verify(identity, model, tokenizer)
    assert report.ok
    stored = load_file(shared / STORIES / "model.safetensors")
    assert report.counts["parameters"] == sum(tensor.size for tensor in stored.values())


def test_random_weights_are_called_untrained_not_broken(shared: Path) -> None:
    identity = open_source(shared / RANDOM)
    report = verify(identity, load_model(identity))
    assert report.ok
    assert report.counts["parameters_with_untied_head"] - report.counts["parameters"] == 1000 * 32
