"""What a model makes of a text that is given: log-probabilities of its tokens, embeddings, attention.

Each is a generator that reads a piece of the text, yields, and returns its result at the end, so that the running batch
takes its steps in between.

Shapes: T tokens, C d_model, V vocabulary, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import LoadstoneError
from ..model import GPT
from ..sampling import as_floats
from .answers import FailedError
from .batch import PIECE, Task, Token, described

CHUNK = 64  # rows of logits at one time


def prompt_logprobs(model: GPT, ids: Sequence[int], wanted: int) -> Task[list[Token]]:
    """Each token but the first, given all before it, with the `wanted` likeliest at its place."""
    found: list[Token] = []
    for start, hidden_TC in _read(model, ids[:-1]):
        for first in range(0, len(hidden_TC), CHUNK):
            logits_TV = model.logits(hidden_TC[first : first + CHUNK])
            _check(logits_TV.amax())
            pairs = zip(ids[start + first + 1 :], as_floats(logits_TV), strict=False)
            found += [described(token, logits_V, wanted) for token, logits_V in pairs]
        yield
    return found


def embedding(model: GPT, ids: Sequence[int], pooling: str) -> Task[list[float]]:
    """The last hidden states [T, C] of a text as one vector [C]: their mean, or the last one. Not normalised."""
    total_C, last_C = torch.zeros(model.config.d_model), torch.zeros(model.config.d_model)
    for _, hidden_TC in _read(model, ids):
        total_C, last_C = total_C + hidden_TC.float().sum(dim=0).cpu(), hidden_TC[-1].float().cpu()
        yield
    vector_C = _check(total_C / len(ids) if pooling == "mean" else last_C)
    values: list[float] = vector_C.tolist()
    return values


def attention(model: GPT, ids: Sequence[int], layer: int, head: int) -> Task[list[list[float]]]:
    """The weights [T, T] of one head, each row up to its own token. Raises LoadstoneError if there is no such head."""
    config = model.config
    if not (layer < config.n_layers and head < config.n_heads):
        raise LoadstoneError(
            f"layer {layer}, head {head}: the model has {config.n_layers} layers of {config.n_heads} heads, from 0."
        )
    module: Any = model.blocks[layer].attn
    found: list[Tensor] = []

    def watched(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        # Values of 1 at one token and 0 elsewhere come out as its weight, whatever mask and scale there are.
        ones = torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand(*k.shape[:3], -1)
        found.append(attend(q, k, ones, **options)[0, head])
        return attend(q, k, v, **options)

    attend = module.attend
    module.attend = watched
    try:
        model.hidden(torch.tensor([ids], device=model.tok_emb.weight.device))
    finally:
        del module.attend
    yield
    return [row[: at + 1] for at, row in enumerate(_check(found[0]).float().tolist())]


def _check(values: Tensor) -> Tensor:
    """The same, if they are numbers. Raises FailedError."""
    if not torch.isfinite(values).all():
        raise FailedError("the model gives no finite numbers: its weights are broken. `loadstone verify` tells which.")
    return values


def _read(model: GPT, ids: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """(where it starts, hidden states [T, C]) of each piece of a text."""
    cache = model.new_cache(1, len(ids)) if len(ids) > PIECE else None
    for start in range(0, len(ids), PIECE):
        piece = torch.tensor([ids[start : start + PIECE]], device=model.tok_emb.weight.device)
        yield start, model.hidden(piece, cache)[0]
