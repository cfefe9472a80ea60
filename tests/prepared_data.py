"""Texts, a small BPE made from them, and what a prepared folder holds."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from loadstone.data.shards import Dataset
from loadstone.data.tokenizer_training import train_bpe

WORDS = "the cat's mat, Österreich 你好 1234 (x) and\nthen \n\n they'll  go  \n x\n\n\ny x\n\ny".split(" ")


def text_of(seed: int, words: int) -> str:
    chosen = random.Random(seed)
    return " ".join(chosen.choice(WORDS) for _ in range(words))


TEXTS = [text_of(seed, 5 + seed * 37 % 300) for seed in range(60)]
BPE = train_bpe(TEXTS, 300)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def documents(dataset: Dataset, split: str) -> list[list[int]]:
    tokens = dataset.tokens(split)
    return [part.tolist() for part in np.split(tokens[:], tokens.documents[1:].astype(int))]
