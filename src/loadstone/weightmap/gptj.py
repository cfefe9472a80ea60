"""GPT-J in HuggingFace's dialect: rotary pairs, one norm a block, a head with a bias. llama.cpp has no graph of it."""

from __future__ import annotations

from .ops import Op, RotaryHalves
from .rules import Ignore, Rule, WeightMap


def _both(source: str, target: str, *ops: Op) -> tuple[Rule, Rule]:
    return Rule(f"{source}.weight", (f"{target}.weight",), ops), Rule(f"{source}.bias", (f"{target}.bias",), ops)


HF = WeightMap(
    "gptj",
    "hf",
    (
        Rule("wte.weight", ("tok_emb.weight",)),
        *_both("h.{i}.ln_1", "blocks.{i}.norm1"),
        *_both("h.{i}.attn.q_proj", "blocks.{i}.attn.q", RotaryHalves("n_heads")),
        *_both("h.{i}.attn.k_proj", "blocks.{i}.attn.k", RotaryHalves("n_kv_heads")),
        *_both("h.{i}.attn.v_proj", "blocks.{i}.attn.v"),
        *_both("h.{i}.attn.out_proj", "blocks.{i}.attn.out"),
        *_both("h.{i}.mlp.fc_in", "blocks.{i}.mlp.up"),
        *_both("h.{i}.mlp.fc_out", "blocks.{i}.mlp.down"),
        *_both("ln_f", "norm"),
        *_both("lm_head", "head"),
    ),
    (
        Ignore("h.{i}.attn.bias", "causal mask, a buffer", "mask"),
        Ignore("h.{i}.attn.masked_bias", "value under the causal mask, a buffer", "scalar"),
        Ignore("h.{i}.attn.embed_positions", "rotary table, a buffer"),
    ),
    prefix="transformer.",
)

TABLES = (HF,)
