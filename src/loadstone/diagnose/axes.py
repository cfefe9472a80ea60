"""Which way square matrices lie, which rows are values, how rotary rows pair up: read off norms of rows and columns.

Training leaves its mark on the channels of the residual stream: each has its own scale, and every matrix that reads or
writes the stream shows it, along one axis only. A transposed matrix shows it along the other. The same holds for the
channels within a head, which `attn.v` writes and `attn.out` reads. Random weights have no such mark, and then there is
no verdict. Thresholds and how they were found: docs/witnesses.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..checkpoint.wording import few
from ..checks import Check
from ..config import GPTConfig
from .profile import Profile

Profiles = Mapping[str, Profile]

# A standard normal number exceeds 6 once in 1e9 matrices; what should carry a mark and does not stays below 3.
STRONG, SILENT = 6.0, 3.0
# The axis of each matrix ([out, in]) that faces the residual stream.
STREAM_AXIS = {"attn.q": 1, "attn.k": 1, "attn.v": 1, "attn.out": 0, "mlp.gate": 1, "mlp.up": 1, "mlp.down": 0}


def check_orientation(config: GPTConfig, profiles: Profiles) -> Check:
    """Square matrices, which no shape can judge: the right axis must follow the residual stream.

    Per matrix, the ranks of the norms along each axis are regressed on those of everything in the same layer that
    faces the stream for sure (norm weights, embeddings, non-square siblings). The R^2 of each axis becomes a standard
    normal z (Bartlett, then Wilson and Hilferty). False needs z >= 6 on the wrong axis and z < 3 on the right one, in
    one matrix or, by Stouffer's sum, in a kind of matrix over all layers.
    """
    name = "orientation of square matrices"
    scores = _scores(config, profiles)
    if not scores:
        return Check(name, None, "there are none: the shapes show the orientation of all")
    pooled = {kind: tuple(map(_stouffer, zip(*layers.values(), strict=True))) for kind, layers in scores.items()}
    shown = "; ".join(
        f"{kind}: z {right:.1f} on the axis of the stream, {wrong:.1f} on the other"
        for kind, (right, wrong) in pooled.items()
    )
    turned = []
    for kind, layers in scores.items():
        if _is_turned(pooled[kind]):
            turned.append(f"{kind} of all {config.n_layers} layers")
        else:
            turned += [f"blocks.{layer}.{kind}" for layer, score in layers.items() if _is_turned(score)]
    if turned:
        return Check(name, False, f"transposed: {few(turned)} ({shown})")
    doubtful = [kind for kind, (right, wrong) in pooled.items() if right < STRONG or wrong >= SILENT]
    if doubtful:
        return Check(name, None, f"no verdict on {', '.join(doubtful)}: untrained, or too narrow to tell ({shown})")
    return Check(name, True, shown)


def _is_turned(score: tuple[float, ...]) -> bool:
    right, wrong = score
    return wrong >= STRONG and right < SILENT


def _stouffer(z: tuple[float, ...]) -> float:
    return sum(z) / math.sqrt(len(z))


def _scores(config: GPTConfig, profiles: Profiles) -> dict[str, dict[int, tuple[float, float]]]:
    """Kind of matrix -> layer -> (z of the stream's axis, z of the other), for the square ones."""
    scores: dict[str, dict[int, tuple[float, float]]] = {}
    for layer in range(config.n_layers):
        references = _references(profiles, layer)
        for kind, axis in STREAM_AXIS.items():
            found = profiles.get(f"blocks.{layer}.{kind}.weight")
            if found is None or found.shape[0] != found.shape[1] or 4 * len(references) > found.shape[0]:
                continue
            sides = (found.rows, found.columns)
            scores.setdefault(kind, {})[layer] = (
                _follows(sides[axis], references),
                _follows(sides[1 - axis], references),
            )
    return scores


def _references(profiles: Profiles, layer: int) -> list[Tensor]:
    """What faces the residual stream for sure, one number per channel each."""
    block = f"blocks.{layer}."
    names = [f"{block}{norm}.{part}" for norm in ("norm1", "norm2") for part in ("weight", "bias")]
    names += ["tok_emb.weight", "pos_emb.weight", "head.weight"]
    found = [profiles[name].columns for name in names if name in profiles and not profiles[name].constant]
    for kind, axis in STREAM_AXIS.items():
        sibling = profiles.get(f"{block}{kind}.weight")
        if sibling is not None and sibling.shape[0] != sibling.shape[1] and not sibling.constant:
            found.append((sibling.rows, sibling.columns)[axis])
    return found


def _follows(values: Tensor, references: list[Tensor]) -> float:
    """How surely `values` depend on the references: a standard normal number if they do not.

    0 where many values are equal: pruned or padded channels may lie at the same indices on both axes.
    """
    if not references or 10 * len(torch.unique(values)) < 9 * len(values):
        return 0.0
    y = _ranks(values)
    count, n = len(references), len(y)
    basis, _ = torch.linalg.qr(torch.stack([_ranks(reference) for reference in references], dim=1))
    r2 = min(float((basis.T @ y).square().sum() / y.square().sum()), 1 - 1e-12)
    chi2 = -(n - 1 - (count + 2) / 2) * math.log1p(-r2)
    spread = 2 / (9 * count)
    return ((chi2 / count) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def _ranks(values: Tensor) -> Tensor:
    """Centred ranks; equal values share theirs, else ties would rank by index and so resemble each other."""
    _, inverse, counts = torch.unique(values.double(), return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[inverse].double()
    return ranks - ranks.mean()


def check_values(config: GPTConfig, profiles: Profiles) -> Check:
    """attn.out reads what attn.v writes: within a head, its columns should follow the rows of v, and of no other.

    Rank correlation of the logarithms, centred per head, summed over the layers to a standard normal z. False if the
    rows of q or k are followed (z >= 6) and those of v are not (z < 3).
    """
    name = "which rows are values"
    sums = dict.fromkeys("qkv", 0.0)
    for layer in range(config.n_layers):
        block = f"blocks.{layer}.attn."
        read = _per_head(config, profiles[f"{block}out.weight"].columns)
        for part in "qkv":
            sums[part] += _correlation_z(read, _per_head(config, profiles[f"{block}{part}.weight"].rows))
    z = {part: total / math.sqrt(config.n_layers) for part, total in sums.items()}
    shown = f"the columns of attn.out follow the rows of v with z {z['v']:.1f}, of k {z['k']:.1f}, of q {z['q']:.1f}"
    other = max(z["q"], z["k"])
    if other >= STRONG and z["v"] < SILENT:
        return Check(name, False, f"{shown}: v is in the place of {'q' if z['q'] > z['k'] else 'k'}")
    if z["v"] >= STRONG and other < SILENT:
        return Check(name, True, shown)
    return Check(name, None, f"no verdict: untrained, too few layers, or the mark is weak ({shown})")


def _per_head(config: GPTConfig, norms: Tensor) -> Tensor:
    """Norms of a row per channel -> centred logarithms [K * D]; query heads that share a key/value head are joined."""
    heads = norms.square().view(config.n_kv_heads, -1, config.head_dim).sum(1).clamp_min(1e-60).log()
    return (heads - heads.mean(1, keepdim=True)).flatten()


def _correlation_z(a: Tensor, b: Tensor) -> float:
    a, b = _ranks(a), _ranks(b)
    norm = float(a.norm() * b.norm())
    return math.sqrt(len(a)) * float(a @ b) / norm if norm else 0.0


def check_rotary_layout(config: GPTConfig, profiles: Profiles) -> Check | None:
    """Rows that turn together, and rows of neighbouring frequency, grow alike. None without rotary embedding.

    Roughness is the mean squared difference of the log norms of such rows over twice their variance: 1 if they have
    nothing to do with each other. False if the rows are smooth when read as pairs (j with j+1) and, as loaded (j with
    j + D/2), the two of a pair are strangers. The opposite fault looks smooth both ways; the loss must judge it.
    """
    if config.rope is None:
        return None
    name, dims = "rotary layout", config.rope.dims or config.head_dim
    found = []
    for layer in range(config.n_layers):
        for part in "qk":
            rows = profiles[f"blocks.{layer}.attn.{part}.weight"].rows.view(-1, config.head_dim)[:, :dims]
            logs = rows.clamp_min(1e-30).log()
            logs = logs - logs.mean(1, keepdim=True)
            halves, pairs = logs.view(-1, 2, dims // 2), logs.view(-1, dims // 2, 2).transpose(1, 2)
            again = logs.view(-1, 2, dims // 2).transpose(1, 2).reshape(-1, 2, dims // 2)
            found.append(torch.tensor([_roughness(layout) for layout in (halves, pairs, again)]).nan_to_num(1.0))
    together, neighbours = torch.stack(found).mean(0).unbind(1)
    halves_, pairs_, again_ = ((together + neighbours) / 2).tolist()
    count = sum(profiles[f"blocks.{i}.attn.{part}.weight"].shape[0] for i in range(config.n_layers) for part in "qk")
    count = count * dims // config.head_dim // 2
    shown = f"roughness {halves_:.2f} as halves, {pairs_:.2f} as pairs, from {count:,} pairs of rows"
    if (1 - pairs_) * math.sqrt(count) >= STRONG and pairs_ < 0.65 and float(together[0]) > 0.9:
        return Check(name, False, f"{shown}: q and k hold rotary pairs (j with j + 1) and were taken as halves")
    if (1 - halves_) * math.sqrt(count) < STRONG or halves_ > 0.65:
        return Check(name, None, f"no verdict: the rows show no frequencies ({shown})")
    if min(pairs_, again_) < halves_ + 0.1:
        return Check(name, None, f"halves fit, but so would halves that were permuted once more ({shown})")
    return Check(name, True, shown)


def _roughness(layout: Tensor) -> tuple[float, float]:
    """Of the two rows that turn together, and of rows next in frequency. `layout` is [heads, 2, frequencies]."""
    twice = 2 * layout.square().mean()
    together = (layout[:, 0] - layout[:, 1]).square().mean() / twice
    neighbours = (layout[..., 1:] - layout[..., :-1]).square().mean() / twice
    return float(together), float(neighbours)
