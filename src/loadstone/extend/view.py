"""`matrix_view`: the real embedding matrix, small enough to draw: blocks of rows and columns, and what rows are."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..model import GPT
from ..tokenizer import Tokenizer
from .tokens import tokens_of

COLUMNS = 48
BLOCKS = {"old": 64, "new": 32, "padding": 8}  # most blocks that a run of such rows is cut into

Pair = tuple[GPT, Tokenizer]


def matrix_view(before: Pair, after: Pair) -> dict[str, Any]:
    """What a picture of both embedding matrices needs, as JSON values (below 200 kB whatever the model).

    Args:
        before, after: model and tokenizer of either side.

    Returns `{"columns": [0, 16, ...], "before": side, "after": side}`: `columns` are the edges of the column blocks. A
    side has `shape` [V, C], `bands` (runs of rows: start, stop, kind) and `blocks` (start, stop, kind, and for each
    column block `mean` and `rms` of its elements). Kinds are `old`, `new` (a token that only `after` has; up to 32 have
    a block each) and `padding` (rows behind the tokens).
    """
    old, new = tokens_of(before[1]), tokens_of(after[1])
    fresh = {number for number, text in new.items() if old.get(number) != text}
    width = before[0].config.d_model
    edges = [round(i * width / min(width, COLUMNS)) for i in range(min(width, COLUMNS) + 1)]
    last = max(old, default=-1)
    return {
        "columns": edges,
        "before": _side(before[0].tok_emb.weight, edges, set(), last),
        "after": _side(after[0].tok_emb.weight, edges, fresh, last),
    }


def _side(weight_VC: Tensor, edges: list[int], fresh: set[int], last: int) -> dict[str, Any]:
    kinds = ["new" if row in fresh else "old" if row <= last else "padding" for row in range(len(weight_VC))]
    starts = [row for row in range(len(kinds)) if not row or kinds[row] != kinds[row - 1]]
    bands = list(zip(starts, [*starts[1:], len(kinds)], strict=True))
    blocks = []
    for start, stop in bands:
        count = min(stop - start, BLOCKS[kinds[start]])
        cuts = [start + round(i * (stop - start) / count) for i in range(count + 1)]
        blocks += [_block(weight_VC, a, b, edges) | {"kind": kinds[a]} for a, b in pairwise(cuts)]
    return {
        "shape": list(weight_VC.shape),
        "bands": [{"start": a, "stop": b, "kind": kinds[a]} for a, b in bands],
        "blocks": blocks,
    }


def _block(weight_VC: Tensor, start: int, stop: int, edges: list[int]) -> dict[str, Any]:
    values = weight_VC.detach()[start:stop].to("cpu", torch.float32)
    moments = torch.stack([values.mean(0), values.square().mean(0)]).double()  # [2, C]
    mean, square = torch.stack([moments[:, a:b].mean(1) for a, b in pairwise(edges)], dim=1)
    return {"start": start, "stop": stop, "mean": _short(mean), "rms": _short(square.sqrt())}


def _short(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]
