"""What benchmarks/generate.py writes into docs/performance.md: its table, and tokens per second over bytes of a token.

    python benchmarks/generate.py --json > rows.json; python benchmarks/roofline.py rows.json docs/pictures/roofline.svg

A token of a batch of one reads every weight once, so memory that gives B bytes a second allows B / bytes tokens: a line
from corner to corner on two logarithmic axes. How far a point lies below it is what a program leaves unused.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from loadstone.plot.style import (  # noqa: E402
    COLOURS,
    GREY,
    MARKERS,
    new_figure,
    plain,
    round_numbers,
    save,
    styled,
)

MARKS = ("<!-- benchmarks/generate.py --write -->", "<!-- end -->")
NAMES = {
    "native": "Loadstone, native",
    "llama": "llama.cpp",
    "transformers": "transformers",
    "torch": "Loadstone, torch",
    "onnx": "ONNX Runtime",
    "openvino": "OpenVINO",
    "ctranslate2": "CTranslate2",
}
LABELLED = list(NAMES)[:4]  # the others' points would be hidden under their own names
PACKAGES = {
    "llama": "llama-cpp-python",
    "onnx": "onnxruntime",
    "openvino": "openvino",
    "ctranslate2": "ctranslate2",
    "transformers": "transformers",
    "torch": "torch",
}


def draw(rows: list[dict[str, Any]], bandwidth: float, path: Path) -> None:
    """`rows` as benchmarks/generate.py gives them; `bandwidth` in GB/s, of the same run."""
    with styled():
        figure = new_figure(7, 4.4)
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.set_yscale("log")
        sizes = [row["weights"] for row in rows]
        ends = [min(sizes) / 1.5, max(sizes) * 1.6]
        limits = [bandwidth * 1e3 / size for size in ends]
        axes.plot(ends, limits, color=GREY, linewidth=1.2, label=f"what {bandwidth:.0f} GB/s allow")
        for place, (kind, label) in enumerate(NAMES.items()):
            own = [row for row in rows if row["contender"].partition("-")[0] == kind]
            look: dict[str, Any] = {
                "color": COLOURS[place],
                "marker": (*MARKERS, "P", "X")[place],
                "markersize": 7,
                "linestyle": "none",
            }
            if own:
                axes.plot([row["weights"] for row in own], [row["decode"] for row in own], label=label, **look)
            for row in own if kind in LABELLED else []:
                width = row["contender"].partition("-")[2]
                right = kind in ("native", "torch")
                axes.annotate(
                    f"{width}, {row['reached'] / bandwidth:.0%}", (row["weights"], row["decode"]),
                    xytext=(6, 4) if right else (-6, -4), textcoords="offset points", fontsize=8, color=COLOURS[place],
                    ha="left" if right else "right", va="bottom" if right else "top",
                )  # fmt: skip
        lowest = min(row["decode"] for row in rows) / 1.5
        axes.set_xlim(*ends)
        axes.set_ylim(lowest, limits[0] * 1.2)
        for axis, span in ((axes.xaxis, ends), (axes.yaxis, [lowest, limits[0] * 1.2])):
            axis.set_ticks(round_numbers(*span), minor=False)
            axis.set_ticks([], minor=True)
            axis.set_major_formatter(plain())
        axes.set_xlabel("MB of weights that a token reads")
        axes.set_ylabel("tokens per second")
        axes.set_title("GPT-2 124M, one token at a time, and what memory allows")
        axes.legend(loc="upper right")
    path.parent.mkdir(exist_ok=True)
    save(figure, path, path.suffix[1:], "Tokens per second over the bytes that a token reads")


def write_docs(table: str, rows: list[dict[str, Any]], bandwidth: float, how: str) -> None:
    """Table and picture into docs/performance.md, between its two marks."""
    draw(rows, bandwidth, ROOT / "docs/pictures/roofline.svg")
    path = ROOT / "docs/performance.md"
    before, _, rest = path.read_text().partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not end:
        sys.exit(f"{path}: the marks {MARKS} are not there")
    picture = "![Tokens per second over the bytes that a token reads](pictures/roofline.svg)"
    path.write_text(f"{before}{MARKS[0]}\n{how}\n\n{table}\n\n{picture}\n{end}{after}")


def described(rows: list[dict[str, Any]], rounds: int, threads: int) -> str:
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ": unknown")
    kinds = {row["contender"].partition("-")[0] for row in rows}
    packages = ", ".join(f"{name} {version(name)}" for kind, name in PACKAGES.items() if kind in kinds)
    return (
        f"{time.strftime('%Y-%m-%d', time.gmtime())}, {cpu.partition(':')[2].strip()}, {threads} threads of "
        f"{len(os.sched_getaffinity(0))} cores, medians of {rounds} rounds; {packages}."
    )


if __name__ == "__main__":
    found = json.loads(Path(sys.argv[1]).read_text())
    draw(found["rows"], statistics.median(found["read"]), Path(sys.argv[2]))
