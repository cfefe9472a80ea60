"""The engine `max`: the graph of `max_graph`, compiled by Modular's MAX, with the cache in numpy.

MAX keeps what it compiled (~/.cache/modular), by the graph and not by the weights: the first start of a model's shape
takes a minute or more, every later one a second or two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from max.engine import InferenceSession
from numpy.typing import NDArray

from ..config import GPTConfig
from ..errors import LoadstoneError
from ..model import GPT
from ..positions import inverse_frequencies
from .max_graph import build_graph
from .protocol import Engine
from .slots import Floats, SlotCache


class MaxEngine(Engine):
    """A float32 model on the CPU. See `Engine`."""

    def __init__(self, model: GPT) -> None:
        self.config = model.config
        # contiguous, and kept: MAX does not copy them
        self._weights = {n: np.ascontiguousarray(p.detach().numpy()) for n, p in model.named_parameters()}
        self._weights |= _rotation(self.config)
        graph = build_graph(self.config, {name: weight.shape for name, weight in self._weights.items()})
        try:
            self._model = InferenceSession().load(graph, weights_registry=self._weights)
        except (RuntimeError, ValueError) as error:
            reason = (str(error).strip() or "no message").splitlines()[0]
            raise LoadstoneError(f"engine max: MAX could not compile the model: {reason}") from error

    def new_cache(self, batch: int = 1, length: int | None = None, *, allocate: int | None = None) -> SlotCache:
        return SlotCache(self.config, batch, length, allocate=allocate)

    def prefill(self, cache: SlotCache, prompts: Mapping[int, Sequence[int]]) -> Floats:
        rows, counts = list(prompts), [len(ids) for ids in prompts.values()]
        ids_RT = np.zeros((len(rows), max(counts)), np.int64)
        for place, ids in enumerate(prompts.values()):
            ids_RT[place, : len(ids)] = ids
        return self._run(cache, rows, ids_RT, counts)

    def decode(self, cache: SlotCache, tokens: Sequence[int]) -> Floats:
        return self._run(cache, range(len(tokens)), np.array(tokens, np.int64)[:, None], [1] * len(tokens))

    def _run(self, cache: SlotCache, rows: Sequence[int], ids_RT: NDArray[Any], counts: Sequence[int]) -> Floats:
        lengths = [cache.lengths[row] for row in rows]
        cache.reserve(max(lengths) + ids_RT.shape[1])
        last = np.array(counts, np.int64) - 1
        logits, new = self._model.execute(ids_RT, np.array(lengths, np.int64), last, cache.held(rows))
        cache.append(rows, new.to_numpy(), counts)
        return np.array(logits.to_numpy())


def _rotation(config: GPTConfig) -> dict[str, Floats]:
    """Weights as far as MAX is concerned, so that what it compiled serves every base and scaling."""
    if config.rope is None:
        return {}
    frequencies, factor = inverse_frequencies(config.rope, config.rope.dims or config.head_dim)
    return {"frequencies": frequencies.numpy(), "rotation_factor": np.array([factor], np.float32)}
