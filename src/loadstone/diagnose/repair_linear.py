"""Repairs of linear layers: orientation, order, rotary layout, exchanges, biases, single elements."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from .candidate import QKV, Candidate, Suspect, exchange, from_file, in_file, swap
from .points import BLOCK

LAYOUTS = {  # how q, k and v can lie in one tensor: axes of [heads, 3, head_dim] in the order in which they are stored
    "one after the other": (1, 0, 2),
    "head by head": (0, 1, 2),
    "element by element": (0, 2, 1),
}


def transpose(s: Suspect) -> Iterator[Candidate]:
    if s.weight.shape[0] == s.weight.shape[1]:
        table = s.bench.identity.weight_map
        other = "[in, out]" if table.orientation == "[out, in]" else "[out, in]"
        text = f"{{tensors}}: transposed; this file stores {other}, where {table.name} stores {table.orientation}"
        yield Candidate(text, (f"{s.stem}.weight",), {f"{s.stem}.weight": s.weight.T})


def reshape(s: Suspect) -> Iterator[Candidate]:
    """Somebody made the shape fit by reshaping, which mixes rows and columns, instead of transposing."""
    step = s.bench.step_of.get(f"{s.stem}.weight")
    if step is None or (stored := np.squeeze(in_file(s, step))).shape[0] == stored.shape[1]:
        return
    mended = stored.reshape(stored.shape[::-1]).T.reshape(step.source_shape)
    text = "{tensors}: reshaped where it had to be transposed; the shape is right, the elements are mixed up"
    yield Candidate(text, step.targets, from_file(mended, step, s.config))


def qkv_order(s: Suspect) -> Iterator[Candidate]:
    stems = [f"{s.block}.{part}" for part in QKV]
    for order in permutations(range(3)):
        stored = dict(zip(stems, (stems[i] for i in order), strict=True))  # part -> the slot it is stored in
        moved = {part: slot for part, slot in stored.items() if part != slot}
        if s.stem not in moved:
            continue
        found = "".join("qkv"[order.index(slot)] for slot in range(3))
        for leaves in (("weight", "bias"), ("weight",)):
            if values := exchange(s, moved, leaves):
                text = f"{{tensors}}: stored in the order {', '.join(found)} instead of q, k, v"
                text += "" if len(leaves) == 2 or s.bias is None else " (the biases are right)"
                yield Candidate(text, tuple(values), values)


def interleave(s: Suspect) -> Iterator[Candidate]:
    """q, k and v of each head side by side (GPT-NeoX), read as one after the other, or the other way round."""
    stems, c = [f"{s.block}.{part}" for part in QKV], s.config
    if c.n_heads != c.n_kv_heads:
        return
    shape = (c.n_heads, 3, c.head_dim)
    for found, axes in LAYOUTS.items():
        for wanted, wanted_axes in LAYOUTS.items():
            for order in permutations(range(3)) if found != wanted else ():
                values: dict[str, Tensor] = {}
                for leaf in s.parameters_of(s.stem):
                    parts = torch.stack(
                        [_cut(s.state.weights.need(f"{stem}.{leaf}"), 0, *shape[::2]) for stem in stems], 1
                    )
                    rest = list(range(3, parts.dim()))
                    # The file as it was read, then cut in the way in which it was really written.
                    stored = _cut(parts.permute(*axes, *rest).flatten(0, 2), 0, *(shape[a] for a in wanted_axes))
                    parts = stored.permute(*np.argsort(wanted_axes).tolist(), *rest)
                    values |= {f"{stems[order[i]]}.{leaf}": parts[:, i].flatten(0, 1) for i in range(3)}
                names = ", ".join("qkv"[i] for i in order)
                text = f"{{tensors}}: {names} are stored {wanted}, and were read as {found}"
                yield Candidate(text, tuple(values), values)


def rotary_layout(s: Suspect) -> Iterator[Candidate]:
    if s.config.rope is None:
        return
    width, own = s.weight.shape[0], s.config.head_dim
    theirs = s.bench.trace.config.rope
    turned = [rope.dims or own for rope in (s.config.rope, theirs) if rope]  # the config's own part may be wrong too
    heads = [(own, part) for part in dict.fromkeys((*turned, own)) if part <= own]
    heads += [(dim, dim) for dim in range(4, width + 1, 2) if width % dim == 0 and dim != own]
    for dim, part in heads:
        for found, wanted, size in (("pairs", "halves", (-1, 2)), ("halves", "pairs", (2, -1))):
            values = {
                f"{s.stem}.{leaf}": _permute_heads(value, dim, part, size)
                for leaf, value in s.parameters_of(s.stem).items()
            }
            of = "" if dim == own else f" with heads of {dim}"
            text = f"{{tensors}}: rows are in rotary {found}{of}, where {s.bench.identity.weight_map.name} has {wanted}"
            yield Candidate(text, tuple(values), values)


def _permute_heads(value: Tensor, dim: int, turned: int, size: tuple[int, int]) -> Tensor:
    heads = _cut(value, 0, -1, dim)
    first = _cut(heads[:, :turned], 1, *size).transpose(1, 2).flatten(1, 2)
    return torch.cat((first, heads[:, turned:]), 1).flatten(0, 1)


def _cut(value: Tensor, axis: int, *sizes: int) -> Tensor:
    """One axis as several."""
    return value.reshape(*value.shape[:axis], *sizes, *value.shape[axis + 1 :])


def head_grouping(s: Suspect) -> Iterator[Candidate]:
    """Query heads go [group of kv head 0, group of kv head 1, ...]; or key/value heads were tiled, not repeated."""
    axis, leaves = (1, ("weight",)) if s.part == "attn.out" else (0, ("weight", "bias"))
    total = s.weight.shape[axis] // s.config.head_dim
    for groups in (n for n in range(2, total) if total % n == 0):
        values = {}
        for leaf, value in s.parameters_of(s.stem).items():
            if leaf in leaves:
                heads = _cut(value, axis, groups, total // groups, s.config.head_dim)
                values[f"{s.stem}.{leaf}"] = heads.transpose(axis, axis + 1).flatten(axis, axis + 2)
        yield Candidate(
            "{tensors}: the heads are grouped the wrong way (tiled instead of repeated)", tuple(values), values
        )


def gate_up(s: Suspect) -> Iterator[Candidate]:
    if s.config.gated_mlp:
        values = exchange(s, swap(f"{s.block}.mlp.gate", f"{s.block}.mlp.up"))
        yield Candidate("{tensors}: gate and up are exchanged", tuple(values), values)


def exchanged_layers(s: Suspect) -> Iterator[Candidate]:
    """A whole block with another."""
    stems = [part for part in BLOCK if s.state.weights(f"{s.block}.{part}.weight") is not None]
    for layer in s.layers():
        both: dict[str, str] = {}
        for part in stems:
            both |= swap(f"{s.block}.{part}", f"blocks.{layer}.{part}")
        if values := exchange(s, both):
            pair = sorted((int(s.block.removeprefix("blocks.")), layer))
            yield Candidate(f"layers {pair[0]} and {pair[1]} are exchanged as a whole", (), values)


def exchanged_tensors(s: Suspect) -> Iterator[Candidate]:
    """One module with its like in another layer, or with one of the same shape in this block."""
    roles = [part for part in BLOCK if part and part not in (s.part, *_siblings(s.part))]
    others = [f"blocks.{layer}.{s.part}" for layer in s.layers()] + [f"{s.block}.{part}" for part in roles]
    for other in others:
        if not s.parameters_of(other):
            continue
        for leaves in (("weight", "bias"), ("weight",), ("bias",)):
            if values := exchange(s, swap(s.stem, other), leaves):
                yield Candidate("{tensors}: exchanged", tuple(values), values)


def _siblings(part: str) -> tuple[str, ...]:
    """Exchanges within these have names of their own, but for the biases."""
    return next((group for group in (QKV, ("mlp.gate", "mlp.up")) if part in group), ())


def exchanged_biases(s: Suspect) -> Iterator[Candidate]:
    for part in _siblings(s.part):
        if f"{s.block}.{part}" != s.stem and (values := exchange(s, swap(s.stem, f"{s.block}.{part}"), ("bias",))):
            yield Candidate("{tensors}: exchanged", tuple(values), values)


def bias(s: Suspect) -> Iterator[Candidate]:
    """A difference that is the same for every token is a bias; the tokens tell its values."""
    lost = s.bias is None or not s.bias.any()
    own = torch.zeros(s.weight.shape[0]) if s.bias is None else s.bias
    name = f"{s.stem}.bias"
    offset = s.missing.mean(0)
    if lost:
        where = "not in the file" if s.bias is None else "all zero"
        size = float(offset.abs().max())
        text = f"{{tensors}}: lost ({where}); the reference adds the same vector, up to {size:.2g}, to every token"
    else:
        wrong = int((offset.abs() > 1e-3 * offset.abs().max()).sum())
        text = f"{{tensors}}: {wrong} wrong values; the difference is the same for every token"
    yield Candidate(text, (name,), {name: own + offset})


def scale(s: Suspect) -> Iterator[Candidate]:
    missing = s.missing
    ours = s.bench.output(s.point, s.state)[:, : missing.shape[1]]
    factor = 1 + float((missing * ours).sum() / ours.square().sum().clamp_min(1e-30))
    if abs(factor) > 1e-3:
        values = {f"{s.stem}.{leaf}": value * factor for leaf, value in s.parameters_of(s.stem).items()}
        yield Candidate(f"{{tensors}}: must be multiplied by {factor:.6g}", tuple(values), values)


def damage(s: Suspect, most: int = 8, each: int = 3) -> Iterator[Candidate]:
    """A few wrong elements: each adds its own multiple of one input to one output, and that finds them."""
    missing, x = s.missing, s.inputs
    per_row = missing.square().mean(0).sqrt()
    rows = (per_row > 1e-2 * per_row.max()).nonzero().flatten().tolist()
    if len(rows) > most or x.shape[0] <= 2 * each:
        return
    mended, elements = s.weight.clone(), []
    for row in rows:
        for column in _columns(missing[:, row], x, each):
            mended[row, column] += 0  # the values are solved for below, all columns of a row at once
            elements.append((row, column))
        columns = [c for r, c in elements if r == row]
        mended[row, columns] += torch.linalg.lstsq(x[:, columns], missing[:, row, None]).solution[:, 0]
    changes = [f"[{r}, {c}] is {float(s.weight[r, c]):.6g}, should be {float(mended[r, c]):.6g}" for r, c in elements]
    text = f"{{tensors}}: damaged; as [out, in], {'; '.join(changes)}"
    yield Candidate(text, (f"{s.stem}.weight",), {f"{s.stem}.weight": mended})


def _columns(target: Tensor, x: Tensor, most: int) -> list[int]:
    """The fewest columns of x whose combination is `target`, one after the other by correlation."""
    found: list[int] = []
    rest, norms = target, x.square().sum(0).sqrt().clamp_min(1e-30)
    while len(found) < most and float(rest.square().sum()) > 1e-8 * float(target.square().sum()):
        found.append(int(((rest @ x) / norms).abs().argmax()))
        rest = target - x[:, found] @ torch.linalg.lstsq(x[:, found], target[:, None]).solution[:, 0]
    return found
