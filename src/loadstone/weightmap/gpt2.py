"""GPT-2 in six dialects. Each table is the whole knowledge about its dialect; all say the same model."""

from __future__ import annotations

from .ops import Op, SplitQKV, Squeeze, Transpose
from .rules import Ignore, Rule, WeightMap

QKV_WEIGHT = ("blocks.{i}.attn.q.weight", "blocks.{i}.attn.k.weight", "blocks.{i}.attn.v.weight")
QKV_BIAS = ("blocks.{i}.attn.q.bias", "blocks.{i}.attn.k.bias", "blocks.{i}.attn.v.bias")


def _keep(source: str, target: str) -> Rule:
    return Rule(source, (target,))


def _both(source: str, target: str, *weight_ops: Op) -> tuple[Rule, Rule]:
    """A linear layer's or norm's weight and bias. Biases have no orientation."""
    return (
        Rule(f"{source}.weight", (f"{target}.weight",), weight_ops),
        Rule(f"{source}.bias", (f"{target}.bias",)),
    )


def _fused(source: str, *weight_ops: Op) -> tuple[Rule, Rule]:
    """One `c_attn` for q, k and v."""
    return (
        Rule(f"{source}.weight", QKV_WEIGHT, (*weight_ops, SplitQKV())),
        Rule(f"{source}.bias", QKV_BIAS, (SplitQKV(),)),
    )


def _huggingface_names(*weight_ops: Op) -> tuple[Rule, ...]:
    """HuggingFace's names, which nanoGPT kept while it turned the matrices around."""
    return (
        _keep("wte.weight", "tok_emb.weight"),
        _keep("wpe.weight", "pos_emb.weight"),
        *_both("h.{i}.ln_1", "blocks.{i}.norm1"),
        *_fused("h.{i}.attn.c_attn", *weight_ops),
        *_both("h.{i}.attn.c_proj", "blocks.{i}.attn.out", *weight_ops),
        *_both("h.{i}.ln_2", "blocks.{i}.norm2"),
        *_both("h.{i}.mlp.c_fc", "blocks.{i}.mlp.up", *weight_ops),
        *_both("h.{i}.mlp.c_proj", "blocks.{i}.mlp.down", *weight_ops),
        *_both("ln_f", "norm"),
        _keep("lm_head.weight", "head.weight"),
    )


CAUSAL_MASK = "causal mask, a buffer"
MASKS = (
    Ignore("h.{i}.attn.bias", CAUSAL_MASK, "mask"),
    Ignore("h.{i}.attn.masked_bias", "value under the causal mask, a buffer", "scalar"),
)

# transformers' Conv1D stores [in, out]. The head had another name in its first releases, and so in DialoGPT's files.
HF = WeightMap(
    "gpt2", "hf", _huggingface_names(Transpose()), MASKS, orientation="[in, out]", prefix="transformer.",
    synonyms={"lm_head.decoder.weight": "lm_head.weight"},
)  # fmt: skip

# nanoGPT: the same names over nn.Linear.
NANOGPT = WeightMap("gpt2", "nanogpt", _huggingface_names(), MASKS, prefix="transformer.", shares_head=True)

# OpenAI's TensorFlow graph: Conv1D kernels are [1, in, out]; norms are g and b; there is no head, it is wte.
CONV1D = (Squeeze(), Transpose())
OPENAI = WeightMap(
    "gpt2",
    "openai",
    (
        _keep("model/wte", "tok_emb.weight"),
        _keep("model/wpe", "pos_emb.weight"),
        _keep("model/h{i}/ln_1/g", "blocks.{i}.norm1.weight"),
        _keep("model/h{i}/ln_1/b", "blocks.{i}.norm1.bias"),
        Rule("model/h{i}/attn/c_attn/w", QKV_WEIGHT, (*CONV1D, SplitQKV())),
        Rule("model/h{i}/attn/c_attn/b", QKV_BIAS, (SplitQKV(),)),
        Rule("model/h{i}/attn/c_proj/w", ("blocks.{i}.attn.out.weight",), CONV1D),
        _keep("model/h{i}/attn/c_proj/b", "blocks.{i}.attn.out.bias"),
        _keep("model/h{i}/ln_2/g", "blocks.{i}.norm2.weight"),
        _keep("model/h{i}/ln_2/b", "blocks.{i}.norm2.bias"),
        Rule("model/h{i}/mlp/c_fc/w", ("blocks.{i}.mlp.up.weight",), CONV1D),
        _keep("model/h{i}/mlp/c_fc/b", "blocks.{i}.mlp.up.bias"),
        Rule("model/h{i}/mlp/c_proj/w", ("blocks.{i}.mlp.down.weight",), CONV1D),
        _keep("model/h{i}/mlp/c_proj/b", "blocks.{i}.mlp.down.bias"),
        _keep("model/ln_f/g", "norm.weight"),
        _keep("model/ln_f/b", "norm.bias"),
    ),
    (
        Ignore("global_step", "training step counter", "scalar"),
        *(Ignore(f"beta{n}_power", "Adam's running power", "scalar") for n in (1, 2)),
        *(Ignore(f"{{p}}/{slot}", "optimizer slot") for slot in ("Adam", "Adam_1", "Momentum", "RMSProp", "RMSProp_1")),
        *(Ignore(f"{{p}}/Adafactor{n}", "optimizer slot") for n in ("", "_1", "_2")),
        *(Ignore(f"{{p}}/{slot}", "moving average") for slot in ("ExponentialMovingAverage",)),
    ),
    orientation="[1, in, out]",
)

