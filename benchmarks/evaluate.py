"""Tokens per second of scoring, beside a plain loop over transformers: one window or one sentence at a time.

    python benchmarks/evaluate.py [--rounds 5] [--threads 2] [--only sentences] [--json]

GPT-2 124M's shape with random weights, float32. `windows`: a stream of 2,560 tokens, context 1024, stride 512 (4
windows, 2,560 scored of 4,096 read). `disjoint`: 2,048 tokens, stride 1024. `sentences`: 64 of 8 to 24 tokens, as
BLiMP's pairs. The plain loop takes `model(ids).logits`, log_softmax, and picks the targets, as most scripts do. Each
contender is a fresh process, and they take turns; figures are medians over the rounds, of wall time and of processor
time, which is what to compare on a busy machine. The script stops if the sums of log-probabilities differ.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

CONTENDERS = ("loadstone", "transformers")
Scorer = Callable[[list[Any]], float]


def workloads() -> dict[str, list[Any]]:
    """Requests by name; random tokens, the same in every process."""
    import numpy as np

    from loadstone.evaluate.perplexity import windows
    from loadstone.evaluate.scoring import Request

    random = np.random.default_rng(0)
    ids = random.integers(0, 50257, 4096)
    cut = {"windows": windows(2561, 1024, 512), "disjoint": windows(2049, 1024, 1024)}
    found = {name: [Request(ids[w.begin : w.end], w.targets) for w in each] for name, each in cut.items()}
    lengths = random.integers(8, 25, 64)
    found["sentences"] = [Request(random.integers(0, 50257, n + 1), int(n)) for n in lengths]
    return found


def write_model(folder: Path) -> None:
    import torch

    from loadstone.config import PRESETS
    from loadstone.model import GPT
    from loadstone.save import save_model

    torch.manual_seed(0)
    save_model(GPT(PRESETS["gpt2"]), folder)


def ours(folder: Path) -> Scorer:
    from loadstone import load
    from loadstone.evaluate.scoring import score
    from loadstone.kernels import keep_freed_memory

    model, _ = load(folder)
    keep_freed_memory()  # as `loadstone eval` does
    return lambda requests: sum(float(scores.logprobs.sum(dtype="f8")) for _, scores in score(model, requests))


def theirs(folder: Path) -> Scorer:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def plain(requests: list[Any]) -> float:
        total = 0.0
        for request in requests:
            ids = torch.tensor(request.ids)
            logprobs = model(ids[None, :-1]).logits[0].log_softmax(-1)
            total += float(logprobs.gather(1, ids[1:, None])[-request.targets :].double().sum())
        return total

    return plain


def work(name: str, folder: Path, only: str, threads: int) -> dict[str, Any]:
    """In a process of its own: {workload: [wall seconds, processor seconds, tokens read, sum]}."""
    import torch

    torch.set_num_threads(threads)
    scorer = {"loadstone": ours, "transformers": theirs}[name](folder)
    found = {}
    for workload, requests in workloads().items():
        if only in ("", workload):
            scorer(requests[:2])  # warm
            wall, cpu = time.perf_counter(), time.process_time()
            total = scorer(requests)
            seconds = time.perf_counter() - wall, time.process_time() - cpu
            found[workload] = [*seconds, sum(len(request.ids) - 1 for request in requests), total]
    return found


def measure(name: str, folder: Path, only: str, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, "--work", name, "--folder", str(folder), "--only", only]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command += ["--threads", str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(rounds: int, only: str, threads: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "model")
        write_model(folder)
        runs = [{name: measure(name, folder, only, threads) for name in CONTENDERS} for _ in range(rounds)]
    rows = []
    for workload in runs[0]["loadstone"]:
        sums = [runs[0][name][workload][3] for name in CONTENDERS]
        if abs(sums[0] - sums[1]) > 1e-5 * abs(sums[1]):
            sys.exit(f"{workload}: the sums differ: {sums}")
        row: dict[str, Any] = {"workload": workload}
        for name in CONTENDERS:
            wall, cpu, tokens = (statistics.median(run[name][workload][i] for run in runs) for i in range(3))
            row[name] = {"tokens_per_second": tokens / wall, "seconds": wall, "cpu_seconds": cpu}
        for key, number in (("ratio", 0), ("cpu_ratio", 1)):
            each = [run["transformers"][workload][number] / run["loadstone"][workload][number] for run in runs]
            row[key] = statistics.median(each)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="windows, disjoint or sentences")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        print(json.dumps(work(arguments.work, arguments.folder, arguments.only, arguments.threads)))
        return
    rows = compare(arguments.rounds, arguments.only, arguments.threads)
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'':<12}{'loadstone':>16}{'transformers':>16}{'ratio':>8}{'CPU ratio':>11}")
    for row in rows:
        speeds = (f"{row[name]['tokens_per_second']:,.0f} tok/s" for name in CONTENDERS)
        print(
            f"{row['workload']:<12}{''.join(f'{s:>16}' for s in speeds)}{row['ratio']:>8.2f}{row['cpu_ratio']:>11.2f}"
        )


if __name__ == "__main__":
    main()
