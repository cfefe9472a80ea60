"""`Bench`: one module at a time, fed with the reference's inputs and held against the reference's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..config import GPTConfig
from ..weightmap import Identity
from ..weightmap.plan import Step
from .points import Parameters, evaluate, execution_order, split
from .precision import loosest, precision
from .rounding import expected_error
from .trace import Trace

# Errors above these are no rounding of float32 arithmetic: at least ten times the largest that sound models gave
# (docs/diagnose.md). The softmax and sums over long rows magnify rounding.
TIGHT = 2e-5
ROUNDINGS = 6.0  # a column's error is at most so many times the standard deviation that rounding gives it
SCREEN = 100.0  # a first look over a few rows lets much more pass


@dataclass(frozen=True)
class State:
    """The model under suspicion, as it is or with repairs."""

    config: GPTConfig
    weights: Parameters

    def repaired(self, parameters: Mapping[str, Tensor], config: Mapping[str, Any]) -> State:
        found = self.config.with_overrides(config) if config else self.config
        return State(found, self.weights.with_repaired(parameters))


@dataclass(frozen=True)
class Error:
    """How far a point is from the reference: every row's difference as a part of that row's root mean square.

    Attributes:
        columns: the root mean square of that over all rows, per column.
    """

    columns: Tensor

    @property
    def worst(self) -> float:
        """Of the worst column, so that one wrong row of a large matrix is not diluted. NaN counts as infinite."""
        return float(torch.nan_to_num(self.columns, nan=torch.inf, posinf=torch.inf).max())


@dataclass
class Bench:
    """Inputs and outputs of every point, all prompts with activations together.

    Attributes:
        identity: the model under suspicion; its plan names the file's tensors.
        trace: the reference.
        rows: point -> [N, width], `ids` and `positions` among them; `logits` are the reference's.
        embedding_rows: the same for the embedding alone, of the long prompts too.
        lengths: rows of each prompt in `rows`.
    """

    identity: Identity
    trace: Trace
    rows: dict[str, Tensor] = field(default_factory=dict)
    embedding_rows: dict[str, Tensor] = field(default_factory=dict)
    lengths: Sequence[int] = ()

    def __post_init__(self) -> None:
        config = self.identity.config
        prompts = [p for p in self.trace.prompts if p.activations and len(p.ids) <= config.context_length]
        short = [p for p in prompts if len(p.activations) > 1]
        self.lengths = [len(p.ids) for p in short]
        points = set.intersection(*(set(p.activations) for p in short)) if short else set()
        self.rows = {point: torch.cat([p.activations[point] for p in short]) for point in points}
        if short:
            self.rows["logits"] = torch.cat([p.logits for p in short])
        self.embedding_rows = {
            "ids": torch.cat([p.ids for p in prompts]),
            "positions": torch.cat([torch.arange(len(p.ids)) for p in prompts]),
            "embedding": torch.cat([p.activations["embedding"] for p in prompts]),
        }
        self._widen_heads(config)
        self.step_of: dict[str, Step] = {t: step for step in self.identity.plan.steps for t in step.targets}
        self.lost = ""  # the coarser type to which tensors turned out to have been rounded

    def _widen_heads(self, config: GPTConfig) -> None:
        """A model whose key/value heads were copied for every query head is compared with copies of the reference's."""
        theirs = self.trace.config
        times = config.n_kv_heads * config.head_dim // (theirs.n_kv_heads * theirs.head_dim)
        if times > 1:
            for name in self.rows:
                if split(name)[1] in ("attn.k", "attn.v"):
                    heads = self.rows[name].view(-1, theirs.n_kv_heads, theirs.head_dim)
                    self.rows[name] = heads.repeat_interleave(times, 1).flatten(1)

    def name(self, target: str) -> str:
        """What the file calls a parameter; of a tensor that holds several, which part."""
        step = self.step_of.get(target)
        if step is None:
            return target
        part = target.split(".")[-2]
        return step.source if len(step.targets) == 1 else f"{step.source} ({part})"

    def points(self, state: State) -> list[str]:
        """The points that can be judged, in the order of execution."""
        return [name for name in execution_order(state.config) if name == "embedding" or name in self.rows]

    def inputs(self, name: str) -> dict[str, Tensor]:
        return self.embedding_rows if name == "embedding" else self.rows

    def output(self, name: str, state: State) -> Tensor:
        """What the model's module makes of the reference's inputs."""
        return evaluate(name, state.config, state.weights, self.inputs(name), self.lengths)

    def error(self, name: str, state: State) -> Error:
        ours, theirs = self.output(name, state), self.inputs(name)[name]
        common = min(ours.shape[1], theirs.shape[1])  # a vocabulary may be padded; other widths are equal
        ours, theirs = ours[:, :common], theirs[:, :common]
        return Error(((ours - theirs) / row_scale(theirs)).square().mean(0).sqrt())

    def screen(self, name: str, state: State) -> bool:
        """A quick look at a repair, at the shortest prompt alone: False if it cannot be right."""
        if name == "embedding" or len(self.lengths) < 2:
            return True
        error = self._shortest.error(name, state)
        return error.worst <= SCREEN * TIGHT or self._shortest.is_rounding(name, error, state, SCREEN)

    @cached_property
    def _shortest(self) -> Bench:
        """The same over the shortest prompt alone."""
        bench, count = copy(self), self.lengths[0]
        bench.rows = {name: value[:count] for name, value in self.rows.items()}
        bench.lengths = [count]
        return bench

    def agrees(self, name: str, error: Error, state: State) -> bool:
        """Whether a point is as the reference has it, as far as arithmetic and element types let one say."""
        return error.worst <= TIGHT or self.is_rounding(name, error, state, ROUNDINGS)

    def is_rounding(self, name: str, error: Error, state: State, times: float) -> bool:
        """Whether every column's error is at most so many times what the rounding of its weights explains."""
        own = {self.step_of[n].dtype for n in _weights_of(name, state.config) if n in self.step_of}
        types = own | {self.trace.stored}
        coarse = loosest(types) if len(types) > 1 else ""
        if self.lost and (not coarse or precision(coarse).rounding < precision(self.lost).rounding):
            coarse = self.lost
        if not coarse or (ratio := self.ratio(name, error, state, coarse)) is None:
            return False
        return bool((ratio <= times).all())

    def ratio(self, name: str, error: Error, state: State, dtype: str) -> Tensor | None:
        """Each column's error as a multiple of what rounding the weights to `dtype` gives; None without weights."""
        rows = self.inputs(name)
        expected = expected_error(name, state.config, state.weights, rows, dtype)
        if expected is None:
            return None
        expected = expected[:, : len(error.columns)] / row_scale(rows[name])
        return (error.columns - TIGHT).clamp_min(0) / expected.square().mean(0).sqrt().clamp_min(1e-12)


def row_scale(rows: Tensor) -> Tensor:
    """Root mean square of each row, [N, 1]."""
    return rows.square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)


def _weights_of(name: str, config: GPTConfig) -> tuple[str, ...]:
    if name == "embedding":
        return ("tok_emb.weight", "pos_emb.weight")
    if name == "logits":
        return ("tok_emb.weight" if config.tied else "head.weight",)
    return (f"{name}.weight",)
