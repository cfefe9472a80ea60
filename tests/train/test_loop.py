"""The loop: it learns, resumes to the bit, leaves frozen parameters alone, and survives what goes wrong."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from loadstone.data.batch import IGNORED, Sample
from loadstone.data.loader import Loader
from loadstone.data.windows import Windows
from loadstone.errors import LoadstoneError
from loadstone.load import load
from loadstone.train import loop
from loadstone.train.schedule import learning_rate
from loadstone.train.settings import Settings
from loadstone.train.state import Run
from train.runs import ids, same_weights, small_model, trainer, weights_of


class KilledError(Exception):
    """Stands for SIGKILL: nothing of the loop may run after it. (A real one: test_train_cli.py.)"""


def kill_before(made: loop.Trainer, step: int) -> None:
    original = made._step

    def stepping() -> None:
        if made.progress.step == step:
            raise KilledError
        original()

    made._step = stepping  # type: ignore[method-assign]


def require_close(a: torch.nn.Module, b: torch.nn.Module) -> None:
    """But for k's biases: softmax does not see them, so their gradient is rounding, which AdamW makes large."""
    for (name, mine), theirs in zip(a.named_parameters(), b.parameters(), strict=True):
        if not name.endswith("attn.k.bias"):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=3e-5, msg=name)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_loss_falls_far_below_uniform(tmp_path: Path) -> None:
    outcome = trainer(tmp_path, steps=80, eval_every=40).run_to_end()
    assert outcome.why == "done"
    assert outcome.metrics["val_loss"] < 2.0  # uniform: 4.1; three equally likely steps: 1.1


@pytest.mark.parametrize("extra", [{}, {"dropout": 0.1, "updates_every": 4}, {"dtype": "bfloat16", "micro_batch": 2}])
@pytest.mark.parametrize("at", [1, 5, 6, 11])
def test_a_killed_run_resumes_to_the_bit(tmp_path: Path, at: int, extra: dict[str, Any]) -> None:
    whole = trainer(tmp_path / "whole", save_every=1, **extra)
    whole.run_to_end()
    first = trainer(tmp_path / "killed", save_every=1, **extra)
    kill_before(first, at)
    with pytest.raises(KilledError):
        first.run_to_end()
    torch.manual_seed(99)  # nothing may depend on what another process left behind
    second = trainer(tmp_path / "killed", small_model(seed=5), resume=True, save_every=1, **extra)
    assert second.progress.step == at
    second.run_to_end()
    assert same_weights(weights_of(whole.model), weights_of(second.model))
    mine, theirs = (tmp_path / name / "latest" / "model.safetensors" for name in ("killed", "whole"))
    assert mine.read_bytes() == theirs.read_bytes()
    state = "latest/training/state.safetensors"
    assert (tmp_path / "killed" / state).read_bytes() == (tmp_path / "whole" / state).read_bytes()
    if "updates_every" in extra:
        assert lines(tmp_path / "killed/updates.jsonl") == lines(tmp_path / "whole/updates.jsonl")


