"""What people read: the facts of `inspect`, `plan` and `verify` as plain data (for --json) and as lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from .checkpoint.base import Checkpoint
from .checkpoint.wording import folded, layer_template, size_text
from .weightmap import Identity, LoadPlan, Step
from .weightmap.canonical import active_count, parameter_count


def checkpoint_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """The container: format, counts, bytes, element types, ties, remarks."""
    stored = {name: info for name, info in checkpoint.tensors.items() if name not in checkpoint.aliases}
    types: dict[str, int] = {}
    for info in stored.values():
        types[info.dtype] = types.get(info.dtype, 0) + info.nbytes
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "tensors": len(stored),
        "bytes": sum(info.nbytes for info in stored.values()),
        "dtypes": types,
        "aliases": checkpoint.aliases,
        "notes": checkpoint.notes,
    }


def identity_facts(identity: Identity) -> dict[str, Any]:
    """The model in the container: architecture, dialect, config and what each rests on."""
    plan = identity.plan
    agree, able = plan.orientation
    return {
        "architecture": identity.weight_map.architecture,
        "dialect": identity.weight_map.dialect,
        "config": asdict(identity.config),
        "config_source": identity.config_source,
        "assumed": identity.assumed,
        "parameters": parameter_count(identity.config),
        "active_parameters": active_count(identity.config),
        "tie": tie_text(identity),
        "orientation": {"stored": identity.weight_map.orientation, "agree": agree, "of": able},
        "prefixes": plan.prefixes,
        "not_parameters": plan.ignored,
        "problems": plan.problems(),
    }


def tie_text(identity: Identity) -> str:
    if identity.tie_is_known:
        return identity.plan.tie
    return "head and embedding are both stored; loading compares them, and equal ones become one parameter"


def inspect_lines(checkpoint: Checkpoint, identity: Identity | None, reason: str) -> Iterator[tuple[str, str]]:
    """(label, text) pairs for a terminal."""
    facts = checkpoint_facts(checkpoint)
    sizes = facts["dtypes"] | {"": facts["bytes"]}
    *types, total = (f"{name} {size_text(size, tenths_below=1000)}".strip() for name, size in sizes.items())
    yield "file", f"{facts['path']}"
    yield (
        "format",
        f"{facts['format']}, {facts['tensors']} tensors, {total} ({', '.join(types)})",
    )
    if identity is None:
        yield "model", f"not recognised: {reason}"
    else:
        yield from _model_lines(identity)
    for alias, name in checkpoint.aliases.items():
        yield "tied", f"{alias} is {name}"
    for note in checkpoint.notes:
        yield "note", note


def _model_lines(identity: Identity) -> Iterator[tuple[str, str]]:
    config, plan = identity.config, identity.plan
    agree, able = plan.orientation
    yield "model", f"{identity.weight_map.architecture}, in the dialect `{identity.weight_map.dialect}`"
    heads = f"{config.n_heads} heads" + (
        f" sharing {config.n_kv_heads} key/value heads" if config.n_kv_heads != config.n_heads else ""
    )
    yield (
        "size",
        f"{parameter_count(config):,} parameters: {config.n_layers} layers, width {config.d_model}, {heads} of "
        f"{config.head_dim}, MLP {config.d_ff}, vocabulary {config.vocab_size:,}, context {config.context_length:,}",
    )
    if config.n_experts:
        experts = f"{config.n_experts_used} of {config.n_experts} experts for each token"
        yield "experts", f"{experts}: {active_count(config):,} parameters take part in it"
    yield "config", f"from {identity.config_source}"
    for line in identity.assumed:
        yield "assumed", line
    yield "head", tie_text(identity)
    yield "matrices", f"stored {identity.weight_map.orientation}: {agree} of {able} that could tell agree"
    if plan.prefixes:
        yield "prefixes", ", ".join(f"`{prefix}` taken off {count} names" for prefix, count in plan.prefixes.items())
    for reason, count in _count_reasons(plan).items():
        yield "leftovers", f"{count} x {reason}"
    for problem in plan.problems():
        yield "PROBLEM", problem
    if plan.clean:
        yield "plan", "clean: every parameter has its source, nothing is left over"


def _count_reasons(plan: LoadPlan) -> dict[str, int]:
    counts: dict[str, int] = {}
    for reason in plan.ignored.values():
        counts[reason] = counts.get(reason, 0) + 1
    return counts


def plan_rows(plan: LoadPlan, *, fold: bool = True) -> list[dict[str, Any]]:
    """One row per tensor, or, folded, one per kind of tensor with its layers as a range."""
    if not fold:
        return [_row(step, step.source, list(step.targets), 1) for step in plan.steps]
    groups: dict[tuple[Any, ...], list[Step]] = {}
    for step in plan.steps:
        names = tuple(map(layer_template, (step.source, *step.targets)))
        key = (names, step.source_shape, step.dtype, step.ops)
        groups.setdefault(key, []).append(step)
    return [
        _row(steps[0], folded([s.source for s in steps]), _folded_targets(steps), len(steps))
        for steps in groups.values()
    ]


def _row(step: Step, source: str, targets: list[str], count: int) -> dict[str, Any]:
    return {
        "source": source,
        "targets": targets,
        "ops": [op.label for op in step.ops] or ["keep"],
        "shape": list(step.source_shape),
        "dtype": step.dtype,
        "count": count,
    }


def _folded_targets(steps: list[Step]) -> list[str]:
    return [folded([step.targets[i] for step in steps]) for i in range(len(steps[0].targets))]


def plan_lines(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Aligned text: source, shape, type -> targets (ops)."""
    rows = list(rows)
    shapes = [" x ".join(map(str, row["shape"])) or "scalar" for row in rows]
    wide, wider = max((len(row["source"]) for row in rows), default=0), max(map(len, shapes), default=0)
    for row, shape in zip(rows, shapes, strict=True):
        ops = "" if row["ops"] == ["keep"] else f"   ({', then '.join(row['ops'])})"
        yield f"{row['source']:<{wide}}  {shape:>{wider}} {row['dtype']:<8} -> {_joined(row['targets'])}{ops}"


def _joined(targets: list[str]) -> str:
    """`a.q.w`, `a.k.w`, `a.v.w` -> `a.{q,k,v}.w`."""
    parts = [target.split(".") for target in targets]
    if len(targets) == 1 or len({len(part) for part in parts}) > 1:
        return " + ".join(targets)
    columns = [list(dict.fromkeys(column)) for column in zip(*parts, strict=True)]
    return ".".join(column[0] if len(column) == 1 else "{" + ",".join(column) + "}" for column in columns)
