"""diff: what is different between two checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import LoadstoneError
from .options import Json, OpenOptions, config_fields, print_json, progress_bar

if TYPE_CHECKING:
    from ..checkpoint.base import Checkpoint
    from ..weightmap import Identity


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Any SRC: a file, a folder, a hub name, an alias, a URL.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Any other.")],
    options: OpenOptions,
    rtol: Annotated[
        float | None,
        typer.Option(
            min=0, help="Take for the same what differs by no more than this part of a tensor's largest value."
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="One line per parameter, equal ones too.")] = False,
    as_json: Json = False,
) -> None:
    """What is different between two checkpoints, whatever their dialects and containers? Status 1 if anything is.

    Parameters are compared through the model's own names, so that a converted checkpoint equals its source.
    """
    from ..diff import diff as compare
    from ..diff import diff_lines

    sides, reasons = zip(*(_open(source, options) for source in (a, b)), strict=True)
    with progress_bar("comparing") as progress:
        result = compare(*sides, rtol=rtol, progress=progress)
    result.remarks[:0] = filter(None, reasons)
    if as_json:
        print_json(result.as_dict())
    else:
        for line in diff_lines(result, fold=not every):
            print(line)
    if not result.same:
        raise typer.Exit(1)


def _open(source: str, options: OpenOptions) -> tuple[Identity | Checkpoint, str]:
    """The recognised checkpoint, or the bare one and why it was not recognised."""
    from ..checkpoint import open_checkpoint
    from ..checkpoint.hub import resolve
    from ..weightmap import identify

    checkpoint = open_checkpoint(resolve(source, revision=options.revision))
    try:
        return identify(checkpoint, overrides=config_fields(options.sets), **options.as_arguments()), ""
    except LoadstoneError as error:
        if options.dialect or options.sets:  # asked for, so a mistake must be told
            raise
        return checkpoint, str(error)
