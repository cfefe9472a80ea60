"""`loadstone train` and `finetune` as commands: killed and resumed, refused in one paragraph, and what they print."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

import loadstone
from loadstone.cli import main
from loadstone.load import load

TEXT = "\n".join(f"The {a} {b} saw the {c} {d}." for a in ("old", "new", "red") for b in ("cat", "dog", "hen", "fox")
                 for c in ("big", "sad", "shy") for d in ("man", "boy", "king", "bird"))  # fmt: skip
MODEL = ["--set", "d_model=16", "--set", "n_layers=2", "--set", "n_heads=2", "--set", "context_length=16"]
RUN = ["--steps", "30", "--batch-size", "4", "--eval-every", "10", "--save-every", "1", "--validation", "0.1"]
Run = Callable[..., tuple[int, str, str]]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
pytestmark = pytest.mark.usefixtures("one_thread")


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "loadstone", *map(str, arguments)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def whole(text: Path) -> Path:
    """A run that nobody disturbed."""
    folder = text.parent / "whole"
    flags = ["--run", str(folder), "--data", str(text), "--tokenizer", "char", *MODEL, *RUN, "--json"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out:
        patch.setattr(sys, "argv", ["loadstone", "train", *flags])
        with pytest.raises(SystemExit) as end:
            main()
    assert not end.value.code
    assert json.loads(out.getvalue())["why"] == "done"
    return folder


def test_a_run_killed_again_and_again_ends_with_the_same_bytes(
    run: Run, text: Path, whole: Path, tmp_path: Path
) -> None:
    """SIGKILL at any moment: while text is read, in a step, while a checkpoint is written."""
    folder, killed = tmp_path / "killed", 0
    arguments: list[str | Path] = ["train", "--run", folder, "--data", text, "--tokenizer", "char", *MODEL, *RUN]
    begin = command(*arguments)
    for attempt in range(30):
        resume = ["--resume"] if (folder / "checkpoints").is_dir() and any((folder / "checkpoints").iterdir()) else []
        if not resume and folder.exists():
            subprocess.run(["rm", "-r", str(folder)], check=True)
        child = subprocess.Popen(
            [*begin, *resume], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=ENVIRONMENT
        )
        before, patience = steps_of(folder), time.monotonic() + 60
        while child.poll() is None and steps_of(folder) <= before and time.monotonic() < patience:
            time.sleep(0.01)
        time.sleep(random.Random(attempt).uniform(0, 0.1))
        child.send_signal(signal.SIGKILL)
        child.wait()
        killed += child.returncode == -signal.SIGKILL
        if killed >= 3 or child.returncode == 0:
            break
    assert killed >= 3
    status, _, err = run(*arguments, "--resume")
    assert status == 0, err
    for file in ("model.safetensors", "training/state.safetensors"):
        assert (folder / "latest" / file).read_bytes() == (whole / "latest" / file).read_bytes()


def steps_of(folder: Path) -> int:
    found = [path.name for path in (folder / "checkpoints").glob("step-*")] if folder.exists() else []
    return max((int(name[5:]) for name in found), default=-1)


def test_ctrl_c_saves_and_leaves(run: Run, text: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    begin = command("train", "--run", folder, "--data", text, "--tokenizer", "char", *MODEL, *RUN)
    child = subprocess.Popen(begin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    while steps_of(folder) < 3 and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert "all is saved" in out
    assert "Traceback" not in err
    status, _, err = run("train", "--run", folder, "--resume")  # run.json remembers everything else
    assert status == 0, err
    assert (folder / "latest/model.safetensors").read_bytes() == (whole / "latest/model.safetensors").read_bytes()


def test_what_is_trained_is_an_ordinary_model_with_its_tokenizer(whole: Path) -> None:
    model, tokenizer = load(whole / "best")
    assert tokenizer is not None
    text = loadstone.generate_text(model, tokenizer, "The old cat", max_new_tokens=5, seed=0)
    assert text.startswith("The old cat")
    assert len(text) == len("The old cat") + 5


def test_a_resume_with_other_settings_is_refused_and_nothing_is_touched(run: Run, whole: Path) -> None:
    before = snapshot(whole)
    status, _, err = run("train", "--run", whole, "--resume", "--lr", "0.5")
    assert status == 2
    assert "begun with other settings: lr: 0.5 instead of 0.0006" in err
    assert snapshot(whole) == before
    assert run("train", "--run", whole, "--resume", "--log-every", "5")[0] == 0  # which changes nothing


def test_a_second_run_in_the_same_folder_is_refused(run: Run, text: Path, whole: Path) -> None:
    before = snapshot(whole)
    status, _, err = run("train", "--run", whole, "--data", text, "--tokenizer", "char")
    assert (status, "a run lies there already" in err) == (2, True)
    assert snapshot(whole) == before


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--data", "nothing.txt"], "nothing.txt"),
        (["--data", "empty.txt", "--tokenizer", "char"], "nothing to learn from"),
        (["--data", "short.txt", "--tokenizer", "char", *MODEL], "one window needs 17"),
        (["--data", "text.txt", "--tokenizer", "char", "--set", "d_model=15", "--set", "n_heads=2"], "d_model 15"),
        (["--data", "text.txt", "--tokenizer", "char", "--set", "vocab_size=5"], "the model has 5 rows"),
        (["--data", "text.txt", "--tokenizer", "char", "--length", "999"], "beyond the model's context of 256"),
        (["--data", "text.txt", "--tokenizer", "char", "--schedule", "square"], "schedule 'square'"),
        (["--data", "text.txt", "--tokenizer", "char", "--lr", "nan"], "lr must not be negative or infinite"),
        (["--data", "text.txt", "--tokenizer", "char", "--preset", "gpt9"], "no preset 'gpt9'"),
        (["--data", "text.txt", "--tokenizer", "char", "--device", "gpu9"], "gpu9"),
        (["broken.toml"], "not TOML"),
        (["wrong.toml"], "nearest: lr"),
        (["wrong2.toml"], r"[data] sources: expected texts"),
        ([], "no data"),
        (["--resume"], "no run to resume"),
    ],
)
def test_bad_input_is_one_paragraph(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("abcdefgh")
    (tmp_path / "broken.toml").write_text("[settings\nlr=")
    (tmp_path / "wrong.toml").write_text("[settings]\nlrr = 2")
    (tmp_path / "wrong2.toml").write_text("[data]\nsources = 3")
    status, out, err = run("train", *arguments, "--run", "run")
    assert status == 2, out
    assert problem in err
    assert err.startswith("loadstone: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_config_file_says_the_same_as_flags(run: Run, text: Path, whole: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "data": {"sources": [str(text)], "tokenizer": "char", "validation": 0.1},
        "model": {"d_model": 16, "n_layers": 2, "n_heads": 2, "context_length": 16},
        "settings": {"steps": 99, "batch_size": 4, "eval_every": 10, "save_every": 1},
    }
    (tmp_path / "c.json").write_text(json.dumps(values))
    assert run("train", tmp_path / "c.json", "--run", tmp_path / "run", "--steps", "30")[0] == 0
    found, flags = (json.loads((path / "run.json").read_text())["request"] for path in (tmp_path / "run", whole))
    assert found == flags


def test_a_dry_run_writes_nothing(run: Run, text: Path, tmp_path: Path) -> None:
    flags = ["--data", text, "--tokenizer", "char", *MODEL, *RUN, "--dry-run"]
    plan = json.loads(run("train", "--run", tmp_path / "run", *flags, "--json")[1])
    assert "at the peak" in run("train", "--run", tmp_path / "run", *flags)[1]
    assert plan["tokens"] == 30 * 4 * 16
    assert plan["assumed"][0] == "a vocabulary of 100 tokens"
    assert not (tmp_path / "run").exists()


def test_finetune_goes_on_from_any_checkpoint(run: Run, text: Path, whole: Path, tmp_path: Path) -> None:
    flags = ["--steps", "10", "--batch-size", "4", "--eval-every", "5", "--lr", "1e-3", "--validation", "0.1"]
    flags += ["--data", str(text), "--strategy", "last:1", "--json"]
    status, _, err = run("finetune", whole / "best", "--run", tmp_path / "run", *flags)
    assert status == 0, err
    before, after = (dict(load(path)[0].named_parameters()) for path in (whole / "best", tmp_path / "run/latest"))
    moved = {name for name in before if not bool((before[name] == after[name]).all())}
    assert moved == {name for name in before if name.startswith(("blocks.1", "norm"))}
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["strategy"]["phases"][0]["train"]


def test_a_tied_head_alone_is_refused_with_the_ways_out(run: Run, text: Path, whole: Path, tmp_path: Path) -> None:
    status, _, err = run("finetune", whole / "best", "--run", tmp_path / "run", "--data", text, "--strategy", "head")
    assert status == 2
    assert "tied" in err
    assert "untie" in err
    assert not (tmp_path / "run/run.json").exists()
