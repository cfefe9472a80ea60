"""The engine `compile`: torch.compile with static shapes. The cache has a fixed size, the mask follows from positions.

What was compiled once serves every later call: the number of tokens of a prompt and the size of a cache are rounded up
to a few sizes, and where the tokens stand is data, not shape. Weights are frozen: constants that the compiler packs for
its own matrix products (a second copy of them, and the reason why decoding gets faster on a CPU).

Shapes: B rows, T tokens of this call (padded), S cache slots, K key/value heads, D head_dim, V vocabulary.

*Others*: transformers' static cache compiles anew for each length of a cache; gpt-fast compiles for one row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config.common import COMMON, require_fields
from ..model import GPT
from ..positions import rotation
from .protocol import Engine, EngineMissingError

SMALLEST_PROMPT, SMALLEST_CACHE = 32, 256  # tokens and slots; everything else is a power of two, or the context
OBEYED = COMMON | {"window", "qk_norm", "shared_norm", "head_bias"}  # experts would be shapes that follow from data
MOST_SHAPES = 64  # (rows, tokens, slots) of one process; torch gives up on compiling after 8 otherwise


def bucket(n: int, smallest: int, largest: int) -> int:
    """The least power of two that is `n` or more, but at least `smallest` and at most `largest`."""
    return min(max(smallest, 1 << (n - 1).bit_length()), largest)


class StaticCache:
    """Keys and values [B, K, S + 1, D] of each layer, of a fixed size. See `protocol.Cache`.

    The slot beyond the last takes what padding writes, and no query ever sees it. With `allocate` the size doubles when
    a conversation outgrows it, which is another shape.
    """

    def __init__(self, model: GPT, batch: int, length: int | None, allocate: int | None = None) -> None:
        config, weight = model.config, model.tok_emb.weight
        self.context, self.lengths = config.context_length, [0] * batch
        self.size = self.context if length is None else min(length, self.context)
        slots = bucket(max(allocate or self.size, 1), SMALLEST_CACHE, self.context)
        shape = (batch, config.n_kv_heads, slots + 1, config.head_dim)
        # One tensor each: a slice of a common one would be copied whole whenever it is written to.
        self.kv = [torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2 * config.n_layers)]

    def reserve(self, end: int) -> None:
        """Make room up to slot `end`. Raises IndexError beyond `size`."""
        if end > self.size:
            raise IndexError(f"position {end - 1} is beyond the limit of {self.size} tokens")
        more = bucket(end, SMALLEST_CACHE, self.context) + 1 - self.kv[0].shape[2]
        if more > 0:
            self.kv = [F.pad(kv, (0, 0, 0, more)) for kv in self.kv]  # what padding wrote is not seen here either


class _Places:
    """What `model.Positions` and `model.KVCache` are to a block, as tensors of fixed shape."""

    causal = False

    def __init__(
        self, starts_B: Tensor, counts_B: Tensor, T: int, kv: list[Tensor], window: int,
        turns: tuple[Tensor, Tensor] | None,
    ) -> None:  # fmt: skip
        self.kv, slots, device = kv, kv[0].shape[2] - 1, starts_B.device
        steps_T = torch.arange(T, device=device)
        at_BT = starts_B[:, None] + steps_T
        self.ids_BT = at_BT.clamp(max=slots - 1)
        self.slots_BT = torch.where(steps_T < counts_B[:, None], at_BT, slots)
        self.rows_B1 = torch.arange(len(starts_B), device=device)[:, None]
        keys, queries = torch.arange(slots + 1, device=device), self.ids_BT[..., None]
        seen = (keys <= queries) & (keys > queries - window) if window else keys <= queries
        self.mask = seen[:, None]  # [B, 1, T, S + 1]
        # cos and sin, both [B, 1, T, R/2], out of those of all positions
        self.rotation = (turns[0][self.ids_BT][:, None], turns[1][self.ids_BT][:, None]) if turns else None

    def update(self, layer: int, k_BKTD: Tensor, v_BKTD: Tensor, positions: _Places) -> tuple[Tensor, Tensor]:
        keys, values = self.kv[2 * layer], self.kv[2 * layer + 1]
        keys[self.rows_B1, :, self.slots_BT] = k_BKTD.transpose(1, 2)  # indexed as [B, T, K, D]
        values[self.rows_B1, :, self.slots_BT] = v_BKTD.transpose(1, 2)
        return keys, values


class _Step(nn.Module):
    """ids [B, T], of which the first `counts_B` are real, standing at `starts_B` -> logits [B, V]; writes into `kv`."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model, config = model, model.config
        self.turns: tuple[Tensor, Tensor] | None = None  # cos and sin of every position, both [context, R/2]
        if config.rope:
            like = model.tok_emb.weight
            everywhere = torch.arange(config.context_length, device=like.device)[None]
            cos, sin = rotation(config.rope, config.head_dim, everywhere, like)
            self.turns = cos[0, 0], sin[0, 0]

    def forward(self, ids_BT: Tensor, starts_B: Tensor, counts_B: Tensor, kv: list[Tensor]) -> Tensor:
        model = self.model
        places = _Places(starts_B, counts_B, ids_BT.shape[1], kv, model.config.window, self.turns)
        x_BTC = model.tok_emb(ids_BT)
        if model.pos_emb is not None:
            x_BTC = x_BTC + model.pos_emb(places.ids_BT)
        for layer, block in enumerate(model.blocks):
            x_BTC = block(x_BTC, places, places, layer)
        return model.logits(model.norm(x_BTC[places.rows_B1[:, 0], counts_B - 1]))


