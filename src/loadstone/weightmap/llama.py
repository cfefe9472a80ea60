"""Llama and its kin, in HuggingFace's dialect, Meta's and GGUF: one set of names, and what each family adds to it.

Meta keeps rotary pairs, and so does what llama.cpp calls `llama`, so there q and k are permuted. Experts are stored one
by one (files of the hub), or one upon the other (transformers 5 in memory, GGUF): both are the same dialect.
"""

from __future__ import annotations

from .ops import Op, RotaryHalves, SplitExperts, SplitGateUp, SplitQKV
from .rules import Ignore, Rule, WeightMap

Q_ROWS, K_ROWS = RotaryHalves("n_heads"), RotaryHalves("n_kv_heads")
QKV = tuple(f"blocks.{{i}}.attn.{part}" for part in "qkv")
GATE, UP, DOWN = (f"blocks.{{i}}.mlp.{part}" for part in ("gate", "up", "down"))
EACH_GATE, EACH_UP, EACH_DOWN = (f"blocks.{{i}}.mlp.experts.{{e}}.{part}" for part in ("gate", "up", "down"))
Rules = tuple[Rule, ...]


def _weight(source: str, *targets: str, ops: tuple[Op, ...] = ()) -> Rule:
    return Rule(f"{source}.weight", tuple(f"{target}.weight" for target in targets), ops)


def _linear(source: str, *targets: str, ops: tuple[Op, ...] = ()) -> Rules:
    """Weight and bias of one linear layer; whatever moves or splits the rows does it to both."""
    bias = Rule(f"{source}.bias", tuple(f"{target}.bias" for target in targets), ops)
    return _weight(source, *targets, ops=ops), bias


def _stacked(source: str, *targets: str, ops: tuple[Op, ...] = ()) -> Rule:
    """The experts' matrices as one tensor."""
    return Rule(source, tuple(f"{target}.weight" for target in targets), (SplitExperts(), *ops))


_HF_ATTENTION = (
    *_linear("layers.{i}.self_attn.q_proj", QKV[0]),
    *_linear("layers.{i}.self_attn.k_proj", QKV[1]),
    *_linear("layers.{i}.self_attn.v_proj", QKV[2]),
)
_HF_QK_NORM = (
    _weight("layers.{i}.self_attn.q_norm", "blocks.{i}.attn.q_norm"),
    _weight("layers.{i}.self_attn.k_norm", "blocks.{i}.attn.k_norm"),
)
_HF_MLP = (
    *_linear("layers.{i}.mlp.gate_proj", GATE),
    *_linear("layers.{i}.mlp.up_proj", UP),
    *_linear("layers.{i}.mlp.down_proj", DOWN),
)


def _hf(architecture: str, attention: Rules, mlp: Rules) -> WeightMap:
    rules = (
        _weight("embed_tokens", "tok_emb"),
        _weight("layers.{i}.input_layernorm", "blocks.{i}.norm1"),
        *attention,
        *_linear("layers.{i}.self_attn.o_proj", "blocks.{i}.attn.out"),
        _weight("layers.{i}.post_attention_layernorm", "blocks.{i}.norm2"),
        *mlp,
        _weight("norm", "norm"),
        _weight("lm_head", "head"),
    )
    buffers = (Ignore("layers.{i}.self_attn.rotary_emb.inv_freq", "rotary frequencies, a buffer", "vector"),)
    return WeightMap(architecture, "hf", rules, buffers, prefix="model.")


def _hf_experts(router: str, at: str, gate: str, up: str, down: str) -> tuple[Rules, Rules]:
    """The experts of one family one by one, as its files have them, and as transformers 5 holds them in memory."""
    one_by_one = (
        _weight(router, "blocks.{i}.mlp.router"),
        _weight(f"{at}.{{e}}.{gate}", EACH_GATE),
        _weight(f"{at}.{{e}}.{up}", EACH_UP),
        _weight(f"{at}.{{e}}.{down}", EACH_DOWN),
    )
    stacked = (
        _weight("layers.{i}.mlp.gate", "blocks.{i}.mlp.router"),
        _stacked("layers.{i}.mlp.experts.gate_up_proj", EACH_GATE, EACH_UP, ops=(SplitGateUp(),)),
        _stacked("layers.{i}.mlp.experts.down_proj", EACH_DOWN),
    )
    return one_by_one, stacked


_MIXTRAL = _hf_experts(
    "layers.{i}.block_sparse_moe.gate", "layers.{i}.block_sparse_moe.experts", "w1", "w3", "w2"
)  # fmt: skip
_QWEN3_MOE = _hf_experts("layers.{i}.mlp.gate", "layers.{i}.mlp.experts", "gate_proj", "up_proj", "down_proj")

HF = _hf("llama", _HF_ATTENTION, _HF_MLP)
HF_KIN = (
    _hf("mistral", _HF_ATTENTION, _HF_MLP),
    _hf("qwen2", _HF_ATTENTION, _HF_MLP),
    _hf("qwen3", _HF_ATTENTION + _HF_QK_NORM, _HF_MLP),
    _hf(
        "phi3",
        _linear("layers.{i}.self_attn.qkv_proj", *QKV, ops=(SplitQKV(),)),
        (
            *_linear("layers.{i}.mlp.gate_up_proj", GATE, UP, ops=(SplitGateUp(),)),
            *_linear("layers.{i}.mlp.down_proj", DOWN),
        ),
    ),
    *(_hf("mixtral", _HF_ATTENTION, experts) for experts in _MIXTRAL),
    *(_hf("qwen3_moe", _HF_ATTENTION + _HF_QK_NORM, experts) for experts in _QWEN3_MOE),
)

