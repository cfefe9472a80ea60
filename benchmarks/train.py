"""Tokens per second of a whole training step, beside transformers and a nanoGPT-style loop.

    python benchmarks/train.py [--quick] [--rounds 12] [--threads 2] [--only small:bfloat16] [--compile] [--json]

A step is forward, loss, backward, clipping, AdamW (decay on matrices only) and forgetting the gradients, on 4 rows of
256 tokens: float32, or bfloat16 by autocast over float32 weights for everyone. Each contender lives in a process of its
own, all begin with the same weights and get the same rows, and they take turns step by step: only one works at any
time, so that what else the machine does falls on all alike. Given are medians over the rounds; `ratio` is the median of
(transformers' time / this one's) within a round, so above 1 is faster than transformers. `CPU` is processor time over
all threads; with --threads 1 it is the figure to compare on a busy machine. The script stops if the losses of the last
round differ.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

# layers, width, heads, vocabulary, context
SHAPES = {"gpt2-124m": (12, 768, 12, 50257, 1024), "small": (6, 384, 6, 256, 256)}
DTYPES = ("float32", "bfloat16")
ROWS, LENGTH, LR, CLIP, DECAY = 4, 256, 3e-4, 1.0, 0.1
Step = Callable[[Tensor, Tensor], Tensor]


class CausalSelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class NanoBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CausalSelfAttention(width, heads)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh"))


class NanoGPT(nn.Module):
    """What people write by hand: q, k and v fused, all logits at once."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int, context: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.h = nn.ModuleList(NanoBlock(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.h:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def gpt(shape: tuple[int, ...]) -> Any:
    """Our model; seeded, so that every process can make the same weights."""
    from loadstone.config import GPTConfig
    from loadstone.model import GPT

    layers, width, heads, vocabulary, context = shape
    torch.manual_seed(0)
    return GPT(GPTConfig(vocabulary, context, width, layers, heads))


def gpt2_weights(model: Any, transposed: bool) -> dict[str, Tensor]:
    """Our weights under GPT-2's names; `transposed` for transformers, whose Conv1D keeps [in, out]."""
    own, found = model.state_dict(), {"wte.weight": model.tok_emb.weight, "wpe.weight": model.pos_emb.weight}
    names = {"attn.c_proj": ["attn.out"], "mlp.c_fc": ["mlp.up"], "mlp.c_proj": ["mlp.down"]}
    names["attn.c_attn"] = ["attn.q", "attn.k", "attn.v"]
    for i in range(model.config.n_layers):
        for norm in ("1", "2"):
            for part in ("weight", "bias"):
                found[f"h.{i}.ln_{norm}.{part}"] = own[f"blocks.{i}.norm{norm}.{part}"]
        for name, parts in names.items():
            matrix = torch.cat([own[f"blocks.{i}.{part}.weight"] for part in parts])
            found[f"h.{i}.{name}.weight"] = matrix.T if transposed else matrix
            found[f"h.{i}.{name}.bias"] = torch.cat([own[f"blocks.{i}.{part}.bias"] for part in parts])
    return {name: tensor.detach().clone() for name, tensor in found.items()} | {
        f"ln_f.{part}": own[f"norm.{part}"] for part in ("weight", "bias")
    }


def plain_step(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], autocast: Any) -> Step:
    """The loop that everybody writes, with torch's fused AdamW."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=True)

    def step(ids: Tensor, targets: Tensor) -> Tensor:
        with autocast:
            found = loss(ids, targets)
        found.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return found.detach()

    return step


def nanogpt(shape: tuple[int, ...], autocast: Any, compiled: bool) -> Step:
    model = NanoGPT(*shape)
    model.load_state_dict(gpt2_weights(gpt(shape), transposed=False))
    return plain_step(model, torch.compile(model) if compiled else model, autocast)


def transformers(shape: tuple[int, ...], autocast: Any, compiled: bool) -> Step:
    from transformers import GPT2Config, GPT2LMHeadModel

    layers, width, heads, vocabulary, context = shape
    sizes = {"n_layer": layers, "n_embd": width, "n_head": heads, "vocab_size": vocabulary, "n_positions": context}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **dropouts, attn_implementation="sdpa", use_cache=False)).train()
    model.transformer.load_state_dict(gpt2_weights(gpt(shape), transposed=True))
    call = torch.compile(model) if compiled else model
    return plain_step(model, lambda ids, y: call(input_ids=ids, labels=y, shift_labels=y).loss, autocast)


def loadstone(shape: tuple[int, ...], autocast: Any, compiled: bool) -> Step:
    """The parts of `loadstone train`: its task and its optimizer."""
    from loadstone.data.batch import Batch
    from loadstone.kernels import keep_freed_memory, speed_up
    from loadstone.train.optimizer import Optimizer
    from loadstone.train.settings import Settings
    from loadstone.train.task import LanguageModel

    keep_freed_memory()
    model, task = gpt(shape).train(), LanguageModel(compile=compiled)
    speed_up(model)
    settings = Settings(lr=LR, weight_decay=DECAY, beta1=0.9, beta2=0.95, clip=CLIP)
    optimizer = Optimizer(model.named_parameters(), settings, lambda name: 1.0)

    def step(ids: Tensor, targets: Tensor) -> Tensor:
        lengths = torch.full((len(ids),), ids.shape[1])
        with autocast:
            total, count = task.loss(model, Batch(ids, targets, None, lengths))
        (total / count).backward()  # type: ignore[no-untyped-call]
        optimizer.clip()
        optimizer.step(LR)
        return total.detach() / count

    return step


CONTENDERS = {"loadstone": loadstone, "transformers": transformers, "nanoGPT-style": nanogpt}


def work(name: str, shape: str, dtype: str, threads: int) -> None:
    """A contender's process: one step for each number that arrives, answered with what it took."""
    torch.set_num_threads(threads)
    autocast = torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else nullcontext()
    step = CONTENDERS[name.removesuffix(", compiled")](SHAPES[shape], autocast, name.endswith("compiled"))
    for line in sys.stdin:
        rows = torch.Generator().manual_seed(int(line))
        ids = torch.randint(0, SHAPES[shape][3], (ROWS, LENGTH + 1), generator=rows)
        begun, used = time.perf_counter(), time.process_time()
        loss = float(step(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()))
        print(json.dumps([time.perf_counter() - begun, time.process_time() - used, loss]), flush=True)


