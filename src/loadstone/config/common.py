"""Which models an engine of its own can run: it names the config's fields that it obeys, and refuses any other."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import fields

from ..errors import LoadstoneError
from .base import GPTConfig

# GPT-2, GPT-NeoX, Llama and what lies between.
COMMON = frozenset(
    "vocab_size context_length d_model n_layers n_heads n_kv_heads head_dim d_ff architecture norm norm_eps activation "
    "gated_mlp rope parallel_residual qkv_bias attn_out_bias mlp_bias norm_bias tied bos_id eos_ids".split()
)


def unknown_fields(config: GPTConfig, obeyed: Set[str] = COMMON) -> list[str]:
    """What the model has that the engine does not obey: `field = value`, for values that are not the default."""
    pairs = [(field, getattr(config, field.name)) for field in fields(config) if field.name not in obeyed]
    return [f"{field.name} = {value!r}" for field, value in pairs if value != field.default]


def require_fields(config: GPTConfig, engine: str, obeyed: Set[str] = COMMON) -> None:
    """Raises LoadstoneError if a field that the engine does not obey has another value than its default."""
    if unknown := unknown_fields(config, obeyed):
        raise LoadstoneError(
            f"engine {engine} does not do {', '.join(unknown)}, which this model needs; use --engine torch."
        )