# Meta's own releases, and llama2.c's.
META = WeightMap(
    "llama",
    "meta",
    (
        _weight("tok_embeddings", "tok_emb"),
        _weight("layers.{i}.attention_norm", "blocks.{i}.norm1"),
        _weight("layers.{i}.attention.wq", QKV[0], ops=(Q_ROWS,)),
        _weight("layers.{i}.attention.wk", QKV[1], ops=(K_ROWS,)),
        _weight("layers.{i}.attention.wv", QKV[2]),
        _weight("layers.{i}.attention.wo", "blocks.{i}.attn.out"),
        _weight("layers.{i}.ffn_norm", "blocks.{i}.norm2"),
        _weight("layers.{i}.feed_forward.w1", GATE),
        _weight("layers.{i}.feed_forward.w3", UP),
        _weight("layers.{i}.feed_forward.w2", DOWN),
        _weight("norm", "norm"),
        _weight("output", "head"),
    ),
    (
        Ignore("rope.freqs", "rotary frequencies, a buffer", "vector"),
        Ignore("freqs_cos", "rotary table, a buffer"),
        Ignore("freqs_sin", "rotary table, a buffer"),
    ),
    shares_head=True,
)

_GGUF_ATTENTION = (
    *_linear("blk.{i}.attn_q", QKV[0]),
    *_linear("blk.{i}.attn_k", QKV[1]),
    *_linear("blk.{i}.attn_v", QKV[2]),
)
_GGUF_PAIRS = (
    *_linear("blk.{i}.attn_q", QKV[0], ops=(Q_ROWS,)),
    *_linear("blk.{i}.attn_k", QKV[1], ops=(K_ROWS,)),
    *_linear("blk.{i}.attn_v", QKV[2]),
)
_GGUF_QK_NORM = (
    _weight("blk.{i}.attn_q_norm", "blocks.{i}.attn.q_norm"),
    _weight("blk.{i}.attn_k_norm", "blocks.{i}.attn.k_norm"),
)
_GGUF_MLP = (
    *_linear("blk.{i}.ffn_gate", GATE),
    *_linear("blk.{i}.ffn_up", UP),
    *_linear("blk.{i}.ffn_down", DOWN),
)
_GGUF_ROUTER = _weight("blk.{i}.ffn_gate_inp", "blocks.{i}.mlp.router")
_GGUF_EXPERTS = (
    _GGUF_ROUTER,
    _stacked("blk.{i}.ffn_gate_exps.weight", EACH_GATE),
    _stacked("blk.{i}.ffn_up_exps.weight", EACH_UP),
    _stacked("blk.{i}.ffn_down_exps.weight", EACH_DOWN),
)
_GGUF_OLD_EXPERTS = (  # of the first months of Mixtral
    _GGUF_ROUTER,
    _weight("blk.{i}.ffn_gate.{e}", EACH_GATE),
    _weight("blk.{i}.ffn_up.{e}", EACH_UP),
    _weight("blk.{i}.ffn_down.{e}", EACH_DOWN),
)


def _gguf(architecture: str, attention: Rules, mlp: Rules) -> WeightMap:
    rules = (
        _weight("token_embd", "tok_emb"),
        _weight("blk.{i}.attn_norm", "blocks.{i}.norm1"),
        *attention,
        *_linear("blk.{i}.attn_output", "blocks.{i}.attn.out"),
        _weight("blk.{i}.ffn_norm", "blocks.{i}.norm2"),
        *mlp,
        _weight("output_norm", "norm"),
        _weight("output", "head"),
    )
    return WeightMap(architecture, "gguf", rules, (ROPE_FREQS,))


ROPE_FREQS = Ignore("rope_freqs.weight", "rotary scaling; read into the config", "vector")
GGUF = _gguf("llama", _GGUF_PAIRS, _GGUF_MLP)
GGUF_KIN = (
    _gguf("mistral", _GGUF_PAIRS, _GGUF_MLP),
    _gguf("qwen2", _GGUF_ATTENTION, _GGUF_MLP),
    _gguf("qwen3", _GGUF_ATTENTION + _GGUF_QK_NORM, _GGUF_MLP),
    _gguf(
        "phi3",
        _linear("blk.{i}.attn_qkv", *QKV, ops=(SplitQKV(),)),
        (*_linear("blk.{i}.ffn_up", GATE, UP, ops=(SplitGateUp(),)), *_linear("blk.{i}.ffn_down", DOWN)),
    ),
    _gguf("mixtral", _GGUF_PAIRS, _GGUF_EXPERTS),
    _gguf("mixtral", _GGUF_PAIRS, _GGUF_OLD_EXPERTS),
    _gguf("qwen3_moe", _GGUF_ATTENTION + _GGUF_QK_NORM, _GGUF_EXPERTS),
)

TABLES = (HF, META, GGUF, *HF_KIN, *GGUF_KIN)