# Raschka's "LLMs from scratch": q, k, v apart, norms as scale and shift, the head a copy of the embedding.
RASCHKA = WeightMap(
    "gpt2",
    "raschka",
    (
        _keep("tok_emb.weight", "tok_emb.weight"),
        _keep("pos_emb.weight", "pos_emb.weight"),
        _keep("trf_blocks.{i}.norm1.scale", "blocks.{i}.norm1.weight"),
        _keep("trf_blocks.{i}.norm1.shift", "blocks.{i}.norm1.bias"),
        *_both("trf_blocks.{i}.att.W_query", "blocks.{i}.attn.q"),
        *_both("trf_blocks.{i}.att.W_key", "blocks.{i}.attn.k"),
        *_both("trf_blocks.{i}.att.W_value", "blocks.{i}.attn.v"),
        *_both("trf_blocks.{i}.att.out_proj", "blocks.{i}.attn.out"),
        _keep("trf_blocks.{i}.norm2.scale", "blocks.{i}.norm2.weight"),
        _keep("trf_blocks.{i}.norm2.shift", "blocks.{i}.norm2.bias"),
        *_both("trf_blocks.{i}.ff.layers.0", "blocks.{i}.mlp.up"),
        *_both("trf_blocks.{i}.ff.layers.2", "blocks.{i}.mlp.down"),
        _keep("final_norm.scale", "norm.weight"),
        _keep("final_norm.shift", "norm.bias"),
        _keep("out_head.weight", "head.weight"),
    ),
    (Ignore("trf_blocks.{i}.att.mask", CAUSAL_MASK, "mask", written=True),),
    shares_head=True,
)

# The lesson of document 002: HuggingFace's c_attn and c_proj inside `blocks`, fc1 and fc2, all nn.Linear.
LESSON = WeightMap(
    "gpt2",
    "lesson",
    (
        _keep("tok_emb.weight", "tok_emb.weight"),
        _keep("pos_emb.weight", "pos_emb.weight"),
        *_both("blocks.{i}.ln_1", "blocks.{i}.norm1"),
        *_fused("blocks.{i}.attn.c_attn"),
        *_both("blocks.{i}.attn.c_proj", "blocks.{i}.attn.out"),
        *_both("blocks.{i}.ln_2", "blocks.{i}.norm2"),
        *_both("blocks.{i}.mlp.fc1", "blocks.{i}.mlp.up"),
        *_both("blocks.{i}.mlp.fc2", "blocks.{i}.mlp.down"),
        *_both("ln_f", "norm"),
        _keep("lm_head.weight", "head.weight"),
    ),
    (Ignore("blocks.{i}.attn.bias", CAUSAL_MASK, "mask"),),
    shares_head=True,
)

# GGUF, as llama.cpp's converter writes it: matrices already turned to [out, in], q, k, v fused.
GGUF = WeightMap(
    "gpt2",
    "gguf",
    (
        _keep("token_embd.weight", "tok_emb.weight"),
        _keep("position_embd.weight", "pos_emb.weight"),
        *_both("blk.{i}.attn_norm", "blocks.{i}.norm1"),
        *_fused("blk.{i}.attn_qkv"),
        *_both("blk.{i}.attn_output", "blocks.{i}.attn.out"),
        *_both("blk.{i}.ffn_norm", "blocks.{i}.norm2"),
        *_both("blk.{i}.ffn_up", "blocks.{i}.mlp.up"),
        *_both("blk.{i}.ffn_down", "blocks.{i}.mlp.down"),
        *_both("output_norm", "norm"),
        _keep("output.weight", "head.weight"),
    ),
)

TABLES = (HF, NANOGPT, OPENAI, RASCHKA, LESSON, GGUF)
