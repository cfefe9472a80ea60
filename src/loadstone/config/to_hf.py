"""`config.json` and `generation_config.json`, for transformers (4.40 and newer, 5) and llama.cpp's converter."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ..errors import ConfigError
from .base import GPTConfig, Rope
from .families import FAMILIES
from .hf import from_hf
from .losses import plain_rope, require_architecture, require_said
from .rope_factors import with_named_scaling

DTYPES = ("float32", "float16", "bfloat16")
ACTIVATIONS: Mapping[str, str] = {"gelu_tanh": "gelu_new", "gelu": "gelu", "silu": "silu", "relu": "relu"}


def to_hf(config: GPTConfig, *, dtype: str = "float32", accept: Collection[str] = ()) -> dict[str, Any]:
    """The parsed `config.json` of a model.

    Args:
        config: the model.
        dtype: of the weights beside it; transformers loads them as that.
        accept: fields whose change the user accepts.

    Raises ConfigError for what HuggingFace's model class cannot do, naming the fields, and for another dtype.
    """
    require_architecture(config, "HuggingFace's config.json", *_WRITERS)
    if dtype not in DTYPES:
        raise ConfigError(
            f"dtype {dtype!r} cannot be named in config.json; known: {', '.join(DTYPES)}. Choose one, as in "
            "--dtype float32."
        )
    if config.d_model % config.n_heads:  # transformers refuses it, even where head_dim says how wide a head is
        raise ConfigError(
            f"HuggingFace's config.json: transformers wants d_model ({config.d_model}) to be a multiple of n_heads "
            f"({config.n_heads})."
        )
    config = with_named_scaling(config)
    values = {
        "architectures": [FAMILIES[config.architecture].hf],
        "model_type": config.architecture,
        "vocab_size": config.vocab_size,
        **_WRITERS[config.architecture](config),
        "tie_word_embeddings": config.tied,
        **_token_ids(config),
        "dtype": dtype,  # transformers 5
        "torch_dtype": dtype,  # transformers 4
        "use_cache": True,
    }
    require_said(config, from_hf(values), "HuggingFace", accept)
    return values


def generation_config(config: GPTConfig) -> dict[str, Any]:
    """The parsed `generation_config.json`: where a text begins and ends."""
    ids = _token_ids(config)
    return {"_from_model_config": True} | {name: value for name, value in ids.items() if value is not None}


def _token_ids(config: GPTConfig) -> dict[str, Any]:
    """Null is said too: transformers' own defaults are a GPT-2's or a Llama's tokens."""
    ends = config.eos_ids
    return {
        "bos_token_id": config.bos_id,
        "eos_token_id": list(ends) if len(ends) > 1 else next(iter(ends), None),
    }


def _gpt2(config: GPTConfig) -> dict[str, Any]:
    return {
        "n_positions": config.context_length,
        "n_ctx": config.context_length,  # llama.cpp's converter reads this one
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": None if config.d_ff == 4 * config.d_model else config.d_ff,
        "activation_function": ACTIVATIONS[config.activation],
        "layer_norm_epsilon": float(config.norm_eps),
    }


def _gptj(config: GPTConfig) -> dict[str, Any]:
    rope = config.rope or Rope()
    return _gpt2(config) | {"rotary": True, "rotary_dim": rope.dims or config.head_dim}


