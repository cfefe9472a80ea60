"""The points of a forward pass where two programs can be compared, each as a function of the points before it.

A point computed from *another* program's inputs shows that module alone: no fault before it can hide it, and it hides
none after it. `run` chains the points into a whole forward pass; a test holds it equal to `model.GPT`.

Shapes: N tokens of all prompts together, C d_model, V vocabulary. Every point is [N, width].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import GPTConfig
from ..model import ACTIVATIONS, GPT
from ..positions import rotate, rotation

STREAM = "stream"  # what flows into a block: the embedding or the block before
# A block's points in the order of execution, each with the points that it is computed from; see `block_points`.
BLOCK: Mapping[str, tuple[str, ...]] = {
    "norm1": (STREAM,),
    "attn.q": ("norm1",),
    "attn.k": ("norm1",),
    "attn.v": ("norm1",),
    "attn.context": ("attn.q", "attn.k", "attn.v"),
    "attn.out": ("attn.context",),
    "norm2": (STREAM, "attn.out"),
    "mlp.gate": ("norm2",),
    "mlp.up": ("norm2",),
    "mlp.hidden": ("mlp.gate", "mlp.up"),
    "mlp.down": ("mlp.hidden",),
    "": (STREAM, "attn.out", "mlp.down"),
}


def block_points(config: GPTConfig) -> Mapping[str, tuple[str, ...]]:
    """The points of this model's blocks; all experts together are one, `mlp`."""
    found = dict(BLOCK)
    if config.parallel_residual:
        found["norm2"] = (STREAM,)
    if not config.gated_mlp:
        del found["mlp.gate"]
        found["mlp.hidden"] = ("mlp.up",)
    if config.n_experts:
        found = {part: inputs for part, inputs in found.items() if not part.startswith("mlp.")}
        found |= {"mlp": ("norm2",), "": (*found.pop("")[:-1], "mlp")}
    if config.shared_norm:
        del found["norm2"]
        found = {part: tuple(name.replace("norm2", "norm1") for name in inputs) for part, inputs in found.items()}
    return found


class Weights(Protocol):
    """Parameters in float32 by canonical name; None where the model has none of that name."""

    def __call__(self, name: str) -> Tensor | None: ...


class Parameters:
    """A model's parameters in float32, with repaired ones laid over them."""

    def __init__(self, stored: Mapping[str, Tensor], repaired: Mapping[str, Tensor] | None = None) -> None:
        self._stored, self.repaired = stored, dict(repaired or {})

    @classmethod
    def of(cls, model: GPT) -> Parameters:
        return cls(dict(model.named_parameters()))

    def __call__(self, name: str) -> Tensor | None:
        if name in self.repaired:
            return self.repaired[name]
        stored = self._stored.get(name)
        return None if stored is None else stored.detach().float().cpu()

    def need(self, name: str) -> Tensor:
        found = self(name)
        if found is None:
            raise AssertionError(f"the model has no {name}")
        return found

    def with_repaired(self, parameters: Mapping[str, Tensor]) -> Parameters:
        return Parameters(self._stored, {**self.repaired, **parameters})


def split(name: str) -> tuple[str, str]:
    """`blocks.3.attn.q` -> (`blocks.3`, `attn.q`); outside the blocks (``, name)."""
    found = re.fullmatch(r"(blocks\.\d+)\.?(.*)", name)
    return (found[1], found[2]) if found else ("", name)


def layer_of(name: str) -> int:
    """Of a point or parameter inside a block."""
    return int(split(name)[0].removeprefix("blocks."))


def execution_order(config: GPTConfig) -> Iterator[str]:
    yield "embedding"
    for layer in range(config.n_layers):
        for part in block_points(config):
            yield f"blocks.{layer}.{part}".rstrip(".")
    yield from ("norm", "logits")


def is_point(name: str, config: GPTConfig) -> bool:
    """Whether a model of this config has such a point."""
    block, part = split(name)
    if not block:
        return part in ("embedding", "norm", "logits")
    return part in block_points(config) and layer_of(name) < config.n_layers


