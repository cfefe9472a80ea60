"""GGUF metadata as a config (key names as llama.cpp writes them; its `gguf-py/gguf/constants.py` lists them)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..errors import ConfigError
from .base import GPTConfig, Rope
from .fields import Fields
from .others import LLAMA_FIELDS

# Keys under the architecture's name that do not change the function.
HARMLESS = ("vocab_size", "rope.scaling.finetuned", "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")


def from_gguf(
    metadata: Mapping[str, Any],
    facts: Mapping[str, Any],
    *,
    rope_factors: tuple[float, ...] = (),
    where: str = "GGUF metadata",
    ignore: Iterable[str] = (),
) -> GPTConfig:
    """Translate GGUF key-values.

    Args:
        metadata: all key-values of the file.
        facts: config fields that GGUF keeps only in its tensors: `vocab_size` (rows of `token_embd`), `tied` (no
            `output.weight`), `qkv_bias` and the other biases.
        rope_factors: values of `rope_freqs.weight`, if the file has it (Llama 3's scaling).
        where: for errors.
        ignore: fields that the caller knows to be harmless.

    Raises ConfigError for an architecture that is not supported and for fields that nobody handles.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in ("gpt2", "llama"):
        raise ConfigError(f"{where}: general.architecture {architecture!r} is not supported; known: gpt2, llama.")
    prefix = f"{architecture}."
    own = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    fields = Fields(own, f"{where} ({prefix}*)", ignore)
    n_heads = fields.count("attention.head_count")
    sizes: dict[str, Any] = {
        "architecture": architecture,
        "vocab_size": facts["vocab_size"],
        "context_length": fields.integer("context_length"),
        "d_model": fields.integer("embedding_length"),
        "n_layers": fields.integer("block_count"),
        "n_heads": n_heads,
        "n_kv_heads": fields.integer("attention.head_count_kv", n_heads),
        "d_ff": fields.integer("feed_forward_length"),
        **{key: facts[key] for key in ("tied", "qkv_bias", "attn_out_bias", "mlp_bias", "norm_bias")},
        **_special_ids(metadata),
    }
    for expert_key in ("expert_count", "expert_used_count"):
        fields.must_be(expert_key, 0, None)
    if architecture == "gpt2":
        config = fields.build(**sizes, norm_eps=_number(fields, "attention.layer_norm_epsilon", 1e-5))
    else:
        head_dim = fields.integer("attention.key_length", 0)
        fields.must_be("attention.value_length", head_dim, None)
        rope = _rope(fields, rope_factors, sizes["context_length"])
        # Every dimension of a head is turned; partial rotary is another family's.
        fields.must_be("rope.dimension_count", head_dim or sizes["d_model"] // n_heads, None)
        eps = _number(fields, "attention.layer_norm_rms_epsilon", 1e-5)
        config = fields.build(**(LLAMA_FIELDS | sizes), head_dim=head_dim, norm_eps=eps, rope=rope)
    fields.refuse_others(HARMLESS)
    return config


def _number(fields: Fields, key: str, default: float) -> float:
    """GGUF keeps fractions as float32: 1e-05 comes back as 9.999999747378752e-06, and was meant as 1e-05."""
    value = fields.number(key, default)
    with np.errstate(over="ignore"):
        stored = np.float32(value)
    return float(str(stored)) if float(stored) == value else value


def _special_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    fields = Fields(metadata, "GGUF metadata")
    bos = fields.ids("tokenizer.ggml.bos_token_id")
    return {"bos_id": bos[0] if bos else None, "eos_ids": fields.ids("tokenizer.ggml.eos_token_id")}


def _rope(fields: Fields, factors: tuple[float, ...], context: int) -> Rope:
    theta = _number(fields, "rope.freq_base", 10_000.0)
    kind = fields.text("rope.scaling.type", "none")
    factor = _number(fields, "rope.scaling.factor", 1.0)
    original = fields.integer("rope.scaling.original_context_length", context)
    if factors:
        # Llama 3's converter folds its scaling into this tensor and leaves the type out.
        if kind not in ("none", "llama3"):
            raise ConfigError(f"{fields.where}: has rope_freqs.weight and rope.scaling.type {kind!r}: contradictory.")
        return Rope(theta=theta, scaling="factors", factors=factors)
    if kind == "none":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, scaling="linear", factor=factor)
    if kind == "yarn":
        fast, slow = (
            _number(fields, f"rope.scaling.yarn_beta_{end}", usual) for end, usual in (("fast", 32.0), ("slow", 1.0))
        )
        return Rope(
            theta=theta, scaling="yarn", factor=factor, original_context=original, beta_fast=fast, beta_slow=slow
        )
    raise ConfigError(f"{fields.where}: rope.scaling.type {kind!r} is not supported; known: none, linear, yarn.")
