"""Repairs of norms, attention, activation, embedding and head: config values, exchanged and lost vectors, rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from ..config import GPTConfig, Rope
from ..config.base import ACTIVATIONS
from ..errors import ConfigError
from ..weightmap.ops import RotaryHalves, SplitQKV
from .candidate import QKV, Candidate, Suspect, exchange, from_file, in_file, swap
from .points import inputs_of, normalised

EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12, 1e-4, 1e-3)
THETAS = (1e4, 5e5, 1e6, 1e5, 1e7, 2.5e5, 5e4, 1e3)
FACTORS = (2.0, 4.0, 8.0, 16.0, 32.0)


def norm_eps(s: Suspect) -> Iterator[Candidate]:
    for eps in EPSILONS:
        if eps != s.config.norm_eps:
            yield _config(s, norm_eps=eps)
    yield _config(s, norm_eps=float(f"{10 ** _minimum(lambda x: _error(s, norm_eps=10**x), -13, -1):.4g}"))


def norm_kind(s: Suspect) -> Iterator[Candidate]:
    yield _config(s, norm="layernorm" if s.config.norm == "rmsnorm" else "rmsnorm")


def parallel_residual(s: Suspect) -> Iterator[Candidate]:
    if s.part == "norm2":
        yield _config(s, parallel_residual=not s.config.parallel_residual)


def exchanged_norms(s: Suspect) -> Iterator[Candidate]:
    own = [f"{s.block}.norm1", f"{s.block}.norm2"] if s.block else []
    layers = range(s.config.n_layers)
    others = [*own, "norm", *(f"blocks.{n}.{part}" for n in layers for part in ("norm1", "norm2"))]
    for other in dict.fromkeys(name for name in others if name != s.stem):
        for leaves in (("weight", "bias"), ("weight",), ("bias",)):
            if values := exchange(s, swap(s.stem, other), leaves):
                yield Candidate("{tensors}: exchanged", tuple(values), values)


def plus_one(s: Suspect) -> Iterator[Candidate]:
    name = f"{s.stem}.weight"
    for step, text in ((1.0, "{tensors}: 1 is missing; stored as the difference from 1, as Gemma does"),
                       (-1.0, "{tensors}: 1 too large; the 1 that Gemma's norms add was added twice")):  # fmt: skip
        yield Candidate(text, (name,), {name: s.weight + step})


def damaged_norm(s: Suspect) -> Iterator[Candidate]:
    """Weight and bias of each column follow from what the tokens show; a few that differ are damage."""
    x = normalised(
        sum((s.bench.rows[p] for p in inputs_of(s.point, s.config)), torch.zeros(())), s.config.norm, s.config.norm_eps
    )
    theirs = s.bench.rows[s.point]
    centre = (x.mean(0), theirs.mean(0)) if s.bias is not None else (torch.zeros(()), torch.zeros(()))
    slope = ((x - centre[0]) * (theirs - centre[1])).sum(0) / (x - centre[0]).square().sum(0).clamp_min(1e-30)
    wrong = (slope - s.weight).abs() > 1e-3 * s.weight.abs().mean()
    columns = wrong.nonzero().flatten().tolist()
    if 0 < len(columns) <= max(4, len(slope) // 20):
        changes = [f"[{c}] is {float(s.weight[c]):.6g}, should be {float(slope[c]):.6g}" for c in columns[:4]]
        values = {f"{s.stem}.weight": torch.where(wrong, slope, s.weight)}
        if s.bias is not None:
            values[f"{s.stem}.bias"] = torch.where(wrong, centre[1] - slope * centre[0], s.bias)
        yield Candidate(f"{{tensors}}: damaged; {'; '.join(changes)}", (f"{s.stem}.weight",), values)


def activation(s: Suspect) -> Iterator[Candidate]:
    for name in ACTIVATIONS:
        if name != s.config.activation:
            yield _config(s, activation=name)


def head_count(s: Suspect) -> Iterator[Candidate]:
    """Other heads of the same total width. Where the dialect orders rows by head, the file is read again with them."""
    c = s.config
    width, kv_width = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    rows = [t for t, step in s.bench.step_of.items() if any(_by_head(op) for op in step.ops)]
    if s.part in QKV and f"{s.stem}.weight" not in rows:
        return
    dims = (d for d in range(2 if c.rope else 1, kv_width + 1, 2 if c.rope else 1) if kv_width % d == width % d == 0)
    for dim in (d for d in dims if d != c.head_dim):
        fields: dict[str, Any] = {"n_heads": width // dim, "n_kv_heads": kv_width // dim, "head_dim": dim}
        if c.rope and c.rope.dims == c.head_dim:
            fields["rope"] = replace(c.rope, dims=dim)
        candidate = _config(s, **fields)
        if candidate.config:
            own = _reread(s, candidate, [t for t in rows if t.startswith(s.point)])()
            yield replace(candidate, parameters=own, others=_reread(s, candidate, rows))


def _by_head(op: Any) -> bool:
    return isinstance(op, RotaryHalves) or (isinstance(op, SplitQKV) and op.per_head)


def _reread(s: Suspect, candidate: Candidate, targets: list[str]) -> Callable[[], dict[str, Tensor]]:
    def read() -> dict[str, Tensor]:
        config, found = s.config.with_overrides(candidate.config), dict[str, Tensor]()
        for target in targets:
            if target not in found:
                step = s.bench.step_of[target]
                found |= from_file(in_file(s, step), step, config)
        return found

    return read


def rope_theta(s: Suspect) -> Iterator[Candidate]:
    if (rope := s.config.rope) is None:
        return
    theirs = s.bench.trace.config.rope or rope
    for theta in dict.fromkeys((theirs.theta, *THETAS)):
        if theta != rope.theta:
            yield _config(s, rope=replace(rope, theta=theta))
    # The error has many valleys far from the truth, so a grid finds the right one first.
    grid = torch.linspace(1.5, 9, 76).tolist()
    near = min(grid, key=lambda x: _error(s, rope=replace(rope, theta=10**x)))
    best = 10 ** _minimum(lambda x: _error(s, rope=replace(rope, theta=10**x)), near - 0.1, near + 0.1)
    yield _config(s, rope=replace(rope, theta=float(f"{best:.4g}")))


def rope_dims(s: Suspect) -> Iterator[Candidate]:
    if rope := s.config.rope:
        own = rope.dims or s.config.head_dim
        for dims in range(2, s.config.head_dim + 1, 2):
            if dims != own:
                yield _config(s, rope=replace(rope, dims=0 if dims == s.config.head_dim else dims))


def rope_scaling(s: Suspect) -> Iterator[Candidate]:
    """A scaling that was lost, or one that should not be; the reference's own is tried first."""
    if (rope := s.config.rope) is None:
        return
    if theirs := s.bench.trace.config.rope:
        yield _config(s, rope=replace(theirs, theta=rope.theta, dims=rope.dims))
    plain = Rope(theta=rope.theta, dims=rope.dims)
    if rope.scaling != "none":
        yield _config(s, rope=plain)
    for factor in FACTORS:
        yield _config(s, rope=replace(plain, scaling="linear", factor=factor))
        for original in (8192, 4096, 2048):
            yield _config(s, rope=replace(plain, scaling="llama3", factor=factor, original_context=original))


