"""From the scores of the next token to one token: greedy, temperature, top-k, top-p, min-p, repetition penalty.

The order is transformers': penalty, temperature, top-k, top-p, min-p; each filter sees what the one before left over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .errors import LoadstoneError

if TYPE_CHECKING:  # engines without torch use the settings
    import torch
    from torch import Tensor

NOT_FINITE = (
    "the model gives no finite score for the next token: its weights or its config are broken. `loadstone verify` "
    "tells which."
)
RANGE = np.finfo(np.float32)


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token. The default is greedy. Raises LoadstoneError for values without a meaning."""

    temperature: float = 0.0  # 0 takes the likeliest token; above 1 flattens, below 1 sharpens
    top_k: int | None = None  # keep the k likeliest
    top_p: float | None = (
        None  # keep the fewest whose probabilities add up to p (Holtzman et al. 2019, arXiv:1904.09751)
    )
    min_p: float | None = None  # keep those at least p times as likely as the likeliest (arXiv:2407.01082)
    repetition_penalty: float = 1.0  # divides positive and multiplies negative scores of tokens seen (arXiv:1909.05858)

    def __post_init__(self) -> None:
        for name, value, good, range_ in (
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "1 or more"),
            ("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p, self.min_p is None or 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < math.inf, "above 0"),
        ):
            if not good:
                raise LoadstoneError(f"{name} must be {range_}, found {value}.")


def choose(
    logits_BV: Tensor, histories: Sequence[Sequence[int]], sampling: Sampling, generators: Sequence[torch.Generator]
) -> list[int]:
    """One token id per row.

    Args:
        logits_BV: scores, any floating type; computed on in float32.
        histories: tokens so far of each row, for the repetition penalty.
        sampling: the settings.
        generators: one source of randomness per row, so that a row draws the same in a batch as alone.
    """
    import torch

    scores = logits_BV.float()
    highest = scores.amax(dim=-1, keepdim=True)
    if not torch.isfinite(highest).all():
        raise LoadstoneError(NOT_FINITE)
    if sampling.repetition_penalty != 1.0:
        # A penalty near 0 makes scores infinite, and their differences no numbers.
        scores = penalise(scores, histories, sampling.repetition_penalty).clamp(max=float(RANGE.max))
        highest = scores.amax(dim=-1, keepdim=True)
    if sampling.temperature < RANGE.tiny:  # what float32 takes for 0
        return [int(token) for token in scores.argmax(dim=-1)]
    # Below the highest score, so that a temperature near 0 makes -inf and not inf.
    probabilities = keep((scores - highest) / sampling.temperature, sampling).softmax(dim=-1)
    return [
        int(torch.multinomial(row, 1, generator=generator))
        for row, generator in zip(probabilities, generators, strict=True)
    ]


def penalise(scores_BV: Tensor, histories: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Make tokens that a row has seen less likely (more, if penalty < 1)."""
    import torch

    scores_BV = scores_BV.clone()
    for row, history in zip(scores_BV, histories, strict=True):
        seen = torch.tensor(sorted(set(history)), device=row.device, dtype=torch.long)
        row[seen] = torch.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
    return scores_BV


def keep(scores_BV: Tensor, sampling: Sampling) -> Tensor:
    """Scores with everything that top-k, top-p or min-p leaves out at -inf; the likeliest token always stays."""
    import torch

    if sampling.top_k is not None and sampling.top_k < scores_BV.shape[-1]:
        lowest = scores_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores_BV = scores_BV.masked_fill(scores_BV < lowest, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ranked, order = scores_BV.sort(dim=-1, descending=True, stable=True)
        probabilities = ranked.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities  # mass of the likelier ones
        beyond = before >= sampling.top_p
        beyond[:, 0] = False  # of a p that float32 takes for 0 too
        out = torch.zeros_like(beyond).scatter(-1, order, beyond)
        scores_BV = scores_BV.masked_fill(out, -torch.inf)
    if sampling.min_p:
        probabilities = scores_BV.softmax(dim=-1)
        least = sampling.min_p * probabilities.amax(dim=-1, keepdim=True)
        scores_BV = scores_BV.masked_fill(probabilities < least, -torch.inf)
    return scores_BV
