"""Scores kept on the disk, a line an item, so that an evaluation that was stopped goes on where it was.

A file belongs to one task, one model and one set of requests, token for token: its name holds the hash of these, so
scores of another model, tokenizer, text or window are never taken for ours. The number of items, the size of batches
and the machine are no part of it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ..errors import FormatError, LoadstoneError
from ..model import GPT
from ..train.log import drop_torn_line
from .scoring import Request, Scores


def model_hash(model: GPT) -> str:
    """SHA-256 of config, names, types and values: the same in any file format, another one for each dtype."""
    sha = hashlib.sha256(repr(model.config).encode())
    for name, parameter in model.named_parameters():
        sha.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        values: Any = parameter.detach().cpu().contiguous().view(torch.uint8).numpy()
        sha.update(values)
    return sha.hexdigest()


def requests_hash(items: Sequence[Sequence[Request]]) -> str:
    sha = hashlib.sha256()
    for item in items:
        for request in item:
            sha.update(np.array([len(item), len(request.ids), request.targets]).tobytes())
            sha.update(np.asarray(request.ids, dtype=np.int64).tobytes())
    return sha.hexdigest()


class Store:
    """The scores of one task's items. Use as a context; `scored` holds what was there already.

    Args:
        folder: where the file is or will be; made if it is not there.
        task: its name.
        key: what the scores depend on, as plain JSON; written into the first line.
        items: the requests of each; scores that do not fit them are damaged.

    Raises LoadstoneError if the file cannot be written or is none of ours. A line that a killed process left unfinished
    is dropped.
    """

    def __init__(self, folder: Path, task: str, key: Mapping[str, Any], items: Sequence[Sequence[Request]]) -> None:
        text = json.dumps(key, sort_keys=True)
        short = re.sub(r"[^\w.-]+", "_", Path(task).name)[:60]
        self.path = folder / f"{short}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
        self._head = json.dumps({"task": task, "key": key}) + "\n"
        self._items = items
        self.scored: dict[int, list[Scores]] = {}
        self._file: IO[str]

    def __enter__(self) -> Store:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            drop_torn_line(self.path)
            fresh = not self.path.exists() or not self.path.stat().st_size
            if not fresh:
                self._read()
            self._file = self.path.open("a", encoding="utf-8")
            if fresh:
                self._file.write(self._head)
                self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from None
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # of a full disk, which `add` has reported
            self._file.close()

    def add(self, item: int, scores: Sequence[Scores]) -> None:
        """One line, complete on return."""
        record = {
            "item": item,
            "logprobs": [[float(f"{value:.9g}") for value in each.logprobs] for each in scores],  # float32, exactly
            "greedy": ["".join("01"[int(right)] for right in each.greedy) for each in scores],
        }
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from None

    def _read(self) -> None:
        with self.path.open(encoding="utf-8", errors="backslashreplace") as file:
            if file.readline() != self._head:
                raise self._damaged(1)
            for number, line in enumerate(file, 2):
                try:
                    record = json.loads(line)
                    self.scored[record["item"]] = _scores(record, self._items[record["item"]])
                except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
                    raise self._damaged(number) from None

    def _damaged(self, line: int) -> FormatError:
        return FormatError(
            self.path, f"line {line} is not what an evaluation writes.", "Remove the file; its items are run again."
        )

    def _unwritable(self, error: OSError) -> LoadstoneError:
        return LoadstoneError(
            f"{self.path}: the scores cannot be kept ({error.strerror}). Make room or choose another --out; what was "
            "written is used by the next run."
        )


def _scores(record: Mapping[str, Any], requests: Sequence[Request]) -> list[Scores]:
    """Raises some error if the record is none, or of other requests."""
    found = [
        Scores(np.array(logprobs, dtype=np.float32), np.array([mark == "1" for mark in greedy]))
        for logprobs, greedy in zip(record["logprobs"], record["greedy"], strict=True)
    ]
    for each, request in zip(found, requests, strict=True):
        if not each.logprobs.shape == each.greedy.shape == (request.targets,) or not np.isfinite(each.logprobs).all():
            raise ValueError
    return found
