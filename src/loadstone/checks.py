"""`Check`: one question about a loaded model, its answer, and the evidence. What verify and its helpers return."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One question, its answer (None: could not be asked, or no verdict either way), and the evidence."""

    name: str
    ok: bool | None
    detail: str
