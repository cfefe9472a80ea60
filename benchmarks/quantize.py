"""Perplexity before and after quantisation: 8 and 4 bits, rounded to nearest and by GPTQ.

    python benchmarks/quantize.py SRC [--windows 0] [--calibration self] [--rows 64] [--only Q4_0:gptq:91MB] [--json]

Protocol: WikiText-2 raw, test set, as it is; windows of 512 tokens (all, or so many, evenly spread), each token scored
once, with what stands before it in its window; float32; "before" is SRC loaded in float32, whatever it is stored as.
Embedding and head are Q8_0. Nothing is calibrated on WikiText-2. "Own text" is the same for 32 rows of 256 tokens that
the model wrote before it was quantised (another seed than the calibration's): there the rise is KL(before || after).
Intervals are 95%, over blocks of 256 neighbouring tokens. Seconds are of quantisation alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

ALL = "Q8_0:rtn,Q4_0:rtn,Q4_0:gptq,Q4_1:rtn,Q4_1:gptq"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--windows", type=int, default=0, help="0: all")
    parser.add_argument("--calibration", default="self")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--only", default=ALL, help="TYPE:METHOD[:SIZE], the smallest type and most bytes; with commas")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    for row in measured(asked):
        print(json.dumps(row) if asked.json else "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def measured(asked: argparse.Namespace) -> Any:
    """One row per type and method."""
    from loadstone import load
    from loadstone.calibrate.measure import change, examination, nats
    from loadstone.calibrate.rows import calibration_rows
    from loadstone.cli.write import parse_size
    from loadstone.kernels import keep_freed_memory
    from loadstone.quantize.run import Settings, quantize

    model, tokenizer = load(asked.source, dtype="float32")
    keep_freed_memory()
    texts = {
        "wikitext2": examination(model, tokenizer, task="wikitext2", context=512, limit=asked.windows or None),
        "own text": examination(model, tokenizer),
    }
    before = {name: nats(model, text) for name, text in texts.items()}
    yield {"protocol": dict(texts["wikitext2"].protocol), "calibration": asked.calibration, "rows": asked.rows}
    rows = calibration_rows(model, tokenizer, asked.calibration, count=asked.rows)
    for each in asked.only.split(","):
        kind, method, *size = each.split(":")
        settings = Settings(kind, method, budget_size=parse_size(size[0]) if size else None)
        changed, started = copy.deepcopy(model), time.perf_counter()
        # Rounding to nearest needs no text, and nothing is estimated here.
        done = quantize(changed, settings, rows if settings.needs_rows else None)
        seconds = time.perf_counter() - started
        found = {name: change(before[name], nats(changed, text), text) for name, text in texts.items()}
        yield {
            "type": kind, "method": method, "budget": "".join(size), "bits_per_weight": round(done.bits_per_weight, 2),
            "seconds": round(seconds), **{name: str(each) for name, each in found.items()},
        }  # fmt: skip


if __name__ == "__main__":
    main()
