"""`Windows`, `RandomCrops`, `Packed`: the rows that a language model learns from, cut out of one long array of ids.

Each is a pure map from an index to a row, nothing is copied before it is asked for. Why not as others do it: document
003's GPTDatasetV1 keeps two tensors for every window (with a stride of 1, 16 KB a token at length 1024), nanoGPT draws
crops from a global generator (position cannot be restored), and packing commonly lets a document see the one before it.

Shape legend: T tokens of a row.
"""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from .batch import Sample
from .mixing import key_of, mix


class TokenArray(Protocol):
    """`shards.Tokens`, or a one-dimensional numpy array of ids."""

    def __len__(self) -> int: ...
    def __getitem__(self, wanted: slice, /) -> NDArray[Any]: ...


class Windows:
    """Overlapping windows, targets shifted by one: those of `for i in range(0, len(tokens) - length, stride)`.

    Args:
        tokens: the ids.
        length: T.
        stride: from one window's start to the next; by default `length`, so that no target is seen twice.

    Raises ConfigError if not even one window fits.
    """

    def __init__(self, tokens: TokenArray, length: int, stride: int | None = None) -> None:
        self._tokens, self.length, self.stride = tokens, length, length if stride is None else stride
        _check(tokens, length)
        if self.stride < 1:
            raise ConfigError(f"A stride of {self.stride} never moves on; it must be at least 1.")
        self._starts = range(0, len(tokens) - length, self.stride)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int, /) -> Sample:
        return _shifted(self._tokens, self._starts[index], self.length)

    @property
    def identity(self) -> str:
        return f"windows of {self.length} every {self.stride} of {identity_of(self._tokens)}"


class RandomCrops:
    """`count` windows, each starting at a random place that depends on (seed, index) alone, as nanoGPT's batches.

    Raises ConfigError if not even one window fits.
    """

    def __init__(self, tokens: TokenArray, length: int, count: int, seed: int = 0) -> None:
        self._tokens, self.length, self.count, self.seed = tokens, length, count, seed
        _check(tokens, length)
        self._key = key_of("crop", seed)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> Sample:
        index = range(self.count)[index]
        drawn = int(mix(np.array([index], np.uint64), self._key)[0])
        return _shifted(self._tokens, drawn % (len(self._tokens) - self.length), self.length)

    @property
    def identity(self) -> str:
        return f"{self.count} crops of {self.length}, seed {self.seed}, of {identity_of(self._tokens)}"


class Packed:
    """Whole documents side by side in rows of at most T tokens; none sees another, and no target crosses a boundary.

    Every token but the first of its document is a target exactly once. A document that is longer than a row is cut.
    Each goes to the fullest of the last rows into which it still fits, so rows differ a little in length.

    Args:
        tokens: `shards.Tokens`, which know where documents start.
        length: T.
    """

    OPEN = 64  # rows that are still being filled; more would fill better by very little, and spread documents wider

    def __init__(self, tokens: TokenArray, length: int, documents: NDArray[np.uint64] | None = None) -> None:
        self._tokens, self.length = tokens, length
        starts = getattr(tokens, "documents", None) if documents is None else documents
        if starts is None:
            raise ConfigError("Packing needs to know where documents start; give `documents`, or prepared tokens.")
        if length < 1:
            raise ConfigError(f"A row of {length} tokens is none; it must have at least 1.")
        pieces = _pieces(np.asarray(starts, np.int64), len(tokens), length)
        if not len(pieces):
            raise ConfigError(
                f"Nothing to learn from: none of the {len(starts):,} documents has two tokens, one to see and one to "
                "predict."
            )
        order, self._rows = _pack(pieces[:, 1], length, self.OPEN)
        self._pieces = pieces[order]

    def __len__(self) -> int:
        return len(self._rows) - 1

    def __getitem__(self, index: int, /) -> Sample:
        index = range(len(self))[index]
        pieces = self._pieces[self._rows[index] : self._rows[index + 1]]
        parts = [_shifted(self._tokens, int(start), int(size)) for start, size in pieces]
        return Sample(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.targets for part in parts]),
            np.repeat(np.arange(len(pieces)), pieces[:, 1]),
        )

    @property
    def identity(self) -> str:
        return f"packed rows of {self.length} of {identity_of(self._tokens)}"


def identity_of(tokens: TokenArray) -> str:
    """A text that changes with the ids."""
    known = getattr(tokens, "identity", None)
    return known if isinstance(known, str) else hashlib.sha256(tokens[:].tobytes()).hexdigest()


def _shifted(tokens: TokenArray, start: int, length: int) -> Sample:
    ids = tokens[start : start + length + 1].astype(np.int64)
    return Sample(ids[:-1], ids[1:])


def _check(tokens: TokenArray, length: int) -> None:
    if length < 1:
        raise ConfigError(f"A window of {length} tokens is none; it must have at least 1.")
    if len(tokens) <= length:
        raise ConfigError(
            f"The corpus has {len(tokens):,} tokens, and one window needs {length + 1:,}: {length:,} to see and "
            "the one after the last to predict. Give more text, or a shorter context length."
        )


def _pieces(starts: NDArray[np.int64], total: int, length: int) -> NDArray[np.int64]:
    """[pieces, 2]: where it starts, and how many pairs (token, next token), at most `length`."""
    pairs = np.diff(starts, append=total) - 1
    counts = np.maximum(-(-pairs // length), 0)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    first = within * length
    sizes = np.minimum(np.repeat(pairs, counts) - first, length)
    return np.stack([np.repeat(starts, counts) + first, sizes], axis=1)


def _pack(sizes: NDArray[np.int64], length: int, most: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Best fit in order, over a bounded number of open rows: (order of the pieces, where each row starts in it)."""
    rows: list[list[int]] = []
    unfilled: dict[int, int] = {}  # row -> room, oldest first
    for piece, size in enumerate(sizes.tolist()):
        fitting = [row for row, room in unfilled.items() if room >= size]
        row = min(fitting, key=unfilled.__getitem__) if fitting else len(rows)
        if not fitting:
            rows.append([])
            unfilled[row] = length
            if len(unfilled) > most:
                del unfilled[next(iter(unfilled))]
        rows[row].append(piece)
        unfilled[row] -= size
        if not unfilled[row]:
            del unfilled[row]
    counts = [0, *map(len, rows)]
    return np.array([piece for row in rows for piece in row], np.int64), np.cumsum(counts)
