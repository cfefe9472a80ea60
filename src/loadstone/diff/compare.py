"""`diff`: two checkpoints compared parameter by parameter through the model's own names, one pair of tensors at a time.

Why not as others do it: a diff of two files' names and hashes says that everything is different as soon as one of them
was converted. Here both are read as the model would read them, so that what is left is a difference of the models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..checkpoint.arrays import same_bits
from ..checkpoint.base import Checkpoint
from ..errors import TokenizerError
from ..weightmap import Identity
from ..weightmap.canonical import Shape
from .beside import Difference, config_differences, tokenizer_differences
from .hints import Pair, explain, explain_shapes, rounding
from .sides import Key, Side, fingerprint, open_sides
from .values import Numbers, measure, near

# What a pair of tensors can be, worst first, and how a summary says so.
STATUS = {
    "only in A": "only in A",
    "only in B": "only in B",
    "shape": "of another shape",
    "different": "different",
    "close": "close",
    "rounded": "rounded exactly",
    "same values": "equal in value",
    "equal": "equal bit for bit",
}
SAME = ("equal", "same values")


@dataclass(frozen=True)
class Entry:
    """One parameter. `shape_*` and `dtype_*` (the stored type) are None where a side lacks it."""

    name: str
    status: str
    shape_a: Shape | None = None
    shape_b: Shape | None = None
    dtype_a: str | None = None
    dtype_b: str | None = None
    numbers: Numbers | None = None
    hint: str = ""


@dataclass
class Diff:
    """What is different between A and B.

    Attributes:
        a, b: path, format, dialect (None if not recognised), and what is left over in the file, with its reason.
        entries: every parameter of either, in the order of the model.
        config: fields whose values differ.
        remarks: what the user should know about the comparison itself.
        problems: other differences, one sentence each (of the tokenizers, say).
        accepted: statuses that the caller takes for the same.
    """

    a: dict[str, Any]
    b: dict[str, Any]
    entries: list[Entry] = field(default_factory=list)
    config: list[Difference] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    accepted: tuple[str, ...] = SAME

    @property
    def same(self) -> bool:
        """No difference in any value, config field or vocabulary. Stored types and leftovers may differ."""
        differs = any(entry.status not in self.accepted for entry in self.entries)
        return not (differs or self.problems or any(field.known for field in self.config))

    @property
    def counts(self) -> dict[str, int]:
        """Status -> number of parameters, worst first; statuses that do not occur are left out."""
        found = Counter(entry.status for entry in self.entries)
        return {status: found[status] for status in STATUS if found[status]}

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"same": self.same, "counts": self.counts}


def diff(
    a: Identity | Checkpoint,
    b: Identity | Checkpoint,
    *,
    rtol: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Diff:
    """Compare two checkpoints.

    Args:
        a, b: what `open_source` gives, or a bare checkpoint that was not recognised: then names and tensors are
            compared as they are in the files.
        rtol: take for the same what differs by no more than this part of a tensor's largest value. None: differences
            that the coarser of the two types explains are called close, but are differences.
        progress: called with (bytes done, bytes in all) after each parameter.

    Raises FormatError if a tensor turns out to be damaged. Memory: one tensor of each side, and a constant.
    """
    one, two, remarks = open_sides(a, b)
    result = Diff(
        _facts(one), _facts(two), remarks=remarks, accepted=SAME if rtol is None else (*SAME, "rounded", "close")
    )
    if one.identity and two.identity:
        result.config = config_differences(one.identity, two.identity)
        if one.identity.plan.unused != two.identity.plan.unused:
            result.problems.append(
                "tensors that belong to no parameter are left over, and not the same ones in A and B"
            )
        try:
            result.problems += tokenizer_differences(one.checkpoint, two.checkpoint)
        except TokenizerError as error:
            remarks.append(f"the tokenizers could not be compared: {error}")
    result.entries = _Comparison(one, two, rtol, progress).run()
    return result


def _facts(side: Side) -> dict[str, Any]:
    identity, checkpoint = side.identity, side.checkpoint
    left: Counter[str] = Counter(identity.plan.ignored.values()) if identity else Counter()
    if identity and identity.plan.unused:
        left["claimed by no parameter"] = len(identity.plan.unused)
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "dialect": identity.weight_map.name if identity else None,
        "parameters": len(side.names),
        "leftovers": dict(left),
    }


class _Comparison:
    """One walk over both sides, and a second one over what is different, to find where it came from."""

    def __init__(self, a: Side, b: Side, rtol: float | None, progress: Callable[[int, int], None] | None) -> None:
        self.a, self.b, self.rtol, self.progress = a, b, rtol, progress
        self.keys: tuple[dict[str, Key], dict[Key, str]] = ({}, {})  # of A by name, and of B by key

    def run(self) -> list[Entry]:
        names = list(dict.fromkeys([*self.a.names, *self.b.names]))
        total, done, entries = sum(self._nbytes(name) for name in names), 0, []
        for name in names:
            entries.append(self._entry(name))
            done += self._nbytes(name)
            if self.progress:
                self.progress(done, total)
        return [self._traced(entry) for entry in entries]

    def _nbytes(self, name: str) -> int:
        return sum(side.nbytes(name) for side in (self.a, self.b) if name in side.names)

    def _entry(self, name: str) -> Entry:
        (shape_a, dtype_a), (shape_b, dtype_b) = (side.names.get(name, (None, None)) for side in (self.a, self.b))
        entry = Entry(name, "equal", shape_a, shape_b, dtype_a, dtype_b)
        x = self.a.read(name) if shape_a is not None else None
        y = self.b.read(name) if shape_b is not None else None
        if x is not None and (key := fingerprint(x)):
            self.keys[0][name] = key
        if y is not None and (key := fingerprint(y)):
            self.keys[1].setdefault(key, name)
        if x is None or y is None:
            return replace(entry, status="only in B" if x is None else "only in A")
        pair = Pair(name, x, y, (str(dtype_a), str(dtype_b)), self.a.config)
        status, numbers, hint = self._judge(pair)
        return replace(entry, status=status, numbers=numbers, hint=hint)

    def _judge(self, pair: Pair) -> tuple[str, Numbers | None, str]:
        """Status, numbers where values were compared, and a hint."""
        if pair.a.shape != pair.b.shape:
            return "shape", None, explain_shapes(pair)
        one_type = pair.dtypes[0] == pair.dtypes[1]
        if same_bits(pair.a, pair.b):
            return "equal" if one_type else "same values", None, ""
        numbers = measure(pair.a, pair.b)
        if not numbers.differing:
            return "same values", numbers, "zeros of another sign, or NaNs of other bits" if one_type else ""
        if hint := rounding(pair):
            return "rounded", numbers, hint
        if numbers.within(pair.tolerance if self.rtol is None else self.rtol):
            return "close", numbers, ""
        return "different", numbers, explain(pair, numbers)

    def _traced(self, entry: Entry) -> Entry:
        """The entry, with the other parameter of B that A's tensor equals, if nothing else explains it."""
        if entry.hint or entry.status not in ("different", "shape", "only in A"):
            return entry
        key = self.keys[0].get(entry.name)
        other = self.keys[1].get(key) if key else None
        if other is None or other == entry.name:
            return entry
        pair = Pair(
            entry.name, self.a.read(entry.name), self.b.read(other), (str(entry.dtype_a), self.b.names[other][1])
        )
        return (
            replace(entry, hint=f"A has here what B has as {other}") if near(pair.a, pair.b, pair.tolerance) else entry
        )
