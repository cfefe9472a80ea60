"""Block by block through a model: what each linear layer reads, while the blocks before it may already be changed.

Memory: the hidden states of the calibration rows, once (4 bytes * rows * tokens * width), and the moments of one block;
the hidden states twice and a copy of one block where the walk remembers the model as it was.

Why not as others do it: GPTQ's and Wanda's scripts know each family's layers by name and rebuild its masks. Here a
block is called with what the model itself called it with, and linear layers are found by their type.

Shapes: B rows, T tokens, C d_model, K inputs of a layer.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
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
        shifts: [K, K] sums of (y - x) x^T, y being what the layer read in the model as it was; empty if that was not
            kept, and without an expert's layers, which then read other tokens.
        tokens: how many x each sum has.
    """

    leaders: dict[str, str] = field(default_factory=dict)
    grams: dict[str, Tensor] = field(default_factory=dict)
    shifts: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def of(self, name: str) -> Tensor | None:
        """The mean moments of a layer; None if it read nothing (an expert that no token chose)."""
        leader = self.leaders.get(name)
        return None if leader is None else self.grams[leader] / max(1, self.tokens[leader])

    def shift_of(self, name: str) -> Tensor | None:
        leader = self.leaders.get(name)
        return self.shifts[leader] / max(1, self.tokens[leader]) if leader in self.shifts else None

    def add(self, read: Mapping[str, Tensor], before: Mapping[str, Tensor], *, diagonal: bool) -> None:
        """Another batch: what each layer read, and what it did in the model as it was."""
        for name, leader in _leaders(read).items():
            if self.leaders.setdefault(name, leader) != name:
                continue
            x_NK = read[name].flatten(0, -2).float()
            self._sum(self.grams, name, x_NK.square().sum(0) if diagonal else x_NK.T @ x_NK)
            self.tokens[name] = self.tokens.get(name, 0) + len(x_NK)
            if name in before and read[name].dim() == 3:  # experts read [N, K], of the tokens that chose them
                self._sum(self.shifts, name, (before[name].flatten(0, -2).float() - x_NK).T @ x_NK)

    @staticmethod
    def _sum(sums: dict[str, Tensor], name: str, more: Tensor) -> None:
        sums[name] = sums[name] + more if name in sums else more


@dataclass
class Stage:
    """One block of the walk.

    Attributes:
        index: 0 is the first.
        block: may be changed; the walk goes on with what it then computes.
        linears: its linear layers by their names in the model.
        inputs: hidden states [B, T, C] before it, a batch each.
        before: the same stage of the model as it was, if the walk remembers it.
    """

    index: int
    block: nn.Module
    linears: dict[str, Linear]
    inputs: list[Tensor]
    _call: tuple[tuple[Any, ...], dict[str, Any]]
    before: Stage | None = None

    def run(self, x_BTC: Tensor) -> Tensor:
        """What the block makes of some hidden states, as it is now."""
        arguments, options = self._call
        return self.block(x_BTC, *arguments, **options)

    def copied(self, inputs: list[Tensor]) -> Stage:
        """A stage of its own for the block as it is now."""
        block = copy.deepcopy(self.block)
        linears = (module for module in block.modules() if isinstance(module, Linear))
        return Stage(self.index, block, dict(zip(self.linears, linears, strict=True)), inputs, self._call)

    def outputs(self) -> list[Tensor]:
        return [self.run(x_BTC) for x_BTC in self.inputs]

    def steps(self) -> list[list[str]]:
        """Layers in the order in which they read, those together that read the same, or as other experts' do."""
        found: dict[str, list[str]] = {}
        leaders = _leaders(self._read(self.inputs[0], list(self.linears)))
        for name in [*leaders, *(name for name in self.linears if name not in leaders)]:  # no token for an expert yet
            found.setdefault(re.sub(r"\d+", "", leaders.get(name, name)), []).append(name)
        return list(found.values())

    def moments(self, names: Sequence[str] | None = None, *, diagonal: bool = False) -> Moments:
        """Run the block over all rows and sum up what its layers (or those named) read."""
        names, found = list(self.linears if names is None else names), Moments()
        for number, x_BTC in enumerate(self.inputs):
            before = self.before._read(self.before.inputs[number], names) if self.before else {}
            found.add(self._read(x_BTC, names), before, diagonal=diagonal)
        return found

    def _read(self, x_BTC: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """What layers read, in the order in which they do; the block is left when all have."""
        found: dict[str, Tensor] = {}

        def listen(name: str, arguments: tuple[Any, ...]) -> None:
            found[name] = arguments[0]
            if len(found) == len(names):
                raise _StopHereError

        handles = [
            self.linears[name].register_forward_pre_hook(lambda _, arguments, name=name: listen(name, arguments))
            for name in names
        ]
        try:
            self.run(x_BTC)
        except _StopHereError:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return found


def _leaders(read: Mapping[str, Tensor]) -> dict[str, str]:
    """Layer -> the first that read the same tensor."""
    return {name: next(leader for leader, seen in read.items() if seen is x) for name, x in read.items()}


@torch.no_grad()
def walk(model: GPT, rows_BT: Tensor, *, remember: bool = False) -> Iterator[Stage]:
    """The blocks from the first to the last. All rows are as long, so that every batch is called alike.

    What the caller does with a block it does between two steps of this iterator, outside of `no_grad`.

    Args:
        remember: compute beside it what the model computes that was there when the walk began.
    """
    size = max(1, BATCH_TOKENS // rows_BT.shape[1])
    if len(rows_BT) > size:
        rows_BT = rows_BT[: len(rows_BT) // size * size]
    batches = torch.split(rows_BT, size)
    calls = _calls(model, batches[0])
    inputs = [_first_input(model, ids_BT) for ids_BT in batches]
    inputs_before = inputs
    names = {module: name for name, module in model.named_modules()}
    for index, (block, call) in enumerate(zip(model.blocks, calls, strict=True)):
        linears = {names[module]: module for module in block.modules() if isinstance(module, Linear)}
        stage = Stage(index, block, linears, inputs, call)
        if remember:
            stage.before = stage.copied(inputs_before)
        yield stage
        inputs = stage.outputs()
        if stage.before:
            inputs_before = stage.before.outputs()


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
