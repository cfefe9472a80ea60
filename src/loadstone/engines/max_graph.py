"""The model as a graph for Modular's MAX: GPT-2, Llama and what lies between, written once from the config.

Shapes: B rows and T tokens of this call, S cache slots, all three symbolic, so one compiled graph serves every prompt
and decoding; C d_model, H query heads, K key/value heads, D head_dim, V vocabulary.

The keys and values of this call go out as a result and the caller stores them: rows of unequal length would need a
scatter into the cache, which in a graph of values copies it whole. The attention reads the cache and the new keys apart
and joins the scores only. Each block is one subgraph, compiled once however many layers there are.

Written against max 26.6 (`probes.MAX_VERSIONS`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from max.dtype import DType
from max.graph import DeviceRef, Dim, Graph, TensorType, TensorValue, ops

from ..config import GPTConfig
from ..config.common import require_fields

CPU = DeviceRef.CPU()
F32, I64 = DType.float32, DType.int64
B, T, S = Dim("B"), Dim("T"), Dim("S")
HIDDEN = -1e30  # added to the scores of slots and tokens that a query must not see; finite, so nothing becomes NaN

ACTIVATIONS: dict[str, Callable[[TensorValue], TensorValue]] = {
    "gelu_tanh": lambda x: ops.gelu(x, "tanh"),
    "gelu": lambda x: ops.gelu(x),
    "silu": ops.silu,
    "relu": ops.relu,
}


class Seen(NamedTuple):
    """What all blocks share: the masks and, with rotary embedding, the angles of the positions."""

    held: TensorValue  # [B, 1, 1, S]: added to scores of cached slots
    new: TensorValue  # [T, T]: added to scores of this call's tokens
    cos: TensorValue | None = None  # [B, 1, T, R/2]
    sin: TensorValue | None = None

    @property
    def parts(self) -> list[TensorValue]:
        return [value for value in self if value is not None]


def build_graph(config: GPTConfig, shapes: Mapping[str, tuple[int, ...]]) -> Graph:
    """ids [B, T], lengths [B], last [B], cache [layers, 2, B, K, S, D] -> logits [B, V], new [layers, 2, B, K, T, D].

    Args:
        config: the model's.
        shapes: of every parameter, by the model's own names; with rotary embedding also of `frequencies`, the radians
            per position [R/2], and of `rotation_factor` [1], on cos and sin.

    Raises LoadstoneError for a config that asks for what the graph does not do.
    """
    require_fields(config, "max")
    c = config
    inputs = [
        TensorType(I64, [B, T], CPU), TensorType(I64, [B], CPU), TensorType(I64, [B], CPU),
        TensorType(F32, [c.n_layers, 2, B, c.n_kv_heads, S, c.head_dim], CPU),
    ]  # fmt: skip
    with Graph("gpt", input_types=inputs) as graph:
        ids_BT, lengths_B, last_B, kv = (value.tensor for value in graph.inputs)
        weights = _Weights(shapes)
        steps_T = ops.range(0, T, 1, out_dim=T, dtype=I64, device=CPU)
        positions_BT = ops.unsqueeze(lengths_B, 1) + ops.unsqueeze(steps_T, 0)
        seen = _seen(weights, positions_BT, lengths_B, steps_T)
        embedding_VC = weights["tok_emb.weight"]
        x_BTC = ops.gather(embedding_VC, ids_BT, axis=0)
        if c.rope is None:
            x_BTC = x_BTC + ops.gather(weights["pos_emb.weight"], positions_BT, axis=0)
        block = _block_subgraph(graph, c, shapes, seen)
        new = []
        for layer in range(c.n_layers):
            called = ops.call(block, x_BTC, *seen.parts, kv[layer, 0], kv[layer, 1], prefix=f"blocks.{layer}.")
            x_BTC, k, v = (value.tensor for value in called)
            new += [k, v]
        rows_B = ops.range(0, B, 1, out_dim=B, dtype=I64, device=CPU)
        x_BC = ops.gather_nd(x_BTC, ops.stack([rows_B, last_B], axis=1))
        head_VC = embedding_VC if c.tied else weights["head.weight"]
        logits_BV = ops.matmul(_norm(c, weights, "norm", x_BC), ops.transpose(head_VC, 0, 1))
        graph.output(logits_BV, ops.stack(new).reshape((c.n_layers, 2, B, c.n_kv_heads, T, c.head_dim)))
    return graph


class _Weights:
    """The model's parameters as external constants, whose values come when the graph is loaded."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], *, in_block: bool = False) -> None:
        self.shapes, self.in_block = shapes, in_block

    def __contains__(self, name: str) -> bool:
        return self._whole(name) in self.shapes

    def __getitem__(self, name: str) -> TensorValue:
        kind = TensorType(F32, self.shapes[self._whole(name)], CPU)
        return ops.constant_external(name, kind, is_placeholder=self.in_block)

    def _whole(self, name: str) -> str:
        return f"blocks.0.{name}" if self.in_block else name


