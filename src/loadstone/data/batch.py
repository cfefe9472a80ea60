"""`Sample` and `Batch`: one row of training data, and the rows of one step.

Shape legend: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORED = -100  # a target at which no loss is taken: the default `ignore_index` of torch's cross_entropy
PADDING = 0  # an id that every vocabulary has; its target is IGNORED, and attention is causal


class Sample(NamedTuple):
    """One row.

    Attributes:
        ids: [T] token ids.
        targets: [T] the next token of each, IGNORED where no loss is taken; for classification [1], the label.
        segments: [T] number of the packed document that each token belongs to; None where there is one alone.
    """

    ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    segments: NDArray[np.int64] | None = None


class Samples(Protocol):
    """Rows by index, as a pure function: the same index gives the same sample for ever.

    A class that also has `identity` (a text that changes when a row does) lets a loader refuse to resume on other data.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Sample: ...


@dataclass(frozen=True)
class Batch:
    """B rows, padded on the right to the longest: id 0, target IGNORED, a segment of their own.

    Attributes:
        inputs: [B, T] int64.
        targets: [B, T] int64; for classification [B, 1].
        segments: [B, T] int64, or None where no row is packed.
        lengths: [B] int64, the lengths before padding.
    """

    inputs: Tensor
    targets: Tensor
    segments: Tensor | None
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def rows(self, start: int, stop: int) -> Batch:
        """A micro-batch: some of the rows, as views."""
        return self._each(lambda tensor: tensor[start:stop])

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device, copied while the host goes on where the memory is pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        segments = None if self.segments is None else change(self.segments)
        return Batch(change(self.inputs), change(self.targets), segments, change(self.lengths))


def collate(samples: Sequence[Sample]) -> Batch:
    """Rows to a batch; of none, an empty one, as a rank beyond the last few rows of an epoch gets."""
    lengths = [len(sample.ids) for sample in samples]
    segments = None
    if any(sample.segments is not None for sample in samples):
        own = [np.zeros(len(s.ids), np.int64) if s.segments is None else s.segments for s in samples]
        segments = _padded(own, -1)
    return Batch(
        _padded([sample.ids for sample in samples], PADDING),
        _padded([sample.targets for sample in samples], IGNORED),
        segments,
        torch.tensor(lengths),
    )


def _padded(rows: Sequence[NDArray[np.int64]], filler: int) -> Tensor:
    """[B, T] of rows of up to T values."""
    out = np.full((len(rows), max(map(len, rows), default=0)), filler, np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out)
