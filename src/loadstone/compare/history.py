"""What a training run wrote down about a checkpoint: how long, on how many tokens, and the way there."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError
from ..plot import read_run
from ..plot.reading import METRICS

Array = NDArray[np.float64]
Points = tuple[tuple[float, float], ...]  # (tokens seen, nats per token)
POINTS = 240  # most points of a curve: as many as a chart can show


@dataclass(frozen=True)
class History:
    """Attributes:
    run: the run's name.
    step, tokens, seconds: of training until the checkpoint was written; None where nothing tells.
    validation_loss: the last one until then, on the run's own data.
    training, validation: the curves until then; training averaged over neighbouring steps.
    """

    run: str
    step: int | None
    tokens: int | None
    seconds: float | None
    validation_loss: float | None
    training: Points
    validation: Points


def weights_of(source: str) -> str:
    """A run's folder stands for its best checkpoint, or its latest; every other source for itself."""
    try:
        folder = Path(source).expanduser()
        checkpoints = [folder / name for name in ("best", "latest")] if (folder / METRICS).is_file() else []
        return next((str(checkpoint) for checkpoint in checkpoints if checkpoint.exists()), source)
    except (OSError, RuntimeError):  # too long for a path, in a locked folder, ~ of nobody
        return source


def read_history(folder: Path | None) -> History | None:
    """Of a checkpoint in this folder: from the metrics in it, or, if it has `training/state.json`, in the run above it.

    None if it belongs to no run. Raises FormatError for a damaged file.
    """
    if folder is None:
        return None
    folder = folder.resolve()  # RUN/best is a link to RUN/checkpoints/step-N
    progress = _progress(folder / "training" / "state.json")
    # Without counters it is no checkpoint of the run above it: somebody put another model into the run's folder.
    places = (folder, folder.parent, folder.parent.parent) if progress else (folder,)
    home = next((place for place in places if (place / METRICS).is_file()), None)
    if home is None:
        return _history(folder.name, progress, (), (), ()) if progress else None
    run = read_run(home)
    last = progress.get("step", math.inf)
    train, evaluation = run.training, run.evaluation
    before = train.step <= last
    ends = {name: getattr(train, name)[before] for name in ("step", "tokens", "seconds")}
    known = {name: float(column[-1]) for name, column in ends.items() if len(column)} | progress
    validation = _points(evaluation.tokens, evaluation.val_loss, evaluation.step <= last)
    return _history(run.name, known, _averaged(_points(train.tokens, train.loss, before)), validation, validation[-1:])


def _history(run: str, known: dict[str, float], training: Points, validation: Points, last: Points) -> History:
    known = {name: value for name, value in known.items() if math.isfinite(value)}
    step, tokens = (int(known[name]) if name in known else None for name in ("step", "tokens"))
    return History(run, step, tokens, known.get("seconds"), last[0][1] if last else None, training, validation)


def _progress(path: Path) -> dict[str, float]:
    """Counters that a checkpoint of `loadstone train` carries; none where there is no such file."""
    if not path.is_file():
        return {}
    try:
        progress = json.loads(path.read_text(encoding="utf-8"))["progress"]
        return {name: float(progress[name]) for name in ("step", "tokens", "seconds")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        hint = "Move it away to compare the model without its counters."
        raise FormatError(path, f"its counters cannot be read ({error}).", hint) from None


def _points(tokens: Array, loss: Array, wanted: NDArray[np.bool_]) -> Points:
    good = wanted & np.isfinite(tokens) & np.isfinite(loss)
    return tuple(zip(tokens[good].tolist(), loss[good].tolist(), strict=True))


def _averaged(points: Points) -> Points:
    """At most POINTS, each the mean of equally many neighbours."""
    size = -(-len(points) // POINTS) or 1
    groups = (points[i : i + size] for i in range(0, len(points), size))
    return tuple((sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups)
