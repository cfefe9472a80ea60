"""The engine's edges: wrong input, limits, threads, forks, what is missing, and that torch stays away."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import loadstone
import loadstone.native.library as library_module
from loadstone.errors import LoadstoneError
from loadstone.load import open_source
from loadstone.native import NativeEngine, open_native
from loadstone.native.library import choose_threads, missing
from native_models import GPT2, MODELS, engine_of, ids_of, model_of
from small_gpt import small_llama


@pytest.fixture(scope="module")
def engine() -> NativeEngine:
    return engine_of(model_of(GPT2))


def test_wrong_tokens_rows_and_lengths_are_errors_and_change_nothing(engine: NativeEngine) -> None:
    cache = engine.new_cache(2, 10)
    engine.prefill(cache, {0: [1, 2, 3]})
    for prompts, error, text in (
        ({0: [259]}, IndexError, "vocabulary of 259"),
        ({0: [-1]}, IndexError, "vocabulary of 259"),
        ({0: [2**40]}, IndexError, "vocabulary"),
        ({0: [1.5]}, TypeError, "whole numbers"),
        ({0: ["a"]}, TypeError, "whole numbers"),
        ({0: [[1]]}, TypeError, "whole numbers"),
        ({2: [1]}, IndexError, "2 rows"),
        ({-1: [1]}, IndexError, "2 rows"),
        ({0: []}, ValueError, "at least one token"),
        ({}, ValueError, "at least one token"),
        ({0: [1] * 8}, IndexError, "position 10 is beyond the limit of 10 tokens"),
    ):
        with pytest.raises(error, match=text):
            engine.prefill(cache, prompts)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 rows, and 1 tokens"):
        engine.decode(cache, [1])
    with pytest.raises(ValueError, match="cannot be set"):
        engine.reset(cache, [4, 0])
    assert cache.lengths == [3, 0]
    engine.prefill(cache, {0: [1] * 7})  # exactly full
    with pytest.raises(IndexError, match="beyond"):
        engine.decode(cache, [1, 1])
    with pytest.raises(ValueError, match="1 row or more"):
        engine.new_cache(0)
    assert engine.new_cache(1, 10**6).size == 40


def test_the_library_itself_refuses_what_the_wrapper_would_not_send(engine: NativeEngine) -> None:
    lib, cache = library_module.library(), engine.new_cache(2, 10)
    out = np.empty((2, 259), np.float32)

    def status(tokens: list[int], rows: list[int], counts: list[int], starts: list[int]) -> int:
        arrays = [np.array(values, np.int32) for values in (tokens, rows, counts, starts)]
        at = [array.ctypes.data for array in arrays]
        return int(lib.ls_run(engine.handle, cache.handle, at[0], len(rows), *at[1:], 0, out.ctypes.data))

    assert status([1, 2], [0, 1], [1, 1], [0, 0]) == 0
    assert status([1, 2], [0, 0], [1, 1], [0, 0])
    assert status([1], [2], [1], [0])
    assert status([1], [0], [1], [32])  # a cache has whole steps of slots
    assert status([1], [0], [1], [-1])
    assert status([1], [0], [2**30], [0])
    assert status([259], [0], [1], [0])
    for slot, kind, first, rows in ((10**6, 0, 0, 1), (0, 9, 0, 1), (0, 0, 8, 1), (0, 0, 64, 16), (0, 3, 0, 16)):
        work = library_module.Packing(None, 0, 0, slot, kind, first, rows, False)
        assert lib.ls_pack(engine.handle, ctypes.byref(work), 1)
    assert lib.ls_vector(engine.handle, 0, out.ctypes.data, 3)
    with pytest.raises(IndexError, match="no row"):
        engine.weight_row("tok_emb.weight", 259)


def test_two_callers_at_once_wait_for_each_other(engine: NativeEngine) -> None:
    ids = ids_of(30)
    want = engine.scores(ids)
    found: list[bool] = []

    def read() -> None:
        found.extend(bool((engine.scores(ids) == want).all()) for _ in range(5))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 20


@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="sanitizers do not follow a fork of a process with threads")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_starts_threads_of_its_own(engine: NativeEngine) -> None:
    want = engine.scores([1, 2, 3])
    child = os.fork()
    if not child:
        os._exit(0 if (engine.scores([1, 2, 3]) == want).all() else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_threads_sleep_when_there_is_nothing_to_do() -> None:
    engine = engine_of(model_of(GPT2), threads=2)
    engine.scores([1, 2, 3])
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1
    many = engine_of(model_of(GPT2), threads=7)  # more than the machine has cores
    np.testing.assert_array_equal(many.scores([1, 2, 3]), engine.scores([1, 2, 3]))


def test_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert (choose_threads(None), choose_threads(5)) == (3, 5)
    monkeypatch.setenv("OMP_NUM_THREADS", "128")
    assert choose_threads(None) == 64
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert choose_threads(None) == len(os.sched_getaffinity(0))
    for wrong in (0, -1, 65):
        with pytest.raises(LoadstoneError, match=f"1 to 64 threads, found {wrong}"):
            choose_threads(wrong)


@pytest.mark.parametrize("width", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gpt2", "llama biases, odd head"])
def test_a_row_that_was_copied_goes_on_as_the_first(name: str, width: str) -> None:
    engine = engine_of(model_of(MODELS[name]), width)
    for count in (1, 15, 16, 17, 23):
        cache = engine.new_cache(3, 24)
        engine.prefill(cache, {0: ids_of(count), 1: ids_of(24), 2: ids_of(24, seed=2)})
        engine.copy(cache, 0, 1, count)
        engine.reset(cache, [count, count, 23])
        first, second, third = engine.decode(cache, [7, 7, 7])
        assert np.array_equal(first, second)
        assert not np.array_equal(first, third)
    for wrong in ((0, 0, 1), (0, 3, 1), (-1, 1, 1), (0, 1, 99)):
        with pytest.raises(IndexError, match="cannot go to row"):
            engine.copy(cache, *wrong)


def test_what_cannot_run_is_said() -> None:
    identity = open_source(model_of(GPT2))
    with pytest.raises(LoadstoneError, match="width must be auto, float32"):
        open_native(identity, width="q3")
    with pytest.raises(LoadstoneError, match="cannot run as 'mmx' here; it can as portable"):
        open_native(identity, level="mmx")
    with pytest.raises(LoadstoneError, match=r"engine native does not do window = 5, which this model needs"):
        open_native(open_source(small_llama(1, window=5)))


@pytest.mark.usefixtures("unbuilt")
def test_without_the_library_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = library_module.library.__wrapped__
    for content, reason in ((None, "is not built"), (b"", "cannot be opened")):
        path = tmp_path / "other.so"
        if content is not None:
            path.write_bytes(content)
        monkeypatch.setenv(library_module.VARIABLE, str(path))
        monkeypatch.setattr(library_module, "library", load)
        assert reason in missing()


def test_a_library_older_than_its_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_module, "source_hash", lambda: "0" * 16)
    with pytest.raises(LoadstoneError, match="built from other sources"):
        library_module.library.__wrapped__()


def test_text_without_torch() -> None:
    code = (
        "import sys\nfrom loadstone.cli import main\n"
        "sys.argv[1:] = ['generate', 'tiny', 'It was', '-n', '3', '--engine', 'native']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(loadstone.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
