"""Configs, written: reading back gives the same config, and what a dialect cannot say is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loadstone.config import GPTConfig, Rope, from_gguf, from_hf, from_meta, from_nanogpt, from_openai, gpt2_config
from loadstone.config.families import GPT_NEOX_FIELDS, LLAMA_FIELDS
from loadstone.config.losses import differences
from loadstone.config.rope_factors import rope_factors, with_named_scaling
from loadstone.config.to_gguf import ROPE_FREQS, gguf_tensors, to_gguf
from loadstone.config.to_hf import generation_config, to_hf
from loadstone.config.to_others import meta_width, to_meta, to_nanogpt, to_openai, to_raschka
from loadstone.errors import ConfigError
from loadstone.positions import inverse_frequencies

GPT2 = gpt2_config(768, 12, 12)
LLAMA3 = Rope(5e5, "llama3", 32.0, 8192, 1.0, 4.0)
LLAMA = GPTConfig(
    128_256, 131_072, 2048, 16, 32, n_kv_heads=8, d_ff=8192, architecture="llama", **LLAMA_FIELDS, rope=LLAMA3,
    bos_id=128_000, eos_ids=(128_001, 128_009),
)  # fmt: skip
NEOX = GPTConfig(
    50_304, 2048, 512, 6, 8, architecture="gpt_neox", **GPT_NEOX_FIELDS, rope=Rope(dims=16), bos_id=0, eos_ids=(0,)
)

positive = st.floats(1e-3, 1e6, allow_nan=False)
ids = st.integers(0, 2**31)


@st.composite
def ropes(draw: st.DrawFn, dims: st.SearchStrategy[int], exported: bool = False) -> Rope:
    kind = draw(st.sampled_from(["none", "linear", "llama3", "yarn"]))
    theta = draw(positive.filter(lambda x: np.float32(x) != 1))  # GGUF keeps float32, and a theta of 1 is none
    options: dict[str, Any] = {"theta": theta, "scaling": kind, "dims": draw(dims)}
    if kind != "none":
        options["factor"] = draw(positive)
    if kind in ("llama3", "yarn"):
        options["original_context"] = draw(st.integers(1, 10**6))
    if kind == "llama3":
        low = draw(positive)
        options |= {"low_freq_factor": low, "high_freq_factor": low + draw(st.floats(0.5, 9))}
    if kind == "yarn" and not exported:
        fast, slow, attention = draw(positive), draw(positive), draw(st.none() | positive)
        options |= {"beta_fast": fast, "beta_slow": slow, "attention_factor": attention}
    return Rope(**options)


@st.composite
def configs(draw: st.DrawFn, architecture: str, exported: bool = False) -> GPTConfig:
    """Any config that the architecture's HuggingFace class can have; `exported`: that llama.cpp can, too."""
    kv_heads, group, head_dim = draw(st.integers(1, 5)), draw(st.integers(1, 4)), 2 * draw(st.integers(1, 70))
    heads, vocab = kv_heads * group, draw(st.integers(1, 10**6))
    options: dict[str, Any] = {
        "vocab_size": vocab, "context_length": draw(st.integers(1, 10**6)), "d_model": heads * head_dim,
        "n_layers": draw(st.integers(1, 99)), "n_heads": heads, "d_ff": draw(st.integers(1, 10**5)),
        "architecture": architecture, "norm_eps": draw(st.floats(1e-12, 1)), "tied": draw(st.booleans()),
        "bos_id": draw(st.none() | ids), "eos_ids": tuple(draw(st.lists(ids, max_size=3))),
    }  # fmt: skip
    activation = "gelu_tanh" if exported else draw(st.sampled_from(["gelu_tanh", "gelu", "silu", "relu"]))
    if architecture == "gpt2":
        return GPTConfig(**options, activation=activation)
    if architecture == "gpt_neox":
        bias, parts = draw(st.booleans()), st.sampled_from(range(2, head_dim, 2)) if head_dim > 2 else st.just(0)
        options |= {"qkv_bias": bias, "attn_out_bias": bias, "parallel_residual": draw(st.booleans())}
        return GPTConfig(**options, activation=activation, rope=draw(ropes(parts | st.just(0))))
    options |= LLAMA_FIELDS | {"n_kv_heads": kv_heads, "rope": draw(ropes(st.just(0), exported))}
    options |= {"head_dim": draw(st.just(head_dim) | st.just(2 * head_dim))}
    if not exported:
        bias = draw(st.booleans())
        options |= {"activation": activation, "qkv_bias": bias, "attn_out_bias": bias, "mlp_bias": draw(st.booleans())}
    return GPTConfig(**options)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox"])
