"""What `quantize` and `prune` share: their options, a float32 model, its perplexity before and after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import OpenOptions, progress_bar

if TYPE_CHECKING:
    from ..calibrate.measure import Change, Examination
    from ..calibrate.rows import Rows
    from ..model import GPT
    from ..tokenizer import Tokenizer
    from ..weightmap import Identity


@dataclass
class ShrinkOptions(OpenOptions):
    """What is calibrated and measured on."""

    calibration: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Text to calibrate on: a file, folder or archive, or self: the model's own."),
    ] = None
    rows: Annotated[int, typer.Option(min=1, help="Rows of (at most) 512 tokens to calibrate on.")] = 64
    seed: Annotated[int, typer.Option(min=0, help="Of the model's own text. Same seed, same result.")] = 0
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text for the perplexity before and after; else the model's own text."),
    ] = None
    task: Annotated[str | None, typer.Option(metavar="NAME", help="Or a text of `eval`: wikitext2, ptb.")] = None
    context: Annotated[int | None, typer.Option(min=1, help="Of the text: tokens that the model may read.")] = None
    limit: Annotated[int | None, typer.Option(min=1, help="Of the text: so many windows, evenly spread.")] = None

    def load_float32(self, source: str) -> tuple[Identity, GPT, Tokenizer | None]:
        """The model, whose perplexity is to be compared with what becomes of it."""
        from ..kernels import keep_freed_memory

        keep_freed_memory()
        return self.load_as(source, "float32")

    def calibration_of(self, model: GPT, tokenizer: Tokenizer | None, needed: bool) -> Rows | None:
        """The rows to calibrate on: those asked for, or the model's own text if there must be some."""
        from ..calibrate.rows import SELF, calibration_rows

        source = self.calibration or (SELF if needed else None)
        if source is None:
            return None
        with progress_bar("writing text to calibrate on" if source == SELF else "reading") as progress:
            return calibration_rows(model, tokenizer, source, count=self.rows, seed=self.seed, progress=progress)

    def examined(self, model: GPT, tokenizer: Tokenizer | None) -> Examination:
        """What perplexity is measured on."""
        from ..calibrate.measure import examination

        with progress_bar("writing text to measure on") as progress:
            return examination(
                model, tokenizer, text=self.text, task=self.task, context=self.context, limit=self.limit,
                progress=progress,
            )  # fmt: skip


def comparison(model: GPT, what: Examination) -> Callable[[GPT], Change]:
    """Measures the model now, and gives what compares another one with it."""
    from ..calibrate.measure import change, nats

    with progress_bar("perplexity before") as progress:
        before = nats(model, what, progress)

    def compare(changed: GPT) -> Change:
        with progress_bar("perplexity after") as progress:
            return change(before, nats(changed, what, progress), what)

    return compare


def described(change: Change) -> str:
    """What it was measured on, as a line."""
    protocol = {key: value for key, value in change.protocol.items() if key not in ("sha256", "form")}
    named = [f"{key.replace('_', ' ')}: {value}" for key, value in protocol.items()]
    return "; ".join([*named, f"{change.tokens:,} tokens"])
