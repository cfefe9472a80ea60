"""Add chat markers to a model, and see what each way to initialise their rows costs on old text.

python examples/extend.py smollm2
python examples/extend.py ../shared/checkpoints/tinystories-656k-llama

The second table is of the same model with its logits lowered by about 60, all by the same amount: not one probability
changes, for softmax does not see it. Random rows, whose logits are near 0, then take everything: so it goes with GPT-2.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch

import loadstone
from loadstone.extend import extend
from loadstone.verify import ENGLISH

MARKERS = ["<|user|>", "<|assistant|>"]


def main() -> None:
    source = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    model, tokenizer = loadstone.load(source)
    if tokenizer is None:
        sys.exit(f"{source} brings no tokenizer")
    larger, renewed, report = extend(model, tokenizer, MARKERS)
    show(report.lines())

    ids = renewed.encode("<|user|>Hello<|assistant|>", add_special=False, parse_special=True)
    likeliest = int(larger(torch.tensor([ids]))[0, -1].argmax())
    print(f"\n<|user|>Hello<|assistant|> is {ids}; the likeliest token then is {renewed.token_text(likeliest)!r}")

    print(f"\n{source} with all logits lowered by about 60")
    *_, report = extend(lowered(model, tokenizer.encode(ENGLISH), 60.0), tokenizer, MARKERS)
    show(report.lines())


def show(lines: Iterable[tuple[str, str]]) -> None:
    for label, line in lines:
        print(f"{label:<9} {line}")


@torch.no_grad()
def lowered(model: loadstone.GPT, ids: list[int], by: float) -> loadstone.GPT:
    """A model of the same probabilities: the same row is taken from every row of the head, which it gets for itself."""
    common = model.hidden(torch.tensor([ids]))[0].mean(0)  # what hidden states have in common
    rows = (model.tok_emb if model.head is None else model.head).weight
    moved = loadstone.GPT(model.config.with_overrides({"tied": False}))
    moved.load_state_dict({**model.state_dict(), "head.weight": rows - by * common / common.square().sum()})
    return moved


if __name__ == "__main__":
    main()