@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_from_hf_undoes_to_hf(architecture: str, data: st.DataObject) -> None:
    config = data.draw(configs(architecture))
    values = json.loads(json.dumps(to_hf(config, dtype="bfloat16")))  # as a file holds it
    assert from_hf(values) == config
    assert (values["dtype"], values["torch_dtype"]) == ("bfloat16", "bfloat16")


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_each_transformers_reads_its_own_fields_and_finds_the_same(architecture: str, data: st.DataObject) -> None:
    """4 has never heard of `rope_parameters`; 5 would work without the older fields."""
    config = data.draw(configs(architecture))
    values = to_hf(config)
    older = {key: value for key, value in values.items() if key not in ("rope_parameters", "dtype")}
    newer = {
        key: value
        for key, value in values.items()
        if key not in ("rope_theta", "rope_scaling", "rotary_emb_base", "rotary_pct", "torch_dtype")
    }
    assert from_hf(older) == from_hf(newer) == config


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_from_gguf_undoes_to_gguf(architecture: str, data: st.DataObject) -> None:
    config = data.draw(configs(architecture, exported=True))
    facts = {name: getattr(config, name) for name in ("vocab_size", "tied", "qkv_bias", "attn_out_bias", "mlp_bias")}
    factors = tuple(gguf_tensors(config).get(ROPE_FREQS, np.empty(0)).tolist())
    back = from_gguf(to_gguf(config), facts | {"norm_bias": config.norm_bias}, rope_factors=factors)
    assert (back.bos_id, back.eos_ids) == (config.bos_id, config.eos_ids[:1])  # any more is the vocabulary's matter
    back = replace(back, eos_ids=config.eos_ids)
    assert bool(factors) == (config.rope is not None and config.rope.scaling == "llama3")
    if factors and config.rope and back.rope:
        ours, theirs = (inverse_frequencies(rope, config.head_dim)[0] for rope in (config.rope, back.rope))
        rounding = max(2e-4, 5e-7 * config.rope.factor)  # float32's, which a factor magnifies where the blend begins
        assert torch.allclose(ours, theirs, rtol=rounding, atol=0)
        back = replace(back, rope=config.rope)
    assert in_float32(back) == in_float32(config)


def in_float32(config: GPTConfig) -> GPTConfig:
    """GGUF keeps fractions so."""
    rope = config.rope
    if rope is not None:
        rope = replace(rope, theta=float(np.float32(rope.theta)), factor=float(np.float32(rope.factor)))
    return replace(config, norm_eps=float(np.float32(config.norm_eps)), rope=rope)


def test_llama_3_from_gguf_gets_its_name_back() -> None:
    assert LLAMA.rope
    divisors = rope_factors(LLAMA.rope, 64)
    assert divisors is not None
    assert (divisors[0], divisors[-1]) == (1, 32)
    assert (np.diff(divisors) >= 0).all()
    read = replace(LLAMA, rope=Rope(5e5, "factors", factors=tuple(divisors.tolist())))
    assert with_named_scaling(read) == LLAMA
    assert to_hf(read) == to_hf(LLAMA)
    assert to_meta(read) == to_meta(LLAMA)
    other = replace(read, rope=Rope(5e5, "factors", factors=(*divisors[:9].tolist(), 1.5, *divisors[10:].tolist())))
    for write, dialect in ((to_hf, "HuggingFace"), (to_meta, "Meta's Llama")):
        with pytest.raises(ConfigError, match=rf"rope.scaling: wanted 'factors', {dialect} means 'none'.*accept rope$"):
            write(other)
    assert gguf_tensors(other)[ROPE_FREQS].tolist() == list(other.rope.factors if other.rope else ())


