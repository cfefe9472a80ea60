"""A short fuzz of every format in each test run, all that was ever found again, and the harness itself.

`python -m fuzz.run` does the same for as long as one likes, guided by coverage.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz import seeds
from fuzz.run import FORMATS
from fuzz.targets import TARGETS, BrokenPromiseError, Target, check, prepare
from loadstone.errors import ConfigError, FormatError, LoadstoneError, PlanError, SourceError, TokenizerError

# Refusals of what was opened: the model is not known, or the tokenizer is incomplete.
OPENED = (PlanError, ConfigError, TokenizerError)


def test_every_format_is_fuzzed() -> None:
    assert set(FORMATS) == set(TARGETS)


@pytest.mark.parametrize("name", FORMATS)
def test_seeds_and_old_findings(tmp_path: Path, name: str) -> None:
    target = TARGETS[name]
    folder = prepare(target, tmp_path / "x")
    outcomes = [check(target, folder, data) for data in [*target.seeds(), *seeds.corpus(name)]]
    assert any(outcome is None for outcome in outcomes), "no seed is read through to the end"
    if name not in ("pickle", "checkpoint"):  # which begin from hostile files too
        refused = [outcome for outcome in outcomes[: len(target.seeds())] if isinstance(outcome, FormatError)]
        assert not refused, "a seed should be a sound file"


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.integers(0, 2**32))
@pytest.mark.parametrize("name", FORMATS)
def test_mutated_files(tmp_path: Path, name: str, number: int) -> None:
    random, target = Random(number), TARGETS[name]
    folder = tmp_path / "x" if (tmp_path / "x").is_dir() else prepare(target, tmp_path / "x")
    for _ in range(4):
        check(target, folder, target.mutated(random.choice(_seeds(name)), random))


_SEEDS: dict[str, list[bytes]] = {}


def _seeds(name: str) -> list[bytes]:
    return _SEEDS.setdefault(name, TARGETS[name].seeds())


# -- the harness can fail


def spend(folder: Path, data: bytes) -> None:
    bytearray(100 << 20)


def warn(folder: Path, data: bytes) -> None:
    warnings.warn("a file can make us speak", UserWarning, stacklevel=1)


def run_on(folder: Path, data: bytes) -> None:
    raise LoadstoneError("x" * 5000)


def break_down(folder: Path, data: bytes) -> None:
    dict[bytes, int]()[data]


@pytest.mark.parametrize(
    ("fault", "error", "match"),
    [
        (spend, BrokenPromiseError, "bytes of memory, for 1"),
        (run_on, BrokenPromiseError, "an error of 5,000 characters"),
        (warn, UserWarning, "make us speak"),
        (break_down, KeyError, "x"),
    ],
)
def test_a_fault_is_found(
    tmp_path: Path, fault: Callable[[Path, bytes], None], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        check(Target(list, fault), tmp_path, b"x")


def test_slowness_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzz.targets.SECONDS", 0.05)

    def hang(folder: Path, data: bytes) -> None:
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass

    with pytest.raises(BrokenPromiseError, match=r"it took 0\.\d s"):
        check(Target(list, hang), tmp_path, b"x")


def test_our_own_errors_are_an_answer(tmp_path: Path) -> None:
    def refuse(folder: Path, data: bytes) -> None:
        raise SourceError("no")

    assert str(check(Target(list, refuse), tmp_path, b"x")) == "no"


def test_the_program(tmp_path: Path) -> None:
    """It counts, and keeps what it finds: a reader whose check of the shapes is taken away by hand."""
    code = f"""
import runpy, sys
from loadstone.checkpoint import safetensors
if {{planted}}:
    safetensors._are_sizes = lambda value: True
sys.argv = ["fuzz", "--child", "--format", "safetensors", "--runs", "400", "--blind", "--out", {str(tmp_path)!r}]
runpy.run_module("fuzz.run", run_name="__main__")
"""
    for planted in (False, True):
        done = subprocess.run(
            [sys.executable, "-c", code.format(planted=planted)],
            cwd=Path(__file__).parents[1], capture_output=True, text=True,
        )  # fmt: skip
        statistics = json.loads((tmp_path / "statistics.json").read_text())
        assert statistics["runs"] == 400, done.stderr
        assert statistics["opened"] > 10
        assert bool(statistics["findings"]) == planted
    for file in statistics["findings"].values():
        assert Path(file).is_file()
