"""Which models an engine of its own can run: it names the config's fields that it obeys, and refuses any other."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import fields

from ..config import GPTConfig
from ..errors import LoadstoneError

# GPT-2, GPT-NeoX, Llama and what lies between.
COMMON = frozenset(
    "vocab_size context_length d_model n_layers n_heads n_kv_heads head_dim d_ff architecture norm norm_eps activation "
    "gated_mlp rope parallel_residual qkv_bias attn_out_bias mlp_bias norm_bias tied bos_id eos_ids".split()
)


def require_fields(config: GPTConfig, engine: str, obeyed: Set[str] = COMMON) -> None:
    """Raises LoadstoneError if a field that the engine does not obey has another value than its default."""
    odd = [f.name for f in fields(config) if f.name not in obeyed and getattr(config, f.name) != f.default]
    if odd:
        raise LoadstoneError(
            f"engine {engine} does not do {', '.join(odd)}, which this model needs; use --engine torch."
        )
