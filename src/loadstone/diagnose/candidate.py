"""`Candidate`: one legal repair of one point, and `Suspect`: what the generators of candidates look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import GPTConfig
from ..weightmap import apply
from ..weightmap.plan import Step
from .bench import Bench, State
from .points import split

QKV = ("attn.q", "attn.k", "attn.v")


@dataclass(frozen=True)
class Candidate:
    """A repair that could explain why a point differs.

    Attributes:
        text: what is wrong, with `{tensors}` for the names in the file.
        tensors: canonical names of the parameters that are at fault; empty if the config is.
        parameters: canonical name -> its repaired values.
        config: fields with their repaired values.
        others: more parameters to repair with it, in other layers; made only when the point itself fits.
    """

    text: str
    tensors: tuple[str, ...] = ()
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    others: Callable[[], Mapping[str, Tensor]] | None = None


@dataclass(frozen=True)
class Suspect:
    """A point that differs although its inputs agree."""

    bench: Bench
    state: State
    point: str

    @property
    def config(self) -> GPTConfig:
        return self.state.config

    @property
    def block(self) -> str:
        return split(self.point)[0]

    @property
    def part(self) -> str:
        return split(self.point)[1]

    @property
    def stem(self) -> str:
        """What the point's parameters are called, without `.weight`."""
        if self.part != "logits":
            return self.point
        return "tok_emb" if self.config.tied else "head"

    @property
    def weight(self) -> Tensor:
        return self.state.weights.need(f"{self.stem}.weight")

    @property
    def bias(self) -> Tensor | None:
        return self.state.weights(f"{self.stem}.bias")

    @property
    def inputs(self) -> Tensor:
        """Of a linear layer or the head: [N, in]."""
        from .points import inputs_of

        return self.bench.rows[inputs_of(self.point, self.config)[0]]

    @property
    def missing(self) -> Tensor:
        """What the reference has and the model has not, [N, width]; of a padded vocabulary the common columns."""
        ours = self.bench.output(self.point, self.state)
        theirs = self.bench.inputs(self.point)[self.point]
        common = min(ours.shape[1], theirs.shape[1])
        return theirs[:, :common] - ours[:, :common]

    def parameters_of(self, stem: str) -> dict[str, Tensor]:
        """Weight and bias of a module, as far as it has them, by what follows the stem."""
        found = {leaf: self.state.weights(f"{stem}.{leaf}") for leaf in ("weight", "bias")}
        return {leaf: value for leaf, value in found.items() if value is not None}

    def layers(self) -> Iterator[int]:
        """All other layers, the nearest first."""
        own = int(self.block.removeprefix("blocks."))
        yield from sorted((n for n in range(self.config.n_layers) if n != own), key=lambda n: abs(n - own))


def exchange(
    suspect: Suspect, stems: Mapping[str, str], leaves: tuple[str, ...] = ("weight", "bias")
) -> dict[str, Tensor]:
    """Parameters after giving each module of `stems` (module -> whose values it should have) the other's.

    Empty if they do not have the same parameters in the same shapes.
    """
    found: dict[str, Tensor] = {}
    for module, other in stems.items():
        ours, theirs = suspect.parameters_of(module), suspect.parameters_of(other)
        shapes = [{leaf: values[leaf].shape for leaf in leaves if leaf in values} for values in (ours, theirs)]
        if shapes[0] != shapes[1]:
            return {}
        found |= {f"{module}.{leaf}": theirs[leaf] for leaf in shapes[1]}
    return found


def swap(a: str, b: str) -> dict[str, str]:
    return {a: b, b: a}


def in_file(suspect: Suspect, step: Step) -> np.ndarray[Any, Any]:
    """One of the file's tensors, made again from the (perhaps repaired) parameters."""
    arrays = [suspect.state.weights.need(target).numpy() for target in step.targets]
    return apply(step.ops, arrays, suspect.config, inverse=True)[0]


def from_file(array: np.ndarray[Any, Any], step: Step, config: GPTConfig) -> dict[str, Tensor]:
    """The parameters that a tensor of the file becomes under `config`."""
    parts = apply(step.ops, [array], config)
    return {t: torch.from_numpy(np.ascontiguousarray(p)) for t, p in zip(step.targets, parts, strict=True)}
