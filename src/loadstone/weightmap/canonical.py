"""The model's own parameter names and shapes, computed from the config alone (no torch, nothing allocated).

Shapes: V vocabulary, N context, C d_model, H query heads, K key/value heads, D head_dim, F d_ff, E experts. Linear
weights are [out, in], as torch.nn.Linear has them; q, k and v are separate, and so are experts; the rotary rows are in
halves.
"""

from __future__ import annotations

import math

from ..config import GPTConfig

Shape = tuple[int, ...]


def parameter_shapes(config: GPTConfig) -> dict[str, Shape]:
    """Every parameter of `GPT(config)` in the model's own order. A tied head is no parameter of its own."""
    c = config
    shapes: dict[str, Shape] = {"tok_emb.weight": (c.vocab_size, c.d_model)}
    if c.rope is None:
        shapes["pos_emb.weight"] = (c.context_length, c.d_model)
    for i in range(c.n_layers):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in _block_shapes(c).items()}
    shapes |= _norm(c, "norm")
    if not c.tied:
        shapes |= _linear("head", c.vocab_size, c.d_model, c.head_bias)
    return shapes


def parameter_count(config: GPTConfig) -> int:
    """Elements of all parameters, a tied head counted once."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def active_count(config: GPTConfig) -> int:
    """Elements of the parameters that take part in one token: of the experts, as many as the router picks."""
    idle = (config.n_experts - config.n_experts_used) * sum(map(math.prod, _mlp(config, "").values()))
    return parameter_count(config) - config.n_layers * idle


def _block_shapes(c: GPTConfig) -> dict[str, Shape]:
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    shapes = _norm(c, "norm1")
    for name, rows in (("q", q), ("k", kv), ("v", kv)):
        shapes |= _linear(f"attn.{name}", rows, c.d_model, c.qkv_bias)
    for name in ("attn.q_norm", "attn.k_norm") if c.qk_norm else ():
        shapes |= _norm(c, name, c.head_dim)
    shapes |= _linear("attn.out", c.d_model, q, c.attn_out_bias)
    shapes |= {} if c.shared_norm else _norm(c, "norm2")
    if not c.n_experts:
        return shapes | _mlp(c, "mlp.")
    shapes |= _linear("mlp.router", c.n_experts, c.d_model, False)
    for e in range(c.n_experts):
        shapes |= _mlp(c, f"mlp.experts.{e}.")
    return shapes


def _mlp(c: GPTConfig, at: str) -> dict[str, Shape]:
    shapes = _linear(f"{at}gate", c.d_ff, c.d_model, c.mlp_bias) if c.gated_mlp else {}
    shapes |= _linear(f"{at}up", c.d_ff, c.d_model, c.mlp_bias)
    return shapes | _linear(f"{at}down", c.d_model, c.d_ff, c.mlp_bias)


def _linear(name: str, out: int, into: int, bias: bool) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {f"{name}.weight": (out, into)}
    return shapes | {f"{name}.bias": (out,)} if bias else shapes


def _norm(c: GPTConfig, name: str, width: int = 0) -> dict[str, Shape]:
    parts = ("weight", "bias") if c.norm_bias else ("weight",)
    return {f"{name}.{part}": (width or c.d_model,) for part in parts}