def _seen(weights: _Weights, positions_BT: TensorValue, lengths_B: TensorValue, steps_T: TensorValue) -> Seen:
    shown, hidden = ops.constant(0.0, F32, device=CPU), ops.constant(HIDDEN, F32, device=CPU)
    slots_S = ops.range(0, S, 1, out_dim=S, dtype=I64, device=CPU)
    held = ops.where(ops.unsqueeze(lengths_B, 1) > ops.unsqueeze(slots_S, 0), shown, hidden).reshape((B, 1, 1, S))
    new = ops.where(ops.unsqueeze(steps_T, 1) >= ops.unsqueeze(steps_T, 0), shown, hidden)
    if "frequencies" not in weights:
        return Seen(held, new)
    angles = ops.cast(positions_BT, F32).reshape((B, 1, T, 1)) * weights["frequencies"]
    factor = weights["rotation_factor"]
    return Seen(held, new, ops.cos(angles) * factor, ops.sin(angles) * factor)


def _block_subgraph(graph: Graph, c: GPTConfig, shapes: Mapping[str, tuple[int, ...]], seen: Seen) -> Graph:
    """x, `Seen`, cached keys and values [B, K, S, D] -> x, new keys and values [B, K, T, D]."""
    cached = TensorType(F32, [B, c.n_kv_heads, S, c.head_dim], CPU)
    types = [TensorType(F32, [B, T, c.d_model], CPU), *(value.type for value in seen.parts), cached, cached]
    with graph.add_subgraph("block", input_types=types) as block:
        x_BTC, *parts, keys, values = (value.tensor for value in block.inputs)
        weights = _Weights(shapes, in_block=True)
        y_BTC, k, v = _attention(c, weights, _norm(c, weights, "norm1", x_BTC), Seen(*parts), keys, values)
        attended_BTC = x_BTC + y_BTC
        h_BTC = _norm(c, weights, "norm2", x_BTC if c.parallel_residual else attended_BTC)
        block.output(attended_BTC + _mlp(c, weights, h_BTC), k, v)
    return block


def _attention(
    c: GPTConfig, weights: _Weights, x_BTC: TensorValue, seen: Seen, keys: TensorValue, values: TensorValue
) -> tuple[TensorValue, TensorValue, TensorValue]:
    H, K, D = c.n_heads, c.n_kv_heads, c.head_dim

    def heads(name: str, n: int) -> TensorValue:
        return _linear(weights, f"attn.{name}", x_BTC).reshape((B, T, n, D)).permute([0, 2, 1, 3])  # [B, n, T, D]

    q, k, v = heads("q", H), heads("k", K), heads("v", K)
    if seen.cos is not None and seen.sin is not None:
        q, k = _rotate(q, seen.cos, seen.sin, D), _rotate(k, seen.cos, seen.sin, D)

    def shared(x_BKND: TensorValue, n: Dim) -> TensorValue:
        """Each key/value head once for every query head of its group: a copy, as max multiplies ranks up to 4 only."""
        if H == K:
            return x_BKND
        return ops.broadcast_to(ops.unsqueeze(x_BKND, 2), (B, K, H // K, n, D)).reshape((B, H, n, D))

    q = q * D**-0.5
    held = ops.matmul(q, ops.transpose(shared(keys, S), 2, 3)) + seen.held  # [B, H, T, S]
    new = ops.matmul(q, ops.transpose(shared(k, T), 2, 3)) + seen.new  # [B, H, T, T]
    weight = ops.softmax(ops.concat([held, new], axis=-1))
    border = TensorValue(S)
    y = ops.matmul(weight[..., (slice(0, border), S)], shared(values, S))
    y = y + ops.matmul(weight[..., (slice(border, None), T)], shared(v, T))
    y_BTC = y.permute([0, 2, 1, 3]).reshape((B, T, H * D))
    return _linear(weights, "attn.out", y_BTC), k, v


def _rotate(x_BHTD: TensorValue, cos: TensorValue, sin: TensorValue, D: int) -> TensorValue:
    """Turn element j with element j + R/2; those from R on stay. As `model.rotate`."""
    half = int(cos.shape[-1])
    a, b = x_BHTD[..., :half], x_BHTD[..., half : 2 * half]
    turned = [a * cos - b * sin, b * cos + a * sin]
    return ops.concat([*turned, *([x_BHTD[..., 2 * half :]] if 2 * half < D else [])], axis=-1)


def _mlp(c: GPTConfig, weights: _Weights, x_BTC: TensorValue) -> TensorValue:
    act = ACTIVATIONS[c.activation]
    h_BTF = _linear(weights, "mlp.up", x_BTC)
    h_BTF = act(_linear(weights, "mlp.gate", x_BTC)) * h_BTF if c.gated_mlp else act(h_BTF)
    return _linear(weights, "mlp.down", h_BTF)


def _linear(weights: _Weights, name: str, x: TensorValue) -> TensorValue:
    y = ops.matmul(x, ops.transpose(weights[f"{name}.weight"], 0, 1))
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def _norm(c: GPTConfig, weights: _Weights, name: str, x: TensorValue) -> TensorValue:
    weight = weights[f"{name}.weight"]
    if c.norm == "rmsnorm":
        y = ops.rms_norm(x, weight, c.norm_eps)
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y
    if f"{name}.bias" in weights:
        return ops.layer_norm(x, weight, weights[f"{name}.bias"], c.norm_eps)
    return ops.layer_norm(x, weight, ops.constant(np.zeros(c.d_model, np.float32), device=CPU), c.norm_eps)
