"""A smaller model: whole groups of heads, or whole blocks, taken out, and a config that says so.

Heads go as key/value groups (a K/V head with all query heads that share it), as many in each block, so that the config
stays regular: fewer heads of the same width. Blocks go wherever they do least.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..calibrate.walk import Stage
from ..config import GPTConfig
from ..errors import LoadstoneError
from ..model import GPT, Attention


def head_scores(attention: Attention, norms_K: Tensor | None) -> Tensor:
    """How much each K/V group adds to the residual stream.

    With the norms of the inputs of the output projection (activations) the energy of the group's part of its product,
    correlations left out; without, the squared size of the group's weights in q, k, v and out.
    """
    groups, width = attention.n_kv_heads, attention.out.weight.shape[1]
    out = attention.out.weight.square() if norms_K is None else (attention.out.weight * norms_K).square()
    scores = out.reshape(-1, groups, width // groups).sum((0, 2))
    if norms_K is None:
        for linear in (attention.q, attention.k, attention.v):
            scores = scores + linear.weight.square().reshape(groups, -1).sum(1)
    return scores


@torch.no_grad()
def block_score(stage: Stage, *, by_weights: bool) -> float:
    """How much a block changes the residual stream: 1 - cos(before, after), the mean over tokens.

    "Block influence" of ShortGPT (Men et al. 2024, arXiv:2403.03853). By weights: the squared size of its matrices.
    """
    if by_weights:
        return float(sum(linear.weight.square().sum() for linear in stage.linears.values()))
    total = count = 0.0
    for x_BTC in stage.inputs:
        similar = nn.functional.cosine_similarity(x_BTC, stage.run(x_BTC), dim=-1)
        total, count = total + float((1 - similar).sum()), count + similar.numel()
    return total / count


def kept_of(scores: Sequence[float], sparsity: float, what: str) -> list[int]:
    """Indices of those that stay, in order. Raises LoadstoneError if none would go, or none would stay."""
    gone = round(sparsity * len(scores))
    if not 0 < gone < len(scores):
        example = max(1, len(scores) // 2) / len(scores)
        raise LoadstoneError(
            f"--sparsity {sparsity:g} of {len(scores)} {what} takes out {gone}: some must go, and some must stay. "
            + (f"For example --sparsity {example:.2g}." if len(scores) > 1 else "There is only one.")
        )
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    return sorted(order[: len(scores) - gone])


@torch.no_grad()
def without_layers(model: GPT, kept: Sequence[int]) -> GPT:
    """A model of the blocks that are kept; every tensor is the old one's."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[0] == "blocks":
            if int(parts[1]) not in kept:
                continue
            name = ".".join(["blocks", str(kept.index(int(parts[1]))), *parts[2:]])
        tensors[name] = parameter
    return _filled(replace(model.config, n_layers=len(kept)), tensors)


@torch.no_grad()
def without_heads(model: GPT, kept: Mapping[int, Sequence[int]]) -> GPT:
    """A model with the K/V groups that are kept, block -> groups, equally many each."""
    config = model.config
    left = len(next(iter(kept.values())))
    share = config.n_heads // config.n_kv_heads
    smaller = replace(config, n_heads=left * share, n_kv_heads=left)
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    for block, groups in kept.items():
        chosen = torch.tensor(groups)
        for part in ("q", "k", "v", "out"):
            for kind in ("weight", "bias"):
                name = f"blocks.{block}.attn.{part}.{kind}"
                if name in tensors and (part, kind) != ("out", "bias"):
                    tensors[name] = _groups(tensors[name], config.n_kv_heads, chosen, columns=part == "out")
    return _filled(smaller, tensors)


def _groups(tensor: Tensor, groups: int, chosen: Tensor, *, columns: bool) -> Tensor:
    """The rows (or columns) of some groups: those of one group lie together."""
    whole = tensor.T if columns else tensor
    part = whole.reshape(groups, -1, *whole.shape[1:])[chosen].flatten(0, 1)
    return (part.T if columns else part).contiguous()


def _filled(config: GPTConfig, tensors: Mapping[str, Tensor]) -> GPT:
    """A model of these tensors. Raises LoadstoneError for one that has no place in it, or was not cut to fit."""
    with torch.device("meta"):
        model = GPT(config)
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name in sorted({*wanted, *tensors}):
        if name not in tensors or wanted.get(name) != tensors[name].shape:
            raise LoadstoneError(f"{name}: it is of a kind that cannot be taken apart here. Use --structure none.")
    for name in wanted:
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensors[name].detach()))
    return model.eval()
