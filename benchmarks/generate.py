"""Tokens per second of generation on the CPU, beside llama.cpp, transformers and our own model in torch.

    python benchmarks/generate.py [--rounds 5] [--threads 2] [--only native-q4,llama-Q4_0] [--json]

GPT-2 124M's shape with random weights, one folder for all (llama.cpp's files are converted from it), batch 1, a prompt
of 32 tokens, 128 new ones, greedy; prefill of 512 tokens with the last one's logits, the best of three. Each
contender is a fresh process, and they take turns; figures are medians over the rounds. *First token* counts from the
start of the process, imports and loading included (no tokenizer, for any of them); *peak* is its largest resident
memory. *Read* is what a plain loop over memory reaches in the same round, *reached* what weights were read with.

The script stops if the native engine's greedy tokens in float32 are not torch's, or if its perplexity on this
repository's documentation, with SmolLM2's weights, is worse than llama.cpp's at the same width.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

WIDTHS = {"float32": "F32", "bfloat16": "BF16", "q8": "Q8_0", "q4": "Q4_0"}  # ours -> llama.cpp's
FILES = {"F32": "float32", "BF16": "bfloat16", "Q8_0": "q8_0", "Q4_0": "q4_0"}  # llama.cpp's -> our converter's
CONTENDERS = [
    *(name for ours, theirs in WIDTHS.items() for name in (f"native-{ours}", f"llama-{theirs}")),
    "transformers-float32", "transformers-bfloat16", "torch-float32",
]  # fmt: skip
Ids = list[int]
Read = Callable[[Ids], np.ndarray]  # reads tokens after those before; the last one's logits
Contender = tuple[Read, Callable[[], None], float]  # read, forget everything, MB of weights


def native(place: Path, width: str, threads: int) -> Contender:
    from loadstone.load import open_source
    from loadstone.native import open_native

    engine = open_native(open_source(place / "model"), width=width, threads=threads)
    cache = engine.new_cache()
    return lambda ids: engine.prefill(cache, {0: ids})[0], lambda: engine.reset(cache, [0]), engine.packed_bytes / 1e6


def llama(place: Path, kind: str, threads: int) -> Contender:
    from llama_cpp import Llama

    path = place / f"{kind}.gguf"
    model = Llama(
        str(path), n_ctx=1024, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads, flash_attn=True,
        verbose=False,
    )  # fmt: skip

    def read(ids: Ids) -> np.ndarray:
        model.eval(ids)
        return np.ctypeslib.as_array(model._ctx.get_logits(), (50_257,))

    return read, model.reset, path.stat().st_size / 1e6


def transformers(place: Path, dtype: str, threads: int) -> Contender:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=getattr(torch, dtype)).eval()
    past: list[Any] = [None]

    @torch.inference_mode()
    def read(ids: Ids) -> np.ndarray:
        out = model(torch.tensor([ids]), past_key_values=past[0], use_cache=True, logits_to_keep=1)
        past[0] = out.past_key_values
        return out.logits[0, -1].float().numpy()

    return read, lambda: past.__setitem__(0, None), sum(p.nbytes for p in model.parameters()) / 1e6


def in_torch(place: Path, dtype: str, threads: int) -> Contender:
    import torch

    from loadstone import load

    torch.set_num_threads(threads)
    model, _ = load(place / "model", dtype=dtype)
    cache = model.new_cache()

    @torch.inference_mode()
    def read(ids: Ids) -> np.ndarray:
        return model.logits(model.hidden(torch.tensor([ids]), cache)[:, -1])[0].float().numpy()

    return read, lambda: setattr(cache, "lengths", [0]), sum(p.nbytes for p in model.parameters()) / 1e6


MAKERS = {"native": native, "llama": llama, "transformers": transformers, "torch": in_torch}


def random_ids(count: int) -> Ids:
    return [int(token) for token in np.random.default_rng(0).integers(0, 50_257, count)]


def work(name: str, place: Path, threads: int, new_tokens: int = 128) -> dict[str, Any]:
    """In a process of its own."""
    kind, _, width = name.partition("-")
    read, forget, weights = MAKERS[kind](place, width, threads)
    tokens = [int(read(random_ids(32)).argmax())]
    first = time.time()
    begin = time.perf_counter()
    for _ in range(new_tokens):
        tokens.append(int(read(tokens[-1:]).argmax()))
    decode = new_tokens / (time.perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    seconds = []
    for _ in range(3):
        forget()
        begin = time.perf_counter()
        read(random_ids(512))
        seconds.append(time.perf_counter() - begin)
    found = {"decode": decode, "prefill": 512 / min(seconds), "first_at": first, "peak": peak}
    return found | {"reached": decode * weights / 1e3, "tokens": tokens[:32]}


def measure(name: str, place: Path, threads: int) -> dict[str, Any]:
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--work",
        name,
        "--place",
        str(place),
        "--threads",
        str(threads),
    ]
    begin = time.time()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"first": found["first_at"] - begin}


def read_bandwidth(threads: int) -> float:
    """GB/s of a plain loop over memory in large pages, one array a thread; the best of five."""
    from concurrent.futures import ThreadPoolExecutor

    arrays = [np.ones(1 << 26, np.int32) for _ in range(threads)]
    best = math.inf
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            begin = time.perf_counter()
            list(pool.map(np.max, arrays))
            best = min(best, time.perf_counter() - begin)
    return threads * arrays[0].nbytes / best / 1e9


def convert(source: Path, target: Path, kind: str) -> None:
    command = [
        sys.executable,
        "-m",
        "loadstone",
        "convert",
        str(source),
        str(target),
        "--to",
        "gguf",
        "--dtype",
        kind,
        "--no-parity",
    ]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT / "src")})


def write_models(place: Path) -> None:
    import torch

    from loadstone.config import PRESETS
    from loadstone.model import GPT
    from loadstone.save import save_model

    torch.manual_seed(0)
    save_model(GPT(PRESETS["gpt2"]), place / "model")
    for theirs, ours in FILES.items():
        convert(place / "model", place / f"{theirs}.gguf", ours)


def perplexities(place: Path, threads: int, windows: int = 4) -> dict[str, float]:
    """Of SmolLM2 (as float32, then rounded to each width) on windows of 512 tokens of docs/*.md."""
    from llama_cpp import Llama

    from loadstone import load
    from loadstone.load import open_source
    from loadstone.native import open_native
    from loadstone.save import save_model

    model, tokenizer = load("smollm2", dtype="float32")
    assert tokenizer is not None
    save_model(model, place / "smollm2", tokenizer=tokenizer)
    ids = tokenizer.encode("\n\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))))
    texts = [ids[i * 512 : (i + 1) * 512] for i in range(windows)]

    def score(logits: Callable[[Ids], np.ndarray]) -> float:
        losses = []
        for text in texts:
            scores = logits(text)[:-1].astype(np.float64)
            scores -= scores.max(-1, keepdims=True)
            losses.append(np.log(np.exp(scores).sum(-1)) - scores[np.arange(511), text[1:]])
        return float(np.exp(np.mean(losses)))

    found = {}
    for ours, theirs in WIDTHS.items():
        found[f"native-{ours}"] = score(open_native(open_source(place / "smollm2"), width=ours, threads=threads).scores)
        convert(place / "smollm2", path := place / f"smollm2-{theirs}.gguf", FILES[theirs])
        peer = Llama(str(path), n_ctx=512, n_threads=threads, flash_attn=True, verbose=False, logits_all=True)

        def theirs_of(text: Ids, peer: Any = peer) -> np.ndarray:
            peer.reset()
            peer.eval(text)
            return np.array(peer.scores[:512])

        found[f"llama-{theirs}"] = score(theirs_of)
    return found


def check(runs: list[dict[str, dict[str, Any]]], perplexity: dict[str, float]) -> None:
    """Stops the script where a result is wrong."""
    for run in runs:
        if {"native-float32", "torch-float32"} <= set(run) and (
            run["native-float32"]["tokens"] != run["torch-float32"]["tokens"]
        ):
            sys.exit("native-float32: the greedy tokens are not those of torch")
    for ours, theirs in WIDTHS.items():
        mine, peers = perplexity.get(f"native-{ours}", 0), perplexity.get(f"llama-{theirs}", 0)
        if mine > peers * 1.001:
            sys.exit(f"native-{ours}: perplexity {mine:.3f}, llama.cpp's {theirs} has {peers:.3f}")


COLUMNS = {"decode": "decode tok/s", "prefill": "prefill tok/s", "first": "first token s", "peak": "peak MB"}


def table(runs: list[dict[str, dict[str, Any]]], perplexity: dict[str, float]) -> list[dict[str, Any]]:
    rows = []
    for name in runs[0]:
        row: dict[str, Any] = {"contender": name}
        row |= {key: statistics.median(run[name][key] for run in runs) for key in (*COLUMNS, "reached")}
        kind, _, width = name.partition("-")
        if kind == "native" and (peer := f"llama-{WIDTHS[width]}") in runs[0]:
            for key in ("decode", "prefill"):
                row[f"{key}_ratio"] = statistics.median(run[name][key] / run[peer][key] for run in runs)
        rows.append(row | {"perplexity": perplexity.get(name)})
    return rows


def show(rows: list[dict[str, Any]], bandwidth: float) -> None:
    print(f"| | {' | '.join(COLUMNS.values())} | reached GB/s | decode, prefill / llama.cpp's | perplexity |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for row in rows:
        ratios = f"{row['decode_ratio']:.2f}, {row['prefill_ratio']:.2f}" if "decode_ratio" in row else ""
        scored = f"{row['perplexity']:.3f}" if row["perplexity"] else ""
        figures = f"{row['decode']:.1f} | {row['prefill']:.0f} | {row['first']:.2f} | {row['peak']:.0f}"
        print(f"| {row['contender']} | {figures} | {row['reached']:.1f} | {ratios} | {scored} |")
    print(f"\nread: {bandwidth:.1f} GB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders, with commas between them")
    parser.add_argument("--no-perplexity", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        print(json.dumps(work(arguments.work, arguments.place, arguments.threads)))
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_models(place)
        perplexity = {} if arguments.no_perplexity else perplexities(place, arguments.threads)
        names, runs, bandwidth = arguments.only.split(","), [], []
        for _ in range(arguments.rounds):
            bandwidth.append(read_bandwidth(arguments.threads))
            runs.append({name: measure(name, place, arguments.threads) for name in names})
    check(runs, perplexity)
    rows = table(runs, perplexity)
    print(json.dumps({"rows": rows, "read": bandwidth}, indent=2)) if arguments.json else show(
        rows, statistics.median(bandwidth)
    )


if __name__ == "__main__":
    main()
