"""compare: models side by side, as a page, as Markdown, as JSON."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated

import typer

from ..checkpoint.wording import visible
from ..errors import LoadstoneError
from .options import Json, Many, RunOptions, print_json, progress_bar

if TYPE_CHECKING:
    from ..compare import Comparison

PAGE = "comparison.html"


def compare(
    sources: Annotated[
        list[str], typer.Argument(metavar="A B...", help="Two or more SRC; the folder of a run is its best checkpoint.")
    ],
    options: RunOptions,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help=f"The page to write; by itself {PAGE}.")
    ] = None,
    text: Annotated[
        Many, typer.Option(metavar="NAME=FILE", help="A text to score instead of the built-in ones; may be repeated.")
    ] = None,
    prompt: Annotated[Many, typer.Option(metavar="TEXT", help="A prompt to continue; may be repeated.")] = None,
    seeds: Annotated[str, typer.Option(help="Random seeds of the samples, with commas.")] = "0,1",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Most tokens of a sample.")] = 60,
    temperature: Annotated[float, typer.Option(help="Of the samples; 0 is greedy.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Of the samples: choose among the k likeliest tokens.")] = 50,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it is there.")] = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Tables as Markdown on standard output; a page only with -o.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare models: size, training, loss on several kinds of text, samples, speed, and where they differ most.

    Writes one HTML page that needs nothing else. With --json or --markdown the figures go to standard output instead;
    with -o there is the page as well. All models are measured under one protocol (docs/compare.md).
    """
    if as_json and as_markdown:
        raise LoadstoneError("--json and --markdown both print to standard output; choose one.")
    path = output or (None if as_json or as_markdown else Path(PAGE))
    if path is not None:
        _may_write(path, force)
    from ..compare import compare as run
    from ..compare.domains import PROMPTS, read_texts

    texts = read_texts(text or ())
    with progress_bar("comparing") as progress:
        found = run(
            sources, texts, prompts=prompt or PROMPTS, seeds=_numbers(seeds), max_new_tokens=max_new_tokens,
            temperature=temperature, top_k=top_k, dtype=options.dtype, device=options.device, open_source=options.open,
            progress=progress,
        )  # fmt: skip
    _print_notes(found)
    if path is not None:
        _write(path, found)
    if as_json:
        print_json(found.as_dict())
    elif as_markdown:
        from ..compare.markdown import markdown

        print(markdown(found), end="")
    else:
        _print_summary(found, path)


def _may_write(path: Path, force: bool) -> None:
    """Find out before anything is measured."""
    try:
        if path.is_dir():
            raise LoadstoneError(f"{path}: it is a folder. Name a file in it: -o {path / PAGE}.")
        if path.exists() and not (force and path.is_file()):
            raise LoadstoneError(f"{path}: it is there already. Replace it with --force, or choose a new name.")
        if not path.parent.is_dir():
            raise LoadstoneError(f"{path}: there is no folder {path.parent}. Make it first.")
        with TemporaryFile(dir=path.parent):  # permissions alone do not tell: the disk may be full or read-only
            pass
    except OSError as error:
        problem = f"{path}: it cannot be written: {error.strerror}. Choose a place where you may write."
        raise LoadstoneError(problem) from None


def _write(path: Path, found: Comparison) -> None:
    from ..checkpoint.atomic import atomic_file
    from ..compare.page import page

    content = page(found).encode()
    with atomic_file(path, need=len(content)) as temporary:
        temporary.write_bytes(content)


def _print_notes(found: Comparison) -> None:
    for source, notes in (
        *((model.name, model.notes) for model in found.models),
        *((text.source, text.notes) for text in found.texts.values()),
    ):
        for note in notes:
            print(visible(f"note: {source}: {note}"), file=sys.stderr)


def _print_summary(found: Comparison, path: Path | None) -> None:
    from ..compare.tables import letter, verdict

    for index, model in enumerate(found.models):
        print(visible(f"{letter(index)}: {model.name}"))
    for other in range(1, len(found.models)):
        print(verdict(found, other))
    print(visible(f"written: {path}"))


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 0:
        raise LoadstoneError(f"--seeds {text}: expected whole numbers, none below 0, for example --seeds 0,1,2.")
    return found
