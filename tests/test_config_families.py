"""Configs of the newer families, as the hub has them, and what is refused in them by the field's name."""

from __future__ import annotations

from typing import Any

import pytest

from loadstone.config import GPTConfig, Rope, from_hf, gpt2_config
from loadstone.config.own import LATER, from_own, to_own
from loadstone.config.to_gguf import to_gguf
from loadstone.config.to_hf import to_hf
from loadstone.errors import ConfigError

SUMMARY = {
    "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True, "initializer_range": 0.02, "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new", "bos_token_id": 50256, "eos_token_id": 50256, "attn_pdrop": 0.1,
    "embd_pdrop": 0.1, "resid_pdrop": 0.1,
}  # fmt: skip
LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu", "max_position_embeddings": 32768,
    "initializer_range": 0.02, "rms_norm_eps": 1e-5, "use_cache": True, "rope_theta": 10000.0, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "attention_dropout": 0.0,
}  # fmt: skip
HUB: dict[str, dict[str, Any]] = {
    "distilgpt2": SUMMARY | {
        "model_type": "gpt2", "_num_labels": 1, "vocab_size": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12,
        "n_layer": 6, "n_positions": 1024, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0},
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "dialogpt": SUMMARY | {
        "model_type": "gpt2", "vocab_size": 50257, "n_ctx": 1024, "n_embd": 1024, "n_head": 16, "n_layer": 24,
        "n_positions": 1024, "task_specific_params": {"conversational": {"max_length": 1000}},
    },
    "gpt-j": SUMMARY | {
        "model_type": "gptj", "vocab_size": 50400, "n_embd": 4096, "n_head": 16, "n_inner": None, "n_layer": 28,
        "n_positions": 2048, "rotary": True, "rotary_dim": 64, "scale_attn_weights": True, "use_cache": True,
        "tie_word_embeddings": False, "gradient_checkpointing": False, "tokenizer_class": "GPT2Tokenizer",
    },
    "mistral": LLAMA | {"model_type": "mistral", "sliding_window": 4096},
    "mixtral": LLAMA | {
        "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None,
        "output_router_logits": False, "router_aux_loss_coef": 0.02, "rope_theta": 1e6,
    },
    "qwen2.5": LLAMA | {
        "model_type": "qwen2", "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 21,
        "rope_theta": 1e6, "rms_norm_eps": 1e-6, "use_mrope": False,
    },
    "qwen3": LLAMA | {
        "model_type": "qwen3", "head_dim": 128, "attention_bias": False, "use_sliding_window": False,
        "sliding_window": None, "max_window_layers": 28, "rope_scaling": None,
    },
    "qwen3-moe": LLAMA | {
        "model_type": "qwen3_moe", "head_dim": 128, "attention_bias": False, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 128,
        "num_experts_per_tok": 8, "use_sliding_window": False, "sliding_window": None, "max_window_layers": 48,
        "output_router_logits": False, "router_aux_loss_coef": 0.001,
    },
    "phi-3": LLAMA | {
        "model_type": "phi3", "num_key_value_heads": 32, "original_max_position_embeddings": 4096,
        "max_position_embeddings": 4096, "sliding_window": 2047, "rope_scaling": None, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attention_bias": False, "pad_token_id": 32000, "auto_map": {"AutoConfig": "x.Phi3Config"},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_what_the_hub_has_is_read_and_written_back(name: str) -> None:
    config = from_hf(HUB[name])
    assert from_hf(to_hf(config)) == config
    assert from_own(to_own(config), "here") == config


def test_the_fields_of_each() -> None:
    configs = {name: from_hf(values) for name, values in HUB.items()}
    assert configs["distilgpt2"] == gpt2_config(768, 6, 12)
    assert configs["dialogpt"] == gpt2_config(1024, 24, 16)
    gptj = configs["gpt-j"]
    assert (gptj.rope, gptj.shared_norm, gptj.head_bias, gptj.tied) == (Rope(dims=64), True, True, False)
    assert (gptj.qkv_bias, gptj.attn_out_bias, gptj.mlp_bias, gptj.d_ff) == (False, False, True, 16384)
    assert configs["mistral"].window == 4096
    mixtral = configs["mixtral"]
    assert (mixtral.n_experts, mixtral.n_experts_used, mixtral.expert_weights_sum_to_one) == (8, 2, True)
    qwen = configs["qwen2.5"]
    assert (qwen.qkv_bias, qwen.attn_out_bias, qwen.window, qwen.rope) == (True, False, 0, Rope(1e6))
    assert (configs["qwen3"].qk_norm, configs["qwen3"].head_dim) == (True, 128)
    assert (configs["qwen3-moe"].d_ff, configs["qwen3-moe"].n_experts) == (768, 128)
    assert (configs["phi-3"].window, configs["phi-3"].rope) == (2047, Rope())


def test_absent_is_not_null_where_transformers_has_a_default() -> None:
    without = {key: value for key, value in HUB["mistral"].items() if key != "sliding_window"}
    assert from_hf(without).window == 4096
    assert from_hf(without | {"sliding_window": None}).window == 0
    assert (
        from_hf({k: v for k, v in HUB["qwen3-moe"].items() if k != "norm_topk_prob"}).expert_weights_sum_to_one is False
    )


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("distilgpt2", {"model_type": "bloom"}, "model_type 'bloom' is not supported"),
        ("distilgpt2", {"position_embedding_type": "alibi"}, "position_embedding_type = alibi: not known here"),
        ("mistral", {"model_type": "mpt"}, "model_type 'mpt' is not supported; known: gpt2, .* mistral"),
        ("mistral", {"attn_config": {"alibi": True}}, "attn_config = .*alibi"),
        ("mistral", {"alibi": True}, "alibi = True: not known here"),
        ("mistral", {"logit_scale": 0.0625}, "logit_scale = 0.0625"),
        ("mistral", {"residual_multiplier": 0.22}, "residual_multiplier = 0.22"),
        ("mistral", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types = "),
        ("mistral", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ("mistral", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not supported"),
        ("mistral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("qwen2.5", {"use_sliding_window": True}, "'max_window_layers' is 21; this model only does 0"),
        ("qwen2.5", {"layer_types": ["full_attention"] * 31 + ["sliding_attention"]}, "'layer_types' is "),
        ("qwen2.5", {"use_mrope": True}, "use_mrope = True"),
        ("qwen3", {"rope_scaling": {"rope_type": "mrope", "mrope_section": [1, 2]}}, "rope_type 'mrope' is not"),
        ("qwen3-moe", {"decoder_sparse_step": 2}, "'decoder_sparse_step' is 2"),
        ("qwen3-moe", {"mlp_only_layers": [0]}, r"'mlp_only_layers' is \[0\]"),
        ("qwen3-moe", {"use_sliding_window": True}, "'use_sliding_window' is True"),
        ("qwen3-moe", {"num_experts_per_tok": 129}, "n_experts_used 129 cannot be picked out of n_experts 128"),
        ("qwen3-moe", {"shared_expert_intermediate_size": 512}, "shared_expert_intermediate_size = 512"),
        ("mixtral", {"num_local_experts": 0}, "'num_local_experts' should be 1 or more"),
        ("phi-3", {"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}}, "'longrope'"),
        ("phi-3", {"rope_scaling": {"type": "su", "long_factor": [1.0], "short_factor": [1.0]}}, "rope_type 'su'"),
        ("phi-3", {"attention_bias": True}, "attention_bias = True"),
        ("gpt-j", {"rotary": False}, "'rotary' is False"),
        ("gpt-j", {"rotary_dim": None}, "the field 'rotary_dim' is missing"),
        ("gpt-j", {"rotary_dim": 512}, "rope dims 512 is more than the head_dim 256"),
        ("gpt-j", {"tie_word_embeddings": True}, "head_bias needs tied = false"),
    ],
)
def test_what_the_model_does_not_do_is_refused_by_name(name: str, change: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        from_hf(HUB[name] | change)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mistral", "window: wanted 4096, GGUF means 0.*--accept window"),
        ("phi-3", "window: wanted 2047, GGUF means 0"),
        ("gpt-j", "GGUF is written for gpt2 and .* only; this model is a gptj"),
    ],
)
def test_what_llama_cpp_does_not_do_is_refused_by_name(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        to_gguf(from_hf(HUB[name]))


def test_a_window_that_holds_the_context_is_none() -> None:
    config = from_hf(HUB["mistral"] | {"sliding_window": 32768})
    assert to_gguf(config)["general.architecture"] == "llama"


def test_llama_cpp_sums_expert_weights_to_one() -> None:
    with pytest.raises(ConfigError, match="expert_weights_sum_to_one: wanted False, GGUF means True"):
        to_gguf(from_hf(HUB["qwen3-moe"] | {"norm_topk_prob": False}))


@pytest.mark.parametrize("name", ["qwen2.5", "phi-3"])
def test_llama_3s_scaling_is_a_tensor_for_llama_alone(name: str) -> None:
    """Other graphs of llama.cpp do not look for `rope_freqs.weight`."""
    values = HUB[name] | {"sliding_window": None, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }}  # fmt: skip
    with pytest.raises(ConfigError, match=r"rope\.scaling: wanted 'llama3', GGUF means 'none'"):
        to_gguf(from_hf(values))


def test_a_model_of_no_family_is_no_one_elses() -> None:
    """GPT-2 with experts or a window: HuggingFace and llama.cpp have no field for them there."""
    for fields in ({"n_experts": 4, "n_experts_used": 2}, {"window": 5}, {"qk_norm": True}):
        config = GPTConfig(97, 24, 32, 2, 4, **fields)
        for write in (to_hf, to_gguf):
            with pytest.raises(ConfigError, match=f"{next(iter(fields))}: wanted"):
                write(config)


def test_records_of_before_these_fields_are_read() -> None:
    record = to_own(gpt2_config(768, 12, 12))
    assert from_own({key: value for key, value in record.items() if key not in LATER}, "old") == gpt2_config(
        768, 12, 12
    )
    with pytest.raises(ConfigError, match="its config lacks d_ff"):
        from_own({key: value for key, value in record.items() if key != "d_ff"}, "damaged")
