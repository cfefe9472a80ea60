"""Log-probabilities of given tokens: what every figure of this package is made of.

Batched, sorted by length, padded on the right, without a cache. Logits exist only for the rows that are asked for, and
of those only a chunk at a time. *Others*: a plain loop makes the logits of all tokens ([B, T, V]: 206 MB for 1,024
tokens of GPT-2), twice more in the softmax, and throws half of them away where windows overlap.

Shapes: B batch, T tokens, C d_model, V vocabulary, N targets of a batch, R rows of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import LoadstoneError
from ..kernels import quick_scoring
from ..kernels.linear import product
from ..model import GPT
from ..train.losses import chunks

# Padded tokens of a batch, unless rows are asked for. More is no faster on a CPU and pads more; a GPU wants more.
BATCH_TOKENS = {"cpu": 2048}
BATCH_TOKENS_ELSEWHERE = 32768


class Request(NamedTuple):
    """Score the last `targets` of these tokens, each given all before it.

    At most one token more than the model's context, as the last is only asked for and never read.
    """

    ids: Sequence[int] | NDArray[np.int64]
    targets: int


class Scores(NamedTuple):
    """Of the targets of one request: natural log-probabilities, float32, and whether each was the likeliest token."""

    logprobs: NDArray[np.float32]
    greedy: NDArray[np.bool_]


def score(model: GPT, requests: Sequence[Request], *, batch_size: int | None = None) -> Iterator[tuple[int, Scores]]:
    """(index of the request, its scores), batch by batch, the longest requests first.

    What a request scores does not depend on its batch (in float32 to some 1e-6): padding comes after each row's tokens,
    where no token sees it. In bfloat16 the logits are bfloat16, and log-softmax is taken of them in float32; among
    equal logits the lowest id counts as the likeliest.

    Args:
        model: in its own type, on its own device.
        requests: in any order.
        batch_size: rows of a batch; if not given, as many as BATCH_TOKENS allow.

    Raises LoadstoneError for a request that cannot be scored, and if the model computes NaN or infinity.
    """
    for index, request in enumerate(requests):
        _check(index, request, model)
    with _evaluating(model):
        for batch in batches([len(request.ids) - 1 for request in requests], batch_size, model.tok_emb.weight.device):
            yield from zip(batch, _score_batch(model, [requests[index] for index in batch]), strict=True)


def batches(lengths: Sequence[int], batch_size: int | None, device: torch.device) -> Iterator[list[int]]:
    """Indices of rows that are run together: longest first, so that a lack of memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    budget = BATCH_TOKENS.get(device.type, BATCH_TOKENS_ELSEWHERE)
    start = 0
    while start < len(order):
        rows = batch_size or max(1, budget // lengths[order[start]])
        yield order[start : start + rows]
        start += rows


def _check(index: int, request: Request, model: GPT) -> None:
    length, context, rows = len(request.ids), model.config.context_length, len(model.tok_emb.weight)
    if not 0 < request.targets < length:
        raise LoadstoneError(
            f"request {index}: {request.targets} of {length} tokens are to be scored. The first cannot be: nothing "
            "comes before it."
        )
    if length - 1 > context:
        raise LoadstoneError(f"request {index}: {length} tokens, and the model's context is {context}. Cut it.")
    for token in (int(np.min(request.ids)), int(np.max(request.ids))):
        if not 0 <= token < rows:
            raise LoadstoneError(
                f"request {index}: token {token} is none of the model's {rows} rows. Is the tokenizer another model's?"
            )


@contextmanager
def _evaluating(model: GPT) -> Iterator[None]:
    """Meanwhile no dropout, and the faster products; the model is left as it was."""
    training = model.training
    model.eval()
    try:
        with quick_scoring(model):
            yield
    finally:
        model.train(training)


@torch.inference_mode()
def _score_batch(model: GPT, requests: Sequence[Request]) -> list[Scores]:
    longest = max(len(request.ids) for request in requests) - 1
    ids_BT = torch.zeros(len(requests), longest, dtype=torch.int64)
    rows, targets = [], []  # flat positions whose hidden states predict the targets
    for row, request in enumerate(requests):
        ids = torch.as_tensor(np.asarray(request.ids, dtype=np.int64))
        ids_BT[row, : len(ids) - 1] = ids[:-1]
        rows.append(row * longest + torch.arange(len(ids) - 1 - request.targets, len(ids) - 1))
        targets.append(ids[-request.targets :])
    device = model.tok_emb.weight.device
    hidden_NC = model.hidden(ids_BT.to(device)).flatten(0, 1)[torch.cat(rows).to(device)]
    logprobs_N, greedy_N = _head(model, hidden_NC, torch.cat(targets).to(device))
    if not np.isfinite(logprobs_N).all():
        raise LoadstoneError(
            "The model computes probabilities that are NaN or 0. In float16 numbers overflow: choose --dtype float32 "
            "or bfloat16. Otherwise `loadstone verify` says what is wrong with the weights."
        )
    ends = np.cumsum([request.targets for request in requests])[:-1]
    return [Scores(*pair) for pair in zip(np.split(logprobs_N, ends), np.split(greedy_N, ends), strict=True)]


def _head(model: GPT, hidden_NC: Tensor, targets_N: Tensor) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Log-probability of each target, and whether it is the likeliest token."""
    weight_VC, bias_V = model.output
    logprobs_N = torch.empty(len(targets_N), dtype=torch.float32, device=hidden_NC.device)
    greedy_N = torch.empty(len(targets_N), dtype=torch.bool, device=hidden_NC.device)
    for chunk in chunks(len(targets_N), len(weight_VC)):
        logits_RV = product(hidden_NC[chunk], weight_VC.T)
        logits_RV = (logits_RV if bias_V is None else logits_RV + bias_V).float()
        targets_R1 = targets_N[chunk, None]
        asked_R1, highest_R1 = logits_RV.gather(1, targets_R1), logits_RV.amax(dim=-1, keepdim=True)
        greedy_N[chunk] = _first(logits_RV, targets_R1, asked_R1 == highest_R1)
        sums_R1 = logits_RV.sub_(highest_R1).exp_().sum(dim=-1, keepdim=True)
        logprobs_N[chunk] = (asked_R1 - highest_R1 - sums_R1.log())[:, 0]
    return logprobs_N.cpu().numpy(), greedy_N.cpu().numpy()


def _first(logits_RV: Tensor, targets_R1: Tensor, equal_R1: Tensor) -> Tensor:
    """Whether each target is the lowest id of the highest logit. argmax is slow, so only rows that may be are asked."""
    greedy_R = equal_R1[:, 0].clone()
    greedy_R[equal_R1[:, 0]] = logits_RV[equal_R1[:, 0]].argmax(dim=-1) == targets_R1[equal_R1]
    return greedy_R
