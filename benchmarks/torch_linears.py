"""How the engine `torch` should multiply on a CPU: whole models, their linear layers arranged in four ways.

    python benchmarks/torch_linears.py [--threads 2] [--rounds 5] [--models gpt2,smollm2]

GPT-2 124M's shape with random weights, and SmolLM2-135M. `as it is` is F.linear with `[out, in]` weights; `[in, out]`
is addmm with transposed copies; `packed` what `kernels.pack_for_inference` does; `fused` the same with q, k and v, and
gate and up, as one product. Decoding of 8 tokens after a prompt of 32, in 1, 4 and 16 rows; prefill of 512 tokens. All
contenders in one process, taking turns; medians; `x` is the ratio to `as it is` in the same type. float16 is for the
record, decoding only and as it is: elsewhere it is 10 times slower. With one thread it takes the processor's time,
which other work lengthens less. The script stops if float32 logits differ by more than 1e-3.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from loadstone import load
from loadstone.config import PRESETS
from loadstone.engines.eager import TorchEngine
from loadstone.kernels import PackedWeights, pack_for_inference
from loadstone.kernels.packed import PackedProduct
from loadstone.kernels.replacing import replaced
from loadstone.model import GPT, MLP, Attention, Linear

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
TYPES = (torch.float32, torch.bfloat16, torch.float16)


class Tried(PackedWeights):
    """Any products, hung on the model as packed ones are."""

    def __init__(self, model: GPT, products: dict[nn.Module, Product]) -> None:
        super().__init__(model)
        self.tried = products

    @contextmanager
    def used(self, *, prompt: bool) -> Iterator[None]:
        with replaced((module, "product", product) for module, product in self.tried.items()):
            yield


def columns(weight: Tensor) -> Product:
    copied = weight.detach().t().contiguous()

    def product(x: Tensor, _: Tensor, bias: Tensor | None) -> Tensor:
        x_NK = x.flatten(0, -2)
        y_NM = x_NK @ copied if bias is None else torch.addmm(bias, x_NK, copied)
        return y_NM.view(*x.shape[:-1], -1)

    return product


def in_out(model: GPT) -> PackedWeights:
    products: dict[nn.Module, Product] = {m: columns(m.weight) for m in model.modules() if isinstance(m, Linear)}
    return Tried(model, products | {model: columns(model.output[0])})


def fused(model: GPT) -> PackedWeights:
    products: dict[nn.Module, Product] = {**pack_for_inference(model).products}
    for module in model.modules():
        if isinstance(module, Attention):
            products |= together([module.q, module.k, module.v])
        elif isinstance(module, MLP) and module.gate is not None:
            products |= together([module.up, module.gate])
    return Tried(model, products)


def together(layers: list[Linear]) -> dict[nn.Module, Product]:
    """The first computes for all; the others, called after it with the same x, fetch their part."""
    weight = torch.cat([layer.weight.detach() for layer in layers])
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    bias, widths = torch.cat(biases) if biases else None, [len(layer.weight) for layer in layers]
    product, parts = PackedProduct(weight), dict[int, Tensor]()

    def first(x: Tensor, *_: Tensor | None) -> Tensor:
        parts.update(enumerate(torch.split(product(x, weight, bias), widths, dim=-1)))
        return parts[0]

    rest = {layer: lambda *_, at=at: parts[at] for at, layer in enumerate(layers)}
    return rest | {layers[0]: first}


WAYS: dict[str, Callable[[GPT], PackedWeights]] = {
    "as it is": PackedWeights, "[in, out]": in_out, "packed": pack_for_inference, "fused": fused,
}  # fmt: skip


def measure(run: Callable[[], object], clock: Callable[[], float]) -> float:
    begin = clock()
    run()
    return clock() - begin


def decode(engine: TorchEngine, rows: int, clock: Callable[[], float]) -> list[float]:
    cache = engine.new_cache(rows, 64)
    engine.prefill(cache, dict.fromkeys(range(rows), range(10, 42)))
    return [measure(lambda: engine.decode(cache, range(rows)), clock) for _ in range(10)][2:]


def prefill(engine: TorchEngine, tokens: int, clock: Callable[[], float]) -> list[float]:
    return [measure(lambda: engine.prefill(engine.new_cache(1, tokens), {0: range(tokens)}), clock)]


def contenders(name: str) -> dict[tuple[torch.dtype, str], TorchEngine]:
    torch.manual_seed(0)
    model = GPT(PRESETS["gpt2"]) if name == "gpt2" else load(name, dtype="float32")[0]
    found: dict[tuple[torch.dtype, str], TorchEngine] = {}
    for kind in TYPES:
        typed = deepcopy(model).eval().to(kind)
        ways = list(WAYS)[: 1 if kind == torch.float16 else None]
        found |= {(kind, way): TorchEngine(typed, WAYS[way](typed)) for way in ways}
    first = {way: run.prefill(run.new_cache(), {0: range(9)}) for (kind, way), run in found.items() if kind == TYPES[0]}
    if any((logits - first["as it is"]).abs().max() > 1e-3 for logits in first.values()):
        sys.exit(f"{name}: the logits differ")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", default="gpt2,smollm2")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    for name in arguments.models.split(","):
        engines = contenders(name)
        print(f"\n{name}, tok/s | " + " | ".join(f"{str(k).removeprefix('torch.')} {way}" for k, way in engines))
        for tokens, label in ((1, "decode 1"), (4, "decode 4"), (16, "decode 16"), (512, "prefill 512")):
            taking_part = [each for each in engines if tokens < 512 or each[0] != torch.float16]
            times: dict[tuple[torch.dtype, str], list[float]] = {each: [] for each in taking_part}
            for _ in range(arguments.rounds):
                for each, found in times.items():
                    run = prefill if tokens == 512 else decode
                    found += run(engines[each], tokens, clock)
            medians = {each: statistics.median(found) for each, found in times.items()}
            ratios = {each: medians[each[0], "as it is"] / found for each, found in medians.items()}
            cells = [f"{tokens / found:.1f} x{ratios[each]:.2f}" for each, found in medians.items()]
            print(f"{label} | {' | '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
