"""Selectors: words for sets of a model's parameters, such as `embeddings`, `blocks.9-11` or `head`.

Why not as others do it: litgpt, PEFT and LlamaFactory match substrings or regular expressions against names, where
`h.1` takes `h.10` along and a misspelt name silently freezes nothing. Here a selector is one of a closed set of words
or an exact name, and what names nothing is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from ..checkpoint.wording import shown
from ..errors import ConfigError
from ..model import GPT

LORA_PARTS = ("lora_a", "lora_b")
_BLOCKS = re.compile(r"blocks\.(?P<first>-?\d{1,6})(?P<range>-(?P<last>-?\d{1,6})?)?")
# What the names of a selector's parameters begin with, seen from the GPT.
_STEMS: Mapping[str, tuple[str, ...]] = {
    "embeddings": ("tok_emb.", "pos_emb."),
    "tok_emb": ("tok_emb.",),
    "pos_emb": ("pos_emb.",),
    "head": ("head.",),
    "norm": ("norm.",),
    "score": ("score.",),
}
_KNOWN = f"all, {', '.join(_STEMS)}, lora, blocks.4, blocks.9-11, blocks.6- (to the last), blocks.-3- (the last three)"
_ABSENT: Mapping[str, str] = {
    "pos_emb": "its positions are rotary, not learned",
    "head": "it is a classifier, whose output layer is `score`",
    "score": "it is no classifier; the output layer of a language model is `head`",
    "lora": "no adapter was added to it (--lora RANK, or add_lora)",
}


@dataclass(frozen=True)
class Parts:
    """What there is to select from in one model.

    Attributes:
        sizes: elements of every parameter, by full name.
        prefix: what a wrapper (a classifier) puts before the GPT's own names.
        n_layers: blocks of the GPT.
        tied: the head is the token embedding.
    """

    sizes: Mapping[str, int]
    prefix: str
    n_layers: int
    tied: bool

    @classmethod
    def of(cls, model: nn.Module, *, untie: bool = False) -> Parts:
        """The parts of a GPT, or of a module that holds one; with `untie` as they will be after `untie(model)`."""
        prefix, gpt = find_gpt(model)
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        if gpt.head is None and untie:
            sizes[f"{prefix}head.weight"] = gpt.tok_emb.weight.numel()
        has_head = any(_local(name, prefix).startswith(("head.", "score.")) for name in sizes)
        return cls(sizes, prefix, len(gpt.blocks), not has_head)

    def select(self, selector: str) -> frozenset[str]:
        """The names that a selector stands for, at least one. `head` is the token embedding where they are tied.

        Raises ConfigError for an unknown word, for blocks out of range and for what this model does not have.
        """
        if selector == "all":
            return frozenset(self.sizes)
        if selector in self.sizes:
            return frozenset({selector})
        if match := _BLOCKS.fullmatch(selector):
            return self._starting(f"blocks.{i}." for i in self._blocks(selector, match))
        if selector == "lora":
            found = frozenset(name for name in self.sizes if name.endswith(LORA_PARTS))
        elif selector in _STEMS:
            found = self._starting(_STEMS["tok_emb" if selector == "head" and self.tied else selector])
        else:
            raise ConfigError(
                f"strategy: {shown(selector)} is no selector and no parameter of this model. Selectors are {_KNOWN}; "
                "parameters are named in full, as in blocks.0.attn.q.weight."
            )
        if not found:
            raise ConfigError(f"strategy: this model has nothing that {selector} selects: {_ABSENT[selector]}.")
        return found

    def has(self, selector: str) -> bool:
        """Whether one of the fixed words selects anything."""
        return bool(self._starting(_STEMS[selector]))

    def group(self, name: str) -> str:
        """What a table lists a parameter under: `tok_emb`, `blocks`, `norm`, ...; adapters apart from their layers."""
        stem = _local(name, self.prefix).partition(".")[0]
        return f"{stem} (lora)" if name.endswith(LORA_PARTS) else stem

    def label(self, group: str, names: Iterable[str]) -> str:
        """`blocks.0-8` for those of the group `blocks`; other groups as they are called."""
        if not group.startswith("blocks"):
            return group
        layers = sorted({int(_local(name, self.prefix).split(".")[1]) for name in names})
        whole = layers == list(range(layers[0], layers[-1] + 1)) and len(layers) > 1
        return group.replace("blocks", f"blocks.{layers[0]}-{layers[-1]}" if whole else f"blocks.{_commas(layers)}")

    def _starting(self, stems: Iterable[str]) -> frozenset[str]:
        beginnings = tuple(stems)
        return frozenset(name for name in self.sizes if _local(name, self.prefix).startswith(beginnings))

    def _blocks(self, selector: str, match: re.Match[str]) -> range:
        first = int(match["first"])
        last = int(match["last"] or -1) if match["range"] else first
        first, last = (number + self.n_layers if number < 0 else number for number in (first, last))
        if not (0 <= first < self.n_layers and 0 <= last < self.n_layers):
            raise ConfigError(
                f"strategy: {selector} is out of range: this model's blocks are 0 to {self.n_layers - 1} "
                f"(or -{self.n_layers} to -1, counted from the last)."
            )
        if last < first:
            raise ConfigError(f"strategy: {selector} is empty: it ends (block {last}) before it begins ({first}).")
        return range(first, last + 1)


def _commas(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))


def find_gpt(model: nn.Module) -> tuple[str, GPT]:
    """The GPT in a module, and what stands before its parameters' names; the module itself may be it."""
    if isinstance(model, GPT):
        return "", model
    found = [(f"{name}.", module) for name, module in model.named_modules() if isinstance(module, GPT)]
    if len(found) != 1:
        raise ConfigError(f"{type(model).__name__} holds {len(found)} GPTs, and exactly one was expected.")
    return found[0]


def depth(model: nn.Module, name: str) -> int:
    """How far below the top a parameter lies: output layer and final norm 0, the last block 1, the embeddings most."""
    prefix, gpt = find_gpt(model)
    stem, _, rest = _local(name, prefix).partition(".")
    if stem == "blocks":
        return len(gpt.blocks) - int(rest.partition(".")[0])
    return len(gpt.blocks) + 1 if stem in ("tok_emb", "pos_emb") else 0


def _local(name: str, prefix: str) -> str:
    return name.removeprefix(prefix)