def width_of(name: str, config: GPTConfig) -> int:
    """Columns of a point."""
    part, c = split(name)[1], config
    if part in ("attn.q", "attn.context"):
        return c.n_heads * c.head_dim
    if part in ("attn.k", "attn.v"):
        return c.n_kv_heads * c.head_dim
    if part in ("mlp.gate", "mlp.up", "mlp.hidden"):
        return c.d_ff
    return c.vocab_size if part == "logits" else c.d_model


def inputs_of(name: str, config: GPTConfig) -> tuple[str, ...]:
    """The points that one is computed from."""
    block, part = split(name)
    if not block:
        last = f"blocks.{config.n_layers - 1}"
        return {"embedding": ("ids", "positions"), "norm": (last,), "logits": ("norm",)}[name]
    layer = layer_of(name)
    stream = f"blocks.{layer - 1}" if layer else "embedding"
    return tuple(stream if name == STREAM else f"{block}.{name}" for name in block_points(config)[part])


def evaluate(
    name: str, config: GPTConfig, weights: Weights, rows: Mapping[str, Tensor], lengths: Sequence[int]
) -> Tensor:
    """One point from its inputs, in float32.

    Args:
        name: the point.
        config, weights: of the model whose point it is.
        rows: the inputs (`inputs_of`), each [N, width]; `ids` and `positions` are int64 [N].
        lengths: how many of the N rows each prompt has; attention stays within a prompt.
    """
    inputs = [rows[point] for point in inputs_of(name, config)]
    return _function(split(name)[1])(name, config, weights, inputs, lengths)


