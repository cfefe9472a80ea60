"""Comparisons that several files ask questions of; they are only read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import run_folders
from compared import HOSTILE, saved, texts
from loadstone.compare import Comparison, compare
from loadstone.load import open_source

STEP = 100


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, and a model that belongs to no run."""
    home = tmp_path_factory.mktemp("compare")
    rows = [run_folders.evaluation(0, 6.0)]
    for step in range(10, 201, 10):
        rows += [run_folders.training(step, seconds=2.0 * step), run_folders.evaluation(step, 5 - step / 100)]
    run = run_folders.write_run(home / "run", rows)
    checkpoint = saved(run / "checkpoints" / f"step-{STEP:08d}")
    (checkpoint / "training").mkdir()
    progress = {"progress": {"step": STEP, "tokens": 51_200, "seconds": 205.5}}
    (checkpoint / "training" / "state.json").write_text(json.dumps(progress))
    (run / "best").symlink_to(checkpoint.relative_to(run))
    saved(home / "other", seed=1, n_layers=1)
    return home


@pytest.fixture(scope="session")
def comparison(folder: Path) -> Comparison:
    return compare(
        [str(folder / "run"), str(folder / "other"), str(folder / "run" / "best")],
        texts(), prompts=["The cat", HOSTILE], seeds=[0, 7], max_new_tokens=12, temperature=0.8, top_k=50, dtype="auto",
        device="cpu", open_source=open_source,
    )  # fmt: skip
