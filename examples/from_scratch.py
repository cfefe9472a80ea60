"""Train a small GPT on a text from scratch, continue a sentence, save it, and load it with any of Loadstone's commands.

    python examples/from_scratch.py [TEXT.txt]

It is document 003 in one piece, with `loadstone.scratch`, the module that has the names of the book "Build a Large
Language Model (From Scratch)". Without a text it trains on a few sentences of its own. It takes less than a minute on
a laptop; everything is written to a temporary folder.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import loadstone
from loadstone.scratch import (
    GPTModel,
    create_dataloader_v1,
    generate,
    text_to_token_ids,
    token_ids_to_text,
    train_model_simple,
)

TEXT = """The river runs past the mill, and the mill grinds the corn, and the corn makes the bread that we eat.
Every morning the miller opens the gate, and the water turns the wheel, and the wheel turns the stone.
Every evening he closes the gate, and the wheel stands still, and the river runs past the mill.
"""
CONFIG: dict[str, Any] = {
    "vocab_size": 257, "context_length": 64, "emb_dim": 96, "n_heads": 4, "n_layers": 3, "drop_rate": 0.0,
    "qkv_bias": False,
}  # fmt: skip


class Bytes:
    """The simplest tokenizer: a token for each byte of UTF-8. tiktoken's encodings have the same two methods."""

    def encode(self, text: str, allowed_special: object = None) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def main() -> None:
    text = Path(sys.argv[1]).read_text(encoding="utf-8") if len(sys.argv) > 1 else TEXT * 12
    tokenizer, cut = Bytes(), int(0.9 * len(text))
    windows: dict[str, Any] = {"batch_size": 8, "max_length": 64, "stride": 32, "tokenizer": tokenizer}
    train_loader = create_dataloader_v1(text[:cut], **windows)
    val_loader = create_dataloader_v1(text[cut:], **windows, shuffle=False, drop_last=False)

    torch.manual_seed(123)
    model = GPTModel(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.002, weight_decay=0.1)
    train_model_simple(
        model, train_loader, val_loader, optimizer, "cpu",
        num_epochs=20, eval_freq=40, eval_iter=5, start_context="Every morning", tokenizer=tokenizer,
    )  # fmt: skip

    ids = generate(model, text_to_token_ids("The river", tokenizer), 60, CONFIG["context_length"], 0.3, top_k=5)
    print("sampled:", token_ids_to_text(ids, tokenizer).replace("\n", " "))

    file = Path(tempfile.mkdtemp()) / "model.pth"
    torch.save(model.state_dict(), file)
    again, _ = loadstone.load(file, config={"n_heads": CONFIG["n_heads"]})  # no shape shows the number of heads
    print("saved and loaded:", torch.equal(again(ids[:, :64]), model.eval()(ids[:, :64])), file)


if __name__ == "__main__":
    main()
