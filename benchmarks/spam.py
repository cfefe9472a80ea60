"""What to freeze: the SMS spam experiment of "Build a Large Language Model (From Scratch)", chapter 6, with any model.

    python benchmarks/spam.py DATA [SRC] [--seeds 3] [--epochs 5] [--json]

Protocol: 747 messages of each class, 70% to train, 20% to test, copies of a message on one side; the classifier reads
the last token; AdamW, batches of 8, one constant learning rate for all rows (the book's 5e-5 unless another is given),
the accuracy after the last epoch, chosen by nobody. A seed decides the split, the order and the new layers. Seconds
are those of the training steps alone. The published column is GPT-2 124M's on an A100 (one seed, its own split and
300 test messages, where one message is 0.33%): the shape is to be compared, not the decimals.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from loadstone import load
from loadstone.data.labelled import LabelledTexts, load_labelled
from loadstone.data.loader import Loader
from loadstone.finetune.classifier import Classification, Classifier
from loadstone.finetune.lora import LoRA, add_lora
from loadstone.finetune.presets import strategy_for
from loadstone.model import GPT
from loadstone.tokenizer import Tokenizer

BATCH, DECAY, LORA_RANK = 8, 0.1, 16


@dataclass
class Row:
    """One line of the table.

    Attributes:
        strategy: which parameters learn, as `finetune --strategy` takes it.
        published: test accuracy (%) and minutes of the book's repository.
        lora: with an adapter. fresh: from random weights.
    """

    name: str
    strategy: str
    published: tuple[float, float]
    lora: bool = False
    fresh: bool = False
    trained: int = 0
    accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def table() -> list[Row]:
    return [
        Row("last layer only", "0:score", (72.00, 0.25)),
        Row("last block", "last:1", (95.00, 0.28)),
        Row("last two blocks", "last:2", (98.33, 0.33)),
        Row("all", "full", (96.67, 0.69)),
        Row(f"LoRA, rank {LORA_RANK}", "lora", (96.67, 0.75), lora=True),
        Row("all, from random weights", "full", (93.67, 0.69), fresh=True),
    ]


def build(row: Row, source: GPT, labels: tuple[str, ...], seed: int) -> Classifier:
    """A classifier over weights of its own, with what the row trains unfrozen."""
    torch.manual_seed(seed)
    gpt = GPT(source.config).to(source.tok_emb.weight.device)
    if not row.fresh:
        gpt.load_state_dict(source.state_dict())
    model = Classifier(gpt, labels)
    if row.lora:
        add_lora(model, LoRA(LORA_RANK, float(LORA_RANK)))
    strategy_for(model, row.strategy).apply(model, 0, None)
    return model


def train(model: Classifier, data: LabelledTexts, seed: int, epochs: int, lr: float) -> float:
    """Seconds of all steps."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=lr, weight_decay=DECAY)
    task, loader = Classification(data.labels), Loader(data.train, BATCH, seed=seed)
    device = model.score.weight.device
    model.train()
    began = time.perf_counter()
    for _ in range(epochs * loader.batches_per_epoch):
        loss, count = task.loss(model, loader.next_batch().to(device))
        (loss / count).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(source: GPT, tokenizer: Tokenizer, options: argparse.Namespace) -> tuple[list[Row], list[str]]:
    rows = table()
    notes: list[str] = []
    for seed in range(options.seeds):
        data = load_labelled(
            options.data, tokenizer, source.config.context_length,
            balance=True, max_length=options.max_length, seed=seed,
        )  # fmt: skip
        notes = notes or data.notes
        for row in rows:
            model = build(row, source, data.labels, seed)
            row.trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            row.seconds.append(train(model, data, seed, options.epochs, options.lr))
            row.accuracy.append(Classification(data.labels).evaluate(model, data.test)["accuracy"])
            print(f"seed {seed}  {row.name:<25} {row.accuracy[-1]:.2%}  {row.seconds[-1]:.1f} s", file=sys.stderr)
    return rows, notes


def show(rows: list[Row]) -> None:
    print(f"{'trained':<25} {'parameters':>12}  {'test accuracy':<22} {'seconds':>8}   published (124M)")
    for row in rows:
        mean, low, high = statistics.mean(row.accuracy), min(row.accuracy), max(row.accuracy)
        spread = f"{mean:.2%} ({low:.2%} to {high:.2%})" if len(row.accuracy) > 1 else f"{mean:.2%}"
        accuracy, minutes = row.published
        seconds = statistics.mean(row.seconds)
        print(f"{row.name:<25} {row.trained:>12,}  {spread:<26} {seconds:>7.1f}   {accuracy:.2f}%, {minutes:.2f} min")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="labelled messages: sms.tsv")
    parser.add_argument("source", nargs="?", default="tiny", help="the pretrained model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a message; 0: as the longest of training")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args()
    source, tokenizer = load(options.source, dtype="float32", device=options.device)
    if tokenizer is None:
        parser.error(f"{options.source} has no tokenizer")
    rows, notes = measure(source, tokenizer, options)
    if options.json:
        found: dict[str, Any] = {"options": vars(options), "torch": torch.__version__, "data": notes}
        print(json.dumps({**found, "rows": [asdict(row) for row in rows]}, indent=1))
        return
    print("\n".join(notes))
    show(rows)


if __name__ == "__main__":
    main()
