"""pull: fetch a model ahead of its use."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Json, Src, print_json


def pull(
    source: Src,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub name.")] = None,
    as_json: Json = False,
) -> None:
    """Fetch a model now, so that it is there later without a network; prints where it lies."""
    from ..checkpoint.hub import pull as fetch

    path = fetch(source, revision=revision)
    if as_json:
        print_json({"source": source, "path": str(path)})
    else:
        print(path)
