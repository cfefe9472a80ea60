"""plot: a run's curves and maps as pictures."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from ..checkpoint.wording import visible
from .options import Json, print_json


def plot(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...", help="Folder of a training run, or of an extended or quantised model; several to compare."
        ),
    ],
    out: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Where the pictures go; by itself: plots in the (first) RUN.")
    ] = None,
    kind: Annotated[
        str, typer.Option(help="Which ones: loss, updates, schedule, vocabulary, sensitivity, with commas.")
    ] = ("loss,updates,schedule,vocabulary,sensitivity"),
    format: Annotated[str, typer.Option(help="png, svg, or both with a comma.")] = "png,svg",
    as_json: Json = False,
) -> None:
    """Draw loss, updates, schedule, vocabulary extension and sensitivity. Status 1 if there is nothing to draw."""
    from ..plot import plot as draw

    pictures = draw(runs, out, kinds=_words(kind), formats=_words(format))
    if as_json:
        print_json({"pictures": [asdict(picture) for picture in pictures]})
    for picture in () if as_json else pictures:
        label, text = ("drawn", ", ".join(picture.files)) if picture.files else ("not drawn", picture.why_not)
        print(visible(f"{label:<10} {picture.kind:<12}{picture.run}: {text}"))
    if not any(picture.files for picture in pictures):
        raise typer.Exit(1)


def _words(text: str) -> list[str]:
    """`png, svg` -> ["png", "svg"], each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
