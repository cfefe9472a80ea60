"""Are the rows of q, k and v where they belong? The loss on known text under every other legal arrangement tells.

Needs a trained model and its tokenizer, no reference. An arrangement is one permutation of the stacked rows of q, k and
v, the same in every layer, as a converter would get it wrong. A trained model is worse by a nat or more under every
arrangement but its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import permutations
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import Check
from ..config import GPTConfig
from ..model import GPT, Block

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

# Plain English, our own words.
TEXT = (
    "In the morning the street was dry and the clock was still silent. The father opened its case, took out a small "
    "brass wheel, and held it to the light. One of its teeth was bent. He straightened it with a pair of pliers, put "
    "the wheel back, and turned the key twelve times. For a moment nothing happened. Then the clock began to tick, "
    "first slowly, then evenly, and the cat on the stairs lifted its head. The children wanted to know how old it was. "
    "Their mother said that her grandmother had bought it in the year when the railway reached the town, and that it "
    "had stopped only three times since then."
)
TOKENS = 128
GAIN, SIGMAS = 0.25, 4.0  # nats a token by which another arrangement must be better, and how surely
TRAINED = 0.8  # part of ln(vocabulary) below which a model has learnt this text's language


def check_arrangement(model: GPT, tokenizer: Tokenizer | None) -> Check:
    """Loss as loaded, and under every other order of q, k, v and every other rotary layout that the shapes allow.

    False if another arrangement gives a trained model's loss, better by 0.25 nats a token and by 4 standard errors of
    the difference; True if this one is better than every other by as much; None otherwise.
    Costs one forward pass of 128 tokens per arrangement (3 to 10 of them); the model is as before when it returns.
    """
    name, context = "arrangement of q, k and v", min(TOKENS, model.config.context_length)
    if tokenizer is None or context < 32:
        reason = "no tokenizer was found" if tokenizer is None else f"a context of {context} is too short"
        return Check(name, None, f"{reason}, so no text can be scored")
    ids = torch.tensor([tokenizer.encode(TEXT)[:context]], device=model.tok_emb.weight.device)
    loaded = _losses(model, ids)
    gains = {}
    for other, rows in arrangements(model.config):
        with rearranged(model, rows):
            gains[other] = loaded - _losses(model, ids)
    best = max(gains, key=lambda other: float(gains[other].mean()))
    gain, loss = gains[best], float(loaded.mean())
    mean, error = float(gain.mean()), float(gain.std() / math.sqrt(len(gain)))
    trained = TRAINED * math.log(model.config.vocab_size)
    shown = f"{loss:.2f} nats a token as loaded, {loss - mean:.2f} if {best} (the best of {len(gains)} others)"
    if mean >= GAIN and mean >= SIGMAS * error and loss - mean < trained:
        return Check(name, False, f"{shown}: so it is")
    if -mean >= GAIN and -mean >= SIGMAS * error and loss < trained:
        return Check(name, True, shown)
    return Check(name, None, f"no verdict: untrained, no model of English, or broken elsewhere ({shown})")


@torch.inference_mode()
def _losses(model: GPT, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids)[0, :-1].float(), ids[0, 1:], reduction="none").cpu()


def arrangements(config: GPTConfig) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """(what the file would then hold, which of the stacked rows [q; k; v] make q, k and v) for each fault there is."""
    heads, kv_heads, dim = config.n_heads, config.n_kv_heads, config.head_dim
    parts = torch.split(torch.arange((heads + 2 * kv_heads) * dim), [heads * dim, kv_heads * dim, kv_heads * dim])
    dims = (config.rope.dims or dim) if config.rope is not None else 0
    if dims > 2:
        for name, split in (("halves were pairs", (-1, 2)), ("halves were permuted once too often", (2, -1))):
            yield f"the rotary {name}", (*(_permuted(part, dim, dims, split) for part in parts[:2]), parts[2])
    if heads != kv_heads:
        yield "k and v were exchanged", (parts[0], parts[2], parts[1])
        return
    for order in list(permutations(range(3)))[1:]:
        yield f"the file's order was {''.join('qkv'[order.index(i)] for i in range(3))}", tuple(parts[i] for i in order)
    if heads > 1:
        stacked = torch.cat(parts)
        by_head = stacked.view(heads, 3, dim).transpose(0, 1).reshape(3, -1)
        yield "the file went head by head", tuple(by_head.unbind())
        in_thirds = stacked.view(3, heads, dim).transpose(0, 1).reshape(3, -1)
        yield "the file went in thirds, not head by head", tuple(in_thirds.unbind())


def _permuted(part: Tensor, dim: int, dims: int, split: tuple[int, int]) -> Tensor:
    heads = part.view(-1, dim).clone()
    heads[:, :dims] = heads[:, :dims].reshape(len(heads), *split).transpose(1, 2).reshape(-1, dims)
    return heads.flatten()


class _Rows(nn.Module):
    """Some rows of several linear maps stacked, gathered at each call: one layer's copy lives at a time."""

    def __init__(self, maps: tuple[nn.Linear, ...], rows: Tensor) -> None:
        super().__init__()
        self.maps, self.rows = maps, rows.to(maps[0].weight.device)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.cat([linear.weight for linear in self.maps])[self.rows]
        biases: list[Tensor] = [linear.bias for linear in self.maps if linear.bias is not None]
        return F.linear(x, weight, torch.cat(biases)[self.rows] if biases else None)


@contextmanager
def rearranged(model: GPT, rows: tuple[Tensor, ...]) -> Iterator[None]:
    """Within the block, q, k and v of every layer are made of these rows; no weight is changed or kept twice."""
    attentions = [cast(Block, block).attn for block in model.blocks]
    kept = [(attention.q, attention.k, attention.v) for attention in attentions]
    try:
        for attention, maps in zip(attentions, kept, strict=True):
            _set(attention, (_Rows(maps, part) for part in rows))
        yield
    finally:
        for attention, maps in zip(attentions, kept, strict=True):
            _set(attention, maps)


def _set(attention: nn.Module, maps: Iterable[nn.Module]) -> None:
    for name, linear in zip("qkv", maps, strict=True):
        setattr(attention, name, linear)
