"""`LoadPlan`: where each parameter comes from and through which op, decided from the header before any byte is read.

A pure function of (config, header, table). Missing, unused, mismatched and doubly claimed tensors are problems, and a
plan with a problem is not loaded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

from ..checkpoint.base import TensorInfo
from ..checkpoint.wording import few
from ..config import GPTConfig
from ..errors import PlanError
from .canonical import Shape, parameter_shapes
from .ops import Op, apply_shapes
from .rules import Rule, WeightMap

# What programs put before a model's own names: DistributedDataParallel, torch.compile, HuggingFace's and others' heads.
WRAPPERS = ("module.", "_orig_mod.", "transformer.", "model.", "base_model.", "gpt.", "gpt_neox.")

GIVEN_UP = "given up by the caller"


def unwrap(name: str, weight_map: WeightMap | None = None) -> tuple[str, str]:
    """(name without wrappers, the wrappers removed). They nest in any order: `_orig_mod.module.wte.weight`.

    With a table, a name that it calls a synonym comes out as the table's own.
    """
    start, found = 0, True
    while found:
        found = False
        for wrapper in WRAPPERS:
            if name.startswith(wrapper, start) and len(name) > start + len(wrapper):
                start, found = start + len(wrapper), True
    stem = name[start:]
    return (weight_map.synonyms.get(stem, stem) if weight_map else stem), name[:start]


@dataclass(frozen=True)
class Step:
    """One tensor of the file on its way to one or more parameters."""

    source: str
    targets: tuple[str, ...]
    ops: tuple[Op, ...]
    source_shape: Shape
    target_shapes: tuple[Shape, ...]
    dtype: str


@dataclass(frozen=True)
class Mismatch:
    """A tensor whose shape is not the one that the config asks for."""

    source: str
    expected: Shape
    found: Shape


@dataclass
class LoadPlan:
    """Every parameter's origin, or why it has none.

    Attributes:
        config, weight_map: what was planned with.
        steps: tensor -> parameters, in the table's order.
        ignored: tensor -> why it is no parameter (mask buffers, optimizer slots, names that the caller gave up).
        missing: parameter -> the name that the dialect would use for it.
        unused: tensors of the file that nothing claims.
        mismatched: tensors of the wrong shape.
        doubled: parameter or stem -> the tensors that all claim it.
        prefixes: wrapper removed -> on how many names.
        tie: how the head and the embedding hang together, for the report.
        duplicate_head: a stored tensor that must equal the embedding, because the config says they are one.
        orientation: evidence on how linear weights lie in the file: (matrices that agree, matrices that could tell).
    """

    config: GPTConfig
    weight_map: WeightMap
    steps: list[Step] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    mismatched: list[Mismatch] = field(default_factory=list)
    doubled: dict[str, list[str]] = field(default_factory=dict)
    prefixes: dict[str, int] = field(default_factory=dict)
    tie: str = "head is a parameter of its own"
    duplicate_head: str | None = None
    orientation: tuple[int, int] = (0, 0)

    @property
    def clean(self) -> bool:
        return not (self.missing or self.unused or self.mismatched or self.doubled)

    def problems(self) -> list[str]:
        """One sentence per kind of problem; empty if the plan is clean."""
        found = []
        if self.doubled:
            pairs = [f"{stem} by {' and '.join(names)}" for stem, names in self.doubled.items()]
            found.append(f"claimed twice: {few(pairs)}")
        if self.mismatched:
            pairs = [f"{m.source} should be {list(m.expected)}, is {list(m.found)}" for m in self.mismatched]
            found.append(f"wrong shape: {few(pairs)}{self._transposed_hint()}")
        if self.missing:
            found.append(f"missing {len(self.missing)}: {few([self._missing(target) for target in self.missing])}")
        if self.unused:
            found.append(f"unused {len(self.unused)}: {few(self.unused)}{self._classifier_hint()}")
        return found

    def require_clean(self, where: str) -> None:
        """Raise PlanError with every problem, unless there is none."""
        if not self.clean:
            raise PlanError(
                f"{where}: the tensors do not fill a {self.weight_map.name} model of {self.config.n_layers} layers. "
                + "; ".join(self.problems())
                + ". Nothing was loaded. `loadstone plan` shows every tensor; a tensor that you know to be superfluous "
                "can be named with --ignore NAME."
            )

    def _missing(self, target: str) -> str:
        source = self.missing[target]
        near = get_close_matches(source, self.unused, n=1, cutoff=0.85)
        return source + (f" (is {near[0]} a misspelling of it?)" if near else "")

    def _classifier_hint(self) -> str:
        if self.unused != ["score.weight"]:
            return ""
        return (
            " (the last layer of a classifier: `loadstone classify` runs it, and --ignore score.weight takes the "
            "language model below it)"
        )

    def _transposed_hint(self) -> str:
        turned = [m for m in self.mismatched if m.found == m.expected[::-1] and m.found != m.expected]
        if not turned:
            return ""
        return (
            f". {len(turned)} of these would fit if they were transposed: this file does not store its matrices "
            f"{self.weight_map.orientation}, as {self.weight_map.name} does; the square ones are turned too, which "
            "no shape shows"
        )


def make_plan(
    config: GPTConfig,
    tensors: Mapping[str, TensorInfo],
    weight_map: WeightMap,
    *,
    aliases: Mapping[str, str] | None = None,
    ignore: Iterable[str] = (),
) -> LoadPlan:
    """Plan the load of `tensors` (a header) into a model of `config` through `weight_map`.

    Args:
        config, tensors, weight_map: what, from what, by which table.
        aliases: tensor -> the one whose bytes it shares, as the file records its ties.
        ignore: exact names of tensors that the caller gives up.
    """
    plan = LoadPlan(config, weight_map)
    dropped = set(ignore)
    by_stem: dict[str, list[str]] = defaultdict(list)
    for name in tensors:
        if name in dropped:
            plan.ignored[name] = GIVEN_UP
            continue
        stem, prefix = unwrap(name, weight_map)
        by_stem[stem].append(name)
        if prefix:
            plan.prefixes[prefix] = plan.prefixes.get(prefix, 0) + 1
    plan.doubled = {stem: names for stem, names in by_stem.items() if len(names) > 1}
    header = {stem: names[0] for stem, names in by_stem.items()}

    claimed = _plan_head(plan, header, tensors, aliases or {})
    parameters = parameter_shapes(config)
    usual = next((prefix for prefix, count in plan.prefixes.items() if 2 * count > len(tensors)), "")
    for rule in weight_map.needed(config, parameters):
        if rule.source in claimed:
            continue
        if rule.source not in header:
            plan.missing |= dict.fromkeys(rule.target, usual + rule.source)
            continue
        claimed.add(rule.source)
        _plan_step(plan, rule, header[rule.source], tensors[header[rule.source]], parameters)
    _classify_rest(plan, {stem: name for stem, name in header.items() if stem not in claimed}, tensors)
    return plan


def _plan_step(plan: LoadPlan, rule: Rule, name: str, info: TensorInfo, parameters: Mapping[str, Shape]) -> None:
    wanted = tuple(parameters[target] for target in rule.target)
    (expected,) = apply_shapes(rule.ops, wanted, plan.config, inverse=True)
    if info.shape != expected:
        plan.mismatched.append(Mismatch(name, expected, info.shape))
    is_linear = any(part in rule.target[0] for part in (".attn.", ".mlp.")) and len(expected) >= 2
    if is_linear and expected[-1] != expected[-2]:
        agree, able = plan.orientation
        plan.orientation = (agree + (info.shape == expected), able + 1)
    plan.steps.append(Step(name, rule.target, rule.ops, expected, wanted, info.dtype))


def _plan_head(
    plan: LoadPlan, header: Mapping[str, str], tensors: Mapping[str, TensorInfo], aliases: Mapping[str, str]
) -> set[str]:
    """Settle the head of a tied model; returns the stems that are dealt with.

    The embedding may be stored under its own name, under the head's, under both as one (an alias), or under both as two
    copies, which must then be equal.
    """
    embedding, head = str(plan.weight_map.source_of("tok_emb.weight")), plan.weight_map.source_of("head.weight")
    if not plan.config.tied:
        return set()
    plan.tie = "head is the embedding (tied); stored once"
    if head is None or head not in header:
        return set()
    head_name = header[head]
    if embedding not in header:
        plan.tie = f"head is the embedding (tied); stored once, as {head_name}"
        shape = parameter_shapes(plan.config)["tok_emb.weight"]
        _plan_step(plan, Rule(head, ("tok_emb.weight",)), head_name, tensors[head_name], {"tok_emb.weight": shape})
        return {head, embedding}
    embedding_name = header[embedding]
    if tensors[head_name].shape != tensors[embedding_name].shape:
        plan.mismatched.append(Mismatch(head_name, tensors[embedding_name].shape, tensors[head_name].shape))
        return {head}
    if aliases.get(head_name) == embedding_name or aliases.get(embedding_name) == head_name:
        plan.tie = f"head is the embedding (tied); {head_name} and {embedding_name} are one storage"
    else:
        plan.tie = f"head is the embedding (tied); {head_name} is a second copy, compared on load"
        plan.duplicate_head = head_name
    return {head}


def _classify_rest(plan: LoadPlan, rest: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    """Buffers and optimizer slots are set aside with their reason; everything else is unused."""
    ignores = plan.weight_map.ignores(plan.config.n_layers)
    for stem, name in rest.items():
        entry = ignores.get(stem)
        if entry and entry.fits(tensors[name].shape):
            plan.ignored[name] = entry.reason
        else:
            plan.unused.append(name)
