"""LoRA (Hu et al. 2021, arXiv:2106.09685): a frozen matrix W, and a small one, B A, that learns beside it.

The model's code and names stay: a `Linear` becomes a `LoRALinear` that holds the very same weight. PEFT wraps modules
(names get `base_model.model.` before and `.base_layer` within), litgpt has a second copy of its model for it; both add
the update in the weights' own type, where bf16 swallows most of it (unsloth issue 3091), and merging under a tie
damages a model when it is saved (PEFT 2972, transformers 45127). Here a tied head is refused beforehand.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint.wording import shown
from ..errors import ConfigError
from ..model import Linear
from .selectors import find_gpt

_IN_BLOCK: Mapping[str, str] = {
    **{name: f"attn.{name}" for name in ("q", "k", "v", "out")},
    **{name: f"mlp.{name}" for name in ("gate", "up", "down")},
}
_EXPERT = re.compile(r"mlp\.experts\.\d+\.")  # `gate`, `up` and `down` are every expert's; the router has no adapter
EVERY = "linear"  # the target that means all linear layers of the blocks
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class LoRA:
    """How an adapter is built.

    The default targets are all linear layers, which matches full fine-tuning where q and v alone do not (Dettmers et
    al. 2023, arXiv:2305.14314, figure 2).
    """

    rank: int = 8
    alpha: float = 16.0  # the update counts alpha / rank
    dropout: float = 0.0  # on the adapter's input, in training
    targets: tuple[str, ...] = (EVERY,)  # q, k, v, out, gate, up, down, head, or `linear`
    rslora: bool = False  # alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732)

    def __post_init__(self) -> None:
        known = (EVERY, *_IN_BLOCK, "head")
        for name, good, wanted in (
            ("rank", type(self.rank) is int and self.rank > 0, "a positive whole number"),
            ("alpha", type(self.alpha) in (int, float) and 0 < self.alpha < math.inf, "a positive number"),
            ("dropout", type(self.dropout) in (int, float) and 0 <= self.dropout < 1, "at least 0 and below 1"),
            ("rslora", isinstance(self.rslora, bool), "true or false"),
            ("targets", bool(self.targets), "at least one kind of layer"),
        ):
            if not good:
                raise ConfigError(f"lora: {name} must be {wanted}, found {shown(getattr(self, name))}.")
        if wrong := [target for target in self.targets if target not in known]:
            raise ConfigError(
                f"lora: {shown(wrong[0])} is no target; targets are {', '.join(known)}. Embeddings and norms have no "
                "adapter: train them whole, with a strategy such as `0:lora,embeddings`."
            )
        if self.dropout and "head" in self.targets:
            raise ConfigError("lora: the head's adapter is part of its matrix and knows no dropout. Leave one out.")

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoRALinear(Linear):
    """y = W x + b + scale * B A x. `weight` and `bias` are the base's own parameters, under their own names.

    A and B are float32 at least: an optimizer's small steps vanish in bf16.

    Attributes:
        lora_a: A, [rank, in]; uniform, as the authors' code has it.
        lora_b: B, [out, rank]; zero, so an adapter begins by changing nothing.
    """

    def __init__(self, base: Linear, settings: LoRA) -> None:
        with torch.device("meta"):  # no memory for what is replaced at once
            super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        for name, parameter in base.named_parameters():
            self._parameters[name] = parameter
        weight = base.weight
        kind = torch.promote_types(weight.dtype, torch.float32)
        self.lora_a = nn.Parameter(torch.empty(settings.rank, base.in_features, dtype=kind, device=weight.device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, settings.rank, dtype=kind, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.settings, self.scale, self.dropout = settings, settings.scale, settings.dropout
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.base, self.bias)
        x = F.dropout(x, self.dropout) if self.dropout and self.training else x
        update = F.linear(F.linear(x.to(self.lora_a.dtype), self.lora_a), self.lora_b)
        return y + (self.scale * update).to(y.dtype)

    @property
    def base(self) -> nn.Parameter:
        """W."""
        return self._parameters["weight"]  # type: ignore[return-value]

    def merged(self) -> Tensor:
        """W + scale * B A, [out, in], computed in float32 at least and given in W's type."""
        update = self.scale * (self.lora_b @ self.lora_a)
        return (self.base.to(self.lora_a.dtype) + update).to(self.base.dtype)


