"""The part file of a download: `NAME.part`, and beside it `NAME.part.json`, what the server said of the whole file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Origin:
    """What the server said of the whole file when the part file was begun.

    `mirror` is a hash of the URL (which may hold a secret). An empty `validator` means that the part cannot be resumed.
    """

    mirror: str
    validator: str
    length: int | None
    md5: str


def part_of(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def received(target: Path) -> int:
    """Bytes in the part file."""
    part = part_of(target)
    return part.stat().st_size if part.exists() else 0


def description_of(target: Path) -> Path:
    return target.with_name(target.name + ".part.json")


def recall(target: Path) -> Origin | None:
    try:
        return Origin(**json.loads(description_of(target).read_text()))
    except (OSError, ValueError, TypeError):  # absent, or cut short when a process died
        return None


def discard(target: Path) -> None:
    """Forget a part file: it is damaged, or the file is complete under its own name."""
    part_of(target).unlink(missing_ok=True)
    description_of(target).unlink(missing_ok=True)
