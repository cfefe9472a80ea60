"""Floating point operations of a model, counted from its config: every matrix multiplication, and nothing else.

A product [m, k] x [k, n] costs 2mnk. Norms, activations, softmax and embeddings are left out, as everybody leaves them
out: they are below 1% and bound by memory. `torch.utils.flop_counter` counts the same (tested).

Two counts are in use, and they must not be mixed. `count` is what is computed. `palm_per_token` is what others report
as MFU: PaLM's appendix B (Chowdhery et al. 2022, arXiv:2204.02311), which nanoGPT, llm.c and nanochat follow.

Shapes: T tokens, C d_model, H query heads, D head_dim, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from ..config import GPTConfig
from ..weightmap.canonical import active_count, parameter_shapes

HEAD = "head.weight"


@dataclass(frozen=True)
class Flops:
    """Of one sequence; `again` is what recomputation adds: each block's forward, but for its last product.

    With frozen parameters it may be less, where torch finds that nothing further is needed.
    """

    forward: int
    backward: int
    again: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.again


def count(
    config: GPTConfig,
    length: int,
    *,
    causal: bool = False,
    recompute: bool = False,
    trainable: Collection[str] | None = None,
) -> Flops:
    """One training step on one sequence.

    Args:
        config: of any family.
        length: tokens T.
        causal: count only the pairs that attention may look at, T(T+1)/2 of T^2 (what flash kernels compute); False
            counts all pairs, as PaLM's convention does.
        recompute: each block is computed a second time for the gradients.
        trainable: names of the parameters that are trained (a tied head is `tok_emb.weight`); None: all. A frozen
            weight needs no gradient of its own, and below the lowest trained one nothing is propagated at all.
    """
    walk = _Backward(config, length, causal, frozenset(parameter_shapes(config) if trainable is None else trainable))
    return Flops(walk.forward, walk.backward, walk.again if recompute else 0)


def palm_per_token(config: GPTConfig, length: int) -> float:
    """6N + 12 L H D T: of one trained token, PaLM's appendix B. MFU = this x tokens/s / peak.

    N are the parameters that a token is multiplied with: all but the lookup tables (a tied embedding is the head and
    counts), and of experts as many as one token is given to. Attention counts all pairs, recomputation and frozen
    parameters do not enter: MFU stays comparable.
    """
    shapes = parameter_shapes(config)
    tables = ("pos_emb.weight",) if config.tied else ("pos_emb.weight", "tok_emb.weight")
    n = active_count(config) - sum(math.prod(shapes[name]) for name in tables if name in shapes)
    return 6 * n + 12 * config.n_layers * config.n_heads * config.head_dim * length


class _Backward:
    """Walks the model once in the forward direction, and notes which products need a gradient on which side.

    `live` holds where the gradient must flow: a tensor is live if any trained parameter lies before it.
    """

    def __init__(self, config: GPTConfig, length: int, causal: bool, trainable: frozenset[str]) -> None:
        self.forward = self.backward = self.again = 0
        self._config, self._length = config, length
        self._shapes, self._trainable = parameter_shapes(config), trainable
        pairs = length * (length + 1) // 2 if causal else length * length
        self._attention = 4 * config.n_heads * config.head_dim * pairs  # scores, and their sum over values
        live = self._trains("tok_emb", "pos_emb")
        for i in range(config.n_layers):
            live = self._block(f"blocks.{i}.", live, config.parallel_residual)
        live = live or self._trains("norm")
        if config.tied:
            self._shapes[HEAD] = self._shapes["tok_emb.weight"]
            self._trainable |= {HEAD} if "tok_emb.weight" in trainable else set()
        self._linear("head", live)

    def _block(self, at: str, below: bool, parallel: bool) -> bool:
        """One block on an input that is live or not; whether its output is."""
        before = self.forward
        live = below or self._trains(f"{at}norm1")
        for name in ("attn.q", "attn.k", "attn.v"):
            self._linear(at + name, live)
        q, k, v = (live or self._trains(f"{at}attn.{name}", f"{at}attn.{name}_norm") for name in "qkv")
        live = q or k or v
        self.forward += self._attention
        self.backward += ((q or k) + q + k + v) * self._attention // 2  # of the scores, q, k and v: one product each
        self._linear(f"{at}attn.out", live)
        attended = live or self._trains(f"{at}attn.out")
        live = (below if parallel else attended) or self._trains(f"{at}norm{1 if self._config.shared_norm else 2}")
        if self._config.n_experts:
            live, last = self._experts(f"{at}mlp.", live)
        else:
            live, last = self._mlp(f"{at}mlp.", live)
        output = attended or live
        self.again += self.forward - before - last if output else 0  # nothing of the last product is needed again
        return output

    def _mlp(self, at: str, live: bool, share: float = 1.0) -> tuple[bool, int]:
        """Whether its output is live, and the operations of its last product. `share` of the tokens go through it."""
        inner = [name for name in (f"{at}gate", f"{at}up") if f"{name}.weight" in self._shapes]
        for name in inner:
            self._linear(name, live, share)
        live = live or self._trains(*inner)
        last = self._linear(f"{at}down", live, share)
        return live or self._trains(f"{at}down"), last

    def _experts(self, at: str, live: bool) -> tuple[bool, int]:
        """Each gets its even share of the tokens; their results are weighted, so the last products are needed too."""
        self._linear(f"{at}router", live)
        count, used = self._config.n_experts, self._config.n_experts_used
        outputs = [self._mlp(f"{at}experts.{e}.", live, used / count)[0] for e in range(count)]
        return any(outputs) or live or self._trains(f"{at}router"), 0

    def _linear(self, name: str, live: bool, share: float = 1.0) -> int:
        """The product of all tokens, or a share of them, with one matrix; returns its operations."""
        cost = round(2 * self._length * math.prod(self._shapes[f"{name}.weight"]) * share)
        self.forward += cost
        self.backward += cost * (live + (f"{name}.weight" in self._trainable))
        return cost

    def _trains(self, *modules: str) -> bool:
        return any(f"{module}.{leaf}" in self._trainable for module in modules for leaf in ("weight", "bias"))