def tie(s: Suspect) -> Iterator[Candidate]:
    """The head should be the embedding, or the embedding the head. Not if the reference has two matrices."""
    if s.config.tied or not s.bench.trace.config.tied:
        return
    if s.point == "logits":
        embedding = s.state.weights.need("tok_emb.weight")
        text = "{tensors}: should be the token embedding; the tie was lost on the way"
        yield Candidate(text, ("head.weight",), {"head.weight": embedding}, {"tied": True})
    else:
        head = s.state.weights.need("head.weight")
        text = "{tensors}: should be the head; the two are tied, and the embedding was lost on the way"
        yield Candidate(text, ("tok_emb.weight",), {"tok_emb.weight": head}, {"tied": True})


def position_offset(s: Suspect) -> Iterator[Candidate]:
    positions = s.state.weights("pos_emb.weight")
    if positions is None:
        return
    rows = s.bench.embedding_rows
    shown = rows["embedding"] - s.state.weights.need("tok_emb.weight")[rows["ids"]]
    for offset in (1, -1, 2, -2, 3, -3, 4, -4):
        mended = positions.roll(-offset, 0)
        lost = slice(-offset, None) if offset > 0 else slice(None, -offset)
        outside = torch.zeros(len(mended), dtype=torch.bool)
        outside[lost] = True
        at = outside[rows["positions"]]
        mended[rows["positions"][at]] = shown[at]  # rows that the shift pushed out: the reference shows them
        text = f"{{tensors}}: position p is stored in row p{offset:+d}"
        yield Candidate(text, ("pos_emb.weight",), {"pos_emb.weight": mended})


def scaled_embedding(s: Suspect) -> Iterator[Candidate]:
    rows = s.bench.embedding_rows["embedding"]
    ours = s.bench.output(s.point, s.state)
    factor = float((rows * ours).sum() / ours.square().sum().clamp_min(1e-30))
    if abs(factor - 1) > 1e-3 and s.state.weights("pos_emb.weight") is None:
        values = {"tok_emb.weight": s.state.weights.need("tok_emb.weight") * factor}
        if s.config.tied:  # the head keeps its scale
            values["head.weight"] = s.state.weights.need("tok_emb.weight")
        fields = {"tied": False} if s.config.tied else {}
        yield Candidate(f"{{tensors}}: must be multiplied by {factor:.6g}", ("tok_emb.weight",), values, fields)