def test_one_step_is_what_plain_torch_computes(tmp_path: Path) -> None:
    """Loss over the whole batch's targets, clipping, decay groups: against autograd and AdamW written out."""
    made = trainer(tmp_path, steps=3, warmup=1, schedule="constant", clip=0.5, micro_batch=2, weight_decay=0.3)
    twin = small_model()
    groups = [[p for p in twin.parameters() if (p.dim() >= 2) == matrix] for matrix in (True, False)]
    plain = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.3}, {"params": groups[1], "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    loader = Loader(Windows(ids(), 16, 8), 4)
    made.run_to_end()
    for step in range(3):
        batch = loader.next_batch()
        F.cross_entropy(twin(batch.inputs).flatten(0, 1), batch.targets.flatten()).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        for group in plain.param_groups:
            group["lr"] = [0.005, 0.01, 0.01][step]
        plain.step()
        plain.zero_grad()
    require_close(made.model, twin)


class Uneven:
    """Rows of which most targets are ignored, each row another number."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int, /) -> Sample:
        row = Windows(ids(), 16, 8)[index]
        targets = row.targets.copy()
        targets[: index % 16] = IGNORED
        return Sample(row.ids, targets)


def test_accumulation_weighs_targets_not_micro_batches(tmp_path: Path) -> None:
    runs = [trainer(tmp_path / str(micro), rows=Uneven(), micro_batch=micro, steps=4) for micro in (0, 1, 2)]
    for run in runs:
        run.run_to_end()
    for run in runs[1:]:
        require_close(run.model, runs[0].model)


def test_frozen_parameters_move_by_exactly_zero_and_others_all_move(tmp_path: Path) -> None:
    made = trainer(tmp_path, strategy="freeze:2", weight_decay=0.5)
    before = weights_of(made.model)
    made.run_to_end()
    moved = {name for name, value in weights_of(made.model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.startswith(("blocks.2", "norm"))}


def test_gradual_unfreezing_follows_its_phases(tmp_path: Path) -> None:
    heard: list[tuple[str, dict[str, Any]]] = []
    model = small_model(tied=False)
    made = trainer(tmp_path, model, strategy="0:head;4:blocks.2;8:all", heard=heard, updates_every=4, save_every=3)
    made.run_to_end()
    assert [record["step"] for kind, record in heard if kind == "phase"] == [0, 4, 8]
    first, second, third = (line["updates"] for line in lines(tmp_path / "updates.jsonl"))
    assert first["head"] > 0 == first["blocks.2.mlp"] == first["tok_emb"]
    assert second["blocks.2.mlp"] > 0 == second["blocks.1.mlp"]
    assert min(third.values()) > 0
    assert made.optimizer.state()["step.head.weight"] == 12
    assert made.optimizer.state()["step.blocks.2.mlp.up.weight"] == 8
    assert made.optimizer.state()["step.tok_emb.weight"] == 4


def test_layer_decay_slows_the_lower_layers(tmp_path: Path) -> None:
    made = trainer(tmp_path, strategy="full", layer_decay=0.5, steps=1, warmup=1, weight_decay=0.0, clip=0.0)
    before = weights_of(made.model)
    made.run_to_end()
    after = weights_of(made.model)
    # AdamW's first step moves each weight by lr, whatever the gradient.
    moved = [
        float((after[f"blocks.{i}.mlp.up.weight"] - before[f"blocks.{i}.mlp.up.weight"]).abs().median())
        for i in range(3)
    ]
    assert moved[0] / moved[1] == pytest.approx(0.5, rel=1e-2)
    assert moved[1] / moved[2] == pytest.approx(0.5, rel=1e-2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_a_resumed_run_is_the_same(tmp_path: Path, number: int) -> None:
    whole = trainer(tmp_path / "whole", patience=2)
    whole.run_to_end()
    made = trainer(tmp_path / "asked", patience=2)
    original = made._step

    def stepping() -> None:
        if made.progress.step == 6:
            os.kill(os.getpid(), number)
        original()

    made._step = stepping  # type: ignore[method-assign]
    outcome = made.run_to_end()
    assert (outcome.why, outcome.progress.step) == ("interrupted", 7)
    assert made.run.steps()[-1] == 7
    again = trainer(tmp_path / "asked", small_model(7), resume=True, patience=2)
    again.run_to_end()
    assert same_weights(weights_of(again.model), weights_of(whole.model))
    assert again.progress.waited == whole.progress.waited
    assert again.progress.best == whole.progress.best


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    made = trainer(tmp_path, save_every=3)
    original = made._step

    def stepping() -> None:
        if made.progress.step == 7:
            with torch.no_grad():
                made.model.norm.weight[0] = float("nan")
        original()

    made._step = stepping  # type: ignore[method-assign]
    with pytest.raises(LoadstoneError, match=r"no longer a finite number at step 8; the checkpoint of step 6 is kept"):
        made.run_to_end()
    assert all(bool(p.isfinite().all()) for p in load(tmp_path / "latest")[0].parameters())


def test_early_stop_and_best(tmp_path: Path) -> None:
    made = trainer(tmp_path, steps=400, lr=0.5, eval_every=2, patience=3, keep=1)  # far too fast to get better for long
    outcome = made.run_to_end()
    assert outcome.why == "no better"
    assert outcome.progress.step == outcome.progress.best_step + 6  # type: ignore[operator]
    kept = [made.progress.best_step, outcome.progress.step]
    assert made.run.steps() == kept
    assert (tmp_path / "best").resolve() == made.run.path(kept[0]).resolve()  # type: ignore[arg-type]
    assert (tmp_path / "latest").resolve() == made.run.path(kept[1]).resolve()  # type: ignore[arg-type]


def test_a_checkpoint_is_an_ordinary_model(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.run_to_end()
    model, _ = load(tmp_path / "latest")
    assert same_weights(weights_of(model), weights_of(made.model))
    assert model.config == made.model.config
    assert (tmp_path / "latest" / "config.json").is_file()


def test_the_disk_fills_up_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(tmp_path, save_every=4)
    original = Run.save

    def save(*args: Any, **options: Any) -> Path:
        if made.progress.step == 8:
            monkeypatch.setattr("loadstone.train.world.write_safetensors_file", full)
        return original(*args, **options)

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(Run, "save", save)
    with pytest.raises(LoadstoneError, match="the disk is full"):
        made.run_to_end()
    assert made.run.steps() == [4, 5]  # 5: the best so far
    monkeypatch.undo()
    again = trainer(tmp_path, resume=True)
    again.run_to_end()
    assert again.progress.step == 12


def test_a_resume_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    trainer(tmp_path)
    with pytest.raises(LoadstoneError, match="ended before its first checkpoint"):
        trainer(tmp_path, resume=True)


def test_a_resume_with_another_model_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path).run_to_end()
    with pytest.raises(LoadstoneError, match=r"of another model: blocks\.3"):
        trainer(tmp_path, small_model(n_layers=4), resume=True)


def test_a_new_run_never_writes_into_an_old_one(tmp_path: Path) -> None:
    trainer(tmp_path).run_to_end()
    with pytest.raises(LoadstoneError, match=r"a run lies there already. Go on with it: --resume"):
        trainer(tmp_path)


def test_metrics_say_what_happened(tmp_path: Path) -> None:
    trainer(tmp_path, steps=6, log_every=2, eval_every=3).run_to_end()
    found = lines(tmp_path / "metrics.jsonl")
    steps = [line["step"] for line in found if "loss" in line]
    assert steps == [2, 4, 6]
    assert [line["step"] for line in found if "val_loss" in line] == [0, 3, 6]
    last = found[-2] if "loss" in found[-2] else found[-1]
    assert last["tokens"] == 6 * 4 * 16
    assert last["trainable"] == sum(p.numel() for p in small_model().parameters())


def test_recompute_and_packing_change_nothing_but_memory(tmp_path: Path) -> None:
    plain, again = trainer(tmp_path / "a", steps=3), trainer(tmp_path / "b", steps=3, recompute=True)
    plain.run_to_end()
    again.run_to_end()
    assert same_weights(weights_of(plain.model), weights_of(again.model))


def test_learning_rate_rises_then_falls_to_its_share() -> None:
    settings = Settings(steps=100, lr=1.0, warmup=10, min_lr=0.1)
    rates = [learning_rate(settings, step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == rates[10] == 1.0
    assert rates[100] == pytest.approx(0.1)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.55)  # the middle of the cosine
