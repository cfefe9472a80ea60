"""Who hears of a run's events: `metrics.jsonl` and its neighbours, and TensorBoard.

A listener is called with a kind and a flat record; `step` is always in it. Kinds: `step`, `eval`, `sample`, `updates`,
`phase`, `save`, `stop`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import LoadstoneError

Listener = Callable[[str, Mapping[str, Any]], None]
FILES: Mapping[str, str] = {
    "step": "metrics.jsonl",
    "eval": "metrics.jsonl",
    "phase": "metrics.jsonl",
    "sample": "samples.jsonl",
    "updates": "updates.jsonl",
}


class JsonLines:
    """Appends each record as one line to the file of its kind, and is done with it: a killed run loses none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name in set(FILES.values()):
            drop_torn_line(folder / name)

    def __call__(self, kind: str, record: Mapping[str, Any]) -> None:
        if kind not in FILES:
            return
        path = self._folder / FILES[kind]
        line = json.dumps({key: _finite(value) for key, value in record.items()}, allow_nan=False, ensure_ascii=False)
        try:
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")
        except OSError as error:
            raise LoadstoneError(
                f"{path}: the run's record cannot be written ({error.strerror}). The checkpoints are whole; make room, "
                "and go on with --resume."
            ) from None


class TensorBoard:
    """Figures as TensorBoard's scalars, by tokens of its own format. Raises LoadstoneError without the package."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise LoadstoneError(
                "--tensorboard needs the package tensorboard: pip install 'loadstone[tensorboard]'. "
                "metrics.jsonl and `loadstone plot` need nothing more."
            ) from None
        self._writer = SummaryWriter(str(folder))

    def __call__(self, kind: str, record: Mapping[str, Any]) -> None:
        step = record["step"]
        if kind == "sample":
            self._writer.add_text("sample", record["text"], step)
        elif kind == "updates":
            self._scalars("updates", record["updates"], step)
        elif kind in ("step", "eval"):
            self._scalars(kind, record, step)
        self._writer.flush()

    def _scalars(self, group: str, record: Mapping[str, Any], step: int) -> None:
        for key, value in record.items():
            if key != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(f"{group}/{key}", value, step)


def drop_torn_line(path: Path) -> None:
    """A full disk or a lost machine may leave half a line, to which the next would be appended."""
    if path.is_file() and not (text := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, text.rfind(b"\n") + 1)


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
