"""Writes what `loadstone eval --json` measured into a document, between its two `results` marks.

    python benchmarks/results.py FOLDER/tiny FOLDER/smollm2 --into docs/results.md

Each name stands for NAME.json. Called by benchmarks/results.sh.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from loadstone.evaluate.table import figure

BEGIN, END = "<!-- results: written by benchmarks/results.sh -->\n", "<!-- end of results -->\n"
PROTOCOL = ("context", "stride", "first_token", "asked")


def cell(metric: dict[str, Any] | None) -> str:
    if metric is None:
        return "-"
    value, low, high = (figure(metric["name"], metric[key]) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def table(head: list[str], rows: Iterator[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|---" * len(head) + "|"
    yield from ("| " + " | ".join(row) + " |" for row in rows)


def by_task(runs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Results by task, then by model."""
    found: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        for result in run["results"]:
            found.setdefault(result["task"], {})[name] = result
    return found


def figures(runs: dict[str, Any]) -> Iterator[list[str]]:
    for task, results in by_task(runs).items():
        first = next(iter(results.values()))
        for at, metric in enumerate(first["metrics"]):
            cells = (cell(results[name]["metrics"][at]) if name in results else "-" for name in runs)
            yield [task, metric["name"], *cells]


def phenomena(runs: dict[str, Any]) -> Iterator[list[str]]:
    results = by_task(runs)["blimp"]
    for group in next(iter(results.values()))["groups"]:
        yield [group, *(cell(results[name]["groups"][group][0]) for name in runs)]


def protocols(runs: dict[str, Any]) -> Iterator[list[str]]:
    for task, results in by_task(runs).items():
        for name, result in results.items():
            how = "; ".join(f"{key} {result['protocol'][key]}" for key in PROTOCOL if key in result["protocol"])
            items = f"{result['items']:,}" + (f" of {result['of']:,}" if result["items"] < result["of"] else "")
            sha = result["protocol"]["sha256"][:12]
            yield [task, name, items, f"{result['tokens']:,}", how, f"`{sha}`"]


def document(runs: dict[str, Any]) -> Iterator[str]:
    any_run = next(iter(runs.values()))["results"][0]["protocol"]
    hashes = ", ".join(f"{name} `{run['results'][0]['protocol']['model_sha256'][:12]}`" for name, run in runs.items())
    yield (
        f"{datetime.date.today()}; Loadstone {any_run['loadstone']}, PyTorch {any_run['torch']}, {any_run['dtype']}, "
        f"{os.cpu_count()} cores. Weights: {hashes}. In brackets: 95%."
    )
    yield ""
    yield from table(["task", "figure", *runs], figures(runs))
    yield "\n### How each was measured\n"
    yield from table(["task", "model", "items", "tokens scored", "protocol", "data"], protocols(runs))
    yield "\n### BLiMP by phenomenon\n"
    yield from table(["phenomenon", *runs], phenomena(runs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME")
    parser.add_argument("--into", type=Path, required=True)
    options = parser.parse_args()
    runs = {Path(name).name: json.loads(Path(f"{name}.json").read_text(encoding="utf-8")) for name in options.runs}
    text = options.into.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"{options.into} has no marks for the results: {BEGIN.strip()} and {END.strip()}")
    options.into.write_text(before + begin + "\n" + "\n".join(document(runs)) + "\n\n" + end + after, encoding="utf-8")


if __name__ == "__main__":
    main()
