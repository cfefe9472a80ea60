"""What a run wrote down about a checkpoint: which log belongs to it, and logs that are short, long or damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from loadstone.compare.history import POINTS, read_history
from loadstone.errors import LoadstoneError


def test_a_model_that_lies_in_a_runs_folder_is_not_of_that_run(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "run", tmp_path / "run", symlinks=True)
    for place in ("pretrained", "checkpoints/pretrained"):
        shutil.copytree(folder / "other", tmp_path / "run" / place)
        assert read_history(tmp_path / "run" / place) is None
    assert read_history(tmp_path / "run" / "best") is not None


def test_a_log_beside_the_weights_tells_all_it_has(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "run" / "metrics.jsonl", tmp_path)
    history = read_history(tmp_path)
    assert history is not None
    assert (history.step, history.tokens, history.seconds, history.validation_loss) == (200, 102_400, 400.0, 3.0)
    lines = [json.dumps({"step": i, "loss": 5.0 + i % 2, "tokens": i}) for i in range(1, 1001)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    history = read_history(tmp_path)
    assert history is not None
    assert len(history.training) <= POINTS
    assert np.mean([loss for _, loss in history.training]) == pytest.approx(5.5)
    assert (history.seconds, history.validation_loss) == (None, None)
    assert read_history(None) is None


@pytest.mark.parametrize("damage", ["{", "[]", '{"progress": {"step": "x"}}', '{"progress": 3}', "[" * 100_000])
def test_a_damaged_counter_is_named(tmp_path: Path, damage: str) -> None:
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "state.json").write_text(damage)
    with pytest.raises(LoadstoneError, match=r"state\.json.*cannot be read.*Move it away"):
        read_history(tmp_path)
