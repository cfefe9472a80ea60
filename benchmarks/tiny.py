"""The model card of `tiny`: from a run to what the package ships, every figure measured on the shipped weights.

loadstone prepare books.tar.xz books --tokenizer bpe:8192 --validation 0.02
loadstone train --run tiny-run --data books ...          (the command is in run.json, and in the card)
python benchmarks/tiny.py tiny-run src/loadstone/tiny
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch

from loadstone import GPT, Tokenizer, convert, load
from loadstone.data.loader import Loader
from loadstone.data.shards import Dataset
from loadstone.data.windows import Windows
from loadstone.generate import stream_text
from loadstone.plot import plot
from loadstone.train.task import LanguageModel

PROMPTS = (
    "It was a dark night, and", "The old house", "\"My dear sir,\" said", "She looked at him", "In the year 1805",
    "The captain ordered", "Love is", "There was once a king who", "London", "",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("run", type=Path)
    parser.add_argument("destination", type=Path)
    arguments = parser.parse_args()
    run, folder = arguments.run, arguments.destination
    convert(run / "best", folder, to="hf", dtype="bfloat16", force=True, parity=False)
    (folder / "loadstone.json").unlink()  # it names the places of this machine, and the package's files are git's
    record = json.loads((run / "run.json").read_text())
    model, tokenizer = load(folder, dtype="float32")
    if tokenizer is None:
        raise SystemExit(f"{folder}: no tokenizer")
    dataset = Dataset.open(record["data"]["folder"])
    figures = evaluate(model, dataset)
    shutil.copy(run / "metrics.jsonl", folder / "metrics.jsonl")
    plot([run], folder, kinds=["loss"], formats=["svg"])
    (folder / "README.md").write_text(card(record, figures, model, tokenizer, dataset, progress(run)))


@torch.inference_mode()
def evaluate(model: GPT, dataset: Dataset) -> dict[str, float]:
    """Over every window of the validation books, once."""
    held = dataset.tokens("validation")
    loader = Loader(Windows(held, model.config.context_length), 16, shuffle=False, drop_last=False)
    task, sums = LanguageModel(held.nbytes_of_text / len(held)), {"loss": 0.0, "count": 0.0}
    for _ in range(loader.batches_per_epoch):
        found = task.score(model, loader.next_batch())
        sums = {key: sums[key] + found[key] for key in sums}
    return task.metrics(sums)


def progress(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "best" / "training" / "state.json").read_text())["progress"])


def card(
    record: dict[str, Any], figures: dict[str, float], model: GPT, tokenizer: Tokenizer, dataset: Dataset,
    progress: dict[str, Any],
) -> str:  # fmt: skip
    config, parameters = model.config, sum(parameter.numel() for parameter in model.parameters())
    splits = dataset.info.splits
    lines = [
        "# tiny",
        "",
        f"A GPT-2 of {parameters:,} parameters ({config.n_layers} layers, width {config.d_model}, {config.n_heads} "
        f"heads, context {config.context_length}, byte-level BPE of {config.vocab_size:,} tokens), trained on "
        "public-domain novels with Loadstone, and shipped with it: the model that needs no download. It is for trying "
        "things out and for tests. It writes sentences that look English and mean little.",
        "",
        "| on the validation books, all of them, windows that do not overlap | |",
        "|---|---|",
        f"| loss | {figures['val_loss']:.4f} nats a token |",
        f"| bits per byte | {figures['bits_per_byte']:.4f} |",
        f"| perplexity | {figures['perplexity']:.1f} |",
        f"| tokens evaluated | {int(figures['val_tokens']):,} |",
        f"| uniform guess, for comparison | {math.log(config.vocab_size):.4f} nats a token |",
        "",
        f"Measured on these bfloat16 weights, computed in float32. Data: 342 English novels and tales of the 18th to "
        f"early 20th century (mlschmitt/classic-books-markdown, public domain); {splits['train'].documents} books, "
        f"{splits['train'].tokens:,} tokens to train on, {splits['validation'].documents} books, "
        f"{splits['validation'].tokens:,} tokens to evaluate on, chosen by a hash of their names.",
        "",
        f"Training saw {progress['tokens']:,} tokens ({progress['tokens'] / splits['train'].tokens:.2f} passes) in "
        f"{progress['step']:,} steps and {progress['seconds'] / 60:.0f} minutes on one thread of a shared AMD EPYC "
        "(Zen 4). `metrics.jsonl` is the log, `loss.svg` the curve.",
        "",
        "```",
        "loadstone prepare books.tar.xz books --tokenizer bpe:8192 --validation 0.02",
        record["command"],
        "```",
        "",
        "## Ten samples, unedited",
        "",
        "Seeds 0 to 9, temperature 0.8, top-k 50, 60 tokens after the prompt.",
        "",
    ]
    for seed, prompt in enumerate(PROMPTS):
        ids = tokenizer.encode(prompt) if prompt else [tokenizer.bos_id or 0]
        options: dict[str, Any] = {"max_new_tokens": 60, "seed": seed, "temperature": 0.8, "top_k": 50}
        text = "".join(stream_text(model, tokenizer, ids, **options))
        lines += [f"{seed + 1}. prompt: {prompt or '(none)'}", "", "```text", prompt + text, "```", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
