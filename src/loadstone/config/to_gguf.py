"""GGUF's key-values for a config, as llama.cpp's converter writes them (its `conversion/gpt2.py` and `llama.py`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import GPTConfig, Rope
from .families import FAMILIES, OF_GGUF
from .gguf import from_gguf
from .losses import TOKEN_IDS, plain_rope, require_architecture, require_said
from .rope_factors import rope_factors

ROPE_FREQS = "rope_freqs.weight"
LINEAR_BIASES = ("qkv_bias", "attn_out_bias", "mlp_bias")


def to_gguf(config: GPTConfig, accept: Collection[str] = ()) -> dict[str, Any]:
    """The key-values of a model without a vocabulary; those of `tokenizer.export.gguf_vocabulary` go on top.

    Llama 3's rotary scaling is not among them: it is the tensor that `gguf_tensors` gives.
    Raises ConfigError for what llama.cpp's graph of the architecture does not do, naming the fields.
    """
    require_architecture(config, "GGUF", *(name for name, family in FAMILIES.items() if family.gguf))
    prefix = FAMILIES[config.architecture].gguf
    values = {
        "context_length": config.context_length,
        "embedding_length": config.d_model,
        "block_count": config.n_layers,
        "feed_forward_length": config.d_ff,
        "attention.head_count": config.n_heads,
        "vocab_size": config.vocab_size,  # where there is no vocabulary, llama.cpp knows the rows only from here
        **_WRITERS.get(prefix, _llama_like)(config),
    }
    metadata = {"general.architecture": prefix, "general.type": "model", **_token_ids(config)}
    metadata |= {f"{prefix}.{key}": value for key, value in values.items()}
    # The graphs of GPT-2 and GPT-NeoX ask for every bias; a Llama's linear layers may have theirs, its norms have none.
    whole = prefix in _WRITERS
    flags = {name: whole or getattr(config, name) for name in LINEAR_BIASES}
    facts = {"vocab_size": config.vocab_size, "tied": config.tied, "norm_bias": whole} | flags
    factors = gguf_tensors(config).get(ROPE_FREQS)
    meant = from_gguf(metadata, facts, rope_factors=() if factors is None else tuple(factors.tolist()))
    # Mistral and Mixtral are a `llama` there: the same function by another name.
    unrecorded = TOKEN_IDS if OF_GGUF[prefix] == config.architecture else (*TOKEN_IDS, "architecture")
    require_said(_stored(_with_factors(config)), _stored(meant), "GGUF", accept, unrecorded)
    return metadata


def gguf_tensors(config: GPTConfig) -> dict[str, NDArray[np.float32]]:
    """Tensors that stand for config fields: `rope_freqs.weight` where a Llama has Llama 3's scaling.

    llama.cpp's other graphs do not look for it.
    """
    rope = config.rope if FAMILIES[config.architecture].gguf == "llama" else None
    factors = None if rope is None else rope_factors(rope, rope.dims or config.head_dim)
    return {} if factors is None else {ROPE_FREQS: factors}


def _with_factors(config: GPTConfig) -> GPTConfig:
    """The config as it is known once Llama 3's scaling is a tensor."""
    factors = gguf_tensors(config).get(ROPE_FREQS)
    if config.rope is None or factors is None:
        return config
    rope = Rope(theta=config.rope.theta, scaling="factors", factors=tuple(factors.tolist()), dims=config.rope.dims)
    return replace(config, rope=rope)


def _stored(config: GPTConfig) -> GPTConfig:
    """The config with its fractions as GGUF keeps them, in float32."""
    rope = config.rope and replace(config.rope, theta=_float32(config.rope.theta), factor=_float32(config.rope.factor))
    return replace(config, norm_eps=_float32(config.norm_eps), rope=rope)


def _float32(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def _token_ids(config: GPTConfig) -> dict[str, Any]:
    """With `none` for a vocabulary llama.cpp loads the model all the same, and takes and gives ids alone."""
    ids = {"bos": config.bos_id, "eos": next(iter(config.eos_ids), None)}
    known = {f"tokenizer.ggml.{name}_token_id": number for name, number in ids.items() if number is not None}
    return {"tokenizer.ggml.model": "none", **known}


def _gpt2(config: GPTConfig) -> dict[str, Any]:
    return {"attention.layer_norm_epsilon": config.norm_eps}


def _gptneox(config: GPTConfig) -> dict[str, Any]:
    return _gpt2(config) | {"use_parallel_residual": config.parallel_residual} | _rope(config)


def _llama_like(config: GPTConfig) -> dict[str, Any]:
    experts = {
        "expert_count": config.n_experts,
        "expert_used_count": config.n_experts_used,
        "expert_feed_forward_length": config.d_ff,
    }
    return {
        "attention.head_count_kv": config.n_kv_heads,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        **(experts if config.n_experts else {}),
        **_rope(config),
    }


_WRITERS: Mapping[str, Callable[[GPTConfig], dict[str, Any]]] = {"gpt2": _gpt2, "gptneox": _gptneox}


def _rope(config: GPTConfig) -> dict[str, Any]:
    rope = plain_rope(config) or Rope()
    turned = {"rope.freq_base": rope.theta, "rope.dimension_count": rope.dims or config.head_dim}
    return turned | _scaling(rope)


def _scaling(rope: Rope) -> dict[str, Any]:
    if rope.scaling not in ("linear", "yarn"):
        return {}
    values = {"rope.scaling.type": rope.scaling, "rope.scaling.factor": rope.factor}
    if rope.scaling == "linear":
        return values
    return values | {
        "rope.scaling.original_context_length": rope.original_context,
        "rope.scaling.yarn_beta_fast": rope.beta_fast,
        "rope.scaling.yarn_beta_slow": rope.beta_slow,
    }
