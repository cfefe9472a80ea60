"""What a training run shows while it runs: a progress line on a terminal, plain lines elsewhere; on standard error."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..checkpoint.wording import visible

if TYPE_CHECKING:
    from ..train.loop import Trainer

_FIGURES = (
    ("loss", "loss {:.3f}"), ("val_loss", "val {:.4f}"), ("bits_per_byte", "{:.3f} bits/byte"),
    ("accuracy", "accuracy {:.2%}"), ("lr", "lr {:.1e}"), ("tokens_per_s", "{:,.0f} tok/s"), ("mfu", "MFU {:.0%}"),
)  # fmt: skip


class Reporter:
    """A listener of `train.log`. Use as a context."""

    def __init__(self, total: int, begin: int = 0, quiet: bool = False) -> None:
        self._total, self._begin, self._quiet = total, begin, quiet
        self._bar: Any = None
        self._last: dict[str, Any] = {}

    def __enter__(self) -> Reporter:
        if sys.stderr.isatty() and not self._quiet:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (MofNCompleteColumn(), BarColumn(24), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total, completed=self._begin)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, kind: str, record: Mapping[str, Any]) -> None:
        if kind in ("step", "eval"):
            self._last |= record
        if self._bar is not None and kind in ("step", "eval"):
            self._bar.update(self._task, completed=record["step"], description=_figures(self._last))
        if kind == "eval":
            self._say(f"step {record['step']:>6}  {_figures({**self._last, **record})}")
        elif kind == "sample":
            self._say(f"sample      {visible(record['prompt'] + record['text'])}")
        elif kind == "phase":
            self._say(f"phase {record['phase'] + 1}: {record['trainable']:,} parameters are trained")

    def _say(self, line: str) -> None:
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)


def _figures(record: Mapping[str, Any]) -> str:
    return "  ".join(form.format(record[key]) for key, form in _FIGURES if isinstance(record.get(key), (int, float)))


def introduction(trainer: Trainer) -> Iterator[str]:
    """What will be trained, on how much, and when."""
    trained = sum(parameter.numel() for parameter in trainer.optimizer.named.values())
    total = sum(parameter.numel() for parameter in trainer.model.parameters())
    rows = f"{trainer.total:,} steps of {trainer.settings.batch_size} rows"
    yield f"{total:,} parameters, {trained:,} of them trained; {rows}"
    yield from trainer.run.read().get("notes", ())
    if trainer.strategy is not None:
        yield from trainer.strategy.describe(trainer.model).splitlines()


def try_it(run: Path) -> str:
    """A command that shows what was trained."""
    kept = run / "best" if (run / "best").exists() else run / "latest"
    place = shlex.quote(str(kept))
    if (kept / "adapter.json").is_file():
        base = json.loads((kept / "adapter.json").read_text(encoding="utf-8"))["base"]["source"]
        return f"loadstone merge {shlex.quote(base)} {place} merged"
    if (run / "test.jsonl").is_file():
        return f"loadstone classify {place} --test {shlex.quote(str(run / 'test.jsonl'))}"
    if json.loads((run / "run.json").read_text(encoding="utf-8"))["request"]["data"].get("kind") == "sft":
        return f"loadstone chat {place}"
    return f'loadstone generate {place} "Once upon a time"'