def test_the_published_files() -> None:
    assert to_openai(GPT2) == {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
    assert from_openai(to_openai(GPT2)) == GPT2
    assert to_raschka(GPT2) == {
        "vocab_size": 50257, "context_length": 1024, "emb_dim": 768, "n_heads": 12, "n_layers": 12, "drop_rate": 0.0,
        "qkv_bias": True,
    }  # fmt: skip
    assert to_meta(LLAMA) == {
        "dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "norm_eps": 1e-05,
        "multiple_of": 4096, "rope_theta": 500000.0, "use_scaled_rope": True, "rope_scaling_factor": 32.0,
    }  # fmt: skip
    assert generation_config(LLAMA) == {
        "_from_model_config": True, "bos_token_id": 128000, "eos_token_id": [128001, 128009],
    }  # fmt: skip
    assert generation_config(replace(LLAMA, bos_id=None, eos_ids=(7,))) == {
        "_from_model_config": True, "eos_token_id": 7,
    }  # fmt: skip
    written = to_hf(NEOX)  # transformers 4 has its own names for these two
    assert (written["rotary_pct"], written["rotary_emb_base"]) == (0.25, 10_000.0)


def test_nothing_of_older_programs_is_said_that_they_refuse() -> None:
    """Llama 1's code knows neither n_kv_heads nor rope_theta; transformers 4.40 wants two fields for linear scaling."""
    first = replace(LLAMA, n_kv_heads=32, rope=Rope())
    assert set(to_meta(first)) == {"dim", "n_layers", "n_heads", "vocab_size", "norm_eps", "multiple_of"}
    assert to_hf(replace(LLAMA, rope=Rope(scaling="linear", factor=2)))["rope_scaling"] == {
        "type": "linear", "factor": 2.0,
    }  # fmt: skip


@given(st.integers(1, 20_000), st.integers(1, 100_000))
@settings(max_examples=150, deadline=None)
def test_metas_recipe_gives_exactly_the_width(dim: int, d_ff: int) -> None:
    config = GPTConfig(10, 2048, 2 * dim, 1, 1, d_ff=d_ff, architecture="llama", **LLAMA_FIELDS, rope=Rope())
    values = to_meta(config)
    assert meta_width(2 * dim, values["multiple_of"], values.get("ffn_dim_multiplier")) == d_ff
    assert from_meta(values, {"vocab_size": 10, "d_ff": d_ff, "tied": True}) == config


@pytest.mark.parametrize(
    ("dim", "d_ff", "multiple_of", "scale"),
    [(4096, 11008, 256, None), (5120, 13824, 256, None), (4096, 14336, 1024, 1.3), (8192, 28672, 4096, 1.3),
     (16384, 53248, 4096, 1.2), (2048, 8192, 256, 1.5), (3072, 8192, 256, 1.0), (288, 768, 32, None)],
)  # fmt: skip
def test_the_recipe_itself_is_metas(dim: int, d_ff: int, multiple_of: int, scale: float | None) -> None:
    """What the published params.json say, and the widths of the published tensors."""
    assert meta_width(dim, multiple_of, scale) == d_ff


ERF = replace(GPT2, activation="gelu")


@pytest.mark.parametrize(
    ("write", "config", "text"),
    [
        (to_nanogpt, GPT2, r"activation: wanted 'gelu_tanh', nanoGPT means 'gelu'.*--accept activation$"),
        (to_nanogpt, replace(ERF, qkv_bias=False), "attn_out_bias: wanted True, nanoGPT means False; mlp_bias"),
        (to_nanogpt, replace(ERF, tied=False), "tied: wanted False"),
        (to_nanogpt, replace(ERF, d_ff=99), "d_ff: wanted 99, nanoGPT means 3072"),
        (to_nanogpt, replace(ERF, eos_ids=(3,)), "eos_ids: wanted .3,., nanoGPT means .50256,."),
        (to_openai, replace(GPT2, tied=False, norm_eps=1e-6), "norm_eps: wanted 1e-06, .*tied: wanted False"),
        (to_openai, replace(GPT2, norm_bias=False), "norm_bias"),
        (to_raschka, ERF, "the book's GPTModel means 'gelu_tanh'"),
        (to_raschka, replace(GPT2, mlp_bias=False), "mlp_bias"),
        (to_gguf, ERF, "activation: wanted 'gelu', GGUF means 'gelu_tanh'"),
        (to_gguf, replace(GPT2, mlp_bias=False), "mlp_bias: wanted False, GGUF means True"),
        (to_gguf, replace(GPT2, n_kv_heads=4), "n_kv_heads: wanted 4"),
        (to_gguf, replace(LLAMA, norm_bias=True), "norm_bias: wanted True, GGUF means False"),
        (to_gguf, replace(GPT2, norm_eps=1e-50), "norm_eps must be a positive number, found 0.0"),
        (to_gguf, replace(LLAMA, rope=Rope(1e39)), "theta must be a positive number other than 1, found inf"),
        (to_gguf, replace(NEOX, architecture="gptj"), "GGUF is written for gpt2 and .* only; this model is a gptj"),
        (to_meta, replace(LLAMA, activation="relu", qkv_bias=True), "activation: .*qkv_bias"),
        (to_meta, replace(LLAMA, head_dim=128), "head_dim: wanted 128, Meta's Llama means 64"),
        (to_meta, replace(LLAMA, rope=replace(LLAMA3, high_freq_factor=3.0)), "rope.high_freq_factor: wanted 3.0"),
        (to_meta, replace(LLAMA, rope=Rope(scaling="linear", factor=2.0)), "rope.scaling: wanted 'linear'"),
        (to_meta, GPT2, "Meta's params.json is written for llama only; this model is a gpt2"),
        (to_hf, replace(GPT2, qkv_bias=False), "qkv_bias: wanted False, HuggingFace means True"),
        (to_hf, replace(GPT2, rope=Rope()), r"rope: wanted Rope\("),
        (to_hf, replace(LLAMA, norm_bias=True), "norm_bias"),
        (to_hf, replace(LLAMA, attn_out_bias=True), "attn_out_bias: wanted True, HuggingFace means False"),
        (to_hf, replace(NEOX, norm="rmsnorm"), "norm: wanted 'rmsnorm'"),
        (to_hf, replace(LLAMA, rope=None), "rope: wanted None"),
        (to_hf, replace(LLAMA, rope=replace(LLAMA3, dims=32)), "a rotary part of 0.5 of each head is not supported"),
        (to_hf, replace(LLAMA, d_model=2000, head_dim=64), r"d_model \(2000\) to be a multiple of n_heads \(32\)"),
    ],
)  # fmt: skip
def test_what_a_dialect_cannot_say_is_refused_by_name(write: Any, config: GPTConfig, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        write(config)


def test_a_change_can_be_accepted_by_name_and_only_that_one() -> None:
    values = to_nanogpt(GPT2, accept=["activation"])
    assert from_nanogpt(values) == ERF
    with pytest.raises(ConfigError, match=r"tied: wanted False.*accept tied$"):
        to_nanogpt(replace(GPT2, tied=False), accept=["activation"])
    assert (
        from_hf(to_hf(replace(LLAMA, rope=Rope(factors=(1.5,) * 32, scaling="factors")), accept=["rope"])).rope
        == Rope()
    )
    with pytest.raises(ConfigError, match="no config field is called activations"):
        to_nanogpt(GPT2, accept=["activations"])


def test_dtype_must_be_one_that_transformers_has() -> None:
    with pytest.raises(ConfigError, match=r"dtype 'Q8_0' cannot be named in config.json; known: float32, float16"):
        to_hf(GPT2, dtype="Q8_0")


def test_a_rope_that_turns_whole_heads_is_the_same_however_it_is_said() -> None:
    said = replace(LLAMA, rope=replace(LLAMA3, dims=64, beta_fast=1.0))
    assert differences(said, LLAMA) == {}
    assert to_hf(said) == to_hf(LLAMA)
    assert to_gguf(said) == to_gguf(LLAMA)
