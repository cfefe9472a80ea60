"""AdamW over named parameters, and its state as plain tensors that a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ..errors import LoadstoneError
from .settings import Settings

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class Optimizer:
    """Loshchilov & Hutter 2019 (arXiv:1711.05101), torch's fused function. Its class `AdamW` would import the compiler,
    two seconds of each start.

    Matrices and embeddings decay; vectors (biases, norms) do not. A parameter without gradient is skipped, decay
    included: a frozen one moves by exactly zero, and one that is unfrozen later begins with moments and a count of its
    own.

    Args:
        named: the parameters that are ever trained.
        lr_scale: the factor on the learning rate of a parameter, by name.
    """

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], settings: Settings, lr_scale: Callable[[str], float]
    ) -> None:
        self.named = dict(named)
        self._groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.named.items():
            decay = settings.weight_decay if parameter.dim() >= 2 else 0.0
            self._groups.setdefault((decay, lr_scale(name)), []).append(parameter)
        self._state: dict[nn.Parameter, dict[str, Tensor]] = {}
        self._betas, self._eps = (settings.beta1, settings.beta2), settings.eps
        self._clip = settings.clip or float("inf")

    def clip(self) -> Tensor:
        """Norm of all gradients together, before they were shortened to the limit."""
        return torch.nn.utils.clip_grad_norm_(self.named.values(), self._clip)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move the parameters at a learning rate, and forget their gradients."""
        beta1, beta2 = self._betas
        for (decay, scale), group in self._groups.items():
            moved = {p: p.grad for p in group if p.grad is not None}
            states = [self._state.get(p) or self._state.setdefault(p, _begin(p)) for p in moved]
            means, squares, steps = ([state[moment] for state in states] for moment in MOMENTS)
            adamw(
                list(moved), list(moved.values()), means, squares, [], steps, fused=True, amsgrad=False, beta1=beta1,
                beta2=beta2, lr=lr * scale, weight_decay=decay, eps=self._eps, maximize=False,
            )  # fmt: skip
        for parameter in self.named.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """`exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME` of each parameter that was ever moved."""
        state = self._state
        return {f"{m}.{name}": state[p][m] for name, p in self.named.items() if p in state for m in MOMENTS}

    def restore(self, saved: Iterable[tuple[str, Tensor]], part: Callable[[Tensor, Tensor], Tensor]) -> None:
        """The inverse.

        Args:
            saved: each tensor, whole, by its name.
            part: what of a tensor belongs to a parameter here, in memory of its own (see `World.part`).

        Raises LoadstoneError if a tensor is none of this optimizer's, or one is missing.
        """
        for key, tensor in saved:
            moment, _, name = key.partition(".")
            parameter = self.named.get(name)
            if parameter is None or moment not in MOMENTS or tensor.shape not in (parameter.shape, torch.Size()):
                raise LoadstoneError(
                    f"the saved optimizer holds {key} of shape {tuple(tensor.shape)}, which this model does not have. "
                    "The run was begun with another model or strategy; resume it with the command that began it."
                )
            self._state.setdefault(parameter, {})[moment] = part(tensor, parameter)
        for name, parameter in self.named.items():
            if 0 < len(self._state.get(parameter, ())) < len(MOMENTS):
                raise LoadstoneError(
                    f"the saved optimizer holds only {', '.join(self._state[parameter])} of {name}: the "
                    "checkpoint is damaged. Remove it to resume from the one before it."
                )


def _begin(parameter: nn.Parameter) -> dict[str, Tensor]:
    count = torch.zeros((), dtype=torch.float32, device=parameter.device)  # where the fused kernels want it
    return dict(zip(MOMENTS, (torch.zeros_like(parameter), torch.zeros_like(parameter), count), strict=True))
