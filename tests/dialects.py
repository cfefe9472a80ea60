"""Hostile weights, and the same model written down in every dialect by hand.

Written without Loadstone's tables on purpose: a wrong op with its right inverse would round-trip, so what the tables
read must come from elsewhere. Norms and biases are random and matrices have sigma 0.2, because default initialisation
hides whole classes of mapping faults.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Tensors = dict[str, Array]


def _random(rng: np.random.Generator, *shape: int, mean: float = 0.0, sigma: float = 0.2) -> Array:
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(sigma) + np.float32(mean)


def gpt2_hf(
    vocab: int = 101,
    context: int = 40,
    width: int = 32,
    layers: int = 3,
    d_ff: int = 0,
    sigma: float = 0.2,
    seed: int = 0,
) -> Tensors:
    """GPT-2 in HuggingFace's names and Conv1D layout, tied (no lm_head). `sigma` is that of the matrices."""
    rng = np.random.default_rng(seed)
    inner = d_ff or 4 * width
    w: Tensors = {
        "wte.weight": _random(rng, vocab, width, sigma=sigma),
        "wpe.weight": _random(rng, context, width, sigma=sigma),
    }
    for i in range(layers):
        for norm in ("ln_1", "ln_2"):
            w[f"h.{i}.{norm}.weight"] = _random(rng, width, mean=1.0)
            w[f"h.{i}.{norm}.bias"] = _random(rng, width)
        for name, into, out in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, inner),
            ("mlp.c_proj", inner, width),
        ):
            w[f"h.{i}.{name}.weight"] = _random(rng, into, out, sigma=sigma)
            w[f"h.{i}.{name}.bias"] = _random(rng, out)
    w["ln_f.weight"], w["ln_f.bias"] = _random(rng, width, mean=1.0), _random(rng, width)
    return w


def _is_conv1d(name: str) -> bool:
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def gpt2_nanogpt(hf: Tensors) -> Tensors:
    w = {f"transformer.{name}": np.ascontiguousarray(v.T) if _is_conv1d(name) else v for name, v in hf.items()}
    return w | {"lm_head.weight": w["transformer.wte.weight"]}


def gpt2_openai(hf: Tensors) -> Tensors:
    last = {"weight": "w", "bias": "b"}
    w: Tensors = {"model/wte": hf["wte.weight"], "model/wpe": hf["wpe.weight"]}
    for name, value in hf.items():
        parts = name.split(".")
        if parts[0] == "h":
            leaf = {"weight": "g", "bias": "b"}[parts[-1]] if "ln_" in name else last[parts[-1]]
            key = f"model/h{parts[1]}/{'/'.join(parts[2:-1])}/{leaf}"
            w[key] = value[None] if _is_conv1d(name) else value
        elif parts[0] == "ln_f":
            w[f"model/ln_f/{'g' if parts[1] == 'weight' else 'b'}"] = value
    return w


def gpt2_raschka(hf: Tensors, masks: bool = True) -> Tensors:
    context, layers = len(hf["wpe.weight"]), sum(name.endswith("ln_1.weight") for name in hf)
    w: Tensors = {"tok_emb.weight": hf["wte.weight"], "pos_emb.weight": hf["wpe.weight"]}
    for i in range(layers):
        t, h = f"trf_blocks.{i}", f"h.{i}"
        if masks:
            w[f"{t}.att.mask"] = np.triu(np.ones((context, context), np.float32), 1)
        weights = np.split(hf[f"{h}.attn.c_attn.weight"], 3, axis=1)
        biases = np.split(hf[f"{h}.attn.c_attn.bias"], 3)
        for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            w[f"{t}.att.W_{part}.weight"], w[f"{t}.att.W_{part}.bias"] = np.ascontiguousarray(weight.T), bias
        for ours, theirs in (
            ("att.out_proj", "attn.c_proj"),
            ("ff.layers.0", "mlp.c_fc"),
            ("ff.layers.2", "mlp.c_proj"),
        ):
            w[f"{t}.{ours}.weight"] = np.ascontiguousarray(hf[f"{h}.{theirs}.weight"].T)
            w[f"{t}.{ours}.bias"] = hf[f"{h}.{theirs}.bias"]
        for n in (1, 2):
            w[f"{t}.norm{n}.scale"], w[f"{t}.norm{n}.shift"] = hf[f"{h}.ln_{n}.weight"], hf[f"{h}.ln_{n}.bias"]
    w["final_norm.scale"], w["final_norm.shift"] = hf["ln_f.weight"], hf["ln_f.bias"]
    return w | {"out_head.weight": hf["wte.weight"].copy()}


def _renamed(hf: Tensors, replacements: tuple[tuple[str, str], ...]) -> Tensors:
    w: Tensors = {}
    for name, value in hf.items():
        key = name
        for old, new in replacements:
            key = key.replace(old, new)
        w[key] = np.ascontiguousarray(value.T) if _is_conv1d(name) else value
    return w


def gpt2_lesson(hf: Tensors) -> Tensors:
    w = _renamed(
        hf,
        (
            ("wte.", "tok_emb."),
            ("wpe.", "pos_emb."),
            ("h.", "blocks."),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
        ),
    )
    return w | {"lm_head.weight": w["tok_emb.weight"]}


def gpt2_gguf(hf: Tensors) -> Tensors:
    return _renamed(
        hf,
        (
            ("wte.", "token_embd."),
            ("wpe.", "position_embd."),
            ("h.", "blk."),
            ("attn.c_attn", "attn_qkv"),
            ("attn.c_proj", "attn_output"),
            ("mlp.c_fc", "ffn_up"),
            ("mlp.c_proj", "ffn_down"),
            ("ln_1", "attn_norm"),
            ("ln_2", "ffn_norm"),
            ("ln_f", "output_norm"),
        ),
    )


