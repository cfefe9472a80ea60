"""`Side`: one checkpoint as named arrays: by the model's own names where it was recognised, else by the file's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..checkpoint.base import Array, Checkpoint
from ..config import GPTConfig
from ..errors import PlanError
from ..load import settle_tie
from ..weightmap import Identity, Step, apply, make_plan
from ..weightmap.canonical import Shape
from ..weightmap.plan import GIVEN_UP

HEAD, EMBEDDING = "head.weight", "tok_emb.weight"
Key = bytes


class Side:
    """Named arrays of one checkpoint, read one at a time.

    Attributes:
        names: name -> (shape, stored type).
        config: None if the names are the file's own.
    """

    def __init__(self, checkpoint: Checkpoint, identity: Identity | None = None) -> None:
        self.checkpoint, self.identity = checkpoint, identity
        self.config: GPTConfig | None = identity.config if identity else None
        self.names: dict[str, tuple[Shape, str]] = {}
        self._places: dict[str, tuple[Step | str, int]] = {}
        self._last: tuple[Step | str, list[Array]] | None = None
        if identity is None:
            for name, info in checkpoint.tensors.items():
                self.names[name], self._places[name] = (info.shape, info.dtype), (name, 0)
            return
        for step in identity.plan.steps:
            for i, (target, shape) in enumerate(zip(step.targets, step.target_shapes, strict=True)):
                self.names[target], self._places[target] = (shape, step.dtype), (step, i)

    def share_head(self) -> None:
        """Give a tied head its own name too, to be compared with the other side's."""
        if EMBEDDING in self.names:
            self.names[HEAD], self._places[HEAD] = self.names[EMBEDDING], self._places[EMBEDDING]

    def read(self, name: str) -> Array:
        """One array. What it was made from is kept until the next, since one fused tensor holds several."""
        place, part = self._places[name]
        if self._last is None or self._last[0] is not place:
            self._last = None  # freed before the next is read
            self._last = place, self._read(place)
        return self._last[1][part]

    def nbytes(self, name: str) -> int:
        """Stored bytes of the tensor that holds it, in equal parts if it holds several."""
        place, _ = self._places[name]
        if isinstance(place, str):
            return self.checkpoint.info(place).nbytes
        return self.checkpoint.info(place.source).nbytes // len(place.targets)

    def _read(self, place: Step | str) -> list[Array]:
        if isinstance(place, str):
            return [self.checkpoint.read(place)]
        assert self.config is not None  # noqa: S101 - only a recognised checkpoint has steps
        return apply(place.ops, [self.checkpoint.read(place.source)], self.config)


def open_sides(a: Identity | Checkpoint, b: Identity | Checkpoint) -> tuple[Side, Side, list[str]]:
    """Both sides under the same kind of names, and why, where these are not the model's own."""
    remarks: list[str] = []
    settled = [_settled(each, label, remarks) for each, label in ((a, "A"), (b, "B"))]
    (first, one), (second, two) = settled
    if one is None or two is None:
        remarks.append("the names are compared as they are in the files, not by what they mean")
        return Side(first), Side(second), remarks
    sides = Side(first, one), Side(second, two)
    if one.config.tied != two.config.tied:
        for side in sides:
            if side.config and side.config.tied:
                side.share_head()
    return *sides, remarks


def _settled(source: Identity | Checkpoint, label: str, remarks: list[str]) -> tuple[Checkpoint, Identity | None]:
    """The checkpoint, and its identity if that tells where every parameter lies; a doubtful tie is settled."""
    if isinstance(source, Checkpoint):
        return source, None
    identity = replace(source)  # settling changes config and plan
    plan = identity.plan
    if plan.mismatched or plan.doubled:
        remarks.append(f"{label} does not fit its own config: {'; '.join(plan.problems())}")
        return identity.checkpoint, None
    if not plan.clean:
        remarks.append(f"{label} is not loadable as it is: {'; '.join(plan.problems())}")
    try:
        settle_tie(identity)
    except PlanError as error:
        remarks.append(f"{label} is not loadable as it is: {error}")
        given_up = [name for name, reason in plan.ignored.items() if reason == GIVEN_UP]
        identity.config = identity.config.with_overrides({"tied": False})
        identity.plan = make_plan(identity.config, identity.checkpoint.tensors, identity.weight_map, ignore=given_up)
    return identity.checkpoint, identity


def fingerprint(array: Array) -> Key | None:
    """A few elements in bfloat16, by which a copy is recognised whatever its type. None if they are all alike."""
    import ml_dtypes

    if not array.size or not array.ndim or array.dtype.kind == "c":
        return None
    count = 64 if array.ndim == 1 else 8
    grid = np.ix_(*(np.unique(np.linspace(0, dim - 1, count).astype(int)) for dim in array.shape))
    with np.errstate(all="ignore"):
        sample = np.ascontiguousarray(array[grid]).astype(ml_dtypes.bfloat16)
    raw = sample.view(np.uint16)
    return None if (raw == raw.flat[0]).all() else repr(array.shape).encode() + raw.tobytes()
