"""Findings in words and as data: the file's own names, the same fault of many layers told once, the evidence."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

from ..checkpoint.wording import few, folded, layer_template
from ..weightmap import Identity
from .finding import Finding
from .search import Diagnosis

MANY = 6  # modules that differ without a repair: beyond so many, and a quarter of all, the models are different ones


@dataclass(frozen=True)
class Cause:
    """One fault as people see it: findings of the same kind in several places are one.

    Attributes:
        points: where it shows.
        tensors: names in the file, with the part where a tensor holds several.
        text: what is wrong, complete.
        hint: what to type, if the command line can undo it.
        evidence: how the reference's own parameters differ, if they are at hand and nothing else is known.
    """

    repair: str | None
    points: list[str]
    tensors: list[str]
    text: str
    hint: str
    config: Mapping[str, Any]
    mended: bool
    before: float
    after: float | None
    evidence: list[str]


def causes(diagnosis: Diagnosis, identity: Identity) -> list[Cause]:
    groups: dict[tuple[Any, ...], list[Finding]] = {}
    for finding in diagnosis.findings:
        groups.setdefault((finding.repair, finding.text, finding.mended), []).append(finding)
    return [_cause(found, identity) for found in groups.values()]


def _cause(findings: Sequence[Finding], identity: Identity) -> Cause:
    first = findings[0]
    tensors = _file_names([name for finding in findings for name in finding.tensors], identity)
    text = first.text.replace("{tensors}", few(_folded(tensors), 6))
    after = [finding.after for finding in findings if finding.after is not None]
    evidence = [text for finding in findings for text in finding.evidence]
    return Cause(first.repair, [f.point for f in findings], tensors, text, _hint(first.config), first.config,
                 first.mended, max(f.before for f in findings), max(after, default=None), evidence)  # fmt: skip


def _file_names(parameters: Sequence[str], identity: Identity) -> list[str]:
    """The file's tensors; `(q, v)` behind one that holds more than what is at fault."""
    steps = {target: step for step in identity.plan.steps for target in step.targets}
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(parameters):
        step = steps.get(name)
        found.setdefault(step.source if step else name, []).append(name)
    names = []
    for source, parts in found.items():
        whole = len(steps[parts[0]].targets) == len(parts) if parts[0] in steps else True
        names.append(source if whole else f"{source} ({', '.join(part.split('.')[-2] for part in parts)})")
    return names


def _folded(names: Sequence[str]) -> list[str]:
    """`h.0.x`, `h.1.x`, `h.2.x` -> `h.{0,1,2}.x`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(layer_template(name), []).append(name)
    return [folded(members, span_from=3) for members in groups.values()]


def _hint(config: Mapping[str, Any]) -> str:
    """Options for the command line; a rope is given with every field that is not the default."""
    options = []
    for name, value in config.items():
        if is_dataclass(value) and not isinstance(value, type):
            default = asdict(type(value)())
            value = {key: item for key, item in asdict(value).items() if item != default[key] or key == "theta"}
        text = json.dumps(value) if not isinstance(value, str) else value
        options.append(f"--set '{name}={text}'" if isinstance(value, dict) else f"--set {name}={text}")
    return " ".join(options)


def as_dict(diagnosis: Diagnosis, identity: Identity) -> dict[str, Any]:
    """For --json."""
    found = causes(diagnosis, identity)
    rows = [asdict(cause) | {"config": _plain(cause.config)} for cause in found]
    restored = [asdict(parity) | {"ok": parity.ok} for parity in diagnosis.restored]
    return {"causes": rows, "judged": diagnosis.judged, "restored": restored,
            "complete": diagnosis.complete}  # fmt: skip


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for k, v in config.items()}


def lines(diagnosis: Diagnosis, identity: Identity) -> Iterator[str]:
    """Text for a terminal."""
    found = causes(diagnosis, identity)
    if not found:
        yield (
            f"all {diagnosis.judged} modules agree with the reference when they are fed with its inputs: what is left "
            "is the rounding that adds up over the layers"
        )
        return
    for number, cause in enumerate(found, 1):
        yield f"{number}. {cause.text}"
        error = f"error {cause.before:.1e}" + (
            f", {cause.after:.1e} after the repair" if cause.after is not None else ""
        )
        yield f"   seen at {few(_folded(cause.points))}: {error}"
        for text in cause.evidence[:3]:
            yield f"   {text}"
        if cause.hint:
            yield f"   try: {cause.hint}"
    yield _verdict(diagnosis, found)


def _verdict(diagnosis: Diagnosis, found: Sequence[Cause]) -> str:
    if diagnosis.complete:
        repairs = "this repair restores" if len(found) == 1 else f"these {len(found)} repairs together restore"
        worst = max(parity.max_abs for parity in diagnosis.restored)
        return f"{repairs} the logits at all lengths (max difference {worst:.1e})"
    nameless = sum(finding.repair is None for finding in diagnosis.findings)
    if nameless > MANY and 4 * nameless > diagnosis.judged:
        return (
            f"{nameless} of {diagnosis.judged} modules are unlike the reference's, and no repair explains them: it is "
            "probably another model, or the same one after more training"
        )
    if unknown := sum(not cause.mended for cause in found):
        count = "this" if len(found) == 1 else f"{unknown} of these {len(found)}"
        if any(cause.repair is None for cause in found):
            return f"no known repair restores {count}"
        return f"{count} cannot be repaired with what the file holds"
    return "every module agrees after these repairs, yet the logits do not: the reference computes something else too"
