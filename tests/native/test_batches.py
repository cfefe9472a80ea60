"""The native engine beside torch in batches: every family and width, by 1 to 3 threads, in caches of odd lengths."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from loadstone.model import GPT
from loadstone.native.packing import WIDTHS
from native_models import MODELS, emulate, engine_of, ids_of, model_of, same, take_weights

# Of the logits' deviation: floats differ by the order of sums, the others by rounded activations as well.
LIMITS = {"float32": 2e-5, "float16": 2e-5, "bfloat16": 0.1, "q8": 0.1, "q4": 0.1}
BATCHES = ((1, 9), (4, 33), (16, 40))  # rows, and tokens that each may hold


@cache
def prepared(name: str, width: str) -> GPT:
    """A model whose matrices are as this width leaves them."""
    model = model_of(MODELS[name])
    take_weights(model, engine_of(model, width))
    return model


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", MODELS)
def test_each_row_of_a_batch_is_its_text_alone_in_torch(name: str, width: str) -> None:
    model = prepared(name, width)
    for threads, (rows, length) in zip((3, 1, 2), BATCHES, strict=True):
        engine = engine_of(model, width, threads=threads)
        texts = [ids_of(1 + 7 * row % (length - 3), seed=row) for row in range(rows)]
        held = engine.new_cache(rows, length)
        found = [engine.prefill(held, dict(enumerate(texts)))]
        for step in range(2):
            tokens = ids_of(rows, seed=100 + step)
            found.append(engine.decode(held, tokens))
            texts = [[*text, token] for text, token in zip(texts, tokens, strict=True)]
        for row, text in enumerate(texts):
            want = emulate(model, text, same, same)[-3:]
            error = np.stack([step[row] for step in found]) - want
            assert np.sqrt((error**2).mean()) < LIMITS[width] * want.std(), (rows, row)
