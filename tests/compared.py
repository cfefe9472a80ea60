"""Small saved models with tokenizers of different kinds, and comparisons of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from extendable import TOKENIZERS, gpt2_like, hostile
from loadstone.compare import Comparison
from loadstone.compare.measure import Candidate, Measured, Protocol, measure
from loadstone.evaluate.perplexity import Text, text_of
from loadstone.load import open_source
from loadstone.save import save_model

TEXTS = {
    "plain": "The cat sat on the mat, and the dog lay down beside it. They'll sing 24 songs.\n\nThen they slept. " * 2,
    "hard": "Été: naïve 👍🏽 déjà-vu, 你好 x<y && y>z; </p><script>alert(1)</script>\n\tdone",
}
HOSTILE = '</p><script>alert("x")</script> & <b>bold</b> \x1b[31m \u202e'
RULE = Protocol(32, 16, ("The cat", "A dog"), (0, 1), 6, 0.8, 50, "auto", "cpu")


def saved(folder: Path, seed: int = 0, **fields: Any) -> Path:
    """A folder with a GPT-2 of 401 tokens and its tokenizer."""
    save_model(hostile(401, seed, **fields), folder, gpt2_like())
    return folder


def texts(**contents: str) -> dict[str, Text]:
    return {name: text_of(content, name) for name, content in (contents or TEXTS).items()}


def measured(folder: Path, kinds: Sequence[str], rule: Protocol = RULE, **contents: str) -> Comparison:
    """A comparison of models that differ in their tokenizers (and, where these are alike, in nothing)."""
    models: list[Measured] = []
    for kind in kinds:
        tokenizer, place = TOKENIZERS[kind](), folder / kind
        if not place.exists():
            save_model(hostile(tokenizer.vocab_size), place)
        candidate = Candidate(kind, str(place), open_source(place), tokenizer, None)
        models.append(measure(candidate, texts(**contents), rule, lambda: None))
    made = {"date": "2026-11-21", "program": "test", "machine": "test"}
    return Comparison(tuple(models), texts(**contents), rule, made)
