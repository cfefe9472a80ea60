"""What is learnt: a task turns a batch into a sum of losses, and sums over an evaluation into figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ..data.batch import IGNORED, Batch
from ..model import GPT
from .losses import head_loss, perplexity


class Task(Protocol):
    """What the loop asks of a task. `model` is whatever the task trains: a GPT, or a module around one."""

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, int]:
        """Sum of the losses (a float32 scalar with a gradient), and over how many targets."""

    def score(self, model: Any, batch: Batch) -> dict[str, float]:
        """Sums over an evaluation batch; `loss` and `count` are always there."""

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Sums over all batches as figures; `val_loss` is always there, and lower is better."""


class LanguageModel:
    """Next tokens.

    Args:
        bytes_per_token: of the validation text, for bits per byte; None where nobody knows.
        compile: compile the step (torch.compile).
    """

    def __init__(self, bytes_per_token: float | None = None, *, compile: bool = False) -> None:
        self.bytes_per_token = bytes_per_token
        self._sum = torch.compile(sum_loss) if compile else sum_loss

    def loss(self, model: GPT, batch: Batch) -> tuple[Tensor, int]:
        return self._sum(model, batch.inputs, batch.targets, batch.segments), counted(batch)

    def score(self, model: GPT, batch: Batch) -> dict[str, float]:
        loss = sum_loss(model, batch.inputs, batch.targets, batch.segments)
        return {"loss": float(loss), "count": counted(batch)}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        loss = sums["loss"] / max(1.0, sums["count"])
        found = {"val_loss": loss, "perplexity": perplexity(loss), "val_tokens": sums["count"]}
        if self.bytes_per_token:
            found["bits_per_byte"] = loss / math.log(2) / self.bytes_per_token
        return found


def sum_loss(model: GPT, inputs_BT: Tensor, targets_BT: Tensor, segments_BT: Tensor | None) -> Tensor:
    """Sum of the cross entropies of a batch; the logits of all tokens at once never exist."""
    hidden_BTC = model.hidden(inputs_BT, segments_BT=segments_BT)
    weight_VC, bias_V = model.output
    return head_loss(hidden_BTC, weight_VC, targets_BT, bias_V)


def counted(batch: Batch) -> int:
    return int((batch.targets != IGNORED).sum())