def llama_meta(
    vocab: int = 101,
    width: int = 48,
    layers: int = 3,
    heads: int = 6,
    kv_heads: int = 2,
    d_ff: int = 80,
    tied: bool = False,
    seed: int = 0,
) -> Tensors:
    """Llama in Meta's names, rotary pairs."""
    rng, dim = np.random.default_rng(seed), width // heads
    w: Tensors = {"tok_embeddings.weight": _random(rng, vocab, width)}
    for i in range(layers):
        at = f"layers.{i}"
        w[f"{at}.attention_norm.weight"] = _random(rng, width, mean=1.0)
        for name, rows in (("wq", heads * dim), ("wk", kv_heads * dim), ("wv", kv_heads * dim)):
            w[f"{at}.attention.{name}.weight"] = _random(rng, rows, width)
        w[f"{at}.attention.wo.weight"] = _random(rng, width, heads * dim)
        w[f"{at}.ffn_norm.weight"] = _random(rng, width, mean=1.0)
        w[f"{at}.feed_forward.w1.weight"] = _random(rng, d_ff, width)
        w[f"{at}.feed_forward.w2.weight"] = _random(rng, width, d_ff)
        w[f"{at}.feed_forward.w3.weight"] = _random(rng, d_ff, width)
    w["norm.weight"] = _random(rng, width, mean=1.0)
    return w if tied else w | {"output.weight": _random(rng, vocab, width)}


LLAMA_NAMES = {  # Meta's name: (HuggingFace's, GGUF's)
    "tok_embeddings": ("model.embed_tokens", "token_embd"),
    "attention_norm": ("input_layernorm", "attn_norm"),
    "attention.wq": ("self_attn.q_proj", "attn_q"),
    "attention.wk": ("self_attn.k_proj", "attn_k"),
    "attention.wv": ("self_attn.v_proj", "attn_v"),
    "attention.wo": ("self_attn.o_proj", "attn_output"),
    "ffn_norm": ("post_attention_layernorm", "ffn_norm"),
    "feed_forward.w1": ("mlp.gate_proj", "ffn_gate"),
    "feed_forward.w2": ("mlp.down_proj", "ffn_down"),
    "feed_forward.w3": ("mlp.up_proj", "ffn_up"),
    "norm": ("model.norm", "output_norm"),
    "output": ("lm_head", "output"),
}


def _llama(meta: Tensors, column: int, layers: str) -> Tensors:
    w: Tensors = {}
    for name, value in meta.items():
        stem = name.removesuffix(".weight")
        if stem.startswith("layers."):
            _, i, rest = stem.split(".", 2)
            w[f"{layers}.{i}.{LLAMA_NAMES[rest][column]}.weight"] = value
        else:
            w[f"{LLAMA_NAMES[stem][column]}.weight"] = value
    return w


def llama_gguf(meta: Tensors) -> Tensors:
    """GGUF keeps Meta's rotary pairs."""
    return _llama(meta, 1, "blk")


def llama_hf(meta: Tensors, heads: int, kv_heads: int) -> Tensors:
    """HuggingFace's rotary halves: within each head, the even rows come first, then the odd ones."""
    w = _llama(meta, 0, "model.layers")
    for name, value in w.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            parts = np.split(value, heads if "q_proj" in name else kv_heads)
            w[name] = np.concatenate([np.concatenate([part[0::2], part[1::2]]) for part in parts])
    return w


def gpt_neox_gguf(hf: Tensors, heads: int) -> Tensors:
    """As llama.cpp's converter has it: all heads' q, then k, then v."""
    names = (
        ("gpt_neox.", ""), ("embed_in", "token_embd"), ("embed_out", "output"), ("layers.", "blk."),
        ("final_layer_norm", "output_norm"), ("input_layernorm", "attn_norm"), ("attention.dense", "attn_output"),
        ("post_attention_layernorm", "ffn_norm"), ("attention.query_key_value", "attn_qkv"),
        ("mlp.dense_h_to_4h", "ffn_up"), ("mlp.dense_4h_to_h", "ffn_down"),
    )  # fmt: skip
    w = _renamed(hf, names)
    for name, value in w.items():
        if "attn_qkv" in name:
            parts = value.reshape(heads, 3, -1, *value.shape[1:])
            w[name] = np.concatenate([parts[:, i].reshape(-1, *value.shape[1:]) for i in range(3)])
    return w


def gpt_neox_hf(
    vocab: int = 101, width: int = 48, layers: int = 3, heads: int = 4, d_ff: int = 80, seed: int = 0
) -> Tensors:
    """GPT-NeoX in HuggingFace's names: rows of query_key_value go head by head, [q_0 k_0 v_0 q_1 ...]."""
    rng = np.random.default_rng(seed)
    w: Tensors = {"gpt_neox.embed_in.weight": _random(rng, vocab, width)}
    for i in range(layers):
        at = f"gpt_neox.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            w[f"{at}.{norm}.weight"], w[f"{at}.{norm}.bias"] = _random(rng, width, mean=1.0), _random(rng, width)
        for name, out, into in (
            ("attention.query_key_value", 3 * width, width),
            ("attention.dense", width, width),
            ("mlp.dense_h_to_4h", d_ff, width),
            ("mlp.dense_4h_to_h", width, d_ff),
        ):
            w[f"{at}.{name}.weight"], w[f"{at}.{name}.bias"] = _random(rng, out, into), _random(rng, out)
    norm = "gpt_neox.final_layer_norm"
    w[f"{norm}.weight"], w[f"{norm}.bias"] = _random(rng, width, mean=1.0), _random(rng, width)
    return w | {"embed_out.weight": _random(rng, vocab, width)}
