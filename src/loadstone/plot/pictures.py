"""`draw`: all pictures that a run's data allow, as files, and why the others are not there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from matplotlib.figure import Figure

from ..checkpoint.atomic import atomic_file
from ..checkpoint.wording import shown
from ..errors import LoadstoneError
from .extension import Extension
from .loss import loss_figure
from .quantised import Sensitivity
from .reading import EXTENSION, METRICS, QUANTISED, UPDATES, Run, distinct_names, read_run
from .schedule import schedule_figure
from .sensitivity import sensitivity_figure
from .style import CANVASES, save
from .updates import updates_figure
from .vocabulary import vocabulary_figure


@dataclass(frozen=True)
class Picture:
    """One picture of a run, or of several (`run` then names them): its files, or why there are none."""

    run: str
    kind: str
    files: tuple[str, ...] = ()
    why_not: str = ""


@dataclass(frozen=True)
class Kind:
    """A kind of picture: how it is drawn, and what is missing where it cannot be."""

    figure: Callable[[Run], Figure]
    possible: Callable[[Run], bool]
    missing: str


def _any(values: Any) -> bool:
    return bool(np.isfinite(values).any())


KINDS: Mapping[str, Kind] = {
    "loss": Kind(
        lambda run: loss_figure([run]),
        lambda run: _any(run.training.loss) or _any(run.evaluation.val_loss),
        f"{METRICS} has no loss yet",
    ),
    "updates": Kind(
        updates_figure,
        lambda run: bool(run.updates.groups),
        f"{UPDATES} has no measurement (training writes them with --updates-every)",
    ),
    "schedule": Kind(schedule_figure, lambda run: _any(run.training.lr), f"{METRICS} has no learning rate yet"),
    "vocabulary": Kind(
        lambda run: vocabulary_figure(cast(Extension, run.extension), run.name),
        lambda run: run.extension is not None,
        f"there is no {EXTENSION} (`loadstone extend` writes it)",
    ),
    "sensitivity": Kind(
        lambda run: sensitivity_figure(cast(Sensitivity, run.sensitivity), run.name),
        lambda run: run.sensitivity is not None,
        f"there is no {QUANTISED} with estimates (`loadstone quantize --calibration ...` writes it)",
    ),
}


def draw(
    folders: Sequence[Path | str], destination: Path | str | None, kinds: Sequence[str], formats: Sequence[str]
) -> list[Picture]:
    """What `loadstone.plot.plot` promises."""
    _require_known(kinds, KINDS, "picture")
    _require_known(formats, CANVASES, "format")
    runs = [read_run(folder) for folder in folders]
    base = Path(destination) if destination else runs[0].folder / "plots"
    if len(runs) == 1:
        return [_picture(runs[0], runs[0].name, kind, base, formats) for kind in kinds]
    return list(_compared(runs, base, kinds, formats))


def _compared(runs: list[Run], base: Path, kinds: Sequence[str], formats: Sequence[str]) -> Iterator[Picture]:
    names = distinct_names(runs)
    if "loss" in kinds:
        able = [KINDS["loss"].possible(run) for run in runs]
        yield from (
            Picture(name, "loss", why_not=KINDS["loss"].missing)
            for name, possible in zip(names, able, strict=True)
            if not possible
        )
        if drawn := [run for run, possible in zip(runs, able, strict=True) if possible]:
            together = ", ".join(distinct_names(drawn))
            yield Picture(
                together, "loss", _write(loss_figure(drawn), base / "loss-compared", formats, f"loss: {together}")
            )
    for run, name in zip(runs, names, strict=True):
        yield from (_picture(run, name, kind, base / name, formats) for kind in kinds if kind != "loss")


def _picture(run: Run, name: str, kind: str, folder: Path, formats: Sequence[str]) -> Picture:
    if not KINDS[kind].possible(run):
        return Picture(name, kind, why_not=KINDS[kind].missing)
    return Picture(name, kind, _write(KINDS[kind].figure(run), folder / kind, formats, f"{kind}: {name}"))


def _write(figure: Figure, stem: Path, formats: Sequence[str], title: str) -> tuple[str, ...]:
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LoadstoneError(
            f"{stem.parent}: the folder for the pictures cannot be made ({error.strerror}). Name another: --out."
        ) from None
    files = [stem.with_name(f"{stem.name}.{format}") for format in formats]
    for file, format in zip(files, formats, strict=True):
        with atomic_file(file) as temporary:
            save(figure, temporary, format, title)
    return tuple(map(str, files))


def _require_known(given: Sequence[str], known: Collection[str], what: str) -> None:
    if not given or (wrong := [word for word in given if word not in known]):
        raise LoadstoneError(f"{shown(', '.join(wrong if given else given))} is no {what}; known: {', '.join(known)}.")
