"""From GPT-2 to a sparse Llama by changing `GPTConfig` fields, one at a time: each model trained alike, and compared.

    python examples/refine.py TEXT.txt RUNS [--steps 300] [--seeds 2] [--picture loss.svg]

Document 004 points from GPT-2 onward to RMSNorm, grouped-query attention, RoPE, SwiGLU and mixture of experts. Here
each of them is a row of a table. Every run has the same data, in the same order for the same seed, and the same
learning rate. RUNS is a new folder; each run in it is one that `loadstone plot`, `generate` and `convert` read.
docs/refine.md has the figures.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from loadstone.data.prepare import prepare
from loadstone.data.tokenizer_training import character_tokenizer
from loadstone.plot import plot
from loadstone.train.begin import begin
from loadstone.train.request import Request
from loadstone.weightmap.canonical import active_count, parameter_count

BASE = {"n_layers": 4, "n_heads": 4, "d_model": 128, "context_length": 64}
# Each row keeps the changes of those above it. SwiGLU has three matrices, so that 2/3 of the width are as many
# parameters; two experts of half the width are as much work as one MLP.
STEPS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "rmsnorm": {"norm": "rmsnorm", "norm_bias": False},
    "gqa": {"n_kv_heads": 2},
    "rope": {"rope": {"theta": 10_000.0}},
    "swiglu": {"gated_mlp": True, "activation": "silu", "d_ff": 344},
    "moe": {"n_experts": 4, "n_experts_used": 2, "d_ff": 172},
}
SETTINGS = {"batch_size": 12, "sampling": "crops", "lr": 2e-3, "beta2": 0.99, "eval_every": 50, "save_every": 100_000}


class StepTimes:
    """Hears of a run, and notes the processor time between its steps: other programs on the machine do not count."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: tuple[int, float] | None = None

    def __call__(self, kind: str, record: Mapping[str, Any]) -> None:
        if kind == "step" and self._last:
            step, begun = self._last
            self.seconds.append((time.process_time() - begun) / (record["step"] - step))
        self._last = (record["step"], time.process_time()) if kind in ("step", "eval") else None


def fields_of(name: str) -> dict[str, Any]:
    """The model's fields: the base, and the changes of every row up to this one."""
    fields: dict[str, Any] = dict(BASE)
    for step, changes in STEPS.items():
        fields |= changes
        if step == name:
            return fields
    raise KeyError(name)


def train(name: str, data: Path, folder: Path, seed: int, steps: int) -> dict[str, float]:
    """One run: its sizes, validation loss (nats per character) and milliseconds of a step."""
    wanted = {"data": {"sources": [str(data)]}, "model": fields_of(name)}
    settings = SETTINGS | {"steps": steps, "seed": seed}
    times = StepTimes()
    trainer = begin(Request().merged({**wanted, "settings": settings}, "refine"), folder, listeners=[times])
    config, outcome = trainer.model.config, trainer.run_to_end()
    if outcome.why != "done":  # Ctrl-C ends one run politely; the others are not wanted then either
        raise SystemExit(f"{folder}: {outcome.why}; what is done so far is saved")
    return {
        "parameters": parameter_count(config), "active": active_count(config), "loss": outcome.metrics["val_loss"],
        "ms": 1000 * statistics.median(times.seconds),
    }  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description="From GPT-2 to a sparse Llama, one config field at a time.")
    options.add_argument("text", type=Path)
    options.add_argument("runs", type=Path)
    options.add_argument("--steps", type=int, default=300)
    options.add_argument("--seeds", type=int, default=2)
    options.add_argument("--picture", type=Path, help="a PNG or SVG of the first seed's curves")
    asked = options.parse_args()
    torch.set_num_threads(1)
    data = asked.runs / "data"
    data.parent.mkdir(parents=True)
    prepare(asked.text, data, character_tokenizer([asked.text.read_text(encoding="utf-8")]), validation=0.05)
    print("| model | parameters | active | loss of each seed | mean | ms a step |\n|---|---|---|---|---|---|")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in STEPS}
    for seed in range(asked.seeds):  # seed by seed, so that what the machine does meanwhile falls on all alike
        for name, rows in found.items():
            rows.append(train(name, data, asked.runs / f"{name}-{seed}", seed, asked.steps))
    for name, rows in found.items():
        losses, first = [row["loss"] for row in rows], rows[0]
        each = ", ".join(f"{loss:.3f}" for loss in losses)
        print(
            f"| `{name}` | {first['parameters']:,} | {first['active']:,} | {each} | {statistics.mean(losses):.3f} "
            f"| {statistics.median(row['ms'] for row in rows):.0f} |"
        )
    if asked.picture:
        (drawn,) = plot(
            [asked.runs / f"{name}-0" for name in STEPS], asked.runs / "plots", kinds=["loss"],
            formats=[asked.picture.suffix[1:]],
        )  # fmt: skip
        asked.picture.write_bytes(Path(drawn.files[0]).read_bytes())


if __name__ == "__main__":
    main()
