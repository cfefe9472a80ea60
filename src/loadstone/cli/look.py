"""inspect, plan, verify: what a checkpoint is, how it would load, whether it loaded right."""

from __future__ import annotations

from typing import Annotated

import typer

from ..checkpoint.wording import visible
from ..errors import LoadstoneError
from .options import Json, OpenOptions, RunOptions, Src, config_fields, print_json, progress_bar


def inspect(
    source: Src,
    options: OpenOptions,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor too.")] = False,
    as_json: Json = False,
) -> None:
    """What is this file? Format, dialect, architecture, sizes, types, ties, leftovers (reads the header only)."""
    from ..checkpoint import open_checkpoint
    from ..checkpoint.hub import resolve
    from ..report import checkpoint_facts, identity_facts, inspect_lines
    from ..weightmap import identify

    checkpoint = open_checkpoint(resolve(source, revision=options.revision))
    identity, reason = None, ""
    try:
        identity = identify(checkpoint, overrides=config_fields(options.sets), **options.as_arguments())
    except LoadstoneError as error:
        reason = str(error)
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


def verify(
    source: Src,
    options: RunOptions,
    against: Annotated[
        str | None, typer.Option(help="Compare logits with: transformers (reading the same SRC), or transformers:PATH.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Load it and prove it: every parameter equals its source, counts, loss on English, logits of a reference."""
    if against:
        from ..verify import check_reference

        check_reference(against)
    identity, model, tokenizer = options.load(source)
    from ..verify import verify as run

    with progress_bar("verifying") as progress:
        report = run(identity, model, tokenizer, against=against, progress=progress)
    if as_json:
        print_json(report.as_dict())
    else:
        for check in report.checks:
            mark = {True: "ok  ", False: "FAIL", None: "-   "}[check.ok]
            print(f"{mark} {check.name}: {check.detail}")
        counts, untied = report.counts, "parameters_with_untied_head"
        print(f"     {counts['parameters']:,} parameters; {counts[untied]:,} if the head were a copy of the embedding")
        if others := counts["not_parameters_in_file"]:
            print(f"     {others:,} elements in the file are no parameters")
        print(("verified" + (", with assumptions" if report.assumed else "")) if report.ok else "NOT verified")
    if not report.ok:
        raise typer.Exit(1)
