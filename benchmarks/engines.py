"""The engines beside each other: start, first tokens, prefill and decoding, on the shape of GPT-2 124M.

    python benchmarks/engines.py [ENGINE ...] [--layers 12] [--rounds 5] [--prompt 512] [--new 64]

Protocol: random fp32 weights, batch 1, one process. Each engine's start and first call of each shape are timed as they
come (they compile), then prefill of a prompt and decoding after 32 tokens are timed in interleaved rounds; medians.
The first engine is the reference: the script stops if another's logits differ from its by more than 1e-4.
Engines that cannot run here are named and left out.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from loadstone.config import PRESETS
from loadstone.engines import ENGINES, Engine, start_engine
from loadstone.model import GPT

CONTEXT = 32  # tokens before the decoding


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


class Timed:
    """One engine: what its start cost, and the times of its rounds."""

    def __init__(self, name: str, model: GPT, prompt: list[int], new: int) -> None:
        self.name, self.prompt, self.new = name, prompt, new
        self.prefills: list[float] = []
        self.decodes: list[float] = []
        self.start, self.engine = seconds(lambda: start_engine(name, model))
        self.first, self.logits = seconds(self.round)

    def round(self) -> torch.Tensor:
        """Reads the prompt, then decodes on a short one; the logits of both."""
        engine: Engine = self.engine
        cache = engine.new_cache(1, len(self.prompt))
        took, whole = seconds(lambda: engine.prefill(cache, {0: self.prompt}))
        self.prefills.append(took)
        cache = engine.new_cache(1, CONTEXT + self.new)
        engine.prefill(cache, {0: self.prompt[:CONTEXT]})

        def decode() -> Any:
            for token in self.prompt[: self.new]:
                last = engine.decode(cache, [token])
            return last

        took, last = seconds(decode)
        self.decodes.append(took)
        return torch.cat([torch.as_tensor(whole), torch.as_tensor(last)])

    def forget_rounds(self) -> None:
        self.prefills.clear()
        self.decodes.clear()

    def line(self, first: Timed) -> str:
        prefill = len(self.prompt) / statistics.median(self.prefills)
        decode = self.new / statistics.median(self.decodes)
        ratio = statistics.median(first.decodes) / statistics.median(self.decodes)
        return f"{self.name:8} {self.start:8.1f} {self.first:12.1f} {prefill:9.0f} {decode:8.1f} {ratio:6.2f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("engines", nargs="*", default=list(ENGINES), metavar="ENGINE")
    for option, default in (("layers", 12), ("rounds", 5), ("prompt", 512), ("new", 64)):
        parser.add_argument(f"--{option}", type=int, default=default)
    asked = parser.parse_args()
    torch.manual_seed(0)
    model = GPT(PRESETS["gpt2"].with_overrides({"n_layers": asked.layers})).eval()
    prompt = torch.randint(0, model.config.vocab_size, (asked.prompt,)).tolist()
    timed: list[Timed] = []
    for name in asked.engines:
        if reason := ENGINES[name].missing():
            print(f"{name} is left out: {reason}")
            continue
        timed.append(Timed(name, model, prompt, asked.new))
        worst = float((timed[-1].logits - timed[0].logits).abs().max())
        if not worst <= 1e-4:
            raise SystemExit(f"{name}: logits differ from those of {timed[0].name} by {worst:.1e}")
        timed[-1].forget_rounds()
    for _ in range(asked.rounds):
        for one in timed:
            one.round()
    print(
        f"{asked.layers} layers of GPT-2 124M, fp32, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"
    )
    print("engine    start s  first calls s   prefill   decode  ratio   (tokens/s)")
    for one in timed:
        print(one.line(timed[0]))


if __name__ == "__main__":
    main()
