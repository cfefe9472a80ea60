"""Llama's kin and GPT-J: hostile tensors of each, in the names of HuggingFace and llama.cpp, and what they compute.

Written down by hand and run in numpy's float64, without Loadstone's tables or model, as `dialects.py` and
`reference.py` do it for the older families.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dialects import Array, Tensors, _random
from memory import MemoryCheckpoint
from reference import softmax

WIDTH, LAYERS, HEADS, KV_HEADS, DIM, D_FF, VOCAB = 48, 3, 6, 2, 8, 40, 101


@dataclass(frozen=True)
class Kin:
    """What one family does, as its authors describe it; `config` are the fields by which HuggingFace says so."""

    model_type: str
    gguf: str  # what llama.cpp calls it
    config: dict[str, Any]
    qkv_bias: bool = False
    qk_norm: bool = False
    window: int = 0
    experts: int = 0
    used: int = 0
    sum_to_one: bool = True
    fused: bool = False  # q, k, v in one matrix, and gate, up in another
    pairs: bool = False  # GGUF's rotary pairs
    turned: int = DIM


EXPERTS = {"num_experts_per_tok": 2}
KIN = {
    "mistral": Kin("mistral", "llama", {"sliding_window": 5}, window=5, pairs=True),
    "mixtral": Kin(
        "mixtral", "llama", {"num_local_experts": 5, **EXPERTS, "rope_theta": 1e4}, experts=5, used=2, pairs=True
    ),
    "qwen2": Kin("qwen2", "qwen2", {"use_sliding_window": False}, qkv_bias=True),
    "qwen3": Kin("qwen3", "qwen3", {"attention_bias": False}, qk_norm=True),
    "qwen3_moe": Kin(
        "qwen3_moe", "qwen3moe",
        {"num_experts": 5, **EXPERTS, "moe_intermediate_size": D_FF, "norm_topk_prob": True, "intermediate_size": 999},
        qk_norm=True, experts=5, used=2,
    ),
    "phi3": Kin("phi3", "phi3", {"sliding_window": None, "partial_rotary_factor": 0.75}, fused=True, turned=6),
}  # fmt: skip


def checkpoint(kin: Kin, dialect: str) -> MemoryCheckpoint:
    """The same model every time; `stacked` is transformers 5's way with experts."""
    if dialect == "gguf":
        return MemoryCheckpoint(as_gguf(kin, plain(kin)), metadata=gguf_metadata(kin))
    write = as_stacked_hf if dialect == "stacked" else as_hf
    return MemoryCheckpoint(write(kin, plain(kin)), metadata={"hf_config": hf_config(kin)})


def hf_config(kin: Kin) -> dict[str, Any]:
    common = {
        "model_type": kin.model_type, "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": D_FF,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": DIM,
        "max_position_embeddings": 40, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False,
    }  # fmt: skip
    return common | kin.config


def gguf_metadata(kin: Kin) -> dict[str, Any]:
    values = {
        "context_length": 40, "embedding_length": WIDTH, "block_count": LAYERS, "feed_forward_length": D_FF,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "attention.key_length": DIM,
        "attention.value_length": DIM, "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e4,
        "rope.dimension_count": kin.turned,
    }  # fmt: skip
    if kin.experts:
        values |= {"expert_count": kin.experts, "expert_used_count": kin.used}
    return {"general.architecture": kin.gguf, **{f"{kin.gguf}.{key}": value for key, value in values.items()}}


def plain(kin: Kin, seed: int = 0) -> Tensors:
    """Every matrix by itself, under short names: `0.q`, `0.e3.gate`, ...; rotary halves."""
    rng = np.random.default_rng(seed)
    w: Tensors = {
        "embed": _random(rng, VOCAB, WIDTH),
        "norm": _random(rng, WIDTH, mean=1),
        "head": _random(rng, VOCAB, WIDTH),
    }
    for i in range(LAYERS):
        for name, rows in (("q", HEADS * DIM), ("k", KV_HEADS * DIM), ("v", KV_HEADS * DIM)):
            w[f"{i}.{name}"] = _random(rng, rows, WIDTH)
            if kin.qkv_bias:
                w[f"{i}.{name}_bias"] = _random(rng, rows)
        w[f"{i}.o"] = _random(rng, WIDTH, HEADS * DIM)
        for name in ("norm1", "norm2"):
            w[f"{i}.{name}"] = _random(rng, WIDTH, mean=1)
        for name in ("q_norm", "k_norm") if kin.qk_norm else ():
            w[f"{i}.{name}"] = _random(rng, DIM, mean=1)
        if kin.experts:
            w[f"{i}.router"] = _random(rng, kin.experts, WIDTH)
        for at in (f"{i}.e{e}." for e in range(kin.experts)) if kin.experts else (f"{i}.",):
            w |= {at + "gate": _random(rng, D_FF, WIDTH), at + "up": _random(rng, D_FF, WIDTH)}
            w[at + "down"] = _random(rng, WIDTH, D_FF)
    return w


