"""The engine `compile`: what it computes, when it compiles. Here graphs run as they are; C++ is made in tests/peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from engine_contract import PROMPTS, check_generation, play
from loadstone.engines import compiled, start_engine
from loadstone.engines.compiled import CompileEngine, bucket
from loadstone.engines.protocol import EngineMissingError
from loadstone.errors import LoadstoneError
from loadstone.generate import generate
from loadstone.model import GPT
from small_gpt import small_gpt, small_llama, small_neox


@pytest.fixture(autouse=True)
def _without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured, guarded and counted as ever, but not turned into C++, which takes half a minute a shape."""
    real: Callable[..., Any] = torch.compile

    def captured(module: torch.nn.Module, **options: Any) -> Any:
        assert options.pop("options") == {"freezing": True}
        return real(module, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", captured)
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    "make",
    [
        lambda: small_gpt(2), small_neox, lambda: small_llama(2, window=3, qk_norm=True),
        lambda: small_gpt(2, parallel_residual=True, shared_norm=True, tied=False, head_bias=True),
    ],
)  # fmt: skip
def test_it_keeps_the_contract(make: Callable[[], GPT]) -> None:
    model = make().eval()
    play(start_engine("compile", model), model)


def test_what_it_does_not_do_is_refused_by_name() -> None:
    with pytest.raises(LoadstoneError, match="engine compile does not do n_experts = 4, n_experts_used = 2, which"):
        start_engine("compile", small_llama(1, n_experts=4, n_experts_used=2))


def test_it_keeps_the_contract_in_small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts padded to 2, 4, 8, ..., and caches that grow from 4 slots on."""
    monkeypatch.setattr(compiled, "SMALLEST_PROMPT", 2)
    monkeypatch.setattr(compiled, "SMALLEST_CACHE", 4)
    model = small_gpt(1).eval()
    play(CompileEngine(model), model)


def test_generation_is_the_models_own() -> None:
    model = small_llama(2).eval()
    check_generation(start_engine("compile", model), model)


def test_nothing_is_compiled_after_the_warm_up() -> None:
    engine = start_engine("compile", small_gpt(2).eval())
    generate(engine, [[1, 2, 3]], max_new_tokens=2)
    warm = graphs()
    assert warm == 2  # a prompt and a step
    for length in (1, 2, 9, 20):
        generate(engine, [[5] * length], max_new_tokens=30, overflow="window")
    assert graphs() == warm
    generate(engine, PROMPTS, max_new_tokens=3)
    assert graphs() == warm + 2  # another number of rows
    assert not counters["graph_break"]


def test_more_shapes_than_torch_allows_by_itself() -> None:
    engine = start_engine("compile", small_gpt(1).eval())
    # 8 is torch's own limit
    for rows in range(1, 11):
        engine.decode(engine.new_cache(rows), [1] * rows)
    assert graphs() == 10


def test_sizes_are_rounded_up() -> None:
    assert [bucket(n, 32, 1024) for n in (1, 32, 33, 64, 65, 1000, 1024)] == [32, 32, 64, 64, 128, 1024, 1024]
    assert bucket(700, 32, 1000) == 1000
    assert bucket(3, 32, 24) == 24


def test_padding_writes_where_nobody_reads() -> None:
    """A prompt of 20 in a context of 24, padded to 24, must leave slots 20 to 23 as they were."""
    engine = CompileEngine(small_gpt(1).eval())
    cache = engine.new_cache(1)
    engine.prefill(cache, {0: [3] * 20})
    assert not cache.kv[0][:, :, 20:24].any()
    assert cache.kv[0][:, :, 24].any()


def test_a_compiler_that_fails_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    class InvalidCompilerError(RuntimeError):
        __module__ = "torch._inductor.exc"

    def broken(*inputs: object) -> None:
        raise InvalidCompilerError("No working C++ compiler found\nin three places")

    engine = CompileEngine(small_gpt(1))
    engine._step = broken
    with pytest.raises(
        EngineMissingError, match=r"does not work here \(it needs a C\+\+ compiler\): No working C\+\+ comp"
    ):
        engine.decode(engine.new_cache(), [1])