def embedding_rows(s: Suspect) -> Iterator[Candidate]:
    """Tokens whose vector lies in another row of the table: rows shifted from some id on, or exchanged."""
    table, rows = s.state.weights.need("tok_emb.weight"), s.bench.embedding_rows
    wanted = rows["embedding"] - (s.bench.output("embedding", s.state) - table[rows["ids"]])
    ids, first = torch.unique(rows["ids"], return_inverse=True)
    wanted = torch.stack([wanted[(first == i).nonzero()[0, 0]] for i in range(len(ids))])
    found = _nearest(wanted, table)
    yield from _moved_rows(s, "tok_emb.weight", table, ids, found)
    wrong = (table[ids] - wanted).abs() > 1e-4 * wanted.abs().mean()
    if 0 < int(wrong.any(1).sum()) <= max(2, len(ids) // 20):
        mended = table.clone()
        mended[ids] = torch.where(wrong, wanted, table[ids])
        places = [f"[{int(ids[r])}, {int(c)}]" for r, c in wrong.nonzero()[:4]]
        text = f"{{tensors}}: damaged; {int(wrong.sum())} wrong elements were seen ({', '.join(places)}, ...)"
        yield Candidate(text, ("tok_emb.weight",), {"tok_emb.weight": mended})


def head_rows(s: Suspect) -> Iterator[Candidate]:
    """The same for the head: a column of logits that is another row's."""
    missing, theirs = s.missing, s.bench.rows["logits"]
    wrong = (missing.square().mean(0).sqrt() > 1e-3 * theirs.square().mean().sqrt()).nonzero().flatten()
    if not 0 < len(wrong) <= 4096:
        return
    ours = s.inputs @ s.weight.T
    found = _nearest(theirs[:, wrong].T, ours.T)
    yield from _moved_rows(s, f"{s.stem}.weight", s.weight, wrong, found)


def _moved_rows(s: Suspect, name: str, table: Tensor, ids: Tensor, found: Tensor) -> Iterator[Candidate]:
    """Rows of `table` that should hold what lies in row `found` (-1: nowhere)."""
    offsets = (found - ids)[(found >= 0) & (found != ids)]
    if len(offsets) == 0:
        return
    shift = int(offsets.mode().values)
    if int((offsets == shift).sum()) > max(1, len(offsets) // 2):
        moved = ids[(found - ids) == shift]
        stayed = ids[(found == ids) & (ids < moved.min())]
        start = _first_moved(s, table, int(stayed.max()) + 1 if len(stayed) else 0, int(moved.min()))
        mended = table.clone()
        take = torch.arange(start, len(table))
        mended[start:] = table[(take + shift).clamp(0, len(table) - 1)]
        text = f"{{tensors}}: from id {start} on, the row of id n is stored as row n{shift:+d}"
        yield Candidate(text, (name,), {name: mended})
    mended, known = table.clone(), found >= 0
    mended[ids[known]] = table[found[known]]
    pairs = [f"{int(a)} holds {int(b)}'s" for a, b in zip(ids, found, strict=True) if a != b and b >= 0][:4]
    yield Candidate(f"{{tensors}}: rows are permuted: row {', '.join(pairs)}", (name,), {name: mended})


def _first_moved(s: Suspect, table: Tensor, low: int, high: int) -> int:
    """The first of the ids `low` to `high` whose row is not in its place, as far as the logits of a tied head tell."""
    ids = torch.arange(low, high + 1)
    if not s.config.tied or len(ids) == 1:
        return low
    theirs = s.bench.rows["logits"]
    wrong = (s.bench.rows["norm"] @ table[ids].T - theirs[:, ids]).square().mean(0) > 1e-6 * theirs.square().mean()
    return int(ids[wrong][0]) if wrong.any() else high


def _nearest(wanted: Tensor, table: Tensor) -> Tensor:
    """For each row of `wanted` the equal row of `table`, -1 where there is none."""
    distances = torch.cdist(wanted, table, compute_mode="donot_use_mm_for_euclid_dist")
    nearest, index = distances.min(1)
    return torch.where(nearest < 1e-3 * wanted.square().sum(1).sqrt(), index, -1)


def _config(s: Suspect, **fields: Any) -> Candidate:
    """A repair of the config; one that the config itself refuses comes back without fields."""
    try:
        s.config.with_overrides(fields)
    except ConfigError:
        return Candidate("")
    return Candidate(config_text(s.config, fields), config=fields)


def config_text(config: GPTConfig, fields: dict[str, Any]) -> str:
    changes = []
    for name, new in fields.items():
        old = getattr(config, name)
        if isinstance(new, Rope) and isinstance(old, Rope):
            changes += [
                f"rope {k} is {asdict(old)[k]!r}, should be {v!r}"
                for k, v in asdict(new).items()
                if asdict(old)[k] != v
            ]
        elif old != new:
            changes.append(f"{name} is {old!r}, should be {new!r}")
    return "the config is wrong: " + "; ".join(changes)


def _error(s: Suspect, **fields: Any) -> float:
    try:
        return s.bench.error(s.point, s.state.repaired({}, fields)).worst
    except ConfigError:
        return float("inf")


def _minimum(error: Callable[[float], float], low: float, high: float, steps: int = 30) -> float:
    """Where `error` is least between two values, if it has one valley: golden section."""
    golden = (5**0.5 - 1) / 2
    a, b = high - golden * (high - low), low + golden * (high - low)
    at_a, at_b = error(a), error(b)
    for _ in range(steps):
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - golden * (high - low)
            at_a = error(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + golden * (high - low)
            at_b = error(b)
    return (low + high) / 2
