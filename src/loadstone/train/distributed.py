"""Several processes that train one model, started by torchrun: PyTorch's FSDP2 divides it, PyTorch's DCP saves it.

Every parameter is divided by rows over all processes (a DTensor); a block's are gathered while it computes. What a
process holds of weights, gradients and moments is 1/size of them, and the whole of what one block needs.

Why not as others do it: DDP holds all of the optimizer in every process; accelerate and DeepSpeed bring launchers and
config files of their own; torchtitan's checkpoint becomes a HuggingFace folder in a second step, and DCP's default
storage is a pickle.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import ConfigError, LoadstoneError
from ..model import Block
from .shards import part_name
from .world import World

T = TypeVar("T")
BACKENDS: Mapping[str, str] = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
# How long a process waits in a collective for the others. Where the main process works alone they wait for ever.
PATIENCE = timedelta(minutes=10)
_POLL = 0.02  # seconds
_LAST_WORD = 30.0  # seconds that the main process waits for the others in the end
_FIRST_WORD = 5.0  # seconds that the others leave to the main process to say what went wrong
# What gloo says, as plain RuntimeErrors, when another process is gone.
_LOST = re.compile(r"gloo|Connection (closed|reset|refused)|Broken pipe|NCCL|socketPoll|recvVector|sendBytes", re.I)


class Ranks(World):
    """One of several processes."""

    def __init__(self) -> None:
        store, self.rank, self.size = next(iter(rendezvous("env://", timeout=PATIENCE)))
        self._stores: Any = store
        self._store: Any = PrefixStore("loadstone", store)
        self._turn: int = 0

    def connect(self, device: str) -> None:
        """See `World`. Raises ConfigError if this process has no such device of its own."""
        kind = torch.device(device)
        if kind.type not in BACKENDS or kind.index is not None:
            raise ConfigError(
                f"device {device!r}: under torchrun each process has a device of its own; say --device cuda or cpu."
            )
        self.device: torch.device = self._own_device(kind.type)
        dist.init_process_group(
            BACKENDS[kind.type], store=PrefixStore("collectives", self._stores), rank=self.rank,
            world_size=self.size, timeout=PATIENCE, device_id=self.device if kind.type == "cuda" else None,
        )  # fmt: skip
        self._mesh: Any = init_device_mesh(kind.type, (self.size,))

    @staticmethod
    def _own_device(kind: str) -> torch.device:
        if kind == "cpu":
            return torch.device(kind)
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise ConfigError(
                f"device 'cuda': this machine has {there} of them, and torchrun started process number {local + 1}. "
                f"Start one per device: --nproc-per-node {there}."
            )
        torch.cuda.set_device(local)
        return torch.device(kind, local)

    # -- the model

    def loading_device(self, asked: str) -> str:
        return "cpu"  # a device that holds a part need not be large enough for the whole

    def shard(self, model: nn.Module) -> None:
        self._empty = _copy(model, {name: torch.empty_like(p, device="meta") for name, p in model.named_parameters()})
        for module in model.modules():
            if isinstance(module, Block):
                fully_shard(module, mesh=self._mesh)
        self._root: Any = fully_shard(_Whole(model), mesh=self._mesh)

    def call(self, function: Callable[..., T], model: nn.Module, *arguments: Any) -> T:
        found: T = self._root(function, *arguments)
        if not torch.is_grad_enabled():  # else the backward pass does it
            self._root.reshard()
        return found

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def part(self, whole: Tensor, like: Tensor) -> Tensor:
        if not isinstance(like, DTensor) or not whole.dim():
            return super().part(whole, like)
        # Every process has the whole, so none is sent (src_data_rank).
        return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

    def full(self, model: nn.Module) -> Any:
        return self._gathered(model, everywhere=False)

    @torch.no_grad()
    def fill(self, model: nn.Module, load: Callable[[Any], None]) -> None:
        whole = self._gathered(model, everywhere=True)  # not empty: an adapter's loader looks at the base
        load(whole)
        loaded = dict(whole.named_parameters())
        for name, parameter in model.named_parameters():
            parameter.copy_(self.part(loaded[name], parameter))

    @torch.no_grad()
    def _gathered(self, model: nn.Module, *, everywhere: bool) -> nn.Module:
        """A copy on the CPU; on its device a process holds one whole parameter at a time."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            whole = self.whole(parameter.detach())
            if everywhere or self.main:
                tensors[name] = whole.cpu()
        learns = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        return _copy(self._empty, tensors, learns)

    # -- what the processes tell each other

    def sums(self, values: list[float]) -> list[float]:
        return self._reduced(values, dist.ReduceOp.SUM)

    def most(self, value: int) -> int:
        return int(self._reduced([float(value)], dist.ReduceOp.MAX)[0])

    def agree(self, flag: bool) -> bool:
        return bool(self.most(flag))

    def _reduced(self, values: list[float], how: Any) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, how)
        found: list[float] = tensor.tolist()
        return found

    @contextmanager
    def main_first(self) -> Iterator[None]:
        turn = self._next_turn()
        if self.main:
            with self._announced(turn):
                yield
        else:
            self._wait(turn)
            yield

    def alone(self, work: Callable[[], object]) -> None:
        turn = self._next_turn()
        if self.main:
            with self._announced(turn):
                work()
        else:
            self._wait(turn)

    def _next_turn(self) -> str:
        self._turn += 1
        return f"turn {self._turn}"

    @contextmanager
    def _announced(self, turn: str) -> Iterator[None]:
        """Tell the waiting ones that it is done, or why not."""
        try:
            yield
        except BaseException as error:
            self._store.set(turn, f"failed {error}")
            raise
        self._store.set(turn, "done")

    def _wait(self, turn: str) -> None:
        """Not in a collective: those have a time limit, and a checkpoint takes as long as its disk needs."""
        while not self._store.check([turn]):
            time.sleep(_POLL)
        found = self._store.get(turn).decode(errors="replace")
        if found != "done":
            raise LoadstoneError(found.removeprefix("failed "))

    def may_speak(self, *, at_once: bool) -> bool:
        """Whether this process is the one that reports an error: the main one, or the first if that has none."""
        waited_until = time.monotonic() + (0.0 if at_once or self.main else _FIRST_WORD)
        try:
            while time.monotonic() < waited_until and not self._store.check(["spoken"]):
                time.sleep(_POLL)
            return bool(self._store.add("spoken", 1) == 1)
        except RuntimeError:  # the store is gone with the process that kept it
            return True

    def leave(self) -> None:
        """All is done. Without torchrun the store is in the main process, which waits until no other may ask it."""
        waited_until = time.monotonic() + _LAST_WORD
        with suppress(RuntimeError):  # the main process may have failed, and the store with it
            self._store.add("left", 1)
            while self.main and time.monotonic() < waited_until and self._store.add("left", 0) < self.size:
                time.sleep(_POLL)

    # -- checkpoints

    def store(self, tensors: Mapping[str, Tensor], beside: Path) -> Callable[[Path], None]:
        """Each process writes its parts of moments, and some of what all have, at the same time.

        `beside` must be on a disk that all processes see.
        """
        parts = beside / ".parts"

        def clear() -> None:
            shutil.rmtree(parts, ignore_errors=True)  # what a killed run left behind
            parts.mkdir(parents=True)

        self.alone(clear)
        try:
            save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(parts), save_distributed=True))
        except CheckpointException as error:
            rank, (reason, _) = next(iter(error.failures.items()))
            raise LoadstoneError(
                f"{beside}: the training state cannot be written (process {rank}: {reason}). The checkpoints that are "
                "there are whole; make room, and go on with --resume."
            ) from None

        def write(folder: Path) -> None:
            for rank, file in enumerate(sorted(parts.glob("*.safetensors"))):
                file.replace(folder / part_name(rank, self.size))
            parts.rmdir()

        return write


