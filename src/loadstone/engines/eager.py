"""The engine `torch`: the model itself, one operation after the other. It runs everything that the model can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..config import GPTConfig
from ..kernels import PackedWeights, pack_for_inference
from ..model import GPT
from ..positions import KVCache
from .protocol import Engine


def start(model: GPT) -> TorchEngine:
    """With weights packed where that pays; `engine_of`, for one call with a model, packs nothing."""
    return TorchEngine(model, pack_for_inference(model))


class TorchEngine(Engine):
    """Any model, on any device and in any type. See `Engine`."""

    def __init__(self, model: GPT, packed: PackedWeights | None = None) -> None:
        self.model, self.device = model, model.tok_emb.weight.device
        self._packed = packed or PackedWeights(model)

    @property
    def config(self) -> GPTConfig:  # type: ignore[override]  # the model's own, also when it is exchanged
        return self.model.config

    def new_cache(self, batch: int = 1, length: int | None = None, *, allocate: int | None = None) -> KVCache:
        return self.model.new_cache(batch, length, allocate=allocate)

    @torch.inference_mode()
    def prefill(self, cache: KVCache, prompts: Mapping[int, Sequence[int]]) -> Tensor:
        rows, new = list(prompts), list(prompts.values())
        if rows == list(range(len(cache.lengths))):
            return self._read(cache, new)
        part = self.model.new_cache(len(rows), cache.size, allocate=cache.kv.shape[4])
        part.kv, part.lengths = cache.kv[:, :, rows], [cache.lengths[row] for row in rows]
        logits_RV = self._read(part, new)
        cache.reserve(part.kv.shape[4])
        cache.kv[:, :, rows] = part.kv
        for row, length in zip(rows, part.lengths, strict=True):
            cache.lengths[row] = length
        return logits_RV

    @torch.inference_mode()
    def decode(self, cache: KVCache, tokens: Sequence[int]) -> Tensor:
        ids_B1 = torch.tensor(tokens, device=self.device)[:, None]
        with self._packed.used(prompt=False):
            return self.model.logits(self.model.hidden(ids_B1, cache)[:, -1])

    def _read(self, cache: KVCache, new: Sequence[Sequence[int]]) -> Tensor:
        """Rows padded on the right; logits after each one's last token."""
        ends = [held + len(row) for held, row in zip(cache.lengths, new, strict=True)]
        width = max(map(len, new))
        ids_RT = torch.tensor([[*row, *[0] * (width - len(row))] for row in new], device=self.device)
        last_R = torch.tensor([len(row) - 1 for row in new], device=self.device)
        with self._packed.used(prompt=True):
            x_RTC = self.model.hidden(ids_RT, cache)
            cache.lengths = ends
            return self.model.logits(x_RTC[torch.arange(len(new), device=self.device), last_R])
