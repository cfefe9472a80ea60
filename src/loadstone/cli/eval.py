"""eval: figures of a model on texts and tasks, each with its protocol."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..errors import LoadstoneError
from .options import Json, Many, RunOptions, Src, need, print_json, progress_bar

TASKS = (
    "wikitext2, wikitext2_paper, ptb, ptb_paper, lambada, piqa, winogrande, copa, arc_easy, arc_challenge, hellaswag, "
    "blimp"
)


def evaluate(
    source: Src,
    options: RunOptions,
    task: Annotated[Many, typer.Option(metavar="NAME", help=f"Several may be given. Known: {TASKS}.")] = None,
    text: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="Perplexity of this text (UTF-8).")] = None,
    data: Annotated[
        Many, typer.Option(metavar="NAME=PATH", help="Where a task's data are: a file, a folder, or hub:owner/name.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens that the model may read. Default: its context, at most 2048.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens between the windows of a text. Default: the context.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows at once. In float32 no figure depends on it.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many items of each task, evenly spread.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder for the scores of each item: what it has is not run again.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Evaluate on texts and tasks: perplexity in four units, last words, multiple choice, minimal pairs.

    Each figure comes with its protocol, the hash of its data, and a 95% interval; where the model is a GPT-2, with what
    was published for it (docs/evaluate.md).
    """
    if not task and not text:
        raise LoadstoneError(f"give --task NAME or --text FILE, one or more. Tasks: {TASKS}.")
    from ..evaluate.data import given_data
    from ..evaluate.run import evaluate as run
    from ..evaluate.table import lines
    from ..evaluate.tasks import task_named
    from ..evaluate.tasks.base import Task
    from ..evaluate.tasks.text import file_task
    from ..kernels import keep_freed_memory

    tasks: list[Task] = [*map(task_named, dict.fromkeys(task or ())), *map(file_task, text or ())]
    paths = given_data(data or (), task or ())
    identity, model, found = options.load(source)
    tokenizer = need(found, source)
    keep_freed_memory()
    with progress_bar("evaluating") as progress:
        results = run(
            model, tokenizer, tasks, context=context, stride=stride, batch_size=batch_size, limit=limit, data=paths,
            out=out, progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(
            {"source": source, "config": asdict(identity.config), "results": [each.as_dict() for each in results]}
        )
        return
    for number, result in enumerate(results):
        print("\n" * bool(number) + "\n".join(lines(result)))
