"""`Parts`: how a tokenizer works, read from its own serialisation: vocabulary, merges, cuts, spaces, added tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import AddedToken

from .base import Tokenizer
from .bpe import Merge
from .gguf_vocab import CUTS

SPACE = "\u2581"  # SentencePiece's


@dataclass(frozen=True)
class Parts:
    """The steps of a tokenizer as `tokenizers` writes them down, and its added tokens (id -> token)."""

    steps: dict[str, Any]
    added: dict[int, AddedToken]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Parts:
        return cls(json.loads(tokenizer.backend.to_str()), dict(tokenizer.backend.get_added_tokens_decoder()))

    @property
    def model(self) -> dict[str, Any]:
        model: dict[str, Any] = self.steps["model"]
        return model

    @cached_property
    def vocab(self) -> dict[str, int]:
        """Token -> id, added ones included, in order of the ids."""
        every = {**self.model["vocab"], **{token.content: number for number, token in self.added.items()}}
        return dict(sorted(every.items(), key=lambda item: item[1]))

    @cached_property
    def text_of(self) -> dict[int, str]:
        return {number: text for text, number in self.vocab.items()}

    @cached_property
    def merges(self) -> list[Merge]:
        """In order of rank. Older files have them as one text each."""
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in self.model["merges"])
        return [(left, right) for left, right in pairs]

    def portable(self) -> dict[str, Any]:
        """The steps as `tokenizers` before 0.20 (transformers before 4.45) reads them too: each merge as one text.

        A token with a space in it has no such spelling, and was unknown then.
        """
        if self.model["type"] != "BPE" or any(" " in part for merge in self.merges for part in merge):
            return self.steps
        return {**self.steps, "model": {**self.model, "merges": [" ".join(merge) for merge in self.merges]}}

    @property
    def byte_fallback(self) -> bool:
        return self.model.get("byte_fallback") is True

    @property
    def ignore_merges(self) -> bool:
        return self.model.get("ignore_merges") is True

    @property
    def unknown(self) -> str | None:
        return self.model.get("unk_token")

    def texts(self, size: int) -> list[str | None]:
        """The text of each id below `size`; None where there is none."""
        return [self.text_of.get(number) for number in range(size)]

    def unusual(self) -> str:
        """What neither GGUF nor a bare vocabulary with merges can say, as the end of a sentence; empty if nothing."""
        if self.model["type"] != "BPE":
            return f"is a {self.model['type']}, no BPE"
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if self.model.get(name):
                return f"has a {name}"
        if not self.byte_fallback and (normalizer := self.steps["normalizer"]):
            return f"normalizes the text ({normalizer['type']}) before it is cut"
        for token in self.added.values():
            if token.lstrip or token.rstrip or token.single_word:
                return f"takes the spaces or borders around {token.content!r} as a part of it"
        return ""

    def patterns(self) -> tuple[str, ...] | None:
        """The patterns that a byte-level BPE cuts words by, one after the other; None for other ways of cutting."""
        found: list[str] = []
        steps = _sequence(self.steps["pre_tokenizer"], "pretokenizers")
        for step in steps:
            pattern = _pattern(step)
            if pattern is None:
                return None
            found += pattern
        return tuple(found) if steps and steps[-1]["type"] == "ByteLevel" else None

    def space_prefix(self) -> bool | None:
        """Whether a SentencePiece-like BPE puts a space before each text; None if it treats spaces in another way."""
        prepend = {"type": "Prepend", "prepend": SPACE}
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        known = {1: [replace], 2: [prepend, replace]}
        steps = _sequence(self.steps["normalizer"], "normalizers")
        if self.steps["pre_tokenizer"] or known.get(len(steps)) != steps:
            return None
        return len(steps) == 2


def _sequence(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return list(step[key]) if step["type"] == "Sequence" else [step]


def _pattern(step: dict[str, Any]) -> list[str] | None:
    """The pattern, if there is one, by which one step cuts; None for a step of another kind."""
    kind = step["type"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return list(CUTS["gpt-2"].patterns) if step.get("use_regex", True) else []
    if kind == "Digits" and step["individual_digits"]:
        return [r"\p{N}"]
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"] and "Regex" in step["pattern"]:
        return [step["pattern"]["Regex"]]
    return None
