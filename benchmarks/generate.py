"""Tokens per second of generation on the CPU, beside every program that a GPT-2 runs on; and our own model in torch.

    python benchmarks/generate.py [--rounds 5] [--threads 2] [--only native-q4,llama-Q4_0] [--json | --write]

GPT-2 124M's shape with random weights, one folder for all (all others' files are converted from it), batch 1, a prompt
of 32 tokens, 128 new ones, greedy; prefill of 512 tokens with the last one's logits, the best of three. Each
contender is a fresh process, and they take turns; figures are medians over the rounds. *First token* counts from the
start of the process, imports and loading included (no tokenizer, for any of them); *peak* is its largest resident
memory up to the last token. *Read* is what a plain loop over memory reaches in the same round, *reached* what weights
were read with. A contender whose package is not installed is left out, and the table says so. `--write`
puts table and picture (benchmarks/roofline.py) into docs/performance.md.

The script stops if greedy tokens in float32, ours or a peer's, are not those of transformers, or if the native engine's
perplexity on this repository's documentation, with SmolLM2's weights, is worse than llama.cpp's at the same width, by
more than three standard errors. On two idle cores it takes some four minutes, and two more for each round.
"""

from __future__ import annotations

import argparse
import json
import math
import os
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
sys.path[:0] = [str(ROOT / "src"), str(ROOT), str(ROOT / "tests")]

from benchmarks import generate_peers as peers  # noqa: E402
from benchmarks.generate_peers import Contender, Ids  # noqa: E402

WIDTHS = {"float32": "F32", "bfloat16": "BF16", "q8": "Q8_0", "q4": "Q4_0"}  # ours -> llama.cpp's
FILES = {"F32": "float32", "BF16": "bfloat16", "Q8_0": "q8_0", "Q4_0": "q4_0"}  # llama.cpp's -> our converter's
CONTENDERS = [
    *(name for ours, theirs in WIDTHS.items() for name in (f"native-{ours}", f"llama-{theirs}")),
    *peers.PEERS, "transformers-float32", "transformers-bfloat16", "torch-float32", "torch-bfloat16",
]  # fmt: skip
REFERENCE = "transformers-float32"
CHECKED = [name for name in CONTENDERS if name.endswith("-float32")]  # llama.cpp's keys and values are 16 bits wide


def native(place: Path, width: str, threads: int) -> Contender:
    from loadstone.load import open_source
    from loadstone.native import open_native

    engine = open_native(open_source(place / f"{WIDTHS[width]}.gguf"), threads=threads)
    cache = engine.new_cache()
    return lambda ids: engine.prefill(cache, {0: ids})[0], lambda: engine.reset(cache, [0]), engine.packed_bytes / 1e6


def llama(place: Path, kind: str, threads: int) -> Contender:
    from llama_cpp import Llama

    from llama_amx import without_amx

    without_amx()
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
    from loadstone.engines import start_engine

    torch.set_num_threads(threads)
    model, _ = load(place / "model", dtype=dtype)
    engine = start_engine("torch", model)
    cache = engine.new_cache()

    def read(ids: Ids) -> np.ndarray:
        logits = engine.decode(cache, ids) if len(ids) == 1 else engine.prefill(cache, {0: ids})
        return logits[0].float().numpy()

    return read, lambda: engine.reset(cache, [0]), sum(p.nbytes for p in model.parameters()) / 1e6


MAKERS = {"native": native, "llama": llama, "transformers": transformers, "torch": in_torch} | peers.MAKERS


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
    peak = peak_memory()
    seconds = []
    for _ in range(3):
        forget()
        begin = time.perf_counter()
        logits = read(random_ids(512))
        seconds.append(time.perf_counter() - begin)
        assert np.isfinite(logits).all(), name
    found = {"decode": decode, "prefill": 512 / min(seconds), "first_at": first, "peak": peak}
    return found | {"weights": weights, "reached": decode * weights / 1e3, "tokens": tokens}