def _llama(config: GPTConfig) -> dict[str, Any]:
    return _llama_like(config) | {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


def _mistral(config: GPTConfig) -> dict[str, Any]:
    return _llama_like(config) | {"sliding_window": config.window or None}


def _mixtral(config: GPTConfig) -> dict[str, Any]:
    return _mistral(config) | {
        "num_local_experts": config.n_experts,
        "num_experts_per_tok": config.n_experts_used,
    }


def _qwen2(config: GPTConfig) -> dict[str, Any]:
    window = {"sliding_window": config.window, "max_window_layers": 0} if config.window else {}
    return _llama_like(config) | {"use_sliding_window": bool(config.window)} | window


def _qwen3(config: GPTConfig) -> dict[str, Any]:
    return _qwen2(config) | {"attention_bias": config.qkv_bias}


def _qwen3_moe(config: GPTConfig) -> dict[str, Any]:
    return _llama_like(config) | {
        "attention_bias": config.qkv_bias,
        "use_sliding_window": False,
        "num_experts": config.n_experts,
        "num_experts_per_tok": config.n_experts_used,
        "moe_intermediate_size": config.d_ff,
        "norm_topk_prob": config.expert_weights_sum_to_one,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _phi3(config: GPTConfig) -> dict[str, Any]:
    values = _mistral(config) | _rope(config, part_name="partial_rotary_factor")
    # Without a word on padding it is Phi-3's own token 32000, which may be none of this vocabulary.
    return values | {"original_max_position_embeddings": config.context_length, "pad_token_id": None}


def _llama_like(config: GPTConfig) -> dict[str, Any]:
    return _sizes(config) | {
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": ACTIVATIONS[config.activation],
        "rms_norm_eps": float(config.norm_eps),
        **_rope(config),
    }


def _gpt_neox(config: GPTConfig) -> dict[str, Any]:
    return _sizes(config) | {
        "hidden_act": ACTIVATIONS[config.activation],
        "layer_norm_eps": float(config.norm_eps),
        "attention_bias": config.qkv_bias,
        "use_parallel_residual": config.parallel_residual,
        **_rope(config, theta_name="rotary_emb_base", part_name="rotary_pct"),
    }


def _sizes(config: GPTConfig) -> dict[str, Any]:
    return {
        "max_position_embeddings": config.context_length,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
    }


def _rope(config: GPTConfig, theta_name: str = "rope_theta", part_name: str = "") -> dict[str, Any]:
    """transformers 4 reads the base (and the part of a head that is turned) beside `rope_scaling`; 5 reads all from
    `rope_parameters`, or from the older fields where these stand as well. So both must say the same.
    """
    rope = plain_rope(config) or Rope()
    kind, scaling = _scaling(rope)
    theta, part = float(rope.theta), _part(rope.dims, config.head_dim)
    # Before 4.43 transformers called it `type`, knew no kind but linear, and refused any other field.
    older = {"type" if kind == "linear" else "rope_type": kind} | scaling
    newer = {"rope_type": kind} | scaling | {"rope_theta": theta}
    return {
        theta_name: theta,
        **({part_name: part} if part_name else {}),
        "rope_scaling": None if kind == "default" else older,
        "rope_parameters": newer | ({"partial_rotary_factor": part} if part_name or part != 1 else {}),
    }


def _scaling(rope: Rope) -> tuple[str, dict[str, Any]]:
    """transformers' name of the scaling, and its numbers; it has no name for free divisors."""
    if rope.scaling in ("none", "factors"):
        return "default", {}
    numbers: dict[str, Any] = {"factor": float(rope.factor)}
    if rope.scaling != "linear":
        numbers["original_max_position_embeddings"] = rope.original_context
    for name in ("low_freq_factor", "high_freq_factor") if rope.scaling == "llama3" else ():
        numbers[name] = float(getattr(rope, name))
    for name in ("beta_fast", "beta_slow", "attention_factor") if rope.scaling == "yarn" else ():
        if (value := getattr(rope, name)) is not None:
            numbers[name] = float(value)
    return rope.scaling, numbers


def _part(dims: int, head_dim: int) -> float:
    """The part of a head that is turned: the float which gives `dims` again when its product is cut to an integer."""
    part = (dims or head_dim) / head_dim
    return part if int(head_dim * part) == (dims or head_dim) else math.nextafter(part, 2)


_WRITERS: Mapping[str, Callable[[GPTConfig], dict[str, Any]]] = {
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