class LoRAHead(LoRALinear):
    """The untied head's. A fused loss uses its matrix without its `forward`, so `weight` itself has B A in it."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.merged()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def add_lora(model: nn.Module, settings: LoRA) -> list[str]:
    """Put an adapter beside every targeted layer and freeze all that is not the adapter; nothing else changes.

    Returns the names of the adapted layers. Raises ConfigError for targets that the model does not have, before
    anything was changed.
    """
    if next(adapted(model), None):
        raise ConfigError("lora: the model has an adapter already. Merge it first.")
    layers = target_layers(model, settings)
    model.requires_grad_(False)
    for name, layer in layers.items():
        _replace(model, name, (LoRAHead if name.endswith("head") else LoRALinear)(layer, settings))
    return list(layers)


def target_layers(model: nn.Module, settings: LoRA) -> dict[str, Linear]:
    """The layers that an adapter stands beside, by full name. Raises ConfigError for what the model does not have."""
    prefix, gpt = find_gpt(model)
    words = list(dict.fromkeys(settings.targets))
    if "gate" in words and not gpt.config.gated_mlp:
        raise ConfigError("lora: this model's MLP has no gate. Take it out of the targets.")
    if "head" in words and gpt.head is None:
        tied = "its head is the token embedding (tied), and an embedding has no adapter"
        raise ConfigError(f"lora: {tied}. Take `head` out of the targets, or untie the two first (`--untie`).")
    inside = {path for word, path in _IN_BLOCK.items() if word in words or EVERY in words}
    found = {
        f"{prefix}blocks.{i}.{name}": layer
        for i, block in enumerate(gpt.blocks)
        for name, layer in block.named_modules()
        if _EXPERT.sub("mlp.", name) in inside and isinstance(layer, Linear)
    }
    if "head" in words and gpt.head is not None:
        found[f"{prefix}head"] = gpt.head
    for name, layer in found.items():
        if settings.rank > min(layer.in_features, layer.out_features):
            raise ConfigError(
                f"lora: rank {settings.rank} is more than {name} has ({layer.out_features} x {layer.in_features}), so "
                "an adapter could do no more and would be larger. Choose a smaller rank."
            )
    return found


def kinds_of(names: Iterable[str]) -> tuple[str, ...]:
    """The targets that parameters belong to, by their names in our model; norms and embeddings belong to none."""
    ends = {f".{path}": word for word, path in (*_IN_BLOCK.items(), ("head", "head"))}
    stems = {_EXPERT.sub("mlp.", f".{name}".rpartition(".")[0]) for name in names}
    return tuple(word for end, word in ends.items() if any(stem.endswith(end) for stem in stems))


def adapted(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The layers that have an adapter."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


@dataclass(frozen=True)
class Merged:
    """What a merge did: layers, the update's norm relative to theirs, and the share of it that rounding took away.

    Norms are Frobenius norms over all layers. `lost` is next to nothing for float32 weights, and near 1 where small
    updates meet bf16 weights: merge in float32 then.
    """

    layers: int
    update: float
    lost: float


@torch.no_grad()
def merge(model: nn.Module) -> Merged:
    """Make the adapters part of the weights, in place; the model has plain `Linear`s and the base's names again.

    The weights are new tensors (a mapped file's pages stay shared and clean), in the base's type and `requires_grad`.
    """
    layers, squares = list(adapted(model)), torch.zeros(3, dtype=torch.float64)
    for name, layer in layers:
        base, weight = layer.base, layer.merged()
        exact, got = layer.scale * (layer.lora_b @ layer.lora_a), weight.to(layer.lora_a.dtype) - base
        for i, part in enumerate((base, exact, exact - got)):
            squares[i] += torch.linalg.vector_norm(part, dtype=layer.lora_a.dtype).double().cpu() ** 2
        with torch.device("meta"):
            plain = Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight, plain.bias = nn.Parameter(weight, requires_grad=base.requires_grad), layer.bias
        _replace(model, name, plain.train(layer.training))
    weights, update, lost = squares.sqrt().tolist()
    return Merged(len(layers), update / weights if weights else 0.0, lost / update if update else 0.0)


def merged_copy(model: Model) -> Model:
    """The model with its adapters merged, as a module of its own that shares all else: to save in mid-training."""
    # What deepcopy believes to have copied already it takes as it is.
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    merge(twin)
    return twin


def _replace(model: nn.Module, name: str, layer: Linear) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)
