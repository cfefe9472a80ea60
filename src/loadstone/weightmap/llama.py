"""Llama in three dialects: HuggingFace's, Meta's, GGUF's. The last two keep rotary pairs, so q and k are permuted."""

from __future__ import annotations

from .ops import Op, RotaryHalves
from .rules import Ignore, Rule, WeightMap

Q_ROWS, K_ROWS = RotaryHalves("n_heads"), RotaryHalves("n_kv_heads")


def _linear(source: str, target: str, *ops: Op) -> tuple[Rule, Rule]:
    """Weight and bias of one linear layer; a rotary permutation moves the rows of both."""
    return tuple(Rule(f"{source}.{part}", (f"{target}.{part}",), ops) for part in ("weight", "bias"))  # type: ignore[return-value]


HF = WeightMap(
    "llama",
    "hf",
    (
        Rule("embed_tokens.weight", ("tok_emb.weight",)),
        Rule("layers.{i}.input_layernorm.weight", ("blocks.{i}.norm1.weight",)),
        *_linear("layers.{i}.self_attn.q_proj", "blocks.{i}.attn.q"),
        *_linear("layers.{i}.self_attn.k_proj", "blocks.{i}.attn.k"),
        *_linear("layers.{i}.self_attn.v_proj", "blocks.{i}.attn.v"),
        *_linear("layers.{i}.self_attn.o_proj", "blocks.{i}.attn.out"),
        Rule("layers.{i}.post_attention_layernorm.weight", ("blocks.{i}.norm2.weight",)),
        *_linear("layers.{i}.mlp.gate_proj", "blocks.{i}.mlp.gate"),
        *_linear("layers.{i}.mlp.up_proj", "blocks.{i}.mlp.up"),
        *_linear("layers.{i}.mlp.down_proj", "blocks.{i}.mlp.down"),
        Rule("norm.weight", ("norm.weight",)),
        Rule("lm_head.weight", ("head.weight",)),
    ),
    (Ignore("layers.{i}.self_attn.rotary_emb.inv_freq", "rotary frequencies, a buffer", "vector"),),
    prefix="model.",
)

# Meta's own releases, and llama2.c's.
META = WeightMap(
    "llama",
    "meta",
    (
        Rule("tok_embeddings.weight", ("tok_emb.weight",)),
        Rule("layers.{i}.attention_norm.weight", ("blocks.{i}.norm1.weight",)),
        Rule("layers.{i}.attention.wq.weight", ("blocks.{i}.attn.q.weight",), (Q_ROWS,)),
        Rule("layers.{i}.attention.wk.weight", ("blocks.{i}.attn.k.weight",), (K_ROWS,)),
        Rule("layers.{i}.attention.wv.weight", ("blocks.{i}.attn.v.weight",)),
        Rule("layers.{i}.attention.wo.weight", ("blocks.{i}.attn.out.weight",)),
        Rule("layers.{i}.ffn_norm.weight", ("blocks.{i}.norm2.weight",)),
        Rule("layers.{i}.feed_forward.w1.weight", ("blocks.{i}.mlp.gate.weight",)),
        Rule("layers.{i}.feed_forward.w3.weight", ("blocks.{i}.mlp.up.weight",)),
        Rule("layers.{i}.feed_forward.w2.weight", ("blocks.{i}.mlp.down.weight",)),
        Rule("norm.weight", ("norm.weight",)),
        Rule("output.weight", ("head.weight",)),
    ),
    (
        Ignore("rope.freqs", "rotary frequencies, a buffer", "vector"),
        Ignore("freqs_cos", "rotary table, a buffer"),
        Ignore("freqs_sin", "rotary table, a buffer"),
    ),
    shares_head=True,
)

GGUF = WeightMap(
    "llama",
    "gguf",
    (
        Rule("token_embd.weight", ("tok_emb.weight",)),
        Rule("blk.{i}.attn_norm.weight", ("blocks.{i}.norm1.weight",)),
        *_linear("blk.{i}.attn_q", "blocks.{i}.attn.q", Q_ROWS),
        *_linear("blk.{i}.attn_k", "blocks.{i}.attn.k", K_ROWS),
        *_linear("blk.{i}.attn_v", "blocks.{i}.attn.v"),
        *_linear("blk.{i}.attn_output", "blocks.{i}.attn.out"),
        Rule("blk.{i}.ffn_norm.weight", ("blocks.{i}.norm2.weight",)),
        *_linear("blk.{i}.ffn_gate", "blocks.{i}.mlp.gate"),
        *_linear("blk.{i}.ffn_up", "blocks.{i}.mlp.up"),
        *_linear("blk.{i}.ffn_down", "blocks.{i}.mlp.down"),
        Rule("output_norm.weight", ("norm.weight",)),
        Rule("output.weight", ("head.weight",)),
    ),
    (Ignore("rope_freqs.weight", "rotary scaling; read into the config", "vector"),),
)

TABLES = (HF, META, GGUF)