class CompileEngine(Engine):
    """Any device and type that torch compiles for. See `Engine`."""

    def __init__(self, model: GPT) -> None:
        self.model, self.config, self.device = model, model.config, model.tok_emb.weight.device
        require_fields(self.config, "compile", OBEYED)
        self._step = torch.compile(_Step(model).eval(), dynamic=False, fullgraph=True, options={"freezing": True})

    def new_cache(self, batch: int = 1, length: int | None = None, *, allocate: int | None = None) -> StaticCache:
        return StaticCache(self.model, batch, length, allocate)

    def prefill(self, cache: StaticCache, prompts: Mapping[int, Sequence[int]]) -> Tensor:
        rows, new = list(prompts), list(prompts.values())
        if rows == list(range(len(cache.lengths))):
            return self._run(cache, new)
        cache.reserve(max(cache.lengths[row] for row in rows) + max(map(len, new)))
        part = StaticCache(self.model, len(rows), cache.size, 1)
        part.kv, part.lengths = [kv[rows] for kv in cache.kv], [cache.lengths[row] for row in rows]
        logits_RV = self._run(part, new)
        for kv, changed in zip(cache.kv, part.kv, strict=True):
            kv[rows] = changed
        for row, length in zip(rows, part.lengths, strict=True):
            cache.lengths[row] = length
        return logits_RV

    def decode(self, cache: StaticCache, tokens: Sequence[int]) -> Tensor:
        return self._run(cache, [[token] for token in tokens])

    @torch.inference_mode()
    def _run(self, cache: StaticCache, new: Sequence[Sequence[int]]) -> Tensor:
        counts = [len(ids) for ids in new]
        longest = max(counts)
        cache.reserve(max(cache.lengths) + longest)
        width = longest if longest == 1 else bucket(longest, SMALLEST_PROMPT, self.config.context_length)
        ids_BT = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in new], device=self.device)
        starts_B, counts_B = (torch.tensor(numbers, device=self.device) for numbers in (cache.lengths, counts))
        logits_BV = self._compiled(ids_BT, starts_B, counts_B, cache.kv)
        cache.lengths = [length + count for length, count in zip(cache.lengths, counts, strict=True)]
        return logits_BV

    def _compiled(self, *inputs: Tensor | list[Tensor]) -> Tensor:
        try:
            with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES):
                logits_BV: Tensor = self._step(*inputs)
        except Exception as error:  # whatever torch's compiler raises; the model's own errors pass
            if not type(error).__module__.partition(".")[2].startswith(("_dynamo", "_inductor")):
                raise
            reason = (str(error).strip() or "no message").splitlines()[0]
            raise EngineMissingError(f"torch.compile does not work here (it needs a C++ compiler): {reason}") from error
        return logits_BV.clone()  # inductor may use its result's memory again