def run(
    config: GPTConfig, weights: Weights, ids: Tensor, kept: Tensor, points: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """The whole forward pass over one prompt, point after point.

    Args:
        ids: [T].
        kept: positions whose logits are wanted.
        points: which points to return; the logits alone if not given.
    """
    wanted = set(points or ("logits",))
    rows: dict[str, Tensor] = {"ids": ids, "positions": torch.arange(len(ids))}
    found: dict[str, Tensor] = {}
    for name in execution_order(config):
        if name == "logits":
            rows["norm"] = rows["norm"][kept]
        rows[name] = evaluate(name, config, weights, rows, [len(ids)])
        if name in wanted:
            found[name] = rows[name]
        if re.fullmatch(r"blocks\.\d+", name):  # nothing inside a block is asked for again
            rows = {key: value for key, value in rows.items() if not key.startswith("blocks.") or key == name}
    return found


Function = Callable[[str, GPTConfig, Weights, list[Tensor], Sequence[int]], Tensor]


def _function(part: str) -> Function:
    return FUNCTIONS.get(part, _linear)


def _needed(weights: Weights, name: str) -> Tensor:
    found = weights(name)
    if found is None:
        raise AssertionError(f"there is no {name}")
    return found


def _embedding(name: str, config: GPTConfig, weights: Weights, inputs: list[Tensor], lengths: Sequence[int]) -> Tensor:
    ids, positions = inputs
    tokens = F.embedding(ids, _needed(weights, "tok_emb.weight"))
    return tokens if config.rope else tokens + F.embedding(positions, _needed(weights, "pos_emb.weight"))


def _norm(name: str, config: GPTConfig, weights: Weights, inputs: list[Tensor], lengths: Sequence[int]) -> Tensor:
    weight, bias = _needed(weights, f"{name}.weight"), weights(f"{name}.bias")
    y = normalised(sum(inputs[1:], inputs[0]), config.norm, config.norm_eps) * weight
    return y if bias is None else y + bias


def normalised(x: Tensor, kind: str, eps: float) -> Tensor:
    """A norm without its weight and bias."""
    if kind == "rmsnorm":
        return F.rms_norm(x, x.shape[-1:], None, eps)
    return F.layer_norm(x, x.shape[-1:], None, None, eps)


def _linear(name: str, config: GPTConfig, weights: Weights, inputs: list[Tensor], lengths: Sequence[int]) -> Tensor:
    return F.linear(inputs[0], _needed(weights, f"{name}.weight"), weights(f"{name}.bias"))


def _context(name: str, config: GPTConfig, weights: Weights, inputs: list[Tensor], lengths: Sequence[int]) -> Tensor:
    if config.qk_norm:
        stem = split(name)[0]
        normed = [_head_norm(f"{stem}.attn.{x}_norm", config, weights, inputs["qk".index(x)]) for x in "qk"]
        inputs = [*normed, inputs[2]]
    q, k, v = (torch.split(part, list(lengths)) for part in inputs)
    return torch.cat([_attend(config, *prompt) for prompt in zip(q, k, v, strict=True)])


def _head_norm(name: str, config: GPTConfig, weights: Weights, x: Tensor) -> Tensor:
    return _norm(name, config, weights, [x.view(len(x), -1, config.head_dim)], ()).view(x.shape)


def _attend(config: GPTConfig, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over one prompt, from q [T, H*D] and k, v [T, K*D] to what enters `out` [T, H*D]."""
    q, k, v = (x.view(1, len(x), -1, config.head_dim).transpose(1, 2) for x in (q, k, v))  # [1, heads, T, D]
    if config.rope:
        turn = rotation(config.rope, config.head_dim, torch.arange(q.shape[2])[None], q)
        q, k = rotate(q, *turn), rotate(k, *turn)
    grouped = config.n_heads != config.n_kv_heads
    if not config.window:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=grouped)
    else:
        behind = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        near = (behind >= 0) & (behind < config.window)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=near, enable_gqa=grouped)
    return y.transpose(1, 2).flatten(2)[0]


def _hidden(name: str, config: GPTConfig, weights: Weights, inputs: list[Tensor], lengths: Sequence[int]) -> Tensor:
    activation = ACTIVATIONS[config.activation]
    return activation(inputs[0]) * inputs[1] if config.gated_mlp else activation(inputs[0])


def _experts(name: str, config: GPTConfig, weights: Weights, inputs: list[Tensor], lengths: Sequence[int]) -> Tensor:
    """Every expert on every token, and most of it weighted with zero: slow, and plain."""
    shares = F.linear(inputs[0], _needed(weights, f"{name}.router.weight")).softmax(-1)
    picked = shares >= shares.topk(config.n_experts_used).values[:, -1:]
    shares = shares * picked
    shares = shares / shares.sum(-1, keepdim=True) if config.expert_weights_sum_to_one else shares
    found = torch.zeros_like(inputs[0])
    for e in range(config.n_experts):
        parts = [_linear(f"{name}.experts.{e}.{part}", config, weights, inputs, lengths) for part in _inner(config)]
        hidden = _hidden(name, config, weights, parts, lengths)
        found += shares[:, e, None] * _linear(f"{name}.experts.{e}.down", config, weights, [hidden], lengths)
    return found


def _inner(config: GPTConfig) -> tuple[str, ...]:
    return ("gate", "up") if config.gated_mlp else ("up",)


def _residual(name: str, config: GPTConfig, weights: Weights, inputs: list[Tensor], lengths: Sequence[int]) -> Tensor:
    return inputs[0] + inputs[1] + inputs[2]


def _logits(name: str, config: GPTConfig, weights: Weights, inputs: list[Tensor], lengths: Sequence[int]) -> Tensor:
    return F.linear(
        inputs[0], _needed(weights, "tok_emb.weight" if config.tied else "head.weight"), weights("head.bias")
    )


FUNCTIONS: Mapping[str, Function] = {
    "embedding": _embedding,
    "norm": _norm,
    "norm1": _norm,
    "norm2": _norm,
    "attn.context": _context,
    "mlp.hidden": _hidden,
    "mlp": _experts,
    "": _residual,
    "logits": _logits,
}
