"""HuggingFace's `config.json` of every family (fields and defaults as in transformers 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import ConfigError
from .base import GPTConfig, Rope
from .families import FAMILIES
from .fields import Fields

ACTIVATION_NAMES = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}

# Fields that do not change what the model computes at inference: training settings, bookkeeping, other engines' hints.
HARMLESS = frozenset(
    """_name_or_path _num_labels architectures attn_pdrop auto_map chunk_size_feed_forward dropout dtype embd_pdrop
    finetuning_task gradient_checkpointing id2label initializer_range is_decoder is_encoder_decoder is_llama_config
    keys_to_ignore_at_inference label2id max_length model_type n_special predict_special_tokens problem_type
    reorder_and_upcast_attn resid_pdrop sep_token_id pad_token_id decoder_start_token_id forced_bos_token_id
    forced_eos_token_id
    summary_activation summary_first_dropout summary_proj_to_labels summary_type
    classifier_dropout summary_use_proj task_specific_params tokenizer_class torch_dtype transformers.js_config
    transformers_version
    unsloth_version unsloth_fixed use_cache attention_dropout hidden_dropout output_attentions output_hidden_states
    output_router_logits router_aux_loss_coef router_jitter_noise
    return_dict return_dict_in_generate do_sample temperature top_k top_p num_return_sequences repetition_penalty
    num_beams num_beam_groups length_penalty diversity_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    min_length typical_p prefix early_stopping bad_words_ids exponential_decay_length_penalty _attn_implementation
    _attn_implementation_autoset""".split()
)


def from_hf(values: Mapping[str, Any], where: str = "config.json", ignore: Iterable[str] = ()) -> GPTConfig:
    """Translate a parsed `config.json`.

    Raises ConfigError for an unsupported model type, a missing field, and any field that would change the function
    but is not handled; `ignore` names fields that the caller knows to be harmless.
    """
    fields = Fields(values, where, ignore)
    model_type = fields.text("model_type")
    reader = READERS.get(model_type)
    if reader is None:
        raise ConfigError(f"{where}: model_type {model_type!r} is not supported; known: {', '.join(READERS)}.")
    config = reader(fields)
    fields.refuse_others(HARMLESS)
    return config


def _activation(fields: Fields, key: str, default: str) -> str:
    name = fields.text(key, default)
    if name not in ACTIVATION_NAMES:
        raise ConfigError(f"{fields.where}: {key} {name!r} is not supported; known: {', '.join(ACTIVATION_NAMES)}.")
    return ACTIVATION_NAMES[name]


def _special_ids(fields: Fields) -> dict[str, Any]:
    bos = fields.ids("bos_token_id")
    return {"bos_id": bos[0] if bos else None, "eos_ids": fields.ids("eos_token_id")}


def _gpt2(fields: Fields) -> GPTConfig:
    fields.must_be("scale_attn_by_inverse_layer_idx", False)
    fields.must_be("add_cross_attention", False)
    return fields.build(tied=fields.flag("tie_word_embeddings", True), **_gpt2_sizes(fields))


def _gptj(fields: Fields) -> GPTConfig:
    fields.must_be("rotary", True)
    rope = Rope(dims=fields.count("rotary_dim"))
    tied = fields.flag("tie_word_embeddings", False)
    return fields.build(
        architecture="gptj", rope=rope, **FAMILIES["gptj"].fields | {"tied": tied}, **_gpt2_sizes(fields)
    )


def _gpt2_sizes(fields: Fields) -> dict[str, Any]:
    """What the config of GPT-J has in common with GPT-2's."""
    context = fields.integer("n_positions", None) or fields.integer("n_ctx")
    fields.must_be("n_ctx", context, None)
    fields.must_be("scale_attn_weights", True)
    d_model = fields.integer("n_embd")
    return {
        "vocab_size": fields.integer("vocab_size"),
        "context_length": context,
        "d_model": d_model,
        "n_layers": fields.integer("n_layer"),
        "n_heads": fields.integer("n_head"),
        "d_ff": fields.integer("n_inner", 4 * d_model),
        "norm_eps": fields.number("layer_norm_epsilon", 1e-5),
        "activation": _activation(fields, "activation_function", "gelu_new"),
        **_special_ids(fields),
    }


