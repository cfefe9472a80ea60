"""What every engine must do, played beside the plain model, which reads each row's tokens anew and without a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from loadstone.engines import Engine
from loadstone.generate import Session, generate
from loadstone.model import GPT

PROMPTS = [[1, 2, 3, 4, 5], [7], [9, 8, 7]]


class Played:
    """An engine's cache, and the tokens that each of its rows should hold."""

    def __init__(self, engine: Engine, model: GPT, batch: int, **options: Any) -> None:
        self.engine, self.model = engine, model
        self.cache = engine.new_cache(batch, **options)
        self.rows: list[list[int]] = [[] for _ in range(batch)]

    def prefill(self, prompts: Mapping[int, Sequence[int]]) -> Any:
        for row, ids in prompts.items():
            self.rows[row] += ids
        return self._compare(self.engine.prefill(self.cache, prompts), list(prompts))

    def decode(self, tokens: Sequence[int]) -> Any:
        for row, token in zip(self.rows, tokens, strict=True):
            row.append(token)
        return self._compare(self.engine.decode(self.cache, tokens), range(len(tokens)))

    def reset(self, lengths: Sequence[int]) -> None:
        self.engine.reset(self.cache, lengths)
        self.rows = [row[:length] for row, length in zip(self.rows, lengths, strict=True)]

    def _compare(self, logits: Any, rows: Sequence[int]) -> Any:
        with torch.inference_mode():
            expected = torch.stack([self.model(torch.tensor([self.rows[row]]))[0, -1] for row in rows])
        np.testing.assert_allclose(values(logits), expected.numpy(), atol=1e-4, rtol=0)
        assert self.cache.lengths == [len(row) for row in self.rows]
        return logits


def values(logits: Any) -> Any:
    return torch.as_tensor(logits).numpy()


def play(engine: Engine, model: GPT) -> None:
    """Unequal rows, decoding, forgetting, some rows alone, growth, the limit; results stay what they are."""
    rows = Played(engine, model, 3)
    first = rows.prefill(dict(enumerate(PROMPTS)))
    before = values(first).copy()
    for token in range(3):
        rows.decode([token, token + 1, 60])
    assert np.array_equal(before, values(first))
    rows.reset([2, 0, 6])
    rows.prefill({2: [5, 6], 1: [3, 1, 4]})  # in this order; row 0 stays
    rows.decode([60, 0, 30])
    rows.prefill({0: [8, 8], 1: [5], 2: [9, 9, 9]})  # all, from unequal lengths

    one = Played(engine, model, 1, allocate=2)
    for end in (3, 4, 13):
        one.prefill({0: list(range(len(one.rows[0]), end))})
    one.reset([0])
    one.prefill({0: list(range(model.config.context_length))})
    one.reset([21])
    one.prefill({0: [1, 2, 3]})  # to the last slot, though an engine may pad it
    with pytest.raises(IndexError, match=r"position 24 is beyond the limit of 24 tokens"):
        engine.decode(one.cache, [1])
    with pytest.raises(ValueError, match="cannot be set to"):
        engine.reset(one.cache, [99])


def check_generation(engine: Engine, model: GPT) -> None:
    """The same tokens as the model alone: greedy and drawn, ended rows, a sliding window, a session."""
    for options in (
        {"max_new_tokens": 12},
        {"max_new_tokens": 60},
        {"max_new_tokens": 40, "overflow": "window", "stop_ids": [7]},
        {"max_new_tokens": 30, "overflow": "window", "n_tokens": 50},
    ):
        assert generate(engine, PROMPTS, **options) == generate(model, PROMPTS, **options)
    from loadstone.sampling import Sampling

    drawn: dict[str, Any] = {"max_new_tokens": 10, "seed": 3, "sampling": Sampling(temperature=1.0, top_k=20)}
    assert generate(engine, PROMPTS, **drawn) == generate(model, PROMPTS, **drawn)
    session, prompt = Session(engine.new_cache(allocate=2)), [4, 4, 2]
    for _ in range(3):
        (fresh,) = generate(model, [prompt], max_new_tokens=4)
        assert generate(engine, [prompt], max_new_tokens=4, session=session) == [fresh]
        prompt = [*prompt, *fresh.ids[:2], 33]
