"""`Finding`, and what is known of a module that no repair restores: rounded, overwritten, lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .bench import ROUNDINGS, Error
from .candidate import Suspect
from .points import Weights
from .precision import precision, rounded_to

LEAST = 0.2  # of what rounding gives, in the median column


@dataclass(frozen=True)
class Finding:
    """One fault.

    Attributes:
        point: the first module that differs although its inputs agree.
        repair: name of the repair in `REPAIRS`, or of what is known without one (`precision`, `copy`, ...); None if
            nothing is known but the place.
        mended: whether the repair restores the module.
        text: what is wrong, with `{tensors}` for `tensors`.
        tensors: canonical names of the parameters at fault.
        config: fields with the values that mend it.
        before, after: error of the module, as a part of its output's root mean square.
        coarse: the type to which `precision` found the values rounded.
        evidence: how the reference's own parameters differ, where they are at hand.
    """

    point: str
    repair: str | None
    mended: bool
    text: str
    tensors: tuple[str, ...]
    config: Mapping[str, Any]
    before: float
    after: float | None = None
    coarse: str = ""
    evidence: tuple[str, ...] = ()


def known_loss(suspect: Suspect, error: Error) -> Finding | None:
    """Rounding, which no repair undoes: known by values that all fit a coarser type, and an error to match."""
    name = "tok_emb.weight" if suspect.point == "embedding" else f"{suspect.stem}.weight"
    weight = suspect.state.weights(name)
    if weight is None or not (coarse := rounded_to(weight)):
        return None
    ratio = suspect.bench.ratio(suspect.point, error, suspect.state, coarse)
    # All columns about as wrong as rounding makes them: a fault would leave most of them right, or make them worse.
    if ratio is None or not (float(ratio.max()) <= ROUNDINGS and float(ratio.median()) > LEAST):
        return None
    rounding = precision(coarse).rounding
    stored = suspect.bench.step_of[name].dtype if name in suspect.bench.step_of else coarse
    held = f", though stored as {stored}" if stored != coarse else ""
    text = (
        f"{{tensors}}: rounded to {coarse} on the way (every value fits that type{held}, and its rounding gives an "
        f"error of {rounding:.0e}); what was lost cannot be restored, so convert again from the original"
    )
    return Finding(suspect.point, "precision", False, text, (name,), {}, error.worst, coarse=coarse)


def lost_cause(suspect: Suspect, error: Error) -> Finding:
    """A point that no repair mends: whatever else its parameters show."""
    stems = ("tok_emb", "pos_emb") if suspect.point == "embedding" else (suspect.stem,)
    names = [name for name in suspect.bench.step_of if name.rpartition(".")[0] in stems]

    def finding(name: str | None, text: str, *tensors: str) -> Finding:
        return Finding(suspect.point, name, False, text, tensors, {}, error.worst)

    if suspect.point == "logits" and _head_is_lost(suspect):
        return finding("tie", HEAD_LOST, *names)
    if not names:
        return finding(None, "none of the known repairs restores it")
    for name in names:
        value = suspect.state.weights.need(name)
        if bool((value == value.flatten()[0]).all()) and name.endswith(".weight"):
            return finding(
                "empty", f"{{tensors}}: every value is {float(value.flatten()[0]):g}; its own are lost", name
            )
        if other := _twin(suspect, name):
            return finding(
                "copy", f"{{tensors}}: holds the values of {suspect.bench.name(other)}; its own are lost", name
            )
    found = finding(None, "{tensors}: none of the known repairs restores it", *names)
    reference = suspect.bench.trace.weights
    return replace(found, evidence=tuple(_differences(suspect, reference, names))) if reference else found


HEAD_LOST = "{tensors}: the head is the token embedding here, and the reference has a head of its own, which was lost"


def _head_is_lost(suspect: Suspect) -> bool:
    embedding = suspect.state.weights.need("tok_emb.weight")
    own = not suspect.config.tied and not torch.equal(suspect.weight, embedding)
    return not suspect.bench.trace.config.tied and not own


def _twin(suspect: Suspect, name: str) -> str | None:
    """Another parameter with the same values, where they are no zeros or ones."""
    weights = suspect.state.weights
    value, leaf = weights.need(name), name.rpartition(".")[2]
    if bool((value == value.flatten()[0]).all()):
        return None
    others = (other for other in suspect.bench.step_of if other != name and other.endswith(f".{leaf}"))
    return next((other for other in others if torch.equal(weights.need(other), value)), None)


def _differences(suspect: Suspect, reference: Weights, names: Sequence[str]) -> Iterator[str]:
    for name in names:
        ours, theirs = suspect.state.weights(name), reference(name)
        if ours is not None and theirs is not None and ours.shape == theirs.shape and (ours != theirs).any():
            wrong, most = int((ours != theirs).sum()), float((ours - theirs).abs().max())
            what = suspect.bench.name(name)
            yield f"{wrong:,} of the {ours.numel():,} values of {what} are not the reference's, by up to {most:.2g}"