def _llama(fields: Fields) -> GPTConfig:
    # pretraining_tp > 1 only reorders the arithmetic of a training cluster; 1 is what every shipped model says.
    fields.must_be("pretraining_tp", 1)
    fields.must_be("rope_interleaved", False)
    bias = fields.flag("attention_bias", False)
    return _llama_like(fields, qkv_bias=bias, attn_out_bias=bias, mlp_bias=fields.flag("mlp_bias", False))


def _mistral(fields: Fields) -> GPTConfig:
    return _llama_like(fields, kv_heads=8, context=131_072, window=_window(fields, 4096))


def _mixtral(fields: Fields) -> GPTConfig:
    experts = {
        "n_experts": fields.count("num_local_experts", 8),
        "n_experts_used": fields.count("num_experts_per_tok", 2),
    }
    return _llama_like(fields, kv_heads=8, context=131_072, eps=1e-5, theta=1e6, window=_window(fields, 0), **experts)


def _qwen2(fields: Fields) -> GPTConfig:
    return _llama_like(fields, kv_heads=32, context=32_768, window=_optional_window(fields))


def _qwen3(fields: Fields) -> GPTConfig:
    bias = {name: fields.flag("attention_bias", False) for name in ("qkv_bias", "attn_out_bias")}
    window = _optional_window(fields)
    return _llama_like(fields, kv_heads=32, context=32_768, head_dim=128, window=window, **bias)


def _qwen3_moe(fields: Fields) -> GPTConfig:
    fields.must_be("use_sliding_window", False)
    fields.seen |= {"sliding_window", "max_window_layers", "intermediate_size"}  # of what is off, and of dense layers
    fields.must_be("decoder_sparse_step", 1)
    fields.must_be("mlp_only_layers", [], None)
    bias = {name: fields.flag("attention_bias", False) for name in ("qkv_bias", "attn_out_bias")}
    return _llama_like(
        fields,
        kv_heads=4,
        context=32_768,
        d_ff=fields.count("moe_intermediate_size", 768),
        n_experts=fields.count("num_experts", fields.integer("num_local_experts", 128)),  # what transformers 5 calls it
        n_experts_used=fields.count("num_experts_per_tok", 8),
        expert_weights_sum_to_one=fields.flag("norm_topk_prob", False),
        **bias,
    )


def _phi3(fields: Fields) -> GPTConfig:
    heads = fields.count("num_attention_heads")
    part = fields.number("partial_rotary_factor", 1.0)
    fields.seen.add("original_max_position_embeddings")  # of longrope, which is refused
    width = fields.count("hidden_size") // heads
    return _llama_like(fields, context=4096, eps=1e-5, part=part, turned_of=width, window=_window(fields, 0))


def _llama_like(
    fields: Fields,
    *,
    kv_heads: int = 0,
    head_dim: int = 0,
    context: int = 2048,
    eps: float = 1e-6,
    theta: float = 10_000.0,
    part: float = 1.0,
    turned_of: int = 0,
    **values: Any,
) -> GPTConfig:
    """A Llama, or one of its kin: the family's defaults where transformers has others, and `values` of its own."""
    model_type = fields.text("model_type")
    n_heads = fields.integer("num_attention_heads")
    context = fields.integer("max_position_embeddings", context)
    common = {
        "architecture": model_type,
        "vocab_size": fields.integer("vocab_size"),
        "context_length": context,
        "d_model": fields.integer("hidden_size"),
        "n_layers": fields.integer("num_hidden_layers"),
        "n_heads": n_heads,
        "n_kv_heads": fields.integer("num_key_value_heads", kv_heads or n_heads),
        "head_dim": fields.integer("head_dim", head_dim),
        "norm_eps": fields.number("rms_norm_eps", eps),
        "activation": _activation(fields, "hidden_act", "silu"),
        "rope": _rope(fields, context, theta, part, turned_of),
        "tied": fields.flag("tie_word_embeddings", False),
        **_special_ids(fields),
    }
    if "d_ff" not in values:
        common["d_ff"] = fields.integer("intermediate_size")
    return fields.build(**FAMILIES[model_type].fields | common | values)


