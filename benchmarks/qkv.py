"""Separate or fused q, k, v: the projections of GPT-2 124M's twelve layers, as each file layout would have them.

    python benchmarks/qkv.py

Protocol: fp32, weights of all layers in turn (so that none stays in the cache), medians, the four arrangements
interleaved. Decides whether the model keeps q, k and v apart, which makes every dialect's layout a view.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

WIDTH, LAYERS = 768, 12


def thirds(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as views of the fused tensor's rows."""
    return tensor[:WIDTH], tensor[WIDTH : 2 * WIDTH], tensor[2 * WIDTH :]


def arrangements(x_TC: Tensor) -> dict[str, Callable[[], object]]:
    """What one forward pass does for q, k and v, four ways."""
    rows = [torch.randn(3 * WIDTH, WIDTH) for _ in range(LAYERS)]  # [3 out, in]
    columns = [weight.t().contiguous() for weight in rows]  # HuggingFace's [in, 3 out]
    bias = [torch.randn(3 * WIDTH) for _ in range(LAYERS)]

    def apart(weights: list[tuple[Tensor, ...]]) -> list[Tensor]:
        parts = [(w, b) for ws, b3 in zip(weights, bias, strict=True) for w, b in zip(ws, thirds(b3), strict=True)]
        return [F.linear(x_TC, w, b) for w, b in parts]

    from_rows: list[tuple[Tensor, ...]] = [thirds(weight) for weight in rows]
    from_columns: list[tuple[Tensor, ...]] = [thirds(weight.t()) for weight in columns]
    return {
        "fused, [3 out, in]": lambda: [F.linear(x_TC, w, b) for w, b in zip(rows, bias, strict=True)],
        "separate, [out, in]": lambda: apart(from_rows),
        "fused, view of [in, 3 out]": lambda: [F.linear(x_TC, w.t(), b) for w, b in zip(columns, bias, strict=True)],
        "separate, views of [in, 3 out]": lambda: apart(from_columns),
    }


def main() -> None:
    torch.manual_seed(0)
    for tokens, rounds in ((1, 60), (16, 30), (128, 15), (512, 9)):
        ways = arrangements(torch.randn(tokens, WIDTH))
        times: dict[str, list[float]] = {name: [] for name in ways}
        with torch.inference_mode():
            for _ in range(rounds):
                for name, way in ways.items():
                    began = time.perf_counter()
                    way()
                    times[name].append(time.perf_counter() - began)
        base = statistics.median(times["fused, [3 out, in]"])
        print(f"{tokens} tokens")
        for name, found in times.items():
            print(f"  {name:32} {statistics.median(found) * 1e3:8.2f} ms  {statistics.median(found) / base:5.2f}x")


if __name__ == "__main__":
    main()
