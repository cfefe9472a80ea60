"""The engine `max` beside the model itself. Compiling takes a minute a model the first time; MAX's cache keeps it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Run
from engine_contract import check_generation, play
from loadstone.config import Rope
from loadstone.diagnose.selftest import self_test
from loadstone.engines import probes, start_engine
from loadstone.errors import LoadstoneError
from loadstone.model import GPT
from small_gpt import small_gpt, small_llama, small_neox

pytestmark = pytest.mark.skipif(bool(probes.max_package()), reason=f"engine max: {probes.max_package()}")


@pytest.mark.parametrize(
    "make", [lambda: small_gpt(2), lambda: small_llama(2), small_neox], ids=["gpt2", "llama", "neox"]
)
def test_max_keeps_the_contract(make: Callable[[], GPT]) -> None:
    model = make().eval()
    engine = start_engine("max", model)
    play(engine, model)
    check_generation(engine, model)
    assert [check for check in self_test(model, engine="max") if not check.ok] == []


def test_a_wrong_weight_is_seen() -> None:
    model = small_gpt(2).eval()
    engine = start_engine("max", model)
    model.blocks[1].attn.out.weight.data = model.blocks[1].attn.out.weight.data.T.clone()  # type: ignore[union-attr, operator]
    with pytest.raises(AssertionError):
        play(engine, model)


def test_a_scaled_rotation_comes_from_the_model() -> None:
    rope = Rope(theta=500.0, scaling="yarn", factor=4.0, original_context=8)
    model = small_llama(2, rope=rope).eval()
    play(start_engine("max", model), model)


def test_what_max_does_not_do_is_refused() -> None:
    with pytest.raises(LoadstoneError, match="engine max computes in float32 only, and bfloat16 was asked for"):
        start_engine("max", small_gpt(1).bfloat16())


def test_the_commands(run: Run) -> None:
    same = ["generate", "tiny", "It was a dark night, and", "--max-new-tokens", 12, "--temperature", 0]
    status, text, _ = run(*same, "--engine", "max")
    assert status == 0
    assert text == run(*same, "--dtype", "float32")[1]
    assert run("chat", "tiny", "--engine", "max", "--prompt", "Hello", "-n", 5)[0] == 0


def test_the_example_runs_its_five_steps() -> None:
    example = Path(__file__).parents[2] / "examples" / "max_gpt2.py"
    found = subprocess.run(
        [sys.executable, str(example), "tiny"], input="Once upon\nquit\n", capture_output=True, text=True, check=True
    ).stdout
    assert "of them transposed" in found
    assert "compiled in" in found
    assert found.count("Enter your prompt:") == 2
