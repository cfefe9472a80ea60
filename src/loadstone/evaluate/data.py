"""Where a task's data come from: a given path, the shared folder beside a checkout, or the hub."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..data.hub import hub_rows
from ..data.records import read_records
from ..errors import FormatError, LoadstoneError, SourceError

Record = tuple[str, Mapping[str, Any]]  # its place, `line 3`, and its fields


@dataclass(frozen=True)
class Source:
    """Where to look.

    Attributes:
        file: relative to a data folder; a folder itself for several files.
        hub: `hub:owner/name/config:split`.
    """

    file: str
    hub: str = ""


class Found(NamedTuple):
    """Data that were found: a path, or else the name of a hub data set."""

    path: Path | None
    hub: str

    @property
    def place(self) -> Path | str:
        """For messages."""
        return self.path or self.hub

    def protocol(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
        """What a figure says of the records that it was measured on."""
        return {"data": self.path.name if self.path else self.hub, "sha256": digest(rows)}


def shared_folder() -> Path | None:
    """`shared/data` beside the checkout that this package runs from; LOADSTONE_SHARED names another place of `shared`.

    None for an installed package, and where there is no such folder.
    """
    if named := os.environ.get("LOADSTONE_SHARED"):
        folder = Path(named) / "data"
    else:
        checkout = Path(__file__).parents[3]
        if not (checkout / "pyproject.toml").is_file():
            return None
        folder = checkout.parent / "shared" / "data"
    return folder if folder.is_dir() else None


def find(name: str, source: Source, given: str | None) -> Found:
    """The data of a task: what was given (a path, or `hub:...`), else the shared folder's, else the hub's.

    Raises SourceError if a given path is not there, or nothing is left to try.
    """
    if given is not None:
        if given.startswith("hub:"):
            return Found(None, given)
        try:
            Path(given).stat()
        except OSError as error:
            raise SourceError(
                f"--data {name}={given}: it cannot be read ({error.strerror}, seen from {Path.cwd()})."
            ) from None
        return Found(Path(given), "")
    folder = shared_folder()
    if folder is not None and (folder / source.file).exists():
        return Found(folder / source.file, "")
    if not source.hub:
        raise SourceError(
            f"--task {name}: its data are not here ({folder / source.file if folder else source.file}), and no hub "
            f"data set is known for it. Name the file: --data {name}=PATH."
        )
    return Found(None, source.hub)


def given_data(options: Iterable[str], tasks: Collection[str]) -> dict[str, str]:
    """`--data NAME=PATH` as a table. Raises LoadstoneError for a name that is not among the tasks, or comes twice."""
    found: dict[str, str] = {}
    for option in options:
        name, equals, path = option.partition("=")
        if not (equals and path) or name not in tasks or name in found:
            raise LoadstoneError(
                f"--data {option}: expected NAME=PATH, once for a task, where NAME is one of the tasks that are run: "
                f"{', '.join(tasks) or 'none'}."
            )
        found[name] = path
    return found


def records(found: Found) -> Iterator[Record]:
    """The records of a JSON or JSONL file, or of all such files in a folder (by name), or of a hub data set.

    Raises SourceError or FormatError for what cannot be read, and if there is no record at all.
    """
    empty = True
    for record in _records(found):
        empty = False
        yield record
    if empty:
        raise FormatError(found.place, "there is no record in it.")


def _records(found: Found) -> Iterator[Record]:
    if found.path is None:
        yield from ((f"row {number}", row) for number, row in enumerate(hub_rows(found.hub), 1))
        return
    if not found.path.is_dir():
        yield from read_records(found.path)
        return
    try:
        files = sorted(file for file in found.path.iterdir() if file.suffix in (".jsonl", ".json"))
    except OSError as error:
        raise SourceError(f"{found.path}: it cannot be read ({error.strerror}).") from None
    if not files:
        raise SourceError(f"{found.path}: there is no .jsonl file in this folder.")
    for file in files:
        yield from ((f"{file.name}, {place}", fields) for place, fields in read_records(file))


def digest(rows: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 of the records as read, so that the same data have the same digest in a file and on the hub."""
    sha = hashlib.sha256()
    for row in rows:
        sha.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode(errors="backslashreplace"))
        sha.update(b"\n")
    return sha.hexdigest()
