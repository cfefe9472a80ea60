"""The tasks as data: which file, how its records are read, how a model is asked, what is counted."""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import LoadstoneError
from .base import Task
from .choice import CHOICES
from .lambada import LAMBADA
from .text import TEXTS

_ALL: tuple[Task, ...] = (*TEXTS, LAMBADA, *CHOICES)
TASKS: Mapping[str, Task] = {task.name: task for task in _ALL}


def task_named(name: str) -> Task:
    """Raises LoadstoneError for a task that is not there."""
    if name not in TASKS:
        raise LoadstoneError(f"--task {name}: there is no such task. Known: {', '.join(TASKS)}.")
    return TASKS[name]
