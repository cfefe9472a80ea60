"""inspect and plan: what a checkpoint is, and how it would load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..checkpoint.wording import visible
from ..errors import LoadstoneError
from .options import Json, OpenOptions, Src, config_fields, print_json

if TYPE_CHECKING:
    from ..checkpoint.base import Checkpoint
    from ..weightmap import Identity


def inspect(
    source: Src,
    options: OpenOptions,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor too.")] = False,
    why_size: Annotated[bool, typer.Option("--why-size", help="What its bytes are, all of them, instead.")] = False,
    audit: Annotated[
        bool, typer.Option("--audit", help="What it would import and call in a program that obeys pickles, instead.")
    ] = False,
    as_json: Json = False,
) -> None:
    """What is this file? Format, dialect, architecture, sizes, types, ties, leftovers (reads the header only)."""
    from ..checkpoint import open_checkpoint
    from ..checkpoint.hub import resolve
    from ..report import checkpoint_facts, identity_facts, inspect_lines
    from ..weightmap import identify

    path = resolve(source, revision=options.revision)
    if audit and why_size:
        raise LoadstoneError("--audit and --why-size are two questions; ask one at a time.")
    if audit:
        _audit(path, as_json)
        return
    checkpoint = open_checkpoint(path)
    identity, reason = None, ""
    try:
        identity = identify(checkpoint, overrides=config_fields(options.sets), **options.as_arguments())
    except LoadstoneError as error:
        reason = str(error)
    if why_size:
        _why_size(checkpoint, identity, path, as_json)
        return
    if as_json:
        facts = checkpoint_facts(checkpoint) | {"model": identity_facts(identity) if identity else None}
        facts |= {"not_recognised": reason} if reason else {}
        if tensors:
            facts["tensor_list"] = {
                name: {"shape": info.shape, "dtype": info.dtype, "nbytes": info.nbytes}
                for name, info in checkpoint.tensors.items()
            }
        print_json(facts)
        return
    for label, text in inspect_lines(checkpoint, identity, reason):
        print(f"{label:<10} {visible(text)}")
    if tensors:
        for name, info in checkpoint.tensors.items():
            print(f"  {visible(name)}  {' x '.join(map(str, info.shape)) or 'scalar'}  {info.dtype}")


def _audit(path: Path, as_json: bool) -> None:
    """Works on files that nothing else here would open. Status 1 if something in it is dangerous."""
    from ..checkpoint.audit import audit, audit_lines
    from ..checkpoint.pickle_names import DANGEROUS

    found = audit(path)
    if as_json:
        print_json(found.as_dict())
    else:
        for label, text in audit_lines(found):
            print(f"{label:<10} {text}")
    if found.verdict == DANGEROUS:
        raise typer.Exit(1)


def _why_size(checkpoint: Checkpoint, identity: Identity | None, path: Path, as_json: bool) -> None:
    from ..sizes import why_size, why_size_lines

    found = why_size(checkpoint, identity, folder=path if path.is_dir() else None)
    if as_json:
        print_json(found.as_dict())
    else:
        for line in why_size_lines(found):
            print(visible(line))


def plan(
    source: Src,
    options: OpenOptions,
    every: Annotated[bool, typer.Option("--all", help="One line per tensor instead of one per kind.")] = False,
    as_json: Json = False,
) -> None:
    """How each tensor would enter the model (reads the header only). Status 1 if the plan has problems."""
    from ..report import identity_facts, plan_lines, plan_rows, tie_text

    identity = options.open(source)
    rows = plan_rows(identity.plan, fold=not every)
    if as_json:
        print_json(identity_facts(identity) | {"steps": rows})
    else:
        layers = f"{identity.config.n_layers} layers; config from {identity.config_source}"
        print(f"{identity.weight_map.name} -> model, {layers}")
        for line in plan_lines(rows):
            print(f"  {visible(line)}")
        print(f"  {tie_text(identity)}")
        for name, reason in identity.plan.ignored.items() if every else ():
            print(f"  {visible(name)}: left aside, {reason}")
        for line in identity.assumed:
            print(f"  assumed: {line}")
        for problem in identity.plan.problems():
            print(f"PROBLEM: {visible(problem)}")
        print("clean: nothing missing, nothing unused" if identity.plan.clean else "not loadable as it is")
    if not identity.plan.clean:
        raise typer.Exit(1)
