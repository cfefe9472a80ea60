"""Mixed load on `loadstone serve`, good clients and bad ones; ends with an error if the server failed any of them.

    python benchmarks/serve_soak.py [--seconds 600] [--clients 24] [--json] [SRC ...]

The server is a real process with few rows and a short queue, so that 429 is common. Every greedy answer must be, letter
by letter, the one that `generate` gave for the prompt alone before the server was started (float32). Every request must
have its answer in time. After a warm-up (a minute, or a quarter) the memory must stay within 5% of what it was then. At
the end nothing may run or wait, no descriptor and no thread may be left over, and SIGTERM must end it in order.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from server_load import Server, loadstone
from soak_clients import BODY_LIMIT, SHARES, Known, World, Wrong

NEW, CONTEXT, ROWS, QUEUE = 24, 256, 6, 6
GROWTH = 1.05
CORES = os.cpu_count() or 1
POOL = (CORES + 4) * CORES + CORES  # threads that are kept: asyncio's, each with a team of torch's, and the tokenizers'
SUBJECTS = (
    "a cat, the moon, an old king, the sea, seven stones, my sister, the last train, some bread, a bell, two rivers"
)


def known_answers(name: str, source: str) -> list[Known]:
    """Requests to a model, some with a long common beginning, and what `generate` gives for each alone."""
    from loadstone import load
    from loadstone.generate import generate

    model, tokenizer = load(source, dtype="float32")
    if tokenizer is None:
        sys.exit(f"{source} has no tokenizer")
    ends = {*tokenizer.eos_ids, *model.config.eos_ids}
    known = []
    for number, subject in enumerate(SUBJECTS.split(", ")):
        text = f"{'Once upon a time there was a story that everyone told. ' * (number % 3)}Tale {number}, of {subject}:"
        forms: list[tuple[str, dict[str, Any], list[int]]] = [
            ("/v1/completions", {"prompt": text}, tokenizer.encode(text))
        ]
        if tokenizer.chat_template is not None:
            turns = [{"role": "user", "content": text}]
            shown = tokenizer.apply_chat(turns, add_generation_prompt=True)
            ids = tokenizer.encode(shown, add_special=False, parse_special=True)
            forms.append(("/v1/chat/completions", {"messages": turns}, ids))
        for path, content, ids in forms:
            (made,) = generate(
                model,
                [ids],
                max_new_tokens=NEW,
                stop_ids=ends,
                n_tokens=min(tokenizer.vocab_size, model.config.vocab_size),
            )
            content |= {"model": name, "max_tokens": NEW, "temperature": 0}
            known.append(Known(name, path, content, tokenizer.decode(made.ids)))
    return known


@dataclass
class Watch:
    """What is measured of the server, each time: seconds, bytes of memory, descriptors, threads."""

    server: Server
    samples: list[tuple[float, int, int, int]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def sample(self) -> None:
        server = self.server
        self.samples.append((time.monotonic() - self.began, server.resident, len(server.descriptors), server.threads))

    async def keep(self, every: float) -> None:
        while self.server.process.poll() is None:
            self.sample()
            await asyncio.sleep(every)


@dataclass
class Soak:
    """A run: what became of each client, and whatever went wrong."""

    world: World
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    async def client(self, until: float) -> None:
        kinds, weights = zip(*SHARES, strict=True)
        while time.monotonic() < until and len(self.wrong) < 20:
            (kind,) = self.world.source.choices(kinds, weights)
            try:
                self.outcomes[f"{kind.__name__}: {await kind(self.world)}"] += 1
            except (Wrong, TimeoutError) as error:
                self.wrong.append(f"{kind.__name__}: {error}")
            except Exception:
                self.wrong.append(f"{kind.__name__}: {traceback.format_exc()}")

    async def run(self, watch: Watch, clients: int, seconds: float) -> None:
        watching = asyncio.create_task(watch.keep(max(seconds / 300, 0.1)))
        await asyncio.gather(*(self.client(time.monotonic() + seconds) for _ in range(clients)))
        watching.cancel()


def gauges(server: Server) -> dict[str, float]:
    """What runs and waits, of every model, as /metrics has it."""
    lines = [line.rpartition(" ") for line in server.get("/metrics").splitlines()]
    return {
        name: float(value) for name, _, value in lines if name.startswith(("loadstone_running{", "loadstone_waiting{"))
    }


def settle(watch: Watch, seconds: float = 15) -> dict[str, float]:
    """Wait until the gauges are zero and the connections closed, so many seconds at most; the gauges then."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = gauges(watch.server)
        time.sleep(0.2)
        watch.sample()
        if not any(found.values()) and watch.samples[-1][2] <= watch.samples[0][2]:
            break
    return found


