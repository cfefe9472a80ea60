"""The table of engines, what stands above the protocol, the engine `torch`, and the cache in numpy."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Run
from engine_contract import check_generation, play
from loadstone import native
from loadstone.config import GPTConfig
from loadstone.config.common import COMMON, require_fields
from loadstone.engines import ENGINES, best_engine, engine_of, probes, require_engine, start_engine
from loadstone.engines.eager import TorchEngine
from loadstone.engines.slots import SlotCache
from loadstone.errors import LoadstoneError
from loadstone.generate import generate
from loadstone.load import open_source
from loadstone.model import GPT
from loadstone.positions import KVCache
from small_gpt import small_gpt, small_llama, small_neox

MODELS = {"gpt2": small_gpt, "llama": small_llama, "neox": small_neox}


class NumpyEngine(TorchEngine):
    """As an engine without torch answers: numpy logits."""

    def prefill(self, cache: KVCache, prompts: Mapping[int, Sequence[int]]) -> Any:
        return super().prefill(cache, prompts).numpy()

    def decode(self, cache: KVCache, tokens: Sequence[int]) -> Any:
        return super().decode(cache, tokens).numpy()


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("kind", [TorchEngine, NumpyEngine])
def test_torch_keeps_the_contract(family: str, kind: Callable[[GPT], TorchEngine]) -> None:
    model = MODELS[family]().eval()
    play(kind(model), model)
    check_generation(kind(model), model)


def test_a_forgotten_token_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contract can fail: an engine whose rows stay where they were, one that reads the wrong row."""
    model = small_gpt(2).eval()
    with monkeypatch.context() as patch:
        patch.setattr(TorchEngine, "reset", lambda self, cache, lengths: None)
        with pytest.raises(AssertionError):
            play(TorchEngine(model), model)
    decode = TorchEngine.decode
    monkeypatch.setattr(TorchEngine, "decode", lambda self, cache, tokens: decode(self, cache, tokens).roll(1, 0))
    with pytest.raises(AssertionError):
        play(TorchEngine(model), model)


def test_an_engine_stays_itself_and_a_model_runs_on_torch() -> None:
    model = small_gpt(1)
    engine = engine_of(model)
    assert isinstance(engine, TorchEngine)
    assert engine_of(engine) is engine
    assert type(start_engine("torch", model)) is TorchEngine


def test_what_cannot_run_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LoadstoneError, match=r"no engine is called 'metal'; known: torch, compile, max"):
        require_engine("metal")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "26.6.1")
    assert probes.max_package() == ""
    monkeypatch.setattr("importlib.metadata.version", lambda name: "27.1.0")
    assert "written for max 26.6" in probes.max_package()
    assert "here is max 27.1.0. Install it with `pip install" in probes.max_package()
    monkeypatch.setitem(ENGINES, "max", ENGINES["torch"].__class__("", "", lambda: "", ("cpu",), ("float32",)))
    with pytest.raises(LoadstoneError, match="engine max runs on cpu only; device cuda was asked for"):
        require_engine("max", "cuda")
    with pytest.raises(LoadstoneError, match=r"computes in float32 only, and bfloat16 was asked for: load the"):
        start_engine("max", small_gpt(1).bfloat16())


@pytest.mark.parametrize(
    ("cxx", "there", "words"),
    [
        ("", {"g++"}, ""),
        ("", {"clang++"}, ""),
        ("", set(), r"needs a C\+\+ compiler, and neither g\+\+ nor clang\+\+ is there"),
        ("mycc", {"g++"}, r"\$CXX names 'mycc', which is not there"),
        ("mycc", {"mycc"}, ""),
    ],
)
def test_a_compiler_is_looked_for(monkeypatch: pytest.MonkeyPatch, cxx: str, there: set[str], words: str) -> None:
    import re

    monkeypatch.setenv("CXX", cxx)
    monkeypatch.setattr("shutil.which", lambda name: name if name in there else None)
    found = probes.compiler()
    assert bool(found) == bool(words)
    assert re.search(words, found)


