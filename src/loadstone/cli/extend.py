"""extend: new tokens for a model and its tokenizer."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Annotated

import typer

from ..checkpoint.wording import visible
from ..errors import LoadstoneError
from .options import Json, RunOptions, Src, need, print_json

BESIDE = "extend.json"
_MOST = 1_000_000  # bytes of a text that are read


def extend(
    source: Src,
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write, as transformers reads it.")],
    options: RunOptions,
    add_token: Annotated[list[str], typer.Option("--add-token", metavar="TEXT", help="A new token; may be repeated.")],
    plain: Annotated[
        bool, typer.Option("--plain", help="Find the tokens in every text, not only where special text is parsed.")
    ] = False,
    init: Annotated[
        str,
        typer.Option(
            help="Their rows: mean_cov (mean of the trained rows with a little of their spread), mean, random."
        ),
    ] = "mean_cov",
    seed: Annotated[int, typer.Option(help="Same seed, same rows.")] = 0,
    pad_to_multiple: Annotated[
        int | None,
        typer.Option(metavar="N", help="Round the rows of the matrix up to a multiple of N, 64 for example."),
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Jinja chat template that the tokenizer gets.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Old text to measure the loss on, instead of built-in English.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what Loadstone wrote to DST earlier.")] = False,
    as_json: Json = False,
) -> None:
    """Add tokens to the tokenizer and the model at once, and report what that does to the loss on old text.

    New tokens take over padding rows first. All ways to initialise are measured; the chosen one is written, with the
    report and the data of a picture (`loadstone plot DST`) in extend.json.
    """
    template = None if chat_template is None else _read(chat_template)
    old_text = None if text is None else _read(text)
    identity, model, tokenizer = options.load(source)
    tokenizer = need(tokenizer, source)
    if identity.checkpoint.folder and destination.resolve() == identity.checkpoint.folder.resolve():
        raise LoadstoneError(f"{destination}: the source itself lies there. Choose another name.")
    from ..extend import extend as run
    from ..extend import matrix_view, unused_by_template, with_chat_template
    from ..save import save_model

    if template is not None:
        tokenizer = with_chat_template(tokenizer, template, str(chat_template))
    larger, renewed, report = run(
        model,
        tokenizer,
        add_token,
        init=init,
        pad_to_multiple=pad_to_multiple,
        seed=seed,
        special=not plain,
        text=old_text,
    )
    if template is not None and unused_by_template(renewed, [token.id for token in report.tokens]):
        report.remarks.append(f"{chat_template} writes none of the new tokens")
    view = matrix_view((model, tokenizer), (larger, renewed))

    def beside(folder: Path) -> None:
        (folder / BESIDE).write_text(json.dumps({"report": report.as_dict(), "view": view}, allow_nan=False) + "\n")

    certificate = save_model(larger, destination, renewed, force=force, beside=beside)
    report.remarks.extend(certificate["remarks"])
    if as_json:
        print_json(report.as_dict())
        return
    for label, line in (*report.lines(), ("written", str(destination))):
        print(f"{label:<9} {visible(line)}")


def _read(path: Path) -> str:
    """The beginning of a UTF-8 text file."""
    try:
        with path.open("rb") as file:
            raw = file.read(_MOST)
        return codecs.getincrementaldecoder("utf-8")().decode(raw, final=len(raw) < _MOST)
    except (OSError, UnicodeDecodeError) as error:
        raise LoadstoneError(f"{path}: cannot be read as UTF-8 text ({error}).") from None
