"""The model: against an independent forward pass, its cache against no cache, ragged rows against each alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import dialects
import reference
from loadstone.config import GPTConfig, Rope
from loadstone.config.families import LLAMA_FIELDS
from loadstone.load import load_model, open_source
from loadstone.model import GPT
from loadstone.positions import inverse_frequencies
from loadstone.weightmap import parameter_shapes
from memory import MemoryCheckpoint

SWITCHES = {
    "gpt2": GPTConfig(97, 24, 32, 2, 4),
    "gpt2 without biases": GPTConfig(
        97, 24, 32, 2, 4, qkv_bias=False, attn_out_bias=False, mlp_bias=False, norm_bias=False
    ),
    "llama, grouped": GPTConfig(97, 24, 32, 2, 4, n_kv_heads=2, rope=Rope(), tied=False, **LLAMA_FIELDS),
    "llama, one kv head": GPTConfig(97, 24, 32, 2, 4, n_kv_heads=1, head_dim=6, rope=Rope(), **LLAMA_FIELDS),
    "llama 3 scaling": GPTConfig(97, 24, 32, 2, 4, rope=Rope(500.0, "llama3", 8.0, 12), tied=False, **LLAMA_FIELDS),
    "yarn": GPTConfig(97, 24, 32, 2, 4, rope=Rope(1e4, "yarn", 4.0, 8), **LLAMA_FIELDS),
    "window": GPTConfig(97, 24, 32, 2, 4, n_kv_heads=2, rope=Rope(), window=5, **LLAMA_FIELDS),
    "window, learned positions": GPTConfig(97, 24, 32, 2, 4, window=1),
    "qk norm": GPTConfig(97, 24, 32, 2, 4, n_kv_heads=2, head_dim=16, rope=Rope(), qk_norm=True, **LLAMA_FIELDS),
    "experts": GPTConfig(97, 24, 32, 2, 4, rope=Rope(), n_experts=5, n_experts_used=2, **LLAMA_FIELDS),
    "experts of gpt2": GPTConfig(97, 24, 32, 2, 4, n_experts=3, n_experts_used=1, expert_weights_sum_to_one=False),
    "gptj": GPTConfig(
        97, 24, 32, 2, 4, rope=Rope(dims=4), parallel_residual=True, shared_norm=True, tied=False, head_bias=True
    ),
    "relu, rope, layernorm": GPTConfig(97, 24, 32, 2, 4, rope=Rope(scaling="linear", factor=2.0), activation="relu"),
}


def hostile(config: GPTConfig, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    return model


@pytest.mark.parametrize("length", [1, 7, 64, 80])
def test_gpt2_at_lengths_up_to_the_context_limit(length: int) -> None:
    weights = dialects.gpt2_hf(context=80, width=48)
    model = load_model(open_source(MemoryCheckpoint(weights), config={"n_heads": 6}))
    ids = np.random.default_rng(length).integers(0, 101, length).tolist()
    with torch.no_grad():
        ours = model(torch.tensor([ids]))[0].numpy()
    assert np.abs(ours - reference.gpt2_logits(weights, ids, 6)).max() < 1e-4


@pytest.mark.parametrize("length", [1, 7, 64, 80])
def test_llama_at_lengths_up_to_the_context_limit(length: int) -> None:
    weights = dialects.llama_meta()
    options = {"n_heads": 6, "head_dim": 8, "n_kv_heads": 2, "context_length": 80}
    model = load_model(open_source(MemoryCheckpoint(weights), config=options))
    ids = np.random.default_rng(length).integers(0, 101, length).tolist()
    with torch.no_grad():
        ours = model(torch.tensor([ids]))[0].numpy()
    assert np.abs(ours - reference.llama_logits(weights, ids, 6, 2)).max() < 1e-4


@pytest.mark.parametrize("name", SWITCHES)
def test_parameter_shapes_are_the_models_own(name: str) -> None:
    """The plan computes them without torch; here torch tells whether it is right, order included."""
    model = GPT(SWITCHES[name])
    assert {n: tuple(p.shape) for n, p in model.state_dict().items()} == parameter_shapes(SWITCHES[name])
    assert [n for n, _ in model.named_parameters()] == list(parameter_shapes(SWITCHES[name]))


@pytest.mark.parametrize("name", SWITCHES)
@torch.inference_mode()
def test_cache_equals_no_cache_however_the_prompt_is_cut(name: str) -> None:
    model = hostile(SWITCHES[name])
    ids = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(1))
    whole = model(ids)
    for cuts in ([24], [1] * 24, [5, 1, 7, 11], [23, 1]):
        cache, start, parts = model.new_cache(2), 0, []
        for cut in cuts:
            parts.append(model(ids[:, start : start + cut], cache))
            start += cut
        assert cache.lengths == [24, 24]
        assert (torch.cat(parts, 1) - whole).abs().max() < 1e-4


@pytest.mark.parametrize("name", SWITCHES)
@torch.inference_mode()
def test_ragged_rows_equal_each_row_alone(name: str) -> None:
    """Right-padded prompts, then steps at different positions: padding must leave no trace, NaN included."""
    model = hostile(SWITCHES[name])
    rows = [[5, 6, 7, 8, 9, 10, 11], [1], [2, 3, 4]]
    cache = model.new_cache(3)
    cache.kv.fill_(1e4)  # whatever lies in unused slots must not matter
    width = max(map(len, rows))
    padded = torch.tensor([row + [96] * (width - len(row)) for row in rows])
    first = model(padded, cache)
    cache.lengths = [len(row) for row in rows]
    step = torch.tensor([[20], [21], [22]])
    second, third = model(step, cache), model(step + 1, cache)
    for i, row in enumerate(rows):
        alone = model(torch.tensor([[*row, 20 + i, 21 + i]]))[0]
        assert (first[i, len(row) - 1] - alone[len(row) - 1]).abs().max() < 1e-4
        assert (second[i, 0] - alone[len(row)]).abs().max() < 1e-4
        assert (third[i, 0] - alone[len(row) + 1]).abs().max() < 1e-4


@torch.inference_mode()
def test_lowering_the_lengths_forgets_tokens() -> None:
    model = hostile(SWITCHES["llama, grouped"])
    cache = model.new_cache(1)
    model(torch.tensor([[1, 2, 3, 4, 5]]), cache)
    cache.lengths = [2]
    again = model(torch.tensor([[9, 8]]), cache)
    assert (again - model(torch.tensor([[1, 2, 9, 8]]))[:, 2:]).abs().max() < 1e-4


def test_beyond_the_context_or_the_cache_is_an_error_not_garbage() -> None:
    model = hostile(SWITCHES["gpt2"])
    with pytest.raises(IndexError, match="position 24 is beyond the limit of 24 tokens"):
        model(torch.zeros(1, 25, dtype=torch.long))
    cache = model.new_cache(1, 5)
    with pytest.raises(IndexError, match="position 5 is beyond the limit of 5 tokens"):
        model(torch.zeros(1, 6, dtype=torch.long), cache)
    with pytest.raises(IndexError):
        model(torch.tensor([[97]]))


def test_a_tied_head_is_one_parameter_and_learns_from_both_sides() -> None:
    model = hostile(SWITCHES["gpt2"])
    assert "head.weight" not in dict(model.named_parameters())
    model(torch.tensor([[1, 2]])).sum().backward()
    grad = model.tok_emb.weight.grad
    assert grad is not None
    assert grad[50].abs().sum() > 0  # row 50 was never an input: this is the head's gradient


@pytest.mark.parametrize("name", SWITCHES)
def test_no_buffers_so_nothing_but_parameters_can_be_lost(name: str) -> None:
    assert list(GPT(SWITCHES[name]).buffers()) == []


def test_initialisation_is_gpt2s() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(500, 64, 64, 8, 4))
    weights = dict(model.named_parameters())
    assert weights["blocks.0.attn.q.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert weights["blocks.0.mlp.down.weight"].std().item() == pytest.approx(0.02 / 4, rel=0.1)
    assert weights["blocks.0.norm1.weight"].eq(1).all()
    assert weights["blocks.0.attn.q.bias"].eq(0).all()
    loss = torch.nn.functional.cross_entropy(model(torch.arange(64)[None])[0], torch.arange(100, 164))
    assert loss.item() == pytest.approx(math.log(500), rel=0.05)


def test_rope_frequencies_by_hand() -> None:
    plain, factor = inverse_frequencies(Rope(100.0), 4)
    assert plain.tolist() == pytest.approx([1.0, 0.1])
    assert factor == 1.0
    assert inverse_frequencies(Rope(100.0, "linear", 2.0), 4)[0].tolist() == pytest.approx([0.5, 0.05])
    assert inverse_frequencies(Rope(100.0, "factors", factors=(1.0, 5.0)), 4)[0].tolist() == pytest.approx([1.0, 0.02])
    # llama3: the short wavelength (2 pi) turns often in 1000 tokens and is kept, the long one (2000 pi) is scaled.
    scaled, _ = inverse_frequencies(Rope(1e6, "llama3", 8.0, 1000), 4)
    assert scaled.tolist() == pytest.approx([1.0, 1e-3 / 8])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_half_precision_stays_near_float32(dtype: torch.dtype) -> None:
    for name, config in SWITCHES.items():
        model = hostile(config)
        ids = torch.arange(20)[None]
        exact = model(ids)
        half = model.to(dtype)(ids).float()
        assert (half - exact).abs().max() < 0.1 * exact.abs().max(), name


def test_packed_documents_do_not_see_each_other() -> None:
    """Each document of a packed row gives the hidden states that it gives alone, learned positions and rotary ones."""
    for config in (SWITCHES["gpt2"], SWITCHES["llama, grouped"]):
        model = hostile(config)
        first, second = torch.arange(5)[None] + 1, torch.arange(7)[None] + 3
        packed = torch.cat([first, second], dim=1)
        segments = torch.tensor([[0] * 5 + [1] * 7])
        found = model.hidden(packed, segments_BT=segments)
        torch.testing.assert_close(found[:, :5], model.hidden(first), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[:, 5:], model.hidden(second), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, model.hidden(packed))


def test_dropout_is_for_training_only() -> None:
    torch.manual_seed(0)
    model = GPT(SWITCHES["gpt2"])
    ids = torch.arange(8)[None]
    before = model.eval()(ids)
    model.set_dropout(0.5)
    assert torch.equal(model(ids), before)
    torch.manual_seed(1)
    first = model.train()(ids)
    assert not torch.equal(first, before)
    torch.manual_seed(1)
    assert torch.equal(model(ids), first)
    places = [module.dropout for module in model.modules() if hasattr(module, "dropout")]
    assert places == [0.5] * (1 + 2 * model.config.n_layers)


def test_recomputing_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    model = GPT(SWITCHES["llama, grouped"]).train()
    ids = torch.arange(8)[None]
    found = []
    for again in (False, True):
        model.recompute = again
        model.zero_grad()
        model(ids).square().sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
