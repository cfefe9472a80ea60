"""Independent forward passes in numpy, float64, straight from a dialect's own tensors: the judge that needs no package.

Nothing here uses Loadstone: GPT-2 is computed from HuggingFace-named Conv1D tensors, Llama from Meta-named ones with
complex rotary pairs, as the two programs' papers and code define them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Tensors = Mapping[str, Array]


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attend(q: Array, k: Array, v: Array) -> Array:
    """[T, D] each; causal."""
    scores = q @ k.T / np.sqrt(q.shape[-1])
    scores[np.triu_indices(len(q), 1)] = -np.inf
    return softmax(scores) @ v


def gpt2_logits(w: Tensors, ids: list[int], n_heads: int, eps: float = 1e-5) -> Array:
    """[T, V] logits of GPT-2 from tensors named and laid out as HuggingFace's."""
    w = {name: value.astype(np.float64) for name, value in w.items()}

    def norm(x: Array, name: str) -> Array:
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * w[f"{name}.weight"] + w[
            f"{name}.bias"
        ]

    def conv1d(x: Array, name: str) -> Array:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(x: Array) -> Array:
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    x = w["wte.weight"][ids] + w["wpe.weight"][: len(ids)]
    layer = 0
    while f"h.{layer}.ln_1.weight" in w:
        h = f"h.{layer}"
        q, k, v = np.split(conv1d(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn"), 3, axis=-1)
        heads = [attend(*parts) for parts in zip(*(np.split(t, n_heads, -1) for t in (q, k, v)), strict=True)]
        x = x + conv1d(np.concatenate(heads, -1), f"{h}.attn.c_proj")
        x = x + conv1d(gelu(conv1d(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")), f"{h}.mlp.c_proj")
        layer += 1
    return norm(x, "ln_f") @ w["wte.weight"].T


def llama_logits(
    w: Tensors, ids: list[int], n_heads: int, n_kv_heads: int, theta: float = 10_000.0, eps: float = 1e-5
) -> Array:
    """[T, V] logits of Llama from tensors named and laid out as Meta's: rotary turns neighbouring pairs."""
    w = {name: value.astype(np.float64) for name, value in w.items()}

    def norm(x: Array, name: str) -> Array:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w[f"{name}.weight"]

    def linear(x: Array, name: str) -> Array:
        return x @ w[f"{name}.weight"].T

    def rotary(x: Array) -> Array:
        dim = x.shape[-1]
        angles = np.outer(np.arange(len(x)), theta ** (-np.arange(0, dim, 2) / dim))
        turned = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * angles)
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    x = w["tok_embeddings.weight"][ids]
    layer = 0
    while f"layers.{layer}.attention.wq.weight" in w:
        at = f"layers.{layer}"
        y = norm(x, f"{at}.attention_norm")
        q = np.split(linear(y, f"{at}.attention.wq"), n_heads, -1)
        k = np.split(linear(y, f"{at}.attention.wk"), n_kv_heads, -1)
        v = np.split(linear(y, f"{at}.attention.wv"), n_kv_heads, -1)
        group = n_heads // n_kv_heads
        heads = [attend(rotary(q[i]), rotary(k[i // group]), v[i // group]) for i in range(n_heads)]
        x = x + linear(np.concatenate(heads, -1), f"{at}.attention.wo")
        y = norm(x, f"{at}.ffn_norm")
        gate = linear(y, f"{at}.feed_forward.w1")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(y, f"{at}.feed_forward.w3"), f"{at}.feed_forward.w2")
        layer += 1
    return linear(norm(x, "norm"), "output" if "output.weight" in w else "tok_embeddings")


def gpt_neox_logits(w: Tensors, ids: list[int], n_heads: int, rotary: int, eps: float = 1e-5) -> Array:
    """[T, V] logits of GPT-NeoX from HuggingFace's tensors: parallel residual, the first `rotary` elements turned."""
    w = {name.removeprefix("gpt_neox."): value.astype(np.float64) for name, value in w.items()}

    def norm(x: Array, name: str) -> Array:
        centred = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
        return centred * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Array, name: str) -> Array:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def turn(x: Array) -> Array:
        half = rotary // 2
        turned = x[:, :half] + 1j * x[:, half:rotary]
        turned = turned * np.exp(1j * np.outer(np.arange(len(x)), 10_000.0 ** (-np.arange(half) / half)))
        return np.concatenate([turned.real, turned.imag, x[:, rotary:]], -1)

    def gelu(x: Array) -> Array:
        return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

    x = w["embed_in.weight"][ids]
    layer = 0
    while (at := f"layers.{layer}") + ".input_layernorm.weight" in w:
        fused = linear(norm(x, f"{at}.input_layernorm"), f"{at}.attention.query_key_value")
        heads = (np.split(head, 3, -1) for head in np.split(fused, n_heads, -1))
        attended = np.concatenate([attend(turn(q), turn(k), v) for q, k, v in heads], -1)
        inner = gelu(linear(norm(x, f"{at}.post_attention_layernorm"), f"{at}.mlp.dense_h_to_4h"))
        x = x + linear(attended, f"{at}.attention.dense") + linear(inner, f"{at}.mlp.dense_4h_to_h")
        layer += 1
    return norm(x, "final_layer_norm") @ w["embed_out.weight"].T
