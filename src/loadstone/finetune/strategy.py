"""Fine-tuning strategies as data: which parameters learn from when on, and how fast.

What is trainable is a function of the step alone. Lightning's `BaseFinetuning` unfreezes when an epoch *begins*, so a
resumed run stays frozen (issue 21901) or finds other parameter groups (6891); fast.ai keeps a frozen parameter's
gradient at zero, where weight decay and momentum move it on. transformers, litgpt and LlamaFactory have no schedule,
and none of them minds that freezing the embeddings of a tied GPT-2 freezes its head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ..checkpoint.wording import shown
from ..errors import ConfigError
from ..model import Linear
from .selectors import Parts, depth, find_gpt

UNITS = ("step", "epoch")


@dataclass(frozen=True)
class Phase:
    """From a start on, `train` learns as well. What an earlier phase trains goes on learning."""

    at: int  # steps or epochs done before it begins
    unit: str  # one of UNITS
    train: tuple[str, ...]  # selectors

    def __post_init__(self) -> None:
        for name, good, wanted in (
            ("at", type(self.at) is int and 0 <= self.at < 10**15, "a whole number of steps or epochs"),
            ("unit", self.unit in UNITS, " or ".join(UNITS)),
            ("train", bool(self.train) and all(isinstance(s, str) and s for s in self.train), "at least one selector"),
        ):
            if not good:
                raise ConfigError(f"strategy: a phase's {name} must be {wanted}, found {shown(getattr(self, name))}.")

    def __str__(self) -> str:
        return f"{self.at}{'ep' if self.unit == 'epoch' else ''}:{','.join(self.train)}"

    def start(self, steps_per_epoch: int | None) -> int:
        """The step at which it begins."""
        if not self.at or self.unit == "step":
            return self.at
        if not steps_per_epoch or steps_per_epoch < 1:
            raise ConfigError(f"strategy: {self} begins by epoch, and this data has no whole step in one. Use steps.")
        return self.at * steps_per_epoch

    @classmethod
    def from_json(cls, values: Any) -> Phase:
        """From a mapping with `at`, `train` and, unless it is `step`, `unit`. Raises ConfigError for anything else."""
        if not isinstance(values, Mapping) or not {"at", "train"} <= values.keys() <= {"at", "unit", "train"}:
            raise ConfigError(f"strategy: a phase has at, unit and train, found {shown(values)}.")
        train = values["train"]
        words = [word.strip() for word in train.split(",")] if isinstance(train, str) else train
        if not isinstance(words, Sequence):
            raise ConfigError(f"strategy: a phase's train must be a list of selectors, found {shown(train)}.")
        return cls(values["at"], values.get("unit", "step"), tuple(words))


@dataclass(frozen=True)
class Strategy:
    """Phases, and what else a strategy decides. `presets.strategy_for` makes one of what a user writes.

    Attributes:
        phases: the first begins at 0; each adds to those before it.
        layer_decay: the learning rate of a layer relative to the one above it.
        untie: the loop calls `untie(model)` before it builds the optimizer.
    """

    phases: tuple[Phase, ...]
    layer_decay: float = 1.0
    untie: bool = False

    def __post_init__(self) -> None:
        if not self.phases or self.phases[0].at:
            raise ConfigError(
                "strategy: the first phase must begin at 0, or nothing would learn before it; found "
                f"{shown(str(self))}."
            )
        for unit in UNITS:
            _require_order([(phase, phase.at) for phase in self.phases if phase.unit == unit])
        if not (type(self.layer_decay) in (int, float) and 0 < self.layer_decay <= 1):
            raise ConfigError(f"layer_decay must be above 0 and at most 1, found {shown(self.layer_decay)}.")
        if not isinstance(self.untie, bool):
            raise ConfigError(f"untie must be true or false, found {shown(self.untie)}.")

    def __str__(self) -> str:
        return ";".join(map(str, self.phases))

    def phase(self, step: int, steps_per_epoch: int | None) -> int:
        """Index of the phase that step number `step` (counted from 0) belongs to."""
        starts = [(phase, phase.start(steps_per_epoch)) for phase in self.phases]
        _require_order(starts)
        return sum(start <= step for _, start in starts) - 1

    def trainable(self, model: nn.Module, step: int, steps_per_epoch: int | None) -> frozenset[str]:
        """Names of the parameters that learn in step number `step`."""
        return self.trained(Parts.of(model, untie=self.untie), self.phase(step, steps_per_epoch))

    def ever_trainable(self, model: nn.Module) -> frozenset[str]:
        """Names of what the last phase trains, which is all that learns at any time: what an optimizer must hold."""
        return self.trained(Parts.of(model, untie=self.untie), len(self.phases) - 1)

    def apply(self, model: nn.Module, step: int, steps_per_epoch: int | None) -> bool:
        """Set `requires_grad` for step number `step`; True if anything changed.

        A frozen parameter's gradient becomes None, not zero: torch's optimizers skip it then, weight decay, moments and
        step count included. So the optimizer may hold everything from the start, and what is unfrozen later begins
        afresh, as long as `zero_grad(set_to_none=True)` (torch's default) clears the gradients.
        """
        wanted, changed = self.trainable(model, step, steps_per_epoch), False
        named = dict(model.named_parameters())
        if not wanted <= named.keys():
            raise ConfigError("strategy: it trains a head that this model ties to its embedding: untie(model) first.")
        for name, parameter in named.items():
            if parameter.requires_grad != (name in wanted):
                parameter.requires_grad_(name in wanted)
                changed = True
            if name not in wanted:
                parameter.grad = None
        return changed

    def lr_scale(self, model: nn.Module, name: str) -> float:
        """Factor on a parameter's learning rate: layer_decay to the power of its distance from the top."""
        return float(self.layer_decay ** depth(model, name))

    def check(self, model: nn.Module) -> None:
        """Raises ConfigError if a phase selects what the model does not have, adds nothing, or contradicts a tie."""
        parts, before = Parts.of(model, untie=self.untie), frozenset[str]()
        if self.untie and parts.has("score"):
            raise ConfigError("strategy: a classifier has no language-model head that could be untied. Leave it out.")
        for index, phase in enumerate(self.phases):
            trained = self.trained(parts, index)
            if trained == before:
                raise ConfigError(
                    f"strategy: phase {index + 1} ({phase}) adds nothing: all that it names learns already. Phases "
                    "add up, and nothing is frozen again. Leave it out."
                )
            before = trained

    def trained(self, parts: Parts, index: int) -> frozenset[str]:
        """Names of what learns in a phase, that of the phases before it included."""
        words = [word for phase in self.phases[: index + 1] for word in phase.train]
        chosen = {word: parts.select(word) for word in words}
        embedding = f"{parts.prefix}tok_emb.weight"
        if parts.tied and "head" in words and not any(embedding in chosen[word] for word in words if word != "head"):
            raise ConfigError(
                f"strategy: phase {index + 1} ({self.phases[index]}) trains the head and not the token embedding, but "
                f"in this model they are one matrix (tied), of {parts.sizes[embedding]:,} parameters. Either let it "
                "learn as both: add `embeddings` to the phase; or untie them first (`--untie`, or untie=True): the "
                "head becomes a copy of its own. To leave both frozen, take `head` out."
            )
        return frozenset().union(*chosen.values())

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "phases": [{**asdict(phase), "train": list(phase.train)} for phase in self.phases]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Strategy:
        """The inverse of `to_json`. Raises ConfigError for anything else."""
        phases = values.get("phases") if isinstance(values, Mapping) else None
        if not isinstance(phases, Sequence) or values.keys() - {"phases", "layer_decay", "untie"}:
            raise ConfigError(f"strategy: expected phases, layer_decay and untie, found {shown(values)}.")
        return cls(**{**values, "phases": tuple(map(Phase.from_json, phases))})

    def describe(self, model: nn.Module) -> str:
        """What each phase adds; then each part of the model, its size, its rate and when it begins to learn."""
        parts = Parts.of(model, untie=self.untie)
        trained = [self.trained(parts, index) for index in range(len(self.phases))]
        total, lines = sum(parts.sizes.values()), []
        for index, (phase, names) in enumerate(zip(self.phases, trained, strict=True)):
            count = sum(parts.sizes[name] for name in names)
            adds = f"phase {index + 1}, from {phase.unit} {phase.at}: {'and ' * bool(index)}{', '.join(phase.train)}"
            lines.append(f"{adds}; {count:,} of {total:,} parameters learn ({count / total:.1%})")
        rows = [("", "parameters", "rate", "learns"), *self._rows(model, parts, trained)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for label, size, rate, begins in rows:
            lines.append(f"{label:<{widths[0]}}  {size:>{widths[1]}}  {rate:<{widths[2]}}  {begins}")
        learns = any(f"{parts.prefix}tok_emb.weight" in names for names in trained)
        tie = f"head: it is tok_emb (tied) and {'learns' if learns else 'stays frozen'} with it"
        return "\n".join(lines + [tie] * parts.tied)

    def _rows(
        self, model: nn.Module, parts: Parts, trained: Sequence[frozenset[str]]
    ) -> Iterator[tuple[str, str, str, str]]:
        """A row for each part of the model that begins to learn at one time; blocks that do so are one row."""
        groups: dict[tuple[str, str], list[str]] = {}
        for name in parts.sizes:
            begins = next((f"from phase {index + 1}" for index, names in enumerate(trained) if name in names), "never")
            groups.setdefault((parts.group(name), begins), []).append(name)
        for (group, begins), names in groups.items():
            rates = sorted({f"{self.lr_scale(model, name):.3g}" for name in names}, key=float)
            rate = "" if begins == "never" else " to ".join(dict.fromkeys((rates[0], rates[-1])))
            yield parts.label(group, names), f"{sum(parts.sizes[name] for name in names):,}", rate, begins


@torch.no_grad()
def untie(model: nn.Module) -> bool:
    """Give the model a head of its own, a copy of the token embedding; False if it has one. The logits stay the same.

    Config and files follow: HuggingFace says `tie_word_embeddings: false` and stores `lm_head.weight`.
    """
    _, gpt = find_gpt(model)
    if gpt.head is not None:
        return False
    weight = gpt.tok_emb.weight
    with torch.device("meta"):
        head = Linear(weight.shape[1], weight.shape[0], bias=False)
    head.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    gpt.head = head.train(gpt.training)
    gpt.config = gpt.config.with_overrides({"tied": False})
    return True


def _require_order(starts: Sequence[tuple[Phase, int]]) -> None:
    for (first, begin), (second, later) in pairwise(starts):
        if later <= begin:
            raise ConfigError(
                f"strategy: the phases are out of order: {second} begins at {later}, and {first}, which stands before "
                f"it, at {begin}."
            )