def race(names: list[str], shape: str, dtype: str, threads: int, rounds: int) -> dict[str, list[list[float]]]:
    """[seconds, processor seconds, loss] of each step of each contender, after two steps to warm up."""
    workers = {}
    for name in names:
        command = [sys.executable, "-W", "ignore", __file__, "--work", name, shape, dtype, str(threads)]
        workers[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    found: dict[str, list[list[float]]] = {name: [] for name in names}
    try:
        for round_number in range(-2, rounds):
            # Who goes first changes from round to round: the first one finds colder caches.
            turn = round_number % len(names)
            for name in names[turn:] + names[:turn]:
                worker = workers[name]
                assert worker.stdin
                assert worker.stdout
                print(round_number + 2, file=worker.stdin, flush=True)
                answer = worker.stdout.readline()
                if not answer:
                    sys.exit(f"{name} ended without an answer")
                if round_number >= 0:
                    found[name].append(json.loads(answer))
            print(f"{shape} {dtype}: round {round_number + 1}/{rounds}", file=sys.stderr)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    return found


def summary(found: dict[str, list[list[float]]], dtype: str) -> dict[str, dict[str, float]]:
    losses = {name: steps[-1][2] for name, steps in found.items()}
    if max(losses.values()) - min(losses.values()) > (1e-3 if dtype == "float32" else 2e-2):
        sys.exit(f"the contenders do not learn the same: {losses}")
    peer = found["transformers"]
    return {
        name: {
            "tokens_per_s": ROWS * LENGTH / statistics.median(step[0] for step in steps),
            "best_tokens_per_s": ROWS * LENGTH / min(step[0] for step in steps),
            "ratio": statistics.median(other[0] / step[0] for step, other in zip(steps, peer, strict=True)),
            "cpu_s": statistics.median(step[1] for step in steps),
            "cpu_ratio": statistics.median(other[1] / step[1] for step, other in zip(steps, peer, strict=True)),
            "loss": losses[name],
        }
        for name, steps in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help="4 rounds of each")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", metavar="SHAPE:DTYPE", help=f"{'|'.join(SHAPES)}:{'|'.join(DTYPES)}")
    parser.add_argument("--compile", action="store_true", help="each contender with torch.compile, too")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        name, shape, dtype, threads = arguments.work
        work(name, shape, dtype, int(threads))
        return
    names = list(CONTENDERS) + ([f"{name}, compiled" for name in CONTENDERS] if arguments.compile else [])
    cases = [arguments.only] if arguments.only else [f"{shape}:{dtype}" for shape in SHAPES for dtype in DTYPES]
    results = {}
    for case in cases:
        shape, dtype = case.split(":")
        rounds = 4 if arguments.quick else arguments.rounds * (3 if shape == "small" else 1)
        results[case] = summary(race(names, shape, dtype, arguments.threads, rounds), dtype)
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    print(f"{'':38} {'tokens/s':>9} {'best':>8} {'ratio':>6} {'CPU s':>8} {'ratio':>6}")
    for case, table in results.items():
        for name, row in table.items():
            speed = f"{row['tokens_per_s']:>9.0f} {row['best_tokens_per_s']:>8.0f} {row['ratio']:>6.2f}"
            print(f"{case + ' ' + name:38} {speed} {row['cpu_s']:>8.3f} {row['cpu_ratio']:>6.2f}")


if __name__ == "__main__":
    main()
