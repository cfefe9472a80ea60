"""GGUF metadata as a config (key names as llama.cpp writes them; its `gguf-py/gguf/constants.py` lists them)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import ConfigError
from .base import GPTConfig, Rope
from .families import FAMILIES, OF_GGUF
from .fields import Fields

# Keys under the architecture's name that do not change the function.
HARMLESS = ("vocab_size", "rope.scaling.finetuned", "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")


FROM_TENSORS = ("vocab_size", "tied", "qkv_bias", "attn_out_bias", "mlp_bias", "norm_bias")


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
    named = metadata.get("general.architecture")
    if not isinstance(named, str) or named not in OF_GGUF:
        raise ConfigError(
            f"{where}: general.architecture {named!r} is not supported; known: {', '.join(sorted(OF_GGUF))}."
        )
    own = {key.removeprefix(f"{named}."): metadata[key] for key in metadata if key.startswith(f"{named}.")}
    fields = Fields(own, f"{where} ({named}.*)", ignore)
    architecture, family = OF_GGUF[named], _FAMILIES.get(named, _llama_like)
    values = _sizes(fields) | {key: facts[key] for key in FROM_TENSORS} | _special_ids(metadata)
    values = FAMILIES[architecture].fields | values | family(fields, values)
    config = fields.build(architecture=architecture, **values)
    if named != "gpt2":
        rope = _rope(fields, config, _turned(fields, config, named in PARTIAL), rope_factors)
        config = fields.replace(config, rope=rope)
    if config.n_experts and architecture == "llama":
        config = replace(config, architecture="mixtral")
    fields.refuse_others(HARMLESS)
    return config


def _sizes(fields: Fields) -> dict[str, Any]:
    n_heads = fields.count("attention.head_count")
    return {
        "context_length": fields.integer("context_length"),
        "d_model": fields.integer("embedding_length"),
        "n_layers": fields.integer("block_count"),
        "n_heads": n_heads,
        "n_kv_heads": fields.integer("attention.head_count_kv", n_heads),
        "d_ff": fields.integer("feed_forward_length"),
    }


def _gpt2(fields: Fields, sizes: Mapping[str, Any]) -> dict[str, Any]:
    return {"norm_eps": _number(fields, "attention.layer_norm_epsilon", 1e-5)}


def _gptneox(fields: Fields, sizes: Mapping[str, Any]) -> dict[str, Any]:
    return _gpt2(fields, sizes) | {"parallel_residual": fields.flag("use_parallel_residual", True)}


def _llama_like(fields: Fields, sizes: Mapping[str, Any]) -> dict[str, Any]:
    head_dim = fields.integer("attention.key_length", 0)
    fields.must_be("attention.value_length", head_dim, None)
    return {
        "head_dim": head_dim,
        "norm_eps": _number(fields, "attention.layer_norm_rms_epsilon", 1e-5),
        "n_experts": fields.integer("expert_count", 0),
        "n_experts_used": fields.integer("expert_used_count", 0),
        "d_ff": fields.integer("expert_feed_forward_length", sizes["d_ff"]),
    }


def _phi3(fields: Fields, sizes: Mapping[str, Any]) -> dict[str, Any]:
    return _llama_like(fields, sizes) | {"window": fields.integer("attention.sliding_window", 0)}


_FAMILIES: Mapping[str, Callable[[Fields, Mapping[str, Any]], dict[str, Any]]] = {
    "gpt2": _gpt2,
    "gptneox": _gptneox,
    "phi3": _phi3,
}
PARTIAL = ("gptneox", "phi3")  # may turn a part of each head


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


def _turned(fields: Fields, config: GPTConfig, partial: bool) -> int:
    """Elements of each head that are turned; 0: all."""
    if not partial:
        fields.must_be("rope.dimension_count", config.head_dim, None)
    dims = int(fields.integer("rope.dimension_count", config.head_dim))
    return 0 if dims == config.head_dim else dims


def _rope(fields: Fields, config: GPTConfig, dims: int, factors: tuple[float, ...]) -> Rope:
    context, theta = config.context_length, _number(fields, "rope.freq_base", 10_000.0)
    kind = fields.text("rope.scaling.type", "none")
    factor = _number(fields, "rope.scaling.factor", 1.0)
    original = fields.integer("rope.scaling.original_context_length", context)
    if factors:
        # Llama 3's converter folds its scaling into this tensor and leaves the type out.
        if kind not in ("none", "llama3"):
            raise ConfigError(f"{fields.where}: has rope_freqs.weight and rope.scaling.type {kind!r}: contradictory.")
        return Rope(theta=theta, scaling="factors", factors=factors, dims=dims)
    if kind == "none":
        return Rope(theta=theta, dims=dims)
    if kind == "linear":
        return Rope(theta=theta, scaling="linear", factor=factor, dims=dims)
    if kind == "yarn":
        fast, slow = (
            _number(fields, f"rope.scaling.yarn_beta_{end}", usual) for end, usual in (("fast", 32.0), ("slow", 1.0))
        )
        return Rope(
            theta=theta, scaling="yarn", factor=factor, original_context=original, beta_fast=fast, beta_slow=slow,
            dims=dims,
        )  # fmt: skip
    raise ConfigError(f"{fields.where}: rope.scaling.type {kind!r} is not supported; known: none, linear, yarn.")
