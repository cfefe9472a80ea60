"""Reading every tensor of a GGUF file: ours (in pieces that stay in the cache) beside the gguf package's whole tensors.

    python benchmarks/dequantise.py [SRC] [--rounds 5]

Protocol: the file in the page cache, the two interleaved in one process, medians; values compared bit for bit once. The
blocks themselves are decoded by the gguf package in both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np

from loadstone.checkpoint.gguf import Gguf
from loadstone.checkpoint.hub import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", nargs="?", default="smollm2")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    path = resolve(arguments.source)
    import gguf

    ours, theirs = Gguf(path), {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

    def whole(name: str) -> Any:
        return gguf.dequantize(theirs[name].data, theirs[name].tensor_type)

    for name in ours.tensors:
        if not np.array_equal(ours.read(name), whole(name)):
            raise SystemExit(f"{name} differs")
    times: dict[str, list[float]] = {"loadstone": [], "gguf.dequantize": []}
    for _ in range(arguments.rounds):
        for program, read in (("loadstone", ours.read), ("gguf.dequantize", whole)):
            began = time.perf_counter()
            for name in ours.tensors:
                read(name)
            times[program].append(time.perf_counter() - began)
    base = statistics.median(times["loadstone"])
    for program, found in times.items():
        print(f"{program:16} {statistics.median(found):6.2f} s  {statistics.median(found) / base:5.2f}x")


if __name__ == "__main__":
    main()
