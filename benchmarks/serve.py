"""Tokens per second and time to the first token of `loadstone serve`, beside llama-cpp-python's server.

    python benchmarks/serve.py [--rounds 3] [--threads 2] [--clients 1 4 16 64] [--only gpt2] [--json]

The same GGUF file in both: SmolLM2-135M-Instruct (Q4_1) and GPT-2 of 124M shape (random weights, F32). Both servers run
as processes of their own, context 512, all else as it comes (ours: 16 rows), and take turns: for each number of
clients one, then the other. A client streams greedy completions of 64 tokens, one after the other, to prompts of 20 to
200 words that no run has had before; both get the same ones. Tokens are counted as made, also where an end token came
early. Figures are medians over the rounds (of first tokens: quantiles of all requests). Tokens per processor second
(the server's own time, all threads) are what to compare on a busy machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import llama_amx
from server_load import Answer, Server, ask, loadstone

CONTENDERS = ("loadstone", "llama.cpp")
OWN: dict[str, dict[str, Any]] = {"loadstone": {}, "llama.cpp": {"repeat_penalty": 1.0}}  # its default is not greedy
NEW = 64  # tokens of an answer
REQUESTS = {1: 4, 4: 2}  # that each client makes, by the number of clients; of more clients each makes one
CONTEXT = 512
WORDS = (
    "the of and to in is was for on that with as it by at from his an were are which this be had or he their first "
    "have one her not but all also after they who has two been would when more other out some over new time into year "
    "people only city world state make water house school day night work small large river road early long"
).split()


def write_gpt2(folder: Path) -> Path:
    """GPT-2's shape with random weights and GPT-2's tokenizer, as a GGUF file of float32."""
    import torch

    from loadstone import convert
    from loadstone.config import PRESETS
    from loadstone.model import GPT
    from loadstone.save import save_model
    from loadstone.tokenizer.gpt2 import gpt2_tokenizer

    torch.manual_seed(0)
    save_model(GPT(PRESETS["gpt2"]), folder / "hf", gpt2_tokenizer(None))
    convert(folder / "hf", folder / "gpt2.gguf", to="gguf", parity=False)
    return folder / "gpt2.gguf"


def smollm2(folder: Path) -> Path:
    from loadstone.load import open_source

    return open_source("smollm2").checkpoint.path


MODELS = {"smollm2": smollm2, "gpt2": write_gpt2}


def start(contender: str, file: Path, threads: int) -> Server:
    if contender == "loadstone":
        return Server(loadstone(f"model={file}", "--no-verify", "--context", str(CONTEXT)), threads=threads)
    options = {
        "model": file, "n_ctx": CONTEXT, "n_threads": threads, "n_threads_batch": threads, "verbose": False,
        "logits_all": False,  # its default scores the whole prompt
        "interrupt_requests": False,  # its default cuts an answer short when the next request comes
    }  # fmt: skip
    pairs = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return Server(
        [sys.executable, "-W", "ignore", llama_amx.__file__, *pairs],  # `python -m llama_cpp.server`
        name=contender,
        ready="/v1/models",
        threads=threads,
    )


def prompt(source: random.Random) -> str:
    return " ".join(source.choices(WORDS, k=source.randint(20, 200)))


async def drive(server: Server, prompts: list[list[str]]) -> list[Answer]:
    """One client for each list of prompts, all at once."""

    async def client(texts: list[str]) -> list[Answer]:
        return [await one(server, text, NEW) for text in texts]

    return [answer for answers in await asyncio.gather(*map(client, prompts)) for answer in answers]


async def one(server: Server, text: str, tokens: int) -> Answer:
    content = {"prompt": text, "max_tokens": tokens, "temperature": 0, "stream": True} | OWN[server.name]
    answer = await ask(server.port, "/v1/completions", content, timeout=1800)
    if not answer.whole:
        sys.exit(f"{server.process.args!r} did not answer: {answer}\n{server.errors}")
    return answer


def made(answer: Answer) -> int:
    """Tokens; of an answer that ended early, its pieces of text (one a token, but for characters of several)."""
    return NEW if answer.finish == "length" else answer.pieces


def measure(server: Server, prompts: list[list[str]]) -> dict[str, Any]:
    wall, cpu = time.perf_counter(), server.cpu_seconds
    answers = asyncio.run(drive(server, prompts))
    wall, cpu = time.perf_counter() - wall, server.cpu_seconds - cpu
    tokens = sum(map(made, answers))
    return {
        "tokens_per_second": tokens / wall, "tokens_per_cpu_second": tokens / cpu, "tokens": tokens,
        "first": [answer.first for answer in answers], "texts": [answer.text for answer in answers],
    }  # fmt: skip


def rounds_of(model: str, file: Path, rounds: int, clients: list[int], threads: int) -> list[dict[str, Any]]:
    """One row for each number of clients and contender in each round."""
    found = []
    with ExitStack() as stack:
        servers = {name: stack.enter_context(start(name, file, threads)) for name in CONTENDERS}
        for server in servers.values():
            asyncio.run(one(server, "the house by the river", 8))  # warm
        for number in range(rounds):
            for n in clients:
                source = random.Random(f"{number} {n}")
                prompts = [[prompt(source) for _ in range(REQUESTS.get(n, 1))] for _ in range(n)]
                for name, server in servers.items():
                    row = {"model": model, "clients": n, "server": name} | measure(server, prompts)
                    speed = f"{row['tokens_per_second']:.1f} tok/s"
                    print(f"round {number + 1}: {model}, {n} clients, {name}: {speed}", file=sys.stderr, flush=True)
                    found.append(row)
    return found


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the rounds; quantiles of all first tokens."""
    found = []
    for model, n, name in dict.fromkeys((row["model"], row["clients"], row["server"]) for row in rows):
        same = [row for row in rows if (row["model"], row["clients"], row["server"]) == (model, n, name)]
        firsts = sorted(first for row in same for first in row["first"] if first is not None)
        quantiles = {f"first_p{q}": firsts[min(len(firsts) * q // 100, len(firsts) - 1)] for q in (50, 95)}
        speeds = {
            key: statistics.median(row[key] for row in same) for key in ("tokens_per_second", "tokens_per_cpu_second")
        }
        found.append({"model": model, "clients": n, "server": name} | speeds | quantiles)
    return found


def agreement(rows: list[dict[str, Any]], model: str) -> float:
    """The share of answers that are the same text from both servers."""
    texts = [
        [text for row in rows if (row["model"], row["server"]) == (model, name) for text in row["texts"]]
        for name in CONTENDERS
    ]
    return statistics.mean(a == b for a, b in zip(*texts, strict=True))


def show(found: list[dict[str, Any]]) -> None:
    print(f"{'':<10}{'clients':>8} {'server':<12}{'tok/s':>8}{'x of 1':>8}{'tok/CPU s':>11}{'first p50':>11}{'p95':>9}")
    for row in found:
        alone = next(
            (r for r in found if r["clients"] == 1 and (r["model"], r["server"]) == (row["model"], row["server"])), row
        )
        times = row["tokens_per_second"] / alone["tokens_per_second"]
        print(
            f"{row['model']:<10}{row['clients']:>8} {row['server']:<12}{row['tokens_per_second']:>8.1f}{times:>8.2f}"
            f"{row['tokens_per_cpu_second']:>11.1f}{row['first_p50']:>9.2f} s{row['first_p95']:>7.2f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in [arguments.only] if arguments.only else MODELS:
            file = MODELS[model](Path(folder))
            rows += rounds_of(model, file, arguments.rounds, arguments.clients, arguments.threads)
    found = table(rows)
    agreements = {model: agreement(rows, model) for model in dict.fromkeys(row["model"] for row in rows)}
    if arguments.json:
        print(json.dumps({"rows": found, "same_answers": agreements, "load": os.getloadavg()}, indent=2))
        return
    show(found)
    for model, share in agreements.items():
        print(f"{model}: {share:.0%} of the answers are the same text from both")


if __name__ == "__main__":
    main()
