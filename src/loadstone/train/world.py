"""`World`: the processes that train together. This one stands alone; `distributed.py` has the one of many."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..checkpoint.memory import Arrays
from ..checkpoint.write_safetensors import write_safetensors_file
from .shards import STATE

T = TypeVar("T")


class World:
    """One process. What a run of many does with its shards is nothing here.

    Whatever is called a collective must be called by all processes, in the same order.

    Attributes:
        rank, size: which of how many.
    """

    rank = 0
    size = 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks to people."""
        return self.rank == 0

    def connect(self, device: str) -> None:
        """Get ready to train on a device of each process's own. Collective; before everything but `alone`."""

    # -- the model

    def loading_device(self, asked: str) -> str:
        """Where a model is made before `shard` takes it to its device."""
        return asked

    def shard(self, model: nn.Module) -> None:
        """Divide the parameters over the processes, before an optimizer sees them."""

    def call(self, function: Callable[..., T], model: nn.Module, *arguments: Any) -> T:
        """function(model, *arguments), which may use any weight of the model. Collective."""
        return function(model, *arguments)

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a tensor of which each process may have a part. Collective."""
        return tensor

    def local(self, tensor: Tensor) -> Tensor:
        """What this process has of it."""
        return tensor

    def part(self, whole: Tensor, like: Tensor) -> Tensor:
        """The inverse of `whole`, in memory of its own: this process's part, divided and placed as `like`."""
        return whole.clone().to(like.device)

    def full(self, model: nn.Module) -> Any:
        """A model with whole parameters, in the main process; whatever is there elsewhere is not to be used."""
        return model

    def fill(self, model: nn.Module, load: Callable[[Any], None]) -> None:
        """Let `load` set the parameters of a whole model. Collective."""
        load(model)

    # -- what the processes tell each other

    def sums(self, values: list[float]) -> list[float]:
        """Each value summed over all processes. Collective."""
        return values

    def most(self, value: int) -> int:
        """The largest of all processes'. Collective."""
        return value

    def agree(self, flag: bool) -> bool:
        """Whether any process says so. Collective."""
        return flag

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The others wait until the main process is through, and then find what it made. Collective."""
        yield

    def alone(self, work: Callable[[], object]) -> None:
        """Let the main process do something while the others wait; what it raises, all raise. Collective."""
        work()

    # -- checkpoints

    def store(self, tensors: Mapping[str, Tensor], beside: Path) -> Callable[[Path], None]:
        """Get ready to write tensors; what is returned writes them into a folder, in the main process. Collective.

        Args:
            tensors: under names of their own in each process, or the same value, or a part of one.
            beside: a folder on the disk of the later one, for what must be written before.
        """

        def write(folder: Path) -> None:
            arrays = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
            write_safetensors_file(Arrays(folder, arrays), folder / STATE)

        return write

    def rng(self, device: torch.device) -> dict[str, Tensor]:
        """The state of this process's random numbers, under names of its own."""
        found = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            found["cuda"] = torch.cuda.get_rng_state(device)
        return {f"{name}{self._own}": state for name, state in found.items()}

    def restore_rng(self, saved: Mapping[str, Tensor], device: torch.device, seed: int) -> None:
        """The inverse. A process that did not exist when the state was saved begins at `seed`."""
        torch.manual_seed(seed)
        if f"cpu{self._own}" in saved:
            torch.set_rng_state(saved[f"cpu{self._own}"])
        if device.type == "cuda" and f"cuda{self._own}" in saved:
            torch.cuda.set_rng_state(saved[f"cuda{self._own}"], device)

    @property
    def _own(self) -> str:
        return f".{self.rank}" if self.rank else ""


@contextmanager
def joined() -> Iterator[World]:
    """The processes that torchrun started with this one; without torchrun, this one alone.

    An error ends all of them and is raised in one; in the others SystemExit is, with the exit status of errors.
    """
    if "LOCAL_RANK" not in os.environ or os.environ.get("WORLD_SIZE") == "1":  # torchrun sets both
        yield World()
        return
    from .distributed import Ranks, ending_together

    with ending_together(Ranks()) as world:
        yield world
