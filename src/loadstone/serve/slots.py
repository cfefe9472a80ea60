"""The cache of a running batch: a fixed number of rows, the busy ones in front, the others kept for their prefixes.

A step of the batch runs over rows 0 .. busy-1; a row that ends changes places with the last busy one. What it held
stays until its room is needed, so that the next request of a conversation, or one with the same system prompt, finds
its beginning read already. *Others*: vLLM keeps pages and a kernel that follows them; on a CPU without such a kernel
each step would copy every page. Here is who has which row; `caches.py` has the memory, of torch or of the engine.

Shapes: B rows of a call, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import count

from ..sampling import Floats

LEAST = 16  # tokens; a shorter common beginning is read again rather than copied


class Slots(ABC):
    """Rows of a cache, and which tokens each of them holds.

    Attributes:
        length: tokens that a row has room for.
        busy: rows 0 .. busy-1 belong to requests; the others hold what was left there.
        held: the tokens of each row whose keys and values are in the cache.
        nbytes: of the cache.
        engine: what computes.
    """

    nbytes: int
    engine = "torch"

    def __init__(self, rows: int, length: int) -> None:
        self.length, self.busy = length, 0
        self.held: list[list[int]] = [[] for _ in range(rows)]
        self._clock = count(1)
        self._used = [0] * rows

    @property
    def rows(self) -> int:
        return len(self.held)

    def read(self, first: int, last: int, ids: Sequence[Sequence[int]]) -> Floats:
        """Read new tokens, as many for each, into rows first .. last-1; logits after each one's last, [B, V]."""
        logits_BV = self._run(first, last, ids)
        for held, tokens in zip(self.held[first:last], ids, strict=True):
            held += tokens
        return logits_BV

    @abstractmethod
    def _run(self, first: int, last: int, ids: Sequence[Sequence[int]]) -> Floats: ...

    @abstractmethod
    def _copy(self, source: int, target: int, tokens: int) -> None:
        """The first keys and values of one row over those of another."""

    @abstractmethod
    def _exchange(self, a: int, b: int, tokens: int) -> None:
        """Two rows, which hold so many tokens at most, change places."""

    def admit(self, ids: Sequence[int]) -> int:
        """Take row `busy` for a prompt, with what is known of its beginning already in place; returns how many tokens.

        Never all of them, as the last token's logits are due. There must be a free row.
        """
        row, (source, known) = self.busy, self._longest(ids[:-1])
        if known < LEAST:
            source, known = -1, 0
        if source >= row and source != row:
            self._swap(source, row)
        elif source != row:
            self._make_room(row)
            if source >= 0:
                self._copy(source, row, known)
        self.held[row] = list(ids[:known])
        self.busy += 1
        self._touch(row)
        return known

    def release(self, row: int) -> int:
        """Give a row back; returns the row whose request is now at `row` (the last busy one's)."""
        last = self.busy - 1
        self._touch(row)
        if row != last:
            self._swap(row, last)
        self.busy = last
        return last

    def forget(self, row: int) -> None:
        """What a row holds is not to be trusted: a step failed while it was written."""
        self.held[row] = []

    def _longest(self, ids: Sequence[int]) -> tuple[int, int]:
        """The row with the longest common beginning, and its length; of equals a free one, which need not be copied."""
        best = (-1, 0)
        for row in reversed(range(self.rows)):
            known = _common(self.held[row], ids)
            if known > best[1]:
                best = (row, known)
        return best

    def _make_room(self, row: int) -> None:
        """The free row that was used least recently makes room, for what `row` holds."""
        oldest = min(range(row, self.rows), key=lambda other: self._used[other])
        if oldest != row:
            self._copy(row, oldest, len(self.held[row]))
            self.held[oldest], self._used[oldest] = self.held[row], self._used[row]

    def _touch(self, row: int) -> None:
        self._used[row] = next(self._clock)

    def _swap(self, a: int, b: int) -> None:
        self._exchange(a, b, max(len(self.held[a]), len(self.held[b])))
        for each in (self.held, self._used):
            each[a], each[b] = each[b], each[a]  # type: ignore[assignment]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((at for at, (x, y) in pairs if x != y), min(len(a), len(b)))
