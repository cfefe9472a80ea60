"""GPT-NeoX (Pythia): HuggingFace fuses q, k, v head by head and calls the head `embed_out`; GGUF fuses them whole."""

from __future__ import annotations

from .ops import Op, SplitQKV
from .rules import Ignore, Rule, WeightMap


def _both(source: str, *targets: str, ops: tuple[Op, ...] = ()) -> tuple[Rule, Rule]:
    weight, bias = (tuple(f"{target}.{part}" for target in targets) for part in ("weight", "bias"))
    return Rule(f"{source}.weight", weight, ops), Rule(f"{source}.bias", bias, ops)


QKV = tuple(f"blocks.{{i}}.attn.{part}" for part in "qkv")

HF = WeightMap(
    "gpt_neox",
    "hf",
    (
        Rule("embed_in.weight", ("tok_emb.weight",)),
        *_both("layers.{i}.input_layernorm", "blocks.{i}.norm1"),
        *_both("layers.{i}.attention.query_key_value", *QKV, ops=(SplitQKV(per_head=True),)),
        *_both("layers.{i}.attention.dense", "blocks.{i}.attn.out"),
        *_both("layers.{i}.post_attention_layernorm", "blocks.{i}.norm2"),
        *_both("layers.{i}.mlp.dense_h_to_4h", "blocks.{i}.mlp.up"),
        *_both("layers.{i}.mlp.dense_4h_to_h", "blocks.{i}.mlp.down"),
        *_both("final_layer_norm", "norm"),
        Rule("embed_out.weight", ("head.weight",)),
    ),
    (
        Ignore("layers.{i}.attention.bias", "causal mask, a buffer", "mask"),
        Ignore("layers.{i}.attention.masked_bias", "value under the causal mask, a buffer", "scalar"),
        Ignore("layers.{i}.attention.rotary_emb.inv_freq", "rotary frequencies, a buffer", "vector"),
    ),
    prefix="gpt_neox.",
    # transformers 5 calls the live module so, and goes on writing embed_out.
    synonyms={"lm_head.weight": "embed_out.weight"},
)

# llama.cpp's converter puts all heads' q first, then k, then v.
GGUF = WeightMap(
    "gpt_neox",
    "gguf",
    (
        Rule("token_embd.weight", ("tok_emb.weight",)),
        *_both("blk.{i}.attn_norm", "blocks.{i}.norm1"),
        *_both("blk.{i}.attn_qkv", *QKV, ops=(SplitQKV(),)),
        *_both("blk.{i}.attn_output", "blocks.{i}.attn.out"),
        *_both("blk.{i}.ffn_norm", "blocks.{i}.norm2"),
        *_both("blk.{i}.ffn_up", "blocks.{i}.mlp.up"),
        *_both("blk.{i}.ffn_down", "blocks.{i}.mlp.down"),
        *_both("output_norm", "norm"),
        Rule("output.weight", ("head.weight",)),
    ),
)

TABLES = (HF, GGUF)
