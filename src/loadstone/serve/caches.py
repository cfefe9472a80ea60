"""The memory of a batch's rows: torch's, where rows are parts of one tensor, and the native engine's.

Shapes: N rows, B rows of a call, K key/value heads, S slots (tokens) of a row, D head_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch

from ..kernels import pack_for_inference
from ..model import GPT
from ..native import NativeEngine
from ..sampling import Floats, as_floats
from .slots import Slots


def slots_of(runner: GPT | NativeEngine, rows: int, length: int) -> Slots:
    """Rows for a model, or for the native engine."""
    return NativeSlots(runner, rows, length) if isinstance(runner, NativeEngine) else TorchSlots(runner, rows, length)


class TorchSlots(Slots):
    """Rows of a model's own cache. A step needs no gather, as the busy rows are neighbours."""

    def __init__(self, model: GPT, rows: int, length: int) -> None:
        self._model, self._cache, self._packed = model, model.new_cache(rows, length), pack_for_inference(model)
        super().__init__(rows, self._cache.size)
        self._kv = self._cache.kv  # [layers, 2, N, K, S, D]
        self.nbytes = self._kv.nbytes

    @torch.inference_mode()
    def _run(self, first: int, last: int, ids: Sequence[Sequence[int]]) -> Floats:
        part = copy(self._cache)  # over the same memory
        part.kv, part.lengths = self._kv[:, :, first:last], [len(held) for held in self.held[first:last]]
        with self._packed.used(prompt=len(ids[0]) > 1):
            x_BTC = self._model.hidden(torch.tensor(ids, device=self._kv.device), part)
            return as_floats(self._model.logits(x_BTC[:, -1]))

    def _copy(self, source: int, target: int, tokens: int) -> None:
        self._kv[:, :, target, :, :tokens] = self._kv[:, :, source, :, :tokens]

    def _exchange(self, a: int, b: int, tokens: int) -> None:
        kept = self._kv[:, :, a, :, :tokens].clone()
        self._copy(b, a, tokens)
        self._kv[:, :, b, :, :tokens] = kept


class NativeSlots(Slots):
    """Rows of the native engine's cache, which may lie anywhere: to change places is to change numbers."""

    engine = "native"

    def __init__(self, engine: NativeEngine, rows: int, length: int) -> None:
        self._engine, self._cache = engine, engine.new_cache(rows, length)
        super().__init__(rows, self._cache.size)
        self._at = list(range(rows))
        self.nbytes = self._cache.nbytes

    def _run(self, first: int, last: int, ids: Sequence[Sequence[int]]) -> Floats:
        for at, held in zip(self._at, self.held, strict=True):
            self._cache.lengths[at] = len(held)
        return self._engine.prefill(self._cache, dict(zip(self._at[first:last], ids, strict=True)))

    def _copy(self, source: int, target: int, tokens: int) -> None:
        self._engine.copy(self._cache, self._at[source], self._at[target], tokens)

    def _exchange(self, a: int, b: int, tokens: int) -> None:
        self._at[a], self._at[b] = self._at[b], self._at[a]