def peak_memory() -> float:
    """MB. Not `getrusage`'s figure: a process inherits that of the one that started it."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1e3


def say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def measure(name: str, place: Path, threads: int) -> dict[str, Any]:
    say(name)
    command = [sys.executable, "-W", "ignore", __file__, "--work", name, "--place", str(place)]
    command += ["--threads", str(threads)]
    begin = time.time()
    environment = os.environ | peers.QUIET | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT / "src")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package need not be compiled each time it is run
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
    command = [sys.executable, "-m", "loadstone", "convert", str(source), str(target)]
    command += ["--to", "gguf", "--dtype", kind, "--no-parity"]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT / "src")})


def write_models(place: Path, names: list[str]) -> None:
    import torch

    from loadstone.config import PRESETS
    from loadstone.model import GPT
    from loadstone.save import save_model

    say("writing the models")
    torch.manual_seed(0)
    save_model(GPT(PRESETS["gpt2"]), place / "model")
    for theirs, ours in FILES.items():
        convert(place / "model", place / f"{theirs}.gguf", ours)
    peers.write_peers(place, names)


def losses(place: Path, threads: int, windows: int = 16) -> dict[str, list[float]]:
    """Of SmolLM2 (as float32, then rounded to each width) on windows of 512 tokens of docs/*.md, spread evenly."""
    from llama_cpp import Llama

    from llama_amx import without_amx
    from loadstone import load
    from loadstone.load import open_source
    from loadstone.native import open_native
    from loadstone.save import save_model

    without_amx()
    model, tokenizer = load("smollm2", dtype="float32")
    assert tokenizer is not None
    save_model(model, place / "smollm2", tokenizer=tokenizer)
    ids = tokenizer.encode("\n\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))))
    starts = [i * (len(ids) - 512) // windows for i in range(windows)]

    def score(logits: Callable[[Ids], np.ndarray]) -> list[float]:
        found = []
        for text in (ids[start : start + 512] for start in starts):
            scores = logits(text)[:-1]
            scores -= scores.max(-1, keepdims=True)
            of_each = np.log(np.exp(scores).sum(-1, dtype=np.float64)) - scores[np.arange(511), text[1:]]
            found.append(float(of_each.mean()))
        return found

    found = {}
    for ours, theirs in WIDTHS.items():
        say(f"perplexity at {ours} and {theirs}")
        convert(place / "smollm2", path := place / f"smollm2-{theirs}.gguf", FILES[theirs])
        found[f"native-{ours}"] = score(open_native(open_source(path), threads=threads).scores)
        peer = Llama(str(path), n_ctx=512, n_threads=threads, flash_attn=True, verbose=False, logits_all=True)

        def theirs_of(text: Ids, peer: Any = peer) -> np.ndarray:
            peer.reset()
            peer.eval(text)
            return np.array(peer.scores[:512])

        found[f"llama-{theirs}"] = score(theirs_of)
    return found


def check_tokens(run: dict[str, dict[str, Any]], wanted: Ids) -> None:
    """Stops the script where they differ from the reference's."""
    for name in CHECKED:
        if name in run and run[name]["tokens"] != wanted:
            first = next(
                i for i, pair in enumerate(zip(run[name]["tokens"], wanted, strict=True)) if pair[0] != pair[1]
            )
            sys.exit(f"{name}: greedy token {first} is not the one of {REFERENCE}")


def check_perplexity(found: dict[str, list[float]]) -> None:
    """Stops the script where ours is worse: by more than three standard errors of the difference, window by window.

    Roundings of 4 bits alone, of which none is better, move a window's perplexity by some 3 percent either way.
    """
    for ours, theirs in WIDTHS.items():
        mine, peers = (np.array(found[name]) for name in (f"native-{ours}", f"llama-{theirs}"))
        worse = mine - peers
        if not worse.mean() <= 3 * worse.std(ddof=1) / len(worse) ** 0.5 + 1e-4:
            figures = f"{np.exp(mine.mean()):.3f}, and llama.cpp's {theirs} has {np.exp(peers.mean()):.3f}"
            sys.exit(
                f"native-{ours}: perplexity {figures}; by window, the logarithms differ by {worse.round(4).tolist()}"
            )


COLUMNS = {"decode": "decode tok/s", "prefill": "prefill tok/s", "first": "first token s", "peak": "peak MB"}


def table(runs: list[dict[str, dict[str, Any]]], perplexity: dict[str, float]) -> list[dict[str, Any]]:
    rows = []
    for name in runs[0]:
        row: dict[str, Any] = {"contender": name}
        row |= {key: statistics.median(run[name][key] for run in runs) for key in (*COLUMNS, "weights", "reached")}
        kind, _, width = name.partition("-")
        if kind == "native" and (peer := f"llama-{WIDTHS[width]}") in runs[0]:
            for key in ("decode", "prefill"):
                row[f"{key}_ratio"] = statistics.median(run[name][key] / run[peer][key] for run in runs)
        if kind == "native":
            row |= {f"{key}_best": peers.best_peer(name, key, runs) for key in ("decode", "prefill")}
        rows.append(row | {"perplexity": perplexity.get(name)})
    return rows


def markdown(rows: list[dict[str, Any]], bandwidth: float, left_out: list[str]) -> str:
    columns = [*COLUMNS.values(), "reached GB/s", "decode, prefill / llama.cpp's", "decode, prefill / the best other's"]
    lines = [f"| | {' | '.join(columns)} | perplexity |", f"|---|{'--:|' * (len(columns) + 1)}"]
    for row in rows:
        ratios = f"{row['decode_ratio']:.2f}, {row['prefill_ratio']:.2f}" if "decode_ratio" in row else ""
        best = [row.get(f"{key}_best") for key in ("decode", "prefill")]
        ratios += " | " + ", ".join(f"{each[1]:.2f} ({each[0]})" for each in best if each)
        scored = f"{row['perplexity']:.3f}" if row["perplexity"] else ""
        figures = f"{row['decode']:.1f} | {row['prefill']:.0f} | {row['first']:.2f} | {row['peak']:.0f}"
        lines.append(f"| {row['contender']} | {figures} | {row['reached']:.1f} | {ratios} | {scored} |")
    ends = [f"A plain loop read {bandwidth:.1f} GB/s."] + [f"Not measured: {why}." for why in left_out]
    return "\n".join([*lines, "", *ends])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders, with commas between them")
    parser.add_argument("--no-perplexity", action="store_true")
    parser.add_argument("--json", action="store_true", help="rows, and what each round found, on standard output")
    parser.add_argument("--write", action="store_true", help="table and picture into docs/performance.md")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        print(json.dumps(work(arguments.work, arguments.place, arguments.threads)))
        return
    threads, names = arguments.threads, arguments.only.split(",")
    if unknown := {*names} - {*CONTENDERS}:
        parser.error(f"no such contenders: {', '.join(sorted(unknown))}; there are {', '.join(CONTENDERS)}")
    left_out = [f"{name}, as {module} is not installed" for name in names if (module := peers.missing(name))]
    for why in left_out:
        say(f"NOT MEASURED: {why}")
    names = [name for name in names if not peers.missing(name)]
    if not names:
        sys.exit("nothing is left to measure")
    runs: list[dict[str, dict[str, Any]]] = []
    bandwidths = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_models(place, names)
        scored = {} if arguments.no_perplexity else losses(place, threads)
        if scored:
            check_perplexity(scored)
        perplexity = {name: math.exp(statistics.mean(each)) for name, each in scored.items()}
        wanted = measure(REFERENCE, place, threads)["tokens"] if {*CHECKED} & {*names} else []
        for _ in range(arguments.rounds):
            bandwidths.append(read_bandwidth(threads))
            runs.append({name: measure(name, place, threads) for name in names})
            check_tokens(runs[-1], wanted)
    rows, bandwidth = table(runs, perplexity), statistics.median(bandwidths)
    shown = markdown(rows, bandwidth, left_out)
    if arguments.write:
        from benchmarks.roofline import described, write_docs

        write_docs(shown, rows, bandwidth, described(rows, arguments.rounds, threads))
    found = {"rows": rows, "read": bandwidths, "not measured": left_out}
    print(json.dumps(found, indent=2) if arguments.json else shown)


if __name__ == "__main__":
    main()
