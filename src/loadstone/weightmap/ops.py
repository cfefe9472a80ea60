"""The closed set of tensor operations between a file's layout and the model's, each with its inverse.

Laws, tested for every op: `inverse(forward(x)) == x`, and the shapes that `shapes` announces are true. Whatever can be
a view of its input is one: loading GPT-2 from HuggingFace's file copies nothing.

Forward means import: file -> model. An op takes and gives lists of arrays, because some split and some join.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..config import GPTConfig
from .canonical import Shape

Array = NDArray[Any]


class ShapeError(ValueError):
    """An op cannot be applied to a shape; the plan turns this into a mismatch that names the tensor."""


class Op(ABC):
    """One invertible step. `config` supplies head counts and sizes where an op needs them.

    `label` is what reports call it, read in the direction of import.
    """

    label: ClassVar[str]

    @abstractmethod
    def forward(self, arrays: Sequence[Array], config: GPTConfig) -> list[Array]: ...

    @abstractmethod
    def inverse(self, arrays: Sequence[Array], config: GPTConfig) -> list[Array]: ...

    @abstractmethod
    def shapes(self, shapes: Sequence[Shape], config: GPTConfig | None, *, inverse: bool = False) -> list[Shape]:
        """Shapes after the op. Without a config (inference from a bare file) q, k and v are taken as equal thirds.

        Raises ShapeError where the op cannot apply.
        """


@dataclass(frozen=True)
class Transpose(Op):
    """[in, out] <-> [out, in]: Conv1D and TensorFlow weights. A view."""

    label = "transpose"

    def forward(self, arrays: Sequence[Array], config: GPTConfig) -> list[Array]:
        return [array.T for array in arrays]

    inverse = forward

    def shapes(self, shapes: Sequence[Shape], config: GPTConfig | None, *, inverse: bool = False) -> list[Shape]:
        if any(len(shape) != 2 for shape in shapes):
            raise ShapeError("a matrix")
        return [shape[::-1] for shape in shapes]


@dataclass(frozen=True)
class Squeeze(Op):
    """Drop a leading dimension of 1: OpenAI's Conv1D kernels are [1, in, out]. A view."""

    label = "squeeze"

    def forward(self, arrays: Sequence[Array], config: GPTConfig) -> list[Array]:
        return [array[0] for array in arrays]

    def inverse(self, arrays: Sequence[Array], config: GPTConfig) -> list[Array]:
        return [array[None] for array in arrays]

    def shapes(self, shapes: Sequence[Shape], config: GPTConfig | None, *, inverse: bool = False) -> list[Shape]:
        if inverse:
            return [(1, *shape) for shape in shapes]
        if any(not shape or shape[0] != 1 for shape in shapes):
            raise ShapeError("a leading dimension of 1")
        return [shape[1:] for shape in shapes]


