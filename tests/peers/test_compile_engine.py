"""The engine `compile` with torch's real compiler: C++ made of a small model, and none made after the warm-up."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from engine_contract import Played
from loadstone.engines import probes, start_engine
from small_gpt import small_llama

pytestmark = [
    pytest.mark.skipif(bool(probes.compiler()), reason=f"engine compile: {probes.compiler()}"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # torch's compiler uses what torch deprecates
]


def test_it_computes_what_the_model_does_and_compiles_twice() -> None:
    torch._dynamo.reset()
    counters.clear()
    model = small_llama(1).eval()
    engine = start_engine("compile", model)
    for prompt in ([1, 2, 3], [4] * 11, [5] * 20):
        row = Played(engine, model, 1)
        row.prefill({0: prompt})
        for token in range(4):
            row.decode([token])
        row.reset([1])
        row.prefill({0: [9, 9]})
    assert counters["stats"]["unique_graphs"] == 2
    assert counters["inductor"]
