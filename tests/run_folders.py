"""Folders as training runs and `loadstone extend` write them, with chosen numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
BLOCK = ("norm1", "attn", "norm2", "mlp")


def groups(n_layers: int, head: bool = False) -> list[str]:
    """The module groups of a GPT-2, from top to bottom."""
    blocks = [f"blocks.{i}.{part}" for i in range(n_layers) for part in BLOCK]
    return ["tok_emb", "pos_emb", *blocks, "norm", *(["head"] if head else [])]


def lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def training(step: int, loss: float | None = None, **more: Any) -> Row:
    known = {"lr": 1e-3 / (1 + step), "grad_norm": 1.0, "tokens": 512 * step, "trainable": 10, "phase": 0}
    return {"step": step, "loss": 2 + 2 * math.exp(-step / 20) if loss is None else loss, **known, **more}


def evaluation(step: int, loss: float, **more: Any) -> Row:
    return {"step": step, "val_loss": loss, "perplexity": math.exp(min(loss, 700)), "tokens": 512 * step, **more}


def updated(step: int, moved: Mapping[str, float | None], since: int | None = None) -> Row:
    return {"step": step, "since": step - 20 if since is None else since, "updates": dict(moved)}


def write_run(folder: Path, metrics: Iterable[Row] = (), updates: Iterable[Row] = ()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("metrics", metrics), ("updates", updates)):
        if text := lines(rows):
            (folder / f"{name}.jsonl").write_text(text)
    return folder


def typical_run(folder: Path, *, n_layers: int = 4, steps: int = 200, offset: float = 0.0) -> Path:
    """Blocks 2 and up and the final norm learn first, from step 100 on all do."""
    order = groups(n_layers)
    early = [group for group in order if group == "norm" or (group[0] == "b" and int(group.split(".")[1]) >= 2)]
    metrics: list[Row] = [evaluation(0, 4 + offset)]
    for step in range(5, steps + 1, 5):
        if step in (5, 105):
            learns = {group: float(step == 105 or group in early) for group in order}
            metrics.append({"step": step - 5, "phase": int(step == 105), "learns": learns})
        metrics.append(training(step, phase=int(step > 100)))
        if step % 50 == 0:
            metrics.append(evaluation(step, 2.1 + offset + abs(step - 150) / 500))
    updates = [
        updated(step, {g: 0.0 if step <= 100 and g not in early else (i + 1) / step for i, g in enumerate(order)})
        for step in range(20, steps + 1, 20)
    ]
    return write_run(folder, metrics, updates)


def extension_json(before: int, new: int, width: int = 8, *, padding: int = 0) -> dict[str, Any]:
    """extend.json of a matrix with `padding` rows, of which new tokens take some: the others are added behind."""
    columns = [0, width // 2, width]

    def side(runs: list[tuple[str, int, int]]) -> dict[str, Any]:
        blocks = [
            {"start": row, "stop": row + 1, "kind": kind, "mean": [0.0, 0.0], "rms": [0.01 * (row + 1), 0.5]}
            for kind, start, stop in runs
            for row in range(start, stop)
        ]
        bands = [{"start": start, "stop": stop, "kind": kind} for kind, start, stop in runs if stop > start]
        return {"shape": [runs[-1][2], width], "bands": bands, "blocks": blocks}

    tokens, end = before - padding, max(before, before - padding + new)
    taken = tokens + new
    return {
        "report": {"tokens": [{"text": f"<|new{i}|>", "id": tokens + i, "was": "none"} for i in range(new)]},
        "view": {
            "columns": columns,
            "before": side([("old", 0, tokens), ("padding", tokens, before)]),
            "after": side([("old", 0, tokens), ("new", tokens, taken), ("padding", taken, end)]),
        },
    }


def write_extension(folder: Path, *sizes: int, **options: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "extend.json").write_text(json.dumps(extension_json(*sizes, **options)))
    return folder


def quantised_units() -> list[Row]:
    """Of two blocks, an embedding and an untied head; the second block has no k."""
    names = ["token_embd", "blk.0.attn_q", "blk.0.attn_k", "blk.1.attn_q", "output"]
    return [
        {"name": f"{name}.weight", "type": kind, "losses": {"Q4_0": 0.01 * n, "Q8_0": 0.0001 * n}}
        for n, (name, kind) in enumerate(zip(names, ["Q8_0", "Q4_0", "Q8_0", "Q4_0", "F16"], strict=True), 1)
    ]


def write_quantised(folder: Path, units: Sequence[Row] | None = None) -> Path:
    """As `loadstone quantize` leaves its report."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "quantize.json").write_text(json.dumps({"units": quantised_units() if units is None else units}))
    return folder
