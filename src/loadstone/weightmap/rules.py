"""`WeightMap`: one table per (architecture, dialect), pure data, read forward to import and backward to export.

A name template matches whole names or nothing: `h.{i}.attn.c_attn.bias` ends in `attn.bias` too, and a filter that
drops the mask buffers by that suffix drops twelve real biases.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from ..config import GPTConfig
from .ops import Op

LAYER, EXPERT = "{i}", "{e}"


@dataclass(frozen=True)
class Rule:
    """`source` of the file becomes the `target` parameters of the model through `ops`.

    `{i}` is the layer. `{e}` is an expert: a rule each where the source has it, else all experts' targets are one
    rule's.
    """

    source: str
    target: tuple[str, ...]
    ops: tuple[Op, ...] = ()

    def at(self, layer: int) -> Rule:
        """The rule with the layer number filled in."""
        number = str(layer)
        return Rule(self.source.replace(LAYER, number), tuple(t.replace(LAYER, number) for t in self.target), self.ops)

    def experts(self, count: int) -> Iterator[Rule]:
        """The rule for so many experts: itself if it has nothing to do with them."""
        if EXPERT in self.source:
            for number in map(str, range(count)):
                targets = tuple(t.replace(EXPERT, number) for t in self.target)
                yield Rule(self.source.replace(EXPERT, number), targets, self.ops)
        elif any(EXPERT in t for t in self.target):
            targets = tuple(t.replace(EXPERT, str(e)) for e in range(count) for t in self.target)
            yield Rule(self.source, targets, self.ops)
        else:
            yield self

    @property
    def per_layer(self) -> bool:
        return LAYER in self.source


@dataclass(frozen=True)
class Ignore:
    """A tensor that is no parameter, and why. `{p}` stands for any name that a rule of the table claims.

    `kind` says what shape such a tensor has, so that a real parameter under the same name is not dropped: `mask` is
    [..., T, T], `scalar` has one element, `vector` one dimension, `any` is not checked. `written`: the program's strict
    loading asks for it, so an export holds it (masks only: ones above the diagonal).
    """

    source: str
    reason: str
    kind: str = "any"
    written: bool = False

    def fits(self, shape: tuple[int, ...]) -> bool:
        if self.kind == "mask":
            return len(shape) >= 2 and shape[-1] == shape[-2] and all(dim == 1 for dim in shape[:-2])
        if self.kind == "scalar":
            return all(dim == 1 for dim in shape)
        return len(shape) == 1 if self.kind == "vector" else True


@dataclass(frozen=True)
class WeightMap:
    """One dialect of one architecture.

    Attributes:
        architecture, dialect: what the table is called.
        rules: which tensor becomes which parameters, by names without the wrappers (`model.`) that `unwrap` takes
            off. Targets are disjoint: a double claim is refused at construction.
        ignored: buffers and optimizer slots.
        orientation: how the file stores linear weights, for the report: "[out, in]" or "[in, out]".
        prefix: what the dialect's own program writes before every name but the head's.
        shares_head: a tied head is written too, as a second name of the embedding's bytes, because the program's
            strict loading asks for it.
        synonyms: another name -> the rule's, where a program changed one.
    """

    architecture: str
    dialect: str
    rules: tuple[Rule, ...]
    ignored: tuple[Ignore, ...] = ()
    orientation: str = "[out, in]"
    prefix: str = ""
    shares_head: bool = False
    synonyms: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for side in ([rule.source for rule in self.rules], [t for rule in self.rules for t in rule.target]):
            if twice := {name for name in side if side.count(name) > 1}:
                raise ValueError(f"{self.architecture}/{self.dialect}: claimed twice: {', '.join(sorted(twice))}")

    @property
    def name(self) -> str:
        return f"{self.architecture}/{self.dialect}"

    def source_of(self, target: str) -> str | None:
        """The dialect's name (or template) for one parameter, if it has one."""
        return next((rule.source for rule in self.rules if target in rule.target), None)

    def written_name(self, rule: Rule) -> str:
        """The whole name under which the dialect's own program stores what `rule` claims."""
        return rule.source if rule.target[0].startswith("head.") else self.prefix + rule.source

    def expand(self, n_layers: int, n_experts: int = 0) -> Iterator[Rule]:
        """Every rule for a model of so many layers and experts, in the order of the table."""
        once = [rule for rule in self.rules if not rule.per_layer]
        layered = [rule for rule in self.rules if rule.per_layer]
        yield from once
        for layer in range(n_layers):
            for rule in layered:
                yield from rule.at(layer).experts(n_experts)

    def needed(self, config: GPTConfig, parameters: Collection[str]) -> Iterator[Rule]:
        """The expanded rules whose targets this config has (a gate only with a gated MLP, biases only with biases)."""
        for rule in self.expand(config.n_layers, config.n_experts):
            if any(target in parameters for target in rule.target):
                yield rule

    def count_layers(self, names: Collection[str]) -> int:
        """Layers that have at least one tensor in `names`, counted from 0 without a gap."""
        layered = [rule for rule in self.rules if rule.per_layer]
        layer = 0
        while any(rule.at(layer).source in names for rule in layered):
            layer += 1
        return layer

    def count_experts(self, names: Collection[str]) -> int:
        """Experts of the first layer that have a tensor of their own in `names`."""
        one_by_one = [rule.at(0) for rule in self.rules if EXPERT in rule.source]
        count = 0
        while any(rule.source.replace(EXPERT, str(count)) in names for rule in one_by_one):
            count += 1
        return count

    def ignores(self, n_layers: int) -> dict[str, Ignore]:
        """Exact name -> why it is no parameter, for a model of so many layers."""
        found: dict[str, Ignore] = {}
        for entry in self.ignored:
            if "{p}" in entry.source:
                found |= {entry.source.replace("{p}", rule.source): entry for rule in self.expand(n_layers)}
            else:
                layers = range(n_layers) if LAYER in entry.source else range(1)
                found |= {entry.source.replace(LAYER, str(layer)): entry for layer in layers}
        return found
