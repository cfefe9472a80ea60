"""Block by block through a model: what each linear layer reads, while the blocks before it may already be changed.

Memory: the hidden states of the calibration rows, once (4 bytes * rows * tokens * width), and the moments of one block.

Why not as others do it: GPTQ's and Wanda's scripts know each family's layers by name and rebuild its masks. Here a
block is called with what the model itself called it with, and linear layers are found by their type.

Shapes: B rows, T tokens, C d_model, K inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoadstoneError
from ..model import GPT, Linear

BATCH_TOKENS = 2048  # tokens that are run at once


class _StopHereError(Exception):
    pass


@dataclass
class Moments:
    """Second moments of what each linear layer of a block reads; layers that read the same tensor share one.

    Attributes:
        leaders: layer -> the layer under whose name its moments are kept.
        grams: [K, K] sums of x x^T, float32; only the diagonals, [K], where no more was asked for.
        tokens: how many x each sum has.
    """

    leaders: dict[str, str] = field(default_factory=dict)
    grams: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def of(self, name: str) -> Tensor | None:
        """The mean moments of a layer; None if it read nothing (an expert that no token chose)."""
        leader = self.leaders.get(name)
        return None if leader is None else self.grams[leader] / max(1, self.tokens[leader])


@dataclass
class Stage:
    """One block of the walk.

    Attributes:
        index: 0 is the first.
        block: may be changed; the walk goes on with what it then computes.
        linears: its linear layers by their names in the model.
        inputs: hidden states [B, T, C] before it, a batch each.
    """

    index: int
    block: nn.Module
    linears: dict[str, Linear]
    inputs: list[Tensor]
    _call: tuple[tuple[Any, ...], dict[str, Any]]

    def run(self, x_BTC: Tensor) -> Tensor:
        """What the block makes of some hidden states, as it is now."""
        arguments, options = self._call
        return self.block(x_BTC, *arguments, **options)

    def moments(self, *, diagonal: bool = False) -> Moments:
        """Run the block over all rows and sum up what its layers read."""
        found = Moments()
        with _listening(self.linears, found, diagonal):
            for x_BTC in self.inputs:
                self.run(x_BTC)
        return found


@torch.no_grad()
def walk(model: GPT, rows_BT: Tensor) -> Iterator[Stage]:
    """The blocks from the first to the last. All rows are as long, so that every batch is called alike.

    What the caller does with a block it does between two steps of this iterator, outside of `no_grad`.
    """
    size = max(1, BATCH_TOKENS // rows_BT.shape[1])
    if len(rows_BT) > size:
        rows_BT = rows_BT[: len(rows_BT) // size * size]
    batches = torch.split(rows_BT, size)
    calls = _calls(model, batches[0])
    inputs = [_first_input(model, ids_BT) for ids_BT in batches]
    names = {module: name for name, module in model.named_modules()}
    for index, (block, call) in enumerate(zip(model.blocks, calls, strict=True)):
        linears = {names[module]: module for module in block.modules() if isinstance(module, Linear)}
        stage = Stage(index, block, linears, inputs, call)
        yield stage
        inputs = [stage.run(x_BTC) for x_BTC in inputs]


def _calls(model: GPT, ids_BT: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What each block is called with besides the hidden states; it depends on the shape of the batch alone."""
    found: dict[nn.Module, Any] = {}

    def remember(block: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        found[block] = (arguments[1:], options)

    handles = [block.register_forward_pre_hook(remember, with_kwargs=True) for block in model.blocks]
    try:
        hidden = model.hidden(ids_BT)
    finally:
        for handle in handles:
            handle.remove()
    if not bool(torch.isfinite(hidden).all()):
        raise LoadstoneError(
            "The model computes NaN or infinity on the calibration text. `loadstone verify` says what is wrong with it."
        )
    return [found[block] for block in model.blocks]


def _first_input(model: GPT, ids_BT: Tensor) -> Tensor:
    found: list[Tensor] = []

    def stop(block: nn.Module, arguments: tuple[Any, ...]) -> None:
        found.append(arguments[0])
        raise _StopHereError

    handle = model.blocks[0].register_forward_pre_hook(stop)
    try:
        model.hidden(ids_BT)
    except _StopHereError:
        pass
    finally:
        handle.remove()
    return found[0]


@contextmanager
def _listening(linears: dict[str, Linear], found: Moments, diagonal: bool) -> Iterator[None]:
    names = {module: name for name, module in linears.items()}
    last: dict[str, Tensor] = {}  # what each leader read; kept, so that no other tensor takes its identity

    def listen(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        name, x = names[module], arguments[0]  # type: ignore[index]
        if name not in found.leaders:
            found.leaders[name] = next((leader for leader, seen in last.items() if seen is x), name)
        if found.leaders[name] != name:
            return
        last[name] = x
        x_NK = x.flatten(0, -2).float()
        gram = x_NK.square().sum(0) if diagonal else x_NK.T @ x_NK
        found.grams[name] = found.grams[name] + gram if name in found.grams else gram
        found.tokens[name] = found.tokens.get(name, 0) + len(x_NK)

    handles = [module.register_forward_pre_hook(listen) for module in linears.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
