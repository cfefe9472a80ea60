"""The closed list of legal repairs, as data: name, the kinds of points that it can explain, and its candidates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from . import repair_linear as linear
from . import repair_other as other
from .candidate import QKV, Candidate, Suspect

QK = frozenset({"attn.q", "attn.k"})
LINEAR = frozenset({*QKV, "attn.out", "mlp.gate", "mlp.up", "mlp.down"})
NORM = frozenset({"norm1", "norm2", "norm"})
IN_BLOCK = LINEAR | {"norm1", "norm2"}
CONTEXT, HIDDEN, EMBEDDING, HEAD = (frozenset({x}) for x in ("attn.context", "mlp.hidden", "embedding", "logits"))


@dataclass(frozen=True)
class Repair:
    """One kind of fault, and how to undo it.

    Attributes:
        name: what reports and tests call it.
        points: the parts of the model whose output it changes.
        candidates: the concrete repairs of one point, the likelier first.
        first: whether another fault in the same module may be looked for after it.
        estimates: whether it makes values up from the difference, so that an exact repair comes before it.
    """

    name: str
    points: frozenset[str]
    candidates: Callable[[Suspect], Iterator[Candidate]]
    first: bool = False
    estimates: bool = False


# Of repairs that explain a point equally well, the earlier one is reported.
REPAIRS: tuple[Repair, ...] = (
    Repair("position offset", EMBEDDING, other.position_offset, first=True),
    Repair("tie", EMBEDDING | HEAD, other.tie, first=True),
    Repair("vocabulary rows", EMBEDDING, other.embedding_rows, first=True),
    Repair("vocabulary rows", HEAD, other.head_rows, first=True),
    Repair("scale", EMBEDDING, other.scaled_embedding, estimates=True),
    Repair("parallel residual", frozenset({"norm2"}), other.parallel_residual),
    Repair("norm epsilon", NORM, other.norm_eps),
    Repair("norm kind", NORM, other.norm_kind, first=True),
    Repair("exchanged layers", IN_BLOCK, linear.exchanged_layers, first=True),
    Repair("exchanged norms", NORM, other.exchanged_norms, first=True),
    Repair("norm plus one", NORM, other.plus_one, first=True),
    Repair("transpose", LINEAR | HEAD, linear.transpose, first=True),
    Repair("reshape", LINEAR, linear.reshape, first=True),
    Repair("qkv order", frozenset(QKV), linear.qkv_order, first=True),
    Repair("qkv interleave", frozenset(QKV), linear.interleave, first=True),
    Repair("head count", QK | {"attn.v"} | CONTEXT, other.head_count, first=True),
    Repair("rotary layout", QK, linear.rotary_layout, first=True),
    Repair("rotary theta", CONTEXT, other.rope_theta, first=True),
    Repair("rotary dims", CONTEXT, other.rope_dims, first=True),
    Repair("rotary scaling", CONTEXT, other.rope_scaling),
    Repair("head grouping", frozenset({*QKV, "attn.out"}), linear.head_grouping, first=True),
    Repair("gate and up", frozenset({"mlp.gate", "mlp.up"}), linear.gate_up, first=True),
    Repair("activation", HIDDEN, other.activation),
    Repair("exchanged tensors", LINEAR, linear.exchanged_tensors, first=True),
    Repair("exchanged tensors", LINEAR, linear.exchanged_biases),
    Repair("scale", LINEAR | HEAD | NORM, linear.scale, estimates=True),
    Repair("damage", LINEAR | HEAD, linear.damage, estimates=True),
    Repair("damage", NORM, other.damaged_norm, estimates=True),
    Repair("bias", LINEAR | NORM, linear.bias, estimates=True),
)
