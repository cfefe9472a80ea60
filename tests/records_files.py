"""Types of the fixture that writes records to a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]
Write = Callable[[Rows], str]
