"""What a model makes of a text that is given: log-probabilities of its tokens, embeddings, attention.

Shapes: T tokens, C d_model, V vocabulary, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..model import GPT
from .engine import Token, described

CHUNK = 64  # rows of logits at one time


def prompt_logprobs(ids: Sequence[int], wanted: int) -> Callable[[GPT], list[Token]]:
    """Each token but the first, given all before it, with the `wanted` likeliest at its place."""

    @torch.inference_mode()
    def run(model: GPT) -> list[Token]:
        if len(ids) < 2:
            return []
        hidden_TC = model.hidden(torch.tensor([ids[:-1]], device=model.tok_emb.weight.device))[0]
        found = []
        for start in range(0, len(hidden_TC), CHUNK):
            logits_TV = model.logits(hidden_TC[start : start + CHUNK])
            targets = ids[start + 1 : start + 1 + CHUNK]
            found += [described(token, logits_V, wanted) for token, logits_V in zip(targets, logits_TV, strict=True)]
        return found

    return run


def embedding(ids: Sequence[int], pooling: str) -> Callable[[GPT], list[float]]:
    """The last hidden states [T, C] of a text as one vector [C]: their mean, or the last one. Not normalised."""

    @torch.inference_mode()
    def run(model: GPT) -> list[float]:
        hidden_TC = model.hidden(torch.tensor([ids], device=model.tok_emb.weight.device))[0].float()
        vector_C = hidden_TC.mean(dim=0) if pooling == "mean" else hidden_TC[-1]
        values: list[float] = vector_C.tolist()
        return values

    return run
