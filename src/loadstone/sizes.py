"""Why a checkpoint is as large as it is, to the byte: the model's parts, copies, buffers, the format; what could go.

The parts add up to the size of the files exactly. Nothing is estimated: `checkpoint/layout.py` measures each format.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .checkpoint.arrays import same_bits
from .checkpoint.base import DTYPES, Checkpoint
from .checkpoint.layout import OPTIMIZER, UNUSED_STORAGE, Run, layout
from .checkpoint.wording import size_text, visible
from .weightmap import Identity
from .weightmap.plan import GIVEN_UP

# Component of the model by what the model's own name of a parameter contains; the first that fits.
_COMPONENTS = (
    ("tok_emb.", "token embedding"),
    ("pos_emb.", "position embedding"),
    ("head.", "head"),
    (".attn.", "attention"),
    (".mlp.", "MLP"),
    ("norm", "norms"),
)
WEIGHTS, TENSORS, COPY, BUFFERS, TRAINING, UNUSED, FORMAT, BESIDE = (
    "weights", "tensors", "second copy of the embedding", "buffers", "training state", "unused",
    "file format", "other files",
)  # fmt: skip
# Group by the reason that a table's `Ignore` gives; every other is a buffer's.
_GROUP_OF_REASON: Mapping[str, str] = {
    GIVEN_UP: UNUSED,
    "rotary scaling; read into the config": WEIGHTS,
    **dict.fromkeys(("optimizer slot", "Adam's running power", "training step counter", "moving average"), TRAINING),
}
_SHOWN = 24  # lines at most


@dataclass(frozen=True)
class Part:
    """Bytes with one purpose: its group, what it is, the stored type (of tensors), and how many tensors."""

    group: str
    what: str
    nbytes: int
    dtype: str = ""
    count: int = 0


@dataclass(frozen=True)
class Saving:
    """What could be saved, after all savings before it in the list. `exact`: no weight changes by it."""

    what: str
    nbytes: int
    exact: bool


@dataclass
class Sizes:
    """A size explained.

    Attributes:
        path: the file, or the folder with everything that lies in it.
        nbytes: the real size, links followed, each file once.
        parts: largest first; their sum is `nbytes`.
        savings: in the order in which they would be made; those below 1% are left out.
        free: tensors that are other names of stored ones, and how many bytes they would cost as copies.
    """

    path: str
    nbytes: int
    parts: list[Part]
    savings: list[Saving] = field(default_factory=list)
    free: tuple[int, int] = (0, 0)

    @property
    def groups(self) -> dict[str, int]:
        """Group -> bytes, largest first."""
        sums: dict[str, int] = {}
        for part in self.parts:
            sums[part.group] = sums.get(part.group, 0) + part.nbytes
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"groups": self.groups}


def why_size(checkpoint: Checkpoint, identity: Identity | None = None, *, folder: Path | None = None) -> Sizes:
    """Explain the size of a checkpoint's files.

    Args:
        checkpoint: an open one, of any format, in one file or several.
        identity: what it was recognised as; None: tensors are grouped by their names.
        folder: the folder that the user named: what else lies in it is explained too.

    Reads headers only, and embedding and head where both are stored, to compare them.
    Raises FormatError if a file is damaged, LoadstoneError if the checkpoint lies in no file.
    """
    runs = layout(checkpoint)
    purposes = _purposes(checkpoint, identity)
    parts: dict[tuple[str, str, str], tuple[int, int]] = {}
    for run in runs:
        key = _purpose(run, purposes, checkpoint)
        nbytes, count = parts.get(key, (0, 0))
        parts[key] = nbytes + run.nbytes, count + run.is_tensor
    found = [Part(group, what, nbytes, dtype, count) for (group, what, dtype), (nbytes, count) in parts.items()]
    found += _beside(folder, runs) if folder else ()
    found.sort(key=lambda part: -part.nbytes)
    free = sum(checkpoint.info(name).nbytes for name in checkpoint.aliases)
    total = sum(part.nbytes for part in found)
    return Sizes(str(folder or checkpoint.path), total, found, _savings(found), (len(checkpoint.aliases), free))


def _purpose(run: Run, purposes: Mapping[str, tuple[str, str]], checkpoint: Checkpoint) -> tuple[str, str, str]:
    """(group, what, stored type) of a run of bytes."""
    if run.is_tensor:
        fallback = TENSORS, re.sub(r"\d+", "#", run.what)
        return *purposes.get(run.what, fallback), checkpoint.info(run.what).dtype
    if run.what.startswith(OPTIMIZER):
        return TRAINING, run.what, ""
    if run.what == UNUSED_STORAGE:
        return UNUSED, run.what, ""
    return FORMAT, run.what, ""


def _purposes(checkpoint: Checkpoint, identity: Identity | None) -> dict[str, tuple[str, str]]:
    """Tensor -> (group, what it is), for all that the identity knows of."""
    if identity is None:
        return {}
    plan = identity.plan
    found = {name: (_GROUP_OF_REASON.get(reason, BUFFERS), reason) for name, reason in plan.ignored.items()}
    found |= dict.fromkeys(plan.unused, (UNUSED, "tensors that belong to no parameter"))
    aliases = checkpoint.aliases
    stored = {target: aliases.get(step.source, step.source) for step in plan.steps for target in step.targets}
    for target, source in stored.items():
        found[source] = WEIGHTS, next(what for part, what in _COMPONENTS if part in target)
    head, embedding = plan.duplicate_head or stored.get("head.weight"), stored.get("tok_emb.weight")
    if head and embedding:
        equal = _equal(checkpoint, head, embedding)
        found[head] = (COPY, "head, equal to the token embedding") if equal else (WEIGHTS, "head")
    return found


def _equal(checkpoint: Checkpoint, a: str, b: str) -> bool:
    one, two = checkpoint.info(a), checkpoint.info(b)
    alike = (one.shape, one.dtype, one.nbytes) == (two.shape, two.dtype, two.nbytes)
    return alike and same_bits(checkpoint.read(a), checkpoint.read(b))


def _beside(folder: Path, runs: list[Run]) -> Iterator[Part]:
    """Every other file in a folder and below it, each once, however many links lead to it."""
    seen = {_inode(run.file) for run in runs}
    for place, _, names in os.walk(folder):
        for file in (Path(place, name) for name in sorted(names)):
            if file.is_file() and (inode := _inode(file)) not in seen:
                seen.add(inode)
                yield Part(BESIDE, file.relative_to(folder).as_posix(), file.stat().st_size)


def _inode(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_dev, status.st_ino


def _savings(parts: list[Part]) -> list[Saving]:
    sums: dict[str, int] = {}
    for part in parts:
        sums[part.group] = sums.get(part.group, 0) + part.nbytes
    halves = sum(
        part.nbytes - part.nbytes * 2 // DTYPES[part.dtype].itemsize
        for part in parts
        if part.group in (WEIGHTS, TENSORS) and part.dtype in ("float32", "float64")
    )
    savings = (
        Saving("leave the training state out (it is needed to go on training)", sums.get(TRAINING, 0), True),
        Saving("leave the buffers out (programs make them anew)", sums.get(BUFFERS, 0), True),
        Saving("store the head once, as the embedding that it equals", sums.get(COPY, 0), True),
        Saving("leave out what nothing uses", sums.get(UNUSED, 0), True),
        Saving("store the weights as bfloat16 (rounds them)", halves, False),
    )
    return [saving for saving in savings if 100 * saving.nbytes >= sum(sums.values()) > 0]


def why_size_lines(sizes: Sizes) -> Iterator[str]:
    """Lines for a terminal: the sum, the groups, the parts with bars, and what could be saved."""
    yield visible(f"{sizes.path}: {_size(sizes.nbytes)}, {sizes.nbytes:,} bytes")
    yield "= " + " + ".join(f"{_size(nbytes)} {group}" for group, nbytes in sizes.groups.items())
    for part in sizes.parts[:_SHOWN]:
        share = part.nbytes / max(sizes.nbytes, 1)
        kind = ", ".join(filter(None, (part.what, part.dtype, f"{part.count} x" if part.count > 1 else "")))
        yield visible(
            f"  {_size(part.nbytes):>9}  {part.nbytes:>15,}  {share:6.1%}  {'#' * round(20 * share):<20}  {kind}"
        )
    if rest := sizes.parts[_SHOWN:]:
        yield f"  {_size(total := sum(part.nbytes for part in rest)):>9}  {total:>15,}  in {len(rest)} smaller parts"
    names, as_copies = sizes.free
    if names:
        yield f"  free: {names} x another name of a stored tensor (as copies: {_size(as_copies)})"
    left = sizes.nbytes
    for saving in sizes.savings:
        left -= saving.nbytes
        yield f"could be saved: {_size(saving.nbytes)} ({saving.nbytes:,} bytes): {saving.what}; leaves {_size(left)}"


def _size(nbytes: int) -> str:
    return size_text(nbytes, tenths_below=1000)
