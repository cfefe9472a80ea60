"""Where the tokens of a call stand, and what they see: the key/value cache, the mask, the rotary angles.

Shapes: B batch, T tokens of this call, S cache slots attended to, H query heads, K key/value heads, D head_dim, R the
turned elements of a head (all, usually).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from .config import GPTConfig, Rope
from .config.frequencies import frequencies_of


class KVCache:
    """Keys and values of every layer, allocated once (or, with `allocate`, in doublings from so many slots on).

    Rows may have different lengths. A row's tokens lie at slots 0 .. length-1, at their own positions; what lies beyond
    is garbage that no query can see (a key at slot s is visible from position p only if s <= p) and that the row's next
    tokens overwrite. So prompts of unequal length are padded on the right and need no mask of their own.

    Attributes:
        lengths: tokens held, per row. The model reads them as the positions where the next tokens go, and adds to them;
            a caller that padded sets them back, and to forget tokens is to lower them.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch: int = 1,
        length: int | None = None,
        *,
        allocate: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.size = config.context_length if length is None else min(length, config.context_length)
        slots = self.size if allocate is None else min(allocate, self.size)
        shape = (config.n_layers, 2, batch, config.n_kv_heads, slots, config.head_dim)
        # Zeros, not empty: a masked slot has weight 0, and 0 * NaN is NaN.
        self.kv = torch.zeros(shape, dtype=dtype, device=device)  # [layers, 2, B, K, slots, D]
        self.lengths = [0] * batch

    def reserve(self, end: int) -> None:
        """Make room up to slot `end`, doubling: for a conversation, whose length nobody knows beforehand."""
        slots = self.kv.shape[4]
        if end > slots:
            grown = self.kv.new_zeros((*self.kv.shape[:4], min(max(end, 2 * slots), self.size), self.kv.shape[5]))
            grown[:, :, :, :, :slots] = self.kv
            self.kv = grown

    def update(self, layer: int, k_BKTD: Tensor, v_BKTD: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Write this call's keys and values; return all that the queries may attend to, both [B, K, S, D]."""
        keys, values = self.kv[layer]
        if positions.uniform:
            slots = slice(positions.end - k_BKTD.shape[2], positions.end)
            keys[:, :, slots], values[:, :, slots] = k_BKTD, v_BKTD
        else:
            rows = torch.arange(len(self.lengths), device=keys.device)[:, None]
            keys[rows, :, positions.ids_BT] = k_BKTD.transpose(1, 2)  # indexed as [B, T, K, D]
            values[rows, :, positions.ids_BT] = v_BKTD.transpose(1, 2)
        return keys[:, :, : positions.end], values[:, :, : positions.end]


class Positions:
    """Where the tokens of one call stand, and what follows from it for all layers: rotation and mask.

    `segments_BT` numbers the documents packed into each row: positions begin anew in each, and none sees another.

    Raises IndexError if a position lies beyond the context or the cache.
    """

    def __init__(
        self, config: GPTConfig, starts: Sequence[int], n_tokens: int, limit: int, like: Tensor,
        segments_BT: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.end = max(starts) + n_tokens
        if self.end > limit:
            raise IndexError(f"position {self.end - 1} is beyond the limit of {limit} tokens")
        self.uniform = len(set(starts)) == 1
        first = starts[:1] if self.uniform else starts
        device = like.device
        # [1, T] if all rows stand alike, else [B, T]
        self.ids_BT = torch.tensor(first, device=device)[:, None] + torch.arange(n_tokens, device=device)
        self.window = config.window if config.window < self.end else 0  # one that holds all tokens hides none
        self.causal = n_tokens > 1 and max(starts) == 0 and not self.window
        self.mask: Tensor | None = None  # [B or 1, 1, T, S]; None means causal, or everything
        if not self.causal and (n_tokens > 1 or not self.uniform or self.window):
            self.mask = self._sees(self.ids_BT[..., None], torch.arange(self.end, device=device))[:, None]
        if segments_BT is not None:
            self._separate(segments_BT)
        self.rotation = rotation(config.rope, config.head_dim, self.ids_BT, like) if config.rope else None

    def _sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether the token at one position sees that at another: itself, those before it, no further than a window."""
        return (keys <= queries) & (keys > queries - self.window) if self.window else keys <= queries

    def _separate(self, segments_BT: Tensor) -> None:
        """Positions and mask of packed documents; each occupies neighbouring tokens of its row."""
        steps = self.ids_BT.expand_as(segments_BT)  # [B, T]
        same_BTT = segments_BT[:, :, None] == segments_BT[:, None]
        self.mask = (same_BTT & self._sees(steps[..., None], steps[:, None]))[:, None]
        begins = F.pad(segments_BT[:, 1:] != segments_BT[:, :-1], (1, 0))  # where another document starts
        self.ids_BT = steps - torch.where(begins, steps, 0).cummax(dim=1).values
        self.causal = False


@cache
def inverse_frequencies(rope: Rope, dims: int) -> tuple[Tensor, float]:
    """Radians per position for each of the R/2 turned pairs (of R elements), float32, and the factor on cos and sin."""
    frequencies, factor = frequencies_of(rope, dims)
    return torch.from_numpy(frequencies), factor


def rotation(rope: Rope, head_dim: int, positions_BT: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin for `rotate`, both [B, 1, T, R/2], computed in float32 and given in the type of `like`."""
    frequencies, factor = inverse_frequencies(rope, rope.dims or head_dim)
    angles = positions_BT[:, None, :, None].float() * frequencies.to(positions_BT.device)
    return (angles.cos() * factor).to(like.dtype), (angles.sin() * factor).to(like.dtype)


def rotate(x_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn element j with element j + R/2 by the angle of its position; the elements from R on stay as they are."""
    half = cos.shape[-1]
    a, b = x_BHTD[..., :half], x_BHTD[..., half : 2 * half]  # both [B, H, T, R/2]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, x_BHTD[..., 2 * half :]), dim=-1)
