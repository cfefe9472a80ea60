"""prepare: text to token shards, from which `train` reads."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from ..checkpoint.wording import size_text, visible
from ..errors import ConfigError
from .options import Json, Many, print_json, progress_bar

if TYPE_CHECKING:
    from ..data.shards import Dataset
    from ..tokenizer import Tokenizer


@dataclass
class CorpusOptions:
    """How to read the sources, and what to set aside."""

    tokenizer: Annotated[
        str,
        typer.Option(
            metavar="NAME|SRC", help="gpt2; bpe:8192 or char, made from the sources; or any SRC that has one, a model."
        ),
    ] = "gpt2"
    validation: Annotated[
        float,
        typer.Option(metavar="PART", help="Part of the documents to set aside (of a single one, its end); 0 for none."),
    ] = 0.05
    validation_source: Annotated[
        Many, typer.Option(metavar="SOURCE", help="Source whose documents are the validation split instead.")
    ] = None
    seed: Annotated[int, typer.Option(help="Of the choice of documents that are set aside.")] = 0
    field: Annotated[str, typer.Option(help="Where the text of a JSON line or of a row is.")] = "text"
    separator: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Cut text files into documents at this text.")
    ] = None
    workers: Annotated[int | None, typer.Option(min=1, help="Threads of the tokenizer; by default one a core.")] = None


def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Text files, .jsonl files, tar archives (packed or not), folders of these, or hub data sets "
            "(hub:owner/name, or hub:owner/name/config:split).",
        ),
    ],
    destination: Annotated[str, typer.Argument(metavar="DST", help="A new folder.")],
    options: CorpusOptions,
    force: Annotated[bool, typer.Option("--force", help="Replace the prepared data at DST.")] = False,
    as_json: Json = False,
) -> None:
    """Tokenize documents into memory-mapped shards. Interrupted, the same command goes on where it was."""
    if options.workers:  # read once, when `tokenizers` first encodes a batch
        os.environ["RAYON_NUM_THREADS"] = str(options.workers)
    if not options.tokenizer:
        raise ConfigError("--tokenizer is empty: name one, gpt2 for example.")
    from ..data.prepare import prepare as run

    validation: float | list[str] = options.validation_source or options.validation
    tokenizer = _tokenizer(sources, options)
    with progress_bar("tokenizing") as progress:
        dataset = run(
            sources, destination, tokenizer, validation=validation, seed=options.seed, field=options.field,
            separator=options.separator, force=force, progress=progress,
        )  # fmt: skip
    if as_json:
        print_json({"path": destination, **asdict(dataset.info)})
        return
    for label, text in _lines(destination, dataset, tokenizer):
        print(f"{label:<10} {visible(text)}")


def _tokenizer(sources: list[str], options: CorpusOptions) -> Tokenizer:
    """By name; from the text of all sources, validation too, where it is to be made from text."""
    from ..data.corpus import Corpus
    from ..data.tokenizer_training import tokenizer_from

    corpus = Corpus([*sources, *(options.validation_source or ())], field=options.field, separator=options.separator)
    with progress_bar("reading for the tokenizer") as progress:

        def texts() -> Iterator[str]:
            for document in corpus:
                yield document.text
                if progress:
                    progress(corpus.done, corpus.total)

        return tokenizer_from(options.tokenizer, texts)


def _lines(destination: str, dataset: Dataset, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    info = dataset.info
    end = "no end token" if info.separator_id is None else f"each document ends with token {info.separator_id}"
    yield "tokenizer", f"{tokenizer.source}: {info.vocab_size:,} tokens, {end}"
    for name, split in info.splits.items():
        documents = "1 document" if split.documents == 1 else f"{split.documents:,} documents"
        each = f"{split.text_bytes / split.tokens:.2f} bytes a token"
        yield name, f"{split.tokens:,} tokens in {documents}, {size_text(split.text_bytes)} of text, {each}"
    if info.empty:
        yield "left out", f"{info.empty:,} empty {'document' if info.empty == 1 else 'documents'}"
    if info.spelled_ends and info.separator_id is not None:
        ends = tokenizer.token_text(info.separator_id)
        yield "note", f"the text spells {ends} {info.spelled_ends:,} times, and it was encoded as plain text;"
        yield "", f"where it ends documents, cut with --separator {shlex.quote(ends)}"
    yield "to", f"{destination} ({info.dtype})"
    yield "train", f"loadstone train --run RUN --data {shlex.quote(destination)}"