@dataclass(frozen=True)
class SplitQKV(Op):
    """One fused tensor <-> q, k, v along the rows. Forward is three views.

    `order` is the order in the file. `per_head`: the rows go head by head, [q_0 k_0 v_0 q_1 k_1 v_1 ...], as GPT-NeoX
    stores them (equal head counts only; a copy).
    """

    label = "split q, k, v"
    order: str = "qkv"
    per_head: bool = False

    def _sizes(self, rows: int, config: GPTConfig | None) -> list[int]:
        """Rows of each part, in the file's order."""
        if config is None:
            if rows % 3:
                raise ShapeError("rows for q, k and v")
            return [rows // 3] * 3
        size = {"q": config.n_heads * config.head_dim} | dict.fromkeys("kv", config.n_kv_heads * config.head_dim)
        return [size[part] for part in self.order]

    def forward(self, arrays: Sequence[Array], config: GPTConfig) -> list[Array]:
        (fused,) = arrays
        if self.per_head:
            heads = fused.reshape(config.n_heads, 3, config.head_dim, *fused.shape[1:])
            parts = [heads[:, i].reshape(-1, *fused.shape[1:]) for i in range(3)]
        else:
            parts = np.split(fused, np.cumsum(self._sizes(len(fused), config))[:-1])
        return [parts[self.order.index(part)] for part in "qkv"]

    def inverse(self, arrays: Sequence[Array], config: GPTConfig) -> list[Array]:
        parts = [arrays["qkv".index(part)] for part in self.order]
        if not self.per_head:
            return [np.concatenate(parts)]
        rest = parts[0].shape[1:]
        heads = [part.reshape(config.n_heads, 1, config.head_dim, *rest) for part in parts]
        return [np.concatenate(heads, axis=1).reshape(-1, *rest)]

    def shapes(self, shapes: Sequence[Shape], config: GPTConfig | None, *, inverse: bool = False) -> list[Shape]:
        if inverse:
            return [(sum(shape[0] for shape in shapes), *shapes[0][1:])]
        (fused,) = shapes
        if not fused:
            raise ShapeError("rows for q, k and v")
        sizes = self._sizes(fused[0], config)
        if sum(sizes) != fused[0]:
            raise ShapeError(f"{sum(sizes)} rows for q, k and v")
        return [(sizes[self.order.index(part)], *fused[1:]) for part in "qkv"]


@dataclass(frozen=True)
class SplitGateUp(Op):
    """[gate; up] in one tensor <-> the two halves of its rows, for each tensor given. Forward is views."""

    label = "split gate, up"

    def forward(self, arrays: Sequence[Array], config: GPTConfig) -> list[Array]:
        return [half for array in arrays for half in np.split(array, 2)]

    def inverse(self, arrays: Sequence[Array], config: GPTConfig) -> list[Array]:
        return [np.concatenate(pair) for pair in zip(arrays[::2], arrays[1::2], strict=True)]

    def shapes(self, shapes: Sequence[Shape], config: GPTConfig | None, *, inverse: bool = False) -> list[Shape]:
        if inverse:
            return [(gate[0] + up[0], *gate[1:]) for gate, up in zip(shapes[::2], shapes[1::2], strict=True)]
        if any(not shape or shape[0] % 2 for shape in shapes):
            raise ShapeError("rows for gate and up")
        return [half for shape in shapes for half in [(shape[0] // 2, *shape[1:])] * 2]


@dataclass(frozen=True)
class SplitExperts(Op):
    """[E, ...], the experts' tensors one upon the other <-> a tensor each. Forward is views."""

    label = "split experts"

    def forward(self, arrays: Sequence[Array], config: GPTConfig) -> list[Array]:
        (stack,) = arrays
        return list(stack)

    def inverse(self, arrays: Sequence[Array], config: GPTConfig) -> list[Array]:
        return [np.stack(arrays)]

    def shapes(self, shapes: Sequence[Shape], config: GPTConfig | None, *, inverse: bool = False) -> list[Shape]:
        if inverse:
            return [(len(shapes), *shapes[0])]
        (stack,) = shapes
        if len(stack) < 2 or (config is not None and stack[0] != config.n_experts):
            raise ShapeError("a tensor for each expert")
        return [stack[1:]] * stack[0]


@dataclass(frozen=True)
class RotaryHalves(Op):
    """Rows of q or k from rotary pairs (Meta, GGUF, GPT-J) <-> rotary halves (ours, HuggingFace's else). A copy.

    Pairs rotate element 2j with 2j+1, halves rotate j with j + R/2, where R of a head's D elements are turned (`dims`).
    Getting this wrong keeps every shape, and text that is fluent for some twenty tokens.
    """

    label = "rotary pairs to halves"
    heads: str  # which head count the rows have: n_heads or n_kv_heads

    def forward(self, arrays: Sequence[Array], config: GPTConfig) -> list[Array]:
        return [self._permute(array, config, (-1, 2)) for array in arrays]

    def inverse(self, arrays: Sequence[Array], config: GPTConfig) -> list[Array]:
        return [self._permute(array, config, (2, -1)) for array in arrays]

    def _permute(self, array: Array, config: GPTConfig, split: tuple[int, int]) -> Array:
        heads, rest = getattr(config, self.heads), array.shape[1:]
        rows = array.reshape(heads, -1, *rest)
        turned = (config.rope.dims if config.rope else 0) or rows.shape[1]
        first = rows[:, :turned].reshape(heads, *split, *rest).swapaxes(1, 2).reshape(heads, turned, *rest)
        return (first if turned == rows.shape[1] else np.concatenate((first, rows[:, turned:]), 1)).reshape(array.shape)

    def shapes(self, shapes: Sequence[Shape], config: GPTConfig | None, *, inverse: bool = False) -> list[Shape]:
        if not all(shapes):
            raise ShapeError("rows")
        return list(shapes)


def apply(ops: Sequence[Op], arrays: Sequence[Array], config: GPTConfig, *, inverse: bool = False) -> list[Array]:
    """Run ops in order (or undo them in reverse order)."""
    result = list(arrays)
    for op in reversed(ops) if inverse else ops:
        result = op.inverse(result, config) if inverse else op.forward(result, config)
    return result


def apply_shapes(
    ops: Sequence[Op], shapes: Sequence[Shape], config: GPTConfig | None, *, inverse: bool = False
) -> list[Shape]:
    """The shapes that `apply` would give. Raises ShapeError where an op cannot apply."""
    result = list(shapes)
    for op in reversed(ops) if inverse else ops:
        result = op.shapes(result, config, inverse=inverse)
    return result
