"""How far training moved each part of the model: the relative Frobenius norm of its change since the last look."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..finetune.selectors import find_gpt
from .world import World

_CHUNK = 1 << 20  # elements compared at a time, so that the float64 copies stay small


class UpdateTracker:
    """Remembers the weights of one moment, and measures what has become of them since.

    Memory: one more copy of all parameters, in their own type and on their own device.

    For an exact resume, save `state_dict(model)` with the checkpoint. It holds only the remembered weights that are no
    longer the model's: nothing where the checkpoint is written just after a measurement, and never a frozen weight.

    Where several processes train, each remembers and compares its own part of the weights; all must call alike.
    """

    def __init__(self, model: nn.Module, world: World | None = None) -> None:
        self._world = world or World()
        self._then = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, float]:
        """||now - then|| / ||then|| of each module group (Frobenius, summed in float64); then remember `model` anew.

        The groups, in the model's order: tok_emb, pos_emb, blocks.0.norm1, blocks.0.attn, blocks.0.norm2, blocks.0.mlp,
        ..., norm, head. Biases belong to their module. A tied head is the embedding, and has no group of its own.

        Returns exactly 0.0 for a group in which no weight changed. A group that was all zeros and is no longer has
        moved by 1.0: all that is there now is new. NaN where weights are not finite.
        """
        sums: dict[str, Tensor] = {}  # [2]: squares of the change, squares of what was there
        for name, group, now in _grouped(model):
            then = self._then[name]
            for squares in _squares(self._world.local(now), self._world.local(then)):
                sums[group] = sums[group] + squares if group in sums else squares
            then.copy_(now)
        everywhere = iter(self._world.sums([value for both in sums.values() for value in both.tolist()]))
        return {group: _ratio(math.sqrt(next(everywhere)), math.sqrt(next(everywhere))) for group in sums}

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """The remembered weights that differ from the model's."""
        local = self._world.local
        names = [name for name, _ in model.named_parameters()]
        moved = [not torch.equal(local(now), local(self._then[name])) for name, now in model.named_parameters()]
        everywhere = self._world.sums([float(flag) for flag in moved])
        return {name: self._then[name] for name, count in zip(names, everywhere, strict=True) if count}

    @torch.no_grad()
    def load_state_dict(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Remember what `state_dict` saved, and else the weights of `model`, which must be those of that moment."""
        for name, now in model.named_parameters():
            self._then[name].copy_(self._world.part(state[name], now) if name in state else now)


def learning(model: nn.Module) -> dict[str, float]:
    """Which share of each group's parameters learns now: 1.0, 0.0 if it is frozen, between them for an adapter, say."""
    learns: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for _, group, weight in _grouped(model):
        sizes[group] = sizes.get(group, 0) + weight.numel()
        learns[group] = learns.get(group, 0) + weight.numel() * weight.requires_grad
    return {group: learns[group] / size for group, size in sizes.items()}


def group_of(parameter: str) -> str:
    """`blocks.3.attn.q.weight` -> `blocks.3.attn`; `tok_emb.weight` -> `tok_emb`."""
    parts = parameter.split(".")
    return ".".join(parts[: 3 if parts[0] == "blocks" else 1])


def _grouped(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(name, group, parameter); what a wrapper, as a classifier, puts before the GPT's names is no part of a group."""
    prefix, _ = find_gpt(model)
    for name, weight in model.named_parameters():
        yield name, group_of(name.removeprefix(prefix)), weight


def _squares(now: Tensor, then: Tensor) -> Iterator[Tensor]:
    """Sums of squares of (now - then) and of then, [2] float64, chunk by chunk of rows."""
    rows = max(1, _CHUNK * len(then) // max(1, then.numel()))
    for new, old in zip(torch.split(now, rows), torch.split(then, rows), strict=True):
        a, b = _double(new), _double(old)
        yield torch.stack(((a - b).square().sum(), b.square().sum()))


def _double(x: Tensor) -> Tensor:
    return (x.cpu() if x.device.type == "mps" else x).double()  # Apple's GPUs have no float64


def _ratio(change: float, size: float) -> float:
    return change / (size or change or 1.0)  # from all zeros: the change is all that there is
