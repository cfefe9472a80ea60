"""How much a model loses if one tensor alone is rounded: an estimate for every tensor and block type from one pass.

Close to the trained weights the divergence from the old model is KL = 1/2 d^T F d nats per token, with d the change of
the weights and F the Fisher information, which is E[g g^T] for the gradients g of the log-probability of tokens *drawn
from the model itself*. So a row of tokens needs one backward pass, and (g . d)^2 is one observation for every d at
once.

*Others*: sensitivity scans quantise one layer at a time and evaluate (as many evaluations as layers and types); the
output error of a layer says nothing about what the rest of the model makes of it.

Shapes: T tokens, V vocabulary; N observations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model import GPT
from .grid import Rounded

Progress = Callable[[int, int], None]
ROW, ROWS = 128, 32  # tokens of a row, rows: the estimates have a relative error of some sqrt(2 / ROWS)


def sensitivities(
    model: GPT,
    candidates: Mapping[str, Mapping[str, Rounded]],
    ids_BT: Tensor,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, dict[str, float]]:
    """Parameter -> type -> estimated KL(model || model with this parameter rounded), nats per token.

    Args:
        candidates: parameter -> type -> the rounded matrix.
        ids_BT: contexts; cut into rows of at most ROW tokens, of which ROWS are taken.
    """
    rows = _short_rows(ids_BT)
    generator = torch.Generator().manual_seed(seed)
    parameters = {name: model.get_parameter(name) for name in candidates}
    sums = {name: dict.fromkeys(kinds, 0.0) for name, kinds in candidates.items()}
    for done, ids_T in enumerate(rows, 1):
        gradients = _gradients(model, list(parameters.values()), ids_T, generator)
        for (name, weight), gradient in zip(parameters.items(), gradients, strict=True):
            for kind, rounded in candidates[name].items():
                moved = float((gradient * (rounded.values() - weight.detach())).sum())
                sums[name][kind] += moved * moved
        if progress:
            progress(done, len(rows))
    count = 2 * rows.shape[0] * rows.shape[1]
    return {name: {kind: value / count for kind, value in each.items()} for name, each in sums.items()}


def _gradients(model: GPT, parameters: list[Tensor], ids_T: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Of the sum of the log-probabilities of tokens that are drawn, one behind each of the row's tokens."""
    with torch.inference_mode(False), torch.enable_grad():
        logits_TV = model(ids_T[None])[0].float()
        drawn_T = torch.multinomial(logits_TV.detach().softmax(-1), 1, generator=generator)[:, 0]
        loss = F.cross_entropy(logits_TV, drawn_T, reduction="sum")
        return torch.autograd.grad(loss, parameters)


def _short_rows(ids_BT: Tensor) -> Tensor:
    """[N, T]: evenly spread pieces of the rows."""
    length = min(ROW, ids_BT.shape[1])
    pieces = ids_BT[:, : ids_BT.shape[1] // length * length].reshape(-1, length)
    if len(pieces) <= ROWS:
        return pieces
    return pieces[torch.linspace(0, len(pieces) - 1, ROWS).long()]