class _Whole(nn.Module):
    """The root of the sharded modules, whose forward pass is any use of the model.

    FSDP gathers parameters in `forward` of the module that it was given. The loss reads the head's matrix outside of
    any module's forward pass; within this one it is there, and the gradient's way leads through the loss itself, so it
    is found where nothing but the head learns, too.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., T], *arguments: Any) -> T:
        return function(self.model, *arguments)


def _copy(model: nn.Module, tensors: Mapping[str, Tensor], learns: Mapping[str, bool] | None = None) -> nn.Module:
    """The same modules around other tensors; a parameter that is not named is shared."""
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        # What deepcopy believes to have copied already it takes as it is.
        memo[id(parameter)] = (
            nn.Parameter(tensors[name], requires_grad=(learns or {}).get(name, parameter.requires_grad))
            if name in tensors
            else parameter
        )
    return copy.deepcopy(model, memo)


def _reason(error: RuntimeError) -> str:
    """The first sentence, without the line of C++ that says it."""
    return re.sub(r"^\[\S*:\d+\] ", "", str(error).partition("\n")[0]).partition(". ")[0]


@contextmanager
def ending_together(world: Ranks) -> Iterator[World]:
    """An error in one process ends all, and is raised in one of them; in the others SystemExit is."""
    try:
        yield world
    except LoadstoneError:
        if not world.may_speak(at_once=False):
            raise SystemExit(2) from None
        raise
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or _LOST.search(str(error))):
            raise
        if not world.may_speak(at_once=True):
            raise SystemExit(2) from None
        raise LoadstoneError(
            f"process {world.rank} of {world.size} lost another one, which was killed or cannot be reached "
            f"({_reason(error)}). The checkpoints that are there are whole; go on with --resume, on as "
            "many processes as you like."
        ) from None
    # After an error there is no taking leave: the others may never answer, and torchrun ends them.
    world.leave()
    if dist.is_initialized():
        dist.destroy_process_group()
