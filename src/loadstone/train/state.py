"""A run on disk: its checkpoints, each a model folder with everything beside it that an exact resume needs.

    RUN/run.json                      what was asked for
    RUN/metrics.jsonl ...             what happened (log.py)
    RUN/checkpoints/step-00000500/    the model, as transformers reads it, and training/: optimizer, counters, RNG
    RUN/latest, RUN/best              links to checkpoints

Why not as others do it: nanoGPT's one ckpt.pt is a pickle without the data position or the RNG, and is torn when the
disk is full; litgpt and transformers resume, and nobody checks that the resumed run is the same. Here a checkpoint
appears whole or not at all, and a test kills runs and compares the bytes of their weights.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checkpoint.atomic import atomic_file
from ..checkpoint.base import Checkpoint
from ..errors import FormatError, LoadstoneError
from ..load import load
from ..save import save_model
from .shards import open_state
from .world import World

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

_STEP = re.compile(r"step-(\d{8,})")


@dataclass
class Progress:
    """How far a run is: what a resumed one must know besides weights, optimizer and data position."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # tokens of all batches, over all ranks
    seconds: float = 0.0  # in training steps, evaluations apart
    best: float | None = None  # lowest validation loss so far
    best_step: int | None = None
    evaluated: int = -1  # step of the last evaluation
    waited: int = 0  # evaluations since the best


@dataclass(frozen=True)
class Weights:
    """How the trained module becomes a folder and comes back; a classifier and an adapter have their own."""

    save: Callable[[Any, Path, Tokenizer | None, Callable[[Path], None]], Any]
    load: Callable[[Any, Path], None]


class Run:
    """The folder of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.checkpoints = folder, folder / "checkpoints"

    @property
    def record(self) -> Path:
        return self.folder / "run.json"

    def require_new(self) -> None:
        """Raises LoadstoneError if another run lies there."""
        if self.record.exists():
            raise LoadstoneError(
                f"{self.folder}: a run lies there already. Go on with it: --resume. Or choose another folder."
            )

    def begin(self, record: Mapping[str, Any]) -> None:
        """Write down what was asked for. Raises LoadstoneError if another run lies there."""
        self.require_new()
        make_folder(self.folder)
        with atomic_file(self.record) as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def read(self) -> dict[str, Any]:
        """What was asked for. Raises LoadstoneError if no run lies there."""
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise LoadstoneError(f"{self.folder}: there is no run to resume ({self.record.name} is missing).") from None
        except (OSError, ValueError, RecursionError) as error:
            raise LoadstoneError(f"{self.record}: it cannot be read ({error}). Begin the run anew elsewhere.") from None
        if not isinstance(record, dict):
            raise LoadstoneError(f"{self.record}: expected an object, found {type(record).__name__}.")
        return record

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, in order."""
        if not self.checkpoints.is_dir():
            return []
        found = (_STEP.fullmatch(entry.name) for entry in self.checkpoints.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def save(
        self,
        model: nn.Module,
        tokenizer: Tokenizer | None,
        progress: Progress,
        tensors: Mapping[str, Tensor],
        data: Mapping[str, Any],
        *,
        keep: int,
        weights: Weights,
        world: World,
    ) -> Path:
        """Write a checkpoint, point `latest` (and `best`) at it, and remove those that are not kept. Collective."""
        path = self.path(progress.step)
        if world.agree(world.main and not path.exists()):
            world.alone(lambda: self.checkpoints.mkdir(parents=True, exist_ok=True))
            write_tensors, whole = world.store(tensors, self.checkpoints), world.full(model)
            beside = self._beside(write_tensors, progress, data)
            world.alone(lambda: weights.save(whole, path, tokenizer, beside))
        if world.main:
            self._point("latest", path)
            if progress.best_step == progress.step:
                self._point("best", path)
            self._prune(keep)
        return path

    @staticmethod
    def _beside(
        write_tensors: Callable[[Path], None], progress: Progress, data: Mapping[str, Any]
    ) -> Callable[[Path], None]:
        """Adds what an exact resume needs to a model's folder."""

        def beside(folder: Path) -> None:
            (folder / "training").mkdir()
            write_tensors(folder / "training")
            state = {"progress": asdict(progress), "data": dict(data), "torch": torch.__version__}
            (folder / "training" / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")

        return beside

    def restore(self, model: nn.Module, weights: Weights, world: World) -> tuple[Progress, Checkpoint, dict[str, Any]]:
        """Fill the model from the last checkpoint; returns the counters, the other tensors and the data position."""
        if not self.steps():
            raise LoadstoneError(
                f"{self.folder}: the run ended before its first checkpoint, so there is nothing to go on from. Remove "
                "the folder and begin anew; --save-every sets how often a checkpoint is written."
            )
        path = self.path(self.steps()[-1])
        try:
            world.fill(model, lambda whole: weights.load(whole, path))
            saved = open_state(path / "training")
        except FormatError as error:
            raise LoadstoneError(f"{error} Or remove {path} to resume from the checkpoint before it.") from None
        try:
            state = json.loads((path / "training" / "state.json").read_text(encoding="utf-8"))
            values, data = state["progress"], state["data"]
            progress = Progress(**{f.name: values[f.name] for f in fields(Progress)})
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise LoadstoneError(
                f"{path}: its training state cannot be read ({error}). Remove this checkpoint to resume from the one "
                "before it."
            ) from None
        return progress, saved, data

    def _point(self, name: str, path: Path) -> None:
        temporary = self.folder / f".{name}.new"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(os.path.relpath(path, self.folder))
        temporary.replace(self.folder / name)

    def _prune(self, keep: int) -> None:
        best = self.folder / "best"
        kept = {self.path(step).name for step in self.steps()[-keep:]} | (
            {best.resolve().name} if best.exists() else set()
        )
        for step in self.steps():
            if self.path(step).name not in kept:
                shutil.rmtree(self.path(step), ignore_errors=True)


def make_folder(folder: Path) -> None:
    """Raises LoadstoneError if a run's folder cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LoadstoneError(f"{folder}: the run's folder cannot be made ({error.strerror}).") from None


@torch.no_grad()
def _load_model(model: nn.Module, path: Path) -> None:
    """Copy, not map: the file's tensors lie at any address, and a matrix product may round by how its operands lie."""
    saved = dict(load(path)[0].named_parameters())
    for name, parameter in model.named_parameters():
        if name not in saved or saved[name].shape != parameter.shape:
            raise LoadstoneError(f"{path}: this checkpoint is of another model: {name} is missing or of another shape.")
        parameter.copy_(saved[name])


WHOLE_MODEL = Weights(
    lambda model, path, tokenizer, beside: save_model(model, path, tokenizer, beside=beside), _load_model
)