HF_NAMES = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "norm1": "input_layernorm", "norm2": "post_attention_layernorm", "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    "router": "mlp.gate", "qkv_proj": "self_attn.qkv_proj", "gate_up_proj": "mlp.gate_up_proj",
}  # fmt: skip
GGUF_NAMES = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "norm1": "attn_norm", "norm2": "ffn_norm",
    "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
    "router": "ffn_gate_inp",
}  # fmt: skip
MIXTRAL = {"gate": "w1", "down": "w2", "up": "w3"}


def as_hf(kin: Kin, w: Tensors) -> Tensors:
    """As the hub's files have it: experts one by one."""
    found = {"model.embed_tokens.weight": w["embed"], "model.norm.weight": w["norm"], "lm_head.weight": w["head"]}
    for name, value in _fused(kin, w, "qkv_proj", "gate_up_proj").items():
        if "." not in name:
            continue
        layer, *expert, leaf = name.split(".")
        stem, part = (leaf.removesuffix("_bias"), "bias") if leaf.endswith("_bias") else (leaf, "weight")
        known = HF_NAMES[stem]
        if kin.model_type == "mixtral" and (expert or stem == "router"):
            known = f"block_sparse_moe.experts.{expert[0][1:]}.{MIXTRAL[stem]}" if expert else "block_sparse_moe.gate"
        elif expert:
            known = f"mlp.experts.{expert[0][1:]}.{stem}_proj"
        found[f"model.layers.{layer}.{known}.{part}"] = value
    return found


def as_stacked_hf(kin: Kin, w: Tensors) -> Tensors:
    """As transformers 5 holds experts in memory."""
    hf = as_hf(kin, w)
    found = {name: value for name, value in hf.items() if ".experts." not in name and "moe.gate" not in name}
    for i in range(LAYERS):
        at, each = f"model.layers.{i}.mlp", [f"{i}.e{e}." for e in range(kin.experts)]
        found[f"{at}.gate.weight"] = w[f"{i}.router"]
        pairs = [np.concatenate((w[e + "gate"], w[e + "up"])) for e in each]
        found |= {f"{at}.experts.gate_up_proj": np.stack(pairs), f"{at}.experts.down_proj": _stack(w, each, "down")}
    return found