def test_fields_that_an_engine_does_not_obey_are_refused_by_name() -> None:
    config = GPTConfig(61, 24, 16, 1, 4, norm_bias=False)
    require_fields(config, "max")
    with pytest.raises(LoadstoneError, match="engine max does not do norm_bias = False, which this model needs"):
        require_fields(config, "max", COMMON - {"norm_bias", "tied"})


def test_the_cache_in_numpy_holds_what_the_models_own_does() -> None:
    config = small_gpt(2).config
    cache, rng = SlotCache(config, 3, 20, allocate=2), np.random.default_rng(0)
    new = rng.standard_normal((2, 2, 3, 4, 5, 4)).astype(np.float32)
    assert cache.held([0, 1, 2]).shape == (2, 2, 3, 4, 1, 4)
    cache.reserve(5)
    cache.append([0, 1, 2], new, [5, 1, 3])
    cache.reserve(7)
    cache.append([2, 0], new[:, :, :2, :, :2], [2, 1])
    assert cache.lengths == [6, 1, 5]
    assert np.array_equal(cache.kv[:, :, 2, :, :5], np.concatenate([new[:, :, 2, :, :3], new[:, :, 0, :, :2]], axis=3))
    assert np.array_equal(cache.kv[:, :, 0, :, 5], new[:, :, 1, :, 0])
    assert cache.held([0, 1, 2]) is cache.kv
    assert np.array_equal(cache.held([2, 0]), cache.kv[:, :, [2, 0]])
    assert cache.held([2, 0]).flags.c_contiguous
    with pytest.raises(IndexError, match="position 20 is beyond the limit of 20 tokens"):
        cache.reserve(21)


def test_the_table_costs_no_torch_and_no_max() -> None:
    code = "import sys, loadstone.engines as e, loadstone.engines.slots\n"
    code += "[kind.missing() for kind in e.ENGINES.values()]\nassert not {'torch', 'max'} & set(sys.modules)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_the_command_line_lists_and_chooses(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "25.1")
    status, out, _ = run("engines")
    assert (status, out.count("ok  torch"), out.count("(used if none is named)")) == (0, 1, 1)
    assert "not here: it was written for max 26.6" in out
    status, out, _ = run("engines", "--json")
    rows = {row["engine"]: row for row in json.loads(out)}
    assert list(rows) == list(ENGINES)
    assert [name for name, row in rows.items() if row["default"]] == ["torch" if native.missing() else "native"]
    assert not rows["max"]["available"]
    if not native.missing():
        assert rows["native"]["here"].startswith(f"level {native.levels()[-1]} (of portable")
        monkeypatch.setenv("LOADSTONE_NATIVE_LEVEL", "neon")
        assert "here: the native engine cannot run as 'neon' here; it can as portable" in run("engines")[1]
        monkeypatch.delenv("LOADSTONE_NATIVE_LEVEL")
    for command in ("generate", "chat"):  # refused before the source is even looked for
        arguments = ["no-such-source", *(["x"] if command == "generate" else []), "--engine", "max"]
        status, _, error = run(command, *arguments)
        assert status == 2
        assert "engine max: it was written for max 26.6" in error
        assert "--engine torch runs every model" in error
    same = ["generate", "tiny", "It was", "-n", 8, "--seed", 1]
    assert run(*same) == run(*same, "--engine", best_engine(open_source("tiny").config))


def test_what_runs_if_no_engine_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    config = open_source("tiny").config
    if not native.missing():
        assert best_engine(config) == best_engine(config, "cpu", "q4") == "native"
    assert best_engine(config, "cuda") == best_engine(config, dtype="float64") == "torch"
    assert best_engine(config.with_overrides({"window": 5})) == "torch"
    monkeypatch.setattr(native, "missing", lambda: "it is not built.")
    assert best_engine(config) == "torch"
    _, out, _ = run("engines")
    assert "everything works (used if none is named)" in out
    assert "not here: it is not built." in out


def test_generation_is_the_same_when_an_engine_is_named() -> None:
    model = small_llama().eval()
    assert generate(start_engine("torch", model), [[1, 2]], max_new_tokens=9) == generate(
        model, [[1, 2]], max_new_tokens=9
    )
