"""Pictures of runs, from what they wrote: loss, weight updates, schedule, vocabulary extension, sensitivity.

Why not as others do it: a plotting call inside the loop (nanoGPT's notebooks, wandb) draws what that process saw. Here
a picture is a function of the run's files: it can be drawn while the run goes on, after a resume, on another machine.
matplotlib is imported by the drawing modules only, and never its pyplot: no display, no state between pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LoadstoneError
from .reading import Run, read_run

if TYPE_CHECKING:
    from .pictures import Picture

__all__ = ["Run", "plot", "read_run"]


def plot(
    folders: Sequence[Path | str],
    destination: Path | str | None = None,
    *,
    kinds: Sequence[str] = ("loss", "updates", "schedule", "vocabulary", "sensitivity"),
    formats: Sequence[str] = ("png", "svg"),
) -> list[Picture]:
    """Draw runs. Several are compared in one loss picture; the other pictures are of one run each.

    Args:
        folders: runs, or models that `loadstone extend` or `loadstone quantize` wrote.
        destination: folder for the files, by default `plots` in the (first) run; several runs have one each in it.
        kinds: which pictures; one that the data do not allow is left out, and the result says why.
        formats: png, svg.

    Raises a LoadstoneError for an unknown kind or format, a folder that is no run or has a damaged file, a place that
    cannot be written to, and if matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise LoadstoneError(
            "pictures are drawn with the package matplotlib, which is not installed: pip install 'loadstone[plot]'. "
            "The figures themselves are in the run's metrics.jsonl and updates.jsonl, one JSON object a line."
        ) from None
    from .pictures import draw

    return draw(folders, destination, kinds, formats)