def as_gguf(kin: Kin, w: Tensors) -> Tensors:
    found = {"token_embd.weight": w["embed"], "output_norm.weight": w["norm"], "output.weight": w["head"]}
    for name, value in _fused(kin, w, "attn_qkv", "ffn_up").items():
        if name.count(".") != 1:
            continue
        layer, leaf = name.split(".")
        stem, part = (leaf.removesuffix("_bias"), "bias") if leaf.endswith("_bias") else (leaf, "weight")
        if kin.pairs and stem in ("q", "k"):
            heads = value.reshape(-1, 2, DIM // 2, *value.shape[1:])  # halves; element j of each goes to 2j and 2j + 1
            value = heads.swapaxes(1, 2).reshape(value.shape)
        found[f"blk.{layer}.{GGUF_NAMES.get(stem, stem)}.{part}"] = value
    for i in range(LAYERS) if kin.experts else ():
        each = [f"{i}.e{e}." for e in range(kin.experts)]
        found |= {f"blk.{i}.ffn_{part}_exps.weight": _stack(w, each, part) for part in ("gate", "up", "down")}
    return found


def _stack(w: Tensors, each: list[str], part: str) -> Array:
    return np.stack([w[e + part] for e in each])


def _fused(kin: Kin, w: Tensors, qkv: str, gate_up: str) -> Tensors:
    if not kin.fused:
        return w
    found = {name: value for name, value in w.items() if name.split(".")[-1] not in ("q", "k", "v", "gate", "up")}
    for i in range(LAYERS):
        found[f"{i}.{qkv}"] = np.concatenate([w[f"{i}.{part}"] for part in "qkv"])
        found[f"{i}.{gate_up}"] = np.concatenate([w[f"{i}.gate"], w[f"{i}.up"]])
    return found


def logits(kin: Kin, tensors: Tensors, ids: list[int]) -> Array:
    """[T, V], from `plain` tensors."""
    w = {name: value.astype(np.float64) for name, value in tensors.items()}

    def norm(x: Array, name: str) -> Array:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w[name]

    def turn(x: Array) -> Array:
        half = kin.turned // 2
        angles = np.outer(np.arange(len(x)), 1e4 ** (-np.arange(half) / half))
        turned = (x[:, :half] + 1j * x[:, half : 2 * half]) * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag, x[:, 2 * half :]], -1)

    def heads(x: Array, i: int, name: str) -> list[Array]:
        y = x @ w[f"{i}.{name}"].T + w.get(f"{i}.{name}_bias", 0)
        return [
            norm(h, f"{i}.{name}_norm") if kin.qk_norm and name != "v" else h for h in np.split(y, y.shape[1] // DIM, 1)
        ]

    def attend(q: Array, k: Array, v: Array) -> Array:
        scores = q @ k.T / np.sqrt(DIM)
        behind = np.subtract.outer(np.arange(len(q)), np.arange(len(q)))
        hidden = (behind < 0) | (behind >= kin.window) if kin.window else behind < 0
        return softmax(np.where(hidden, -np.inf, scores)) @ v

    def mlp(x: Array, at: str) -> Array:
        gate = x @ w[at + "gate"].T
        return (gate / (1 + np.exp(-gate)) * (x @ w[at + "up"].T)) @ w[at + "down"].T

    def experts(x: Array, i: int) -> Array:
        weights = softmax(x @ w[f"{i}.router"].T)
        y = np.zeros_like(x)
        for t, row in enumerate(weights):
            best = np.argsort(-row)[: kin.used]
            share = row[best] / row[best].sum() if kin.sum_to_one else row[best]
            y[t] = sum(s * mlp(x[t : t + 1], f"{i}.e{e}.")[0] for s, e in zip(share, best, strict=True))
        return y

    x = w["embed"][ids]
    for i in range(LAYERS):
        h = norm(x, f"{i}.norm1")
        q, k, v = (heads(h, i, name) for name in "qkv")
        group = HEADS // KV_HEADS
        y = [attend(turn(q[j]), turn(k[j // group]), v[j // group]) for j in range(HEADS)]
        x = x + np.concatenate(y, -1) @ w[f"{i}.o"].T
        h = norm(x, f"{i}.norm2")
        x = x + (experts(h, i) if kin.experts else mlp(h, f"{i}."))
    return norm(x, "norm") @ w["head"].T


GPTJ_TURNED = 4
GPTJ_CONFIG = {
    "model_type": "gptj", "vocab_size": VOCAB, "n_positions": 40, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS,
    "rotary": True, "rotary_dim": GPTJ_TURNED, "n_inner": 80, "activation_function": "gelu_new",
}  # fmt: skip


def gptj_hf(seed: int = 0) -> Tensors:
    rng = np.random.default_rng(seed)
    w: Tensors = {"transformer.wte.weight": _random(rng, VOCAB, WIDTH)}
    for i in range(LAYERS):
        at = f"transformer.h.{i}"
        w[f"{at}.ln_1.weight"], w[f"{at}.ln_1.bias"] = _random(rng, WIDTH, mean=1), _random(rng, WIDTH)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            w[f"{at}.attn.{name}.weight"] = _random(rng, WIDTH, WIDTH)
        for name, out, into in (("fc_in", 80, WIDTH), ("fc_out", WIDTH, 80)):
            w[f"{at}.mlp.{name}.weight"], w[f"{at}.mlp.{name}.bias"] = _random(rng, out, into), _random(rng, out)
    w |= {"transformer.ln_f.weight": _random(rng, WIDTH, mean=1), "transformer.ln_f.bias": _random(rng, WIDTH)}
    return w | {"lm_head.weight": _random(rng, VOCAB, WIDTH), "lm_head.bias": _random(rng, VOCAB)}


def gptj_logits(tensors: Tensors, ids: list[int]) -> Array:
    """Neighbouring pairs of the first elements turn; attention and MLP read one norm; the head has a bias."""
    w = {name.removeprefix("transformer."): value.astype(np.float64) for name, value in tensors.items()}

    def norm(x: Array, name: str) -> Array:
        centred = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return centred * w[f"{name}.weight"] + w[f"{name}.bias"]

    def turn(x: Array) -> Array:
        first = x[:, :GPTJ_TURNED]
        angles = np.outer(np.arange(len(x)), 1e4 ** (-np.arange(0, GPTJ_TURNED, 2) / GPTJ_TURNED))
        turned = (first[:, 0::2] + 1j * first[:, 1::2]) * np.exp(1j * angles)
        return np.concatenate([np.stack([turned.real, turned.imag], -1).reshape(first.shape), x[:, GPTJ_TURNED:]], -1)

    def attend(q: Array, k: Array, v: Array) -> Array:
        scores = q @ k.T / np.sqrt(DIM)
        scores[np.triu_indices(len(q), 1)] = -np.inf
        return softmax(scores) @ v

    x = w["wte.weight"][ids]
    for i in range(LAYERS):
        h = norm(x, f"h.{i}.ln_1")
        q, k, v = (np.split(h @ w[f"h.{i}.attn.{name}_proj.weight"].T, HEADS, 1) for name in "qkv")
        y = np.concatenate([attend(turn(q[j]), turn(k[j]), v[j]) for j in range(HEADS)], -1)
        inner = h @ w[f"h.{i}.mlp.fc_in.weight"].T + w[f"h.{i}.mlp.fc_in.bias"]
        inner = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
        mlp = inner @ w[f"h.{i}.mlp.fc_out.weight"].T + w[f"h.{i}.mlp.fc_out.bias"]
        x = x + y @ w[f"h.{i}.attn.out_proj.weight"].T + mlp
    return norm(x, "ln_f") @ w["lm_head.weight"].T + w["lm_head.bias"]