def _window(fields: Fields, default: int) -> int:
    """Null is none, which is not what its absence means to some."""
    return int(fields.integer("sliding_window", 0)) if "sliding_window" in fields.values else default


def _optional_window(fields: Fields) -> int:
    """Qwen's: only where `use_sliding_window` says so, and only in the layers from `max_window_layers` on."""
    layers, first = fields.count("num_hidden_layers"), fields.integer("max_window_layers", 28)
    window = _window(fields, 4096) if fields.flag("use_sliding_window", False) and first < layers else 0
    fields.seen.add("sliding_window")
    if window:
        fields.must_be("max_window_layers", 0)
    kind = "sliding_attention" if window else "full_attention"
    fields.must_be("layer_types", [kind] * layers, None)
    return window


def _gpt_neox(fields: Fields) -> GPTConfig:
    d_model, n_heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    bias = fields.flag("attention_bias", True)
    context = fields.integer("max_position_embeddings", 2048)
    return fields.build(
        architecture="gpt_neox",
        vocab_size=fields.integer("vocab_size"),
        context_length=context,
        d_model=d_model,
        n_layers=fields.integer("num_hidden_layers"),
        n_heads=n_heads,
        d_ff=fields.integer("intermediate_size"),
        norm_eps=fields.number("layer_norm_eps", 1e-5),
        activation=_activation(fields, "hidden_act", "gelu"),
        parallel_residual=fields.flag("use_parallel_residual", True),
        rope=_rope(
            fields,
            context,
            theta=fields.number("rotary_emb_base", 10_000.0),
            part=fields.number("rotary_pct", 0.25),
            head_dim=d_model // n_heads,
        ),
        qkv_bias=bias,
        attn_out_bias=bias,
        tied=fields.flag("tie_word_embeddings", False),
        **_special_ids(fields),
    )


def _rope(fields: Fields, context: int, theta: float = 10_000.0, part: float = 1.0, head_dim: int = 0) -> Rope:
    """`rope_theta` + `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5).

    `theta`, `part` (of each head that is turned): the family's defaults. `head_dim` where a part is allowed.
    """
    theta = fields.number("rope_theta", theta)
    table = {**fields.table("rope_scaling"), **fields.table("rope_parameters")}
    inner = Fields(table, f"{fields.where}: rope scaling", fields.ignore)
    older = inner.text("type", "default")  # transformers 4's first name for it; the newer one wins
    kind = inner.text("rope_type", older)
    part = inner.number("partial_rotary_factor", part)
    if part != 1 and not (head_dim and 0 < part < 1 and int(head_dim * part) >= 2):
        raise ConfigError(f"{inner.where}: a rotary part of {part} of each head is not supported for this model type.")
    common: dict[str, Any] = {"theta": inner.number("rope_theta", theta)}
    common |= {"dims": int(head_dim * part)} if part != 1 else {}
    original = inner.integer("original_max_position_embeddings", context)
    if kind in ("default", "none"):
        rope = Rope(**common)
    elif kind == "linear":
        rope = Rope(**common, scaling="linear", factor=inner.number("factor"))
    elif kind == "llama3":
        low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
        rope = Rope(**common, scaling="llama3", factor=inner.number("factor"), original_context=original,
                    low_freq_factor=low, high_freq_factor=high)  # fmt: skip
    elif kind == "yarn":
        inner.must_be("truncate", True)
        attention = inner.number("attention_factor", 0.0) or None
        rope = Rope(**common, scaling="yarn", factor=inner.number("factor"), original_context=original,
                    beta_fast=inner.number("beta_fast", 32.0), beta_slow=inner.number("beta_slow", 1.0),
                    attention_factor=attention)  # fmt: skip
    else:
        raise ConfigError(f"{inner.where}: rope_type {kind!r} is not supported; known: default, linear, llama3, yarn.")
    inner.refuse_others()
    return rope


READERS: Mapping[str, Callable[[Fields], GPTConfig]] = {
    "gpt2": _gpt2,
    "gptj": _gptj,
    "gpt_neox": _gpt_neox,
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "phi3": _phi3,
}
