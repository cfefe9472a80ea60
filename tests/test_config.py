"""Configs: what each program writes is translated, and what would change the function unnoticed is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from loadstone.config import GPTConfig, Rope, from_gguf, from_hf, from_meta, from_nanogpt, from_openai, gpt2_config
from loadstone.errors import ConfigError

GPT2 = {
    "model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_ctx": 1024, "n_embd": 768, "n_layer": 12,
    "n_head": 12, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "bos_token_id": 50256,
    "eos_token_id": 50256, "resid_pdrop": 0.1, "architectures": ["GPT2LMHeadModel"], "summary_type": "cls_index",
    "task_specific_params": {"text-generation": {"do_sample": True}},
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": True, "hidden_act": "silu", "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "pretraining_tp": 1, "attention_bias": False,
    "rope_scaling": {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
                     "original_max_position_embeddings": 8192},
}  # fmt: skip
FACTS: dict[str, Any] = {
    "vocab_size": 100, "d_ff": 64, "tied": True, "qkv_bias": False, "attn_out_bias": False, "mlp_bias": False,
    "norm_bias": False,
}  # fmt: skip


def test_gpt2_from_hf_is_the_preset() -> None:
    assert from_hf(GPT2) == gpt2_config(768, 12, 12)


def test_llama_3_2_from_hf() -> None:
    config = from_hf(LLAMA)
    assert (config.d_ff, config.n_kv_heads, config.head_dim, config.tied) == (8192, 8, 64, True)
    assert config.eos_ids == (128001, 128008, 128009)
    assert config.rope == Rope(500000.0, "llama3", 32.0, 8192, 1.0, 4.0)


def test_rope_of_transformers_5_and_4_are_the_same() -> None:
    old = from_hf(LLAMA)
    scaling: Any = LLAMA["rope_scaling"]
    new = {k: v for k, v in LLAMA.items() if k not in ("rope_theta", "rope_scaling")}
    assert from_hf(new | {"rope_parameters": scaling | {"rope_theta": 500000.0}}) == old
    assert from_hf(LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}).rope == Rope(500000.0, "linear", 2.0)


@pytest.mark.parametrize(
    ("base", "change", "text"),
    [
        (GPT2, {"activation_function": "quick_gelu"}, "activation_function 'quick_gelu' is not supported"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "'scale_attn_by_inverse_layer_idx' is True"),
        (GPT2, {"scale_attn_weights": False}, "'scale_attn_weights' is False"),
        (GPT2, {"add_cross_attention": True}, "'add_cross_attention' is True"),
        (GPT2, {"alibi": True}, "alibi = True: not known here.*--ignore-config alibi"),
        (GPT2, {"model_type": "bloom"}, "model_type 'bloom' is not supported; known: gpt2, gptj"),
        (GPT2, {"n_embd": None}, "the field 'n_embd' is missing"),
        (GPT2, {"n_embd": "768"}, "'n_embd' should be a whole number, found '768'"),
        (GPT2, {"n_head": 7}, "d_model 768 is not a multiple of n_heads 7"),
        (GPT2, {"n_layer": -1}, "n_layers must be a positive whole number, found -1"),
        (GPT2, {"layer_norm_epsilon": float("nan")}, "norm_eps must be a positive number"),
        (LLAMA, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not supported"),
        (LLAMA, {"rope_theta": -1.0}, "rope theta must be a positive number"),
        (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, "rope factor must be a positive number"),
        (LLAMA, {"num_key_value_heads": 3}, "config.json: n_heads 32 is not a multiple of n_kv_heads 3"),
        (LLAMA, {"rope_scaling": {"rope_type": "linear"}}, "'factor' is missing"),
        (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "zeta": 3}}, "zeta = 3"),
        (LLAMA, {"pretraining_tp": 2}, "'pretraining_tp' is 2"),
        (LLAMA, {"num_key_value_heads": 5}, "n_heads 32 is not a multiple of n_kv_heads 5"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA, {"head_dim": 63}, "head_dim 63 is odd"),
        (LLAMA, {"eos_token_id": "end"}, "'eos_token_id' should be a token id or a list"),
    ],
)
def test_what_the_model_does_not_do_is_refused_by_name(base: dict[str, Any], change: dict[str, Any], text: str) -> None:
    values = {key: value for key, value in (base | change).items() if value is not None}
    with pytest.raises(ConfigError, match=text):
        from_hf(values)


def test_unknown_fields_that_are_off_or_named_pass() -> None:
    assert from_hf(GPT2 | {"new_thing": None, "other_thing": False}) == from_hf(GPT2)
    assert from_hf(GPT2 | {"note": "mine"}, ignore=["note"]) == from_hf(GPT2)
    with pytest.raises(ConfigError, match="logit_scale = 0"):  # 0 is a value, not a feature that is off
        from_hf(GPT2 | {"logit_scale": 0})


def test_openai_nanogpt_meta() -> None:
    assert from_openai({"n_vocab": 50257, "n_ctx": 1024, "n_embd": 1600, "n_head": 25, "n_layer": 48}) == gpt2_config(
        1600, 48, 25
    )
    nano = from_nanogpt(
        {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "bias": False, "vocab_size": 65, "dropout": 0.2}
    )
    assert (nano.activation, nano.norm_bias, nano.qkv_bias, nano.eos_ids) == ("gelu", False, False, ())
    values = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": -1, "multiple_of": 8, "norm_eps": 1e-6}
    meta = from_meta(values, FACTS)
    assert (meta.vocab_size, meta.d_ff, meta.norm_eps, meta.rope) == (100, 64, 1e-6, Rope())
    scaled = from_meta(values | {"use_scaled_rope": True, "rope_theta": 500000.0}, FACTS).rope
    assert scaled == Rope(500000.0, "llama3", 8.0, 8192)
    with pytest.raises(ConfigError, match="vocab_size is 99, but the token embedding has 100 rows"):
        from_meta(values | {"vocab_size": 99}, FACTS)


GGUF = {
    "general.architecture": "llama", "llama.context_length": 128, "llama.embedding_length": 32, "llama.block_count": 2,
    "llama.feed_forward_length": 64, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-6, "llama.rope.freq_base": 1e5, "llama.rope.dimension_count": 8,
    "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
}  # fmt: skip


def test_llama_from_gguf() -> None:
    config = from_gguf(GGUF, FACTS)
    assert (config.n_kv_heads, config.norm_eps, config.rope, config.eos_ids) == (2, 1e-6, Rope(1e5), (2,))
    assert from_gguf(GGUF, FACTS, rope_factors=(1.0, 2.0, 4.0, 8.0)).rope == Rope(
        1e5, "factors", factors=(1.0, 2.0, 4.0, 8.0)
    )
    assert from_gguf(
        GGUF | {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, FACTS
    ).rope == Rope(1e5, "linear", 4.0)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"general.architecture": "mamba"}, "general.architecture 'mamba' is not supported"),
        ({"llama.expert_count": 8}, "n_experts_used 0 cannot be picked out of n_experts 8"),
        ({"llama.expert_shared_count": 1}, "expert_shared_count = 1: not known here"),
        ({"llama.attention.max_alibi_bias": 8.0}, "attention.max_alibi_bias = 8.0: not known here"),
        ({"llama.logit_scale": 0.5}, "logit_scale = 0.5: not known here"),
        ({"llama.rope.dimension_count": 4}, "'rope.dimension_count' is 4"),
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type 'longrope' is not supported"),
        ({"llama.attention.head_count": 0}, "'attention.head_count' should be 1 or more, found 0"),
        ({"llama.rope.freq_base": 10**400}, "'rope.freq_base' is too large a number"),
        ({"llama.attention.sliding_window": 64}, "attention.sliding_window = 64: not known here"),
    ],
)
def test_gguf_fields_that_are_not_handled_are_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        from_gguf(GGUF | change, FACTS)


def test_overrides_name_real_fields_and_derive_the_rest_anew() -> None:
    config = GPTConfig(10, 10, 32, 1, 4)
    assert config.with_overrides({"n_heads": 8}) == GPTConfig(10, 10, 32, 1, 8)
    with pytest.raises(ConfigError, match=r"no config field is called n_head; fields: .*n_heads"):
        config.with_overrides({"n_head": 8})


def test_the_newer_name_of_a_rope_scaling_wins() -> None:
    both = {"rope_type": "linear", "type": "yarn", "factor": 2.0}
    assert from_hf(LLAMA | {"rope_scaling": both}).rope == Rope(500000.0, "linear", 2.0)
    with pytest.raises(ConfigError, match=r"x = 1.*--ignore-config x"):
        from_hf(LLAMA | {"rope_scaling": both | {"x": 1}})
    assert from_hf(LLAMA | {"rope_scaling": both | {"x": 1}}, ignore=["x"]).rope is not None


def test_yarn_in_a_gguf_without_its_original_context_takes_the_context() -> None:
    rope = from_gguf(GGUF | {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, FACTS).rope
    assert rope == Rope(1e5, "yarn", 4.0, 128)


@pytest.mark.parametrize(
    "options",
    [{"theta": 0.0}, {"theta": 1.0}, {"factor": -1.0}, {"scaling": "yarn"}, {"factors": (0.0,)}, {"scaling": "alibi"},
     {"scaling": "llama3", "original_context": 8, "high_freq_factor": 1.0}],
    ids=str,
)  # fmt: skip
def test_rope_values_without_a_meaning_are_refused(options: Any) -> None:
    with pytest.raises(ConfigError, match="rope"):
        Rope(**options)


def test_rope_factors_must_fit_the_heads() -> None:
    with pytest.raises(ConfigError, match="8 turned elements have 4 rotary frequencies, but 1 factors are given"):
        GPTConfig(10, 10, 32, 1, 4, rope=Rope(scaling="factors", factors=(1.0,)))