def judge(watch: Watch, seconds: float, still_open: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Figures of memory, descriptors and threads over the run, and what is wrong with them."""
    first, last = watch.samples[0], watch.samples[-1]
    warm = next(sample for sample in watch.samples if sample[0] >= min(60, seconds / 4))
    most = max(sample[1] for sample in watch.samples if sample[0] >= warm[0])
    curve = [
        [round(at), round(memory / 1e6, 1)] for at, memory, _, _ in watch.samples[:: max(len(watch.samples) // 30, 1)]
    ]
    facts = {
        "memory_start": first[1], "memory_warm": warm[1], "memory_most": most, "memory_end": last[1],
        "descriptors_start": first[2], "descriptors_end": last[2], "threads_start": first[3], "threads_end": last[3],
        "memory_curve_mb": curve,
    }  # fmt: skip
    wrong = []
    if seconds >= 120 and most > warm[1] * GROWTH:  # before, threads and their memory are still new
        wrong.append(f"memory grew from {warm[1] / 1e6:.1f} to {most / 1e6:.1f} MB after the warm-up")
    if last[2] > first[2]:
        wrong.append(f"descriptors: {first[2]} before, {still_open} after")
    if last[3] > first[3] + POOL:
        wrong.append(f"threads: {first[3]} before, {last[3]} after")
    return facts, wrong


def soak(sources: dict[str, str], seconds: float, clients: int, threads: int) -> dict[str, Any]:
    known = [each for name, source in sources.items() for each in known_answers(name, source)]
    known = list({each.text: each for each in known}.values())  # of different answers, so that a mix-up shows
    command = loadstone(
        *(f"{name}={source}" for name, source in sources.items()), "--no-verify", "--dtype", "float32",
        "--context", str(CONTEXT), "--rows", str(ROWS), "--queue", str(QUEUE), "--body-limit", str(BODY_LIMIT),
    )  # fmt: skip
    with Server(command, threads=threads) as server:
        run, watch = Soak(World(server.port, known, random.Random(0))), Watch(server)
        time.sleep(1)  # the connection that asked whether it serves is closed
        watch.sample()
        asyncio.run(run.run(watch, clients, seconds))
        if server.process.poll() is not None:
            sys.exit(f"the server ended with {server.process.returncode}:\n{server.errors}")
        left, still_open = settle(watch), server.descriptors
        status = server.end(signal.SIGTERM)
    facts, wrong = judge(watch, seconds, still_open)
    wrong = run.wrong + wrong
    if any(left.values()) or len(left) != 2 * len(sources):
        wrong.append(f"left over: {left}")
    if status or "Traceback" in server.errors:
        wrong.append(f"it ended with {status}, and had said:\n{server.errors[-4000:]}")
    return (
        {"seconds": seconds, "clients": clients, "outcomes": dict(run.outcomes.most_common())}
        | facts
        | {"wrong": wrong}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("sources", nargs="*", metavar="SRC", help="models, the first of them tiny")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    sources = {"tiny": "tiny"} | {f"model{n}": source for n, source in enumerate(arguments.sources or ["smollm2"], 1)}
    found = soak(sources, arguments.seconds, arguments.clients, arguments.threads)
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        for name, count in found["outcomes"].items():
            print(f"{count:>8}  {name}")
        for name in ("start", "warm", "most", "end"):
            print(f"{found[f'memory_{name}'] / 1e6:>8.1f} MB of memory, {name}")
        for name in ("descriptors", "threads"):
            print(f"{found[f'{name}_start']:>8} {name} before, {found[f'{name}_end']} after")
        print(*found["wrong"], sep="\n")
    sys.exit(bool(found["wrong"]))


if __name__ == "__main__":
    main()
