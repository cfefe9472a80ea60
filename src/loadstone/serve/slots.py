"""The cache of a running batch: a fixed number of rows, the busy ones in front, the others kept for their prefixes.

A step of the batch runs over rows 0 .. busy-1 of one tensor, without a gather; a row that ends changes places with the
last busy one. What it held stays until its room is needed, so that the next request of a conversation, or one with
the same system prompt, finds its beginning read already. *Others*: vLLM keeps pages and a kernel that follows them; on
a CPU without such a kernel each step would copy every page.

Shapes: N rows, K key/value heads, S slots (tokens) of a row, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from itertools import count

from torch import Tensor

from ..model import GPT
from ..positions import KVCache

LEAST = 16  # tokens; a shorter common beginning is read again rather than copied


class Slots:
    """Rows of a cache, and which tokens each of them holds.

    Attributes:
        busy: rows 0 .. busy-1 belong to requests; the others hold what was left there.
        held: the tokens of each row whose keys and values are in the cache.
    """

    def __init__(self, model: GPT, rows: int, length: int) -> None:
        self._cache = model.new_cache(rows, length)
        self.busy = 0
        self.held: list[list[int]] = [[] for _ in range(rows)]
        self._clock = count(1)
        self._used = [0] * rows

    @property
    def rows(self) -> int:
        return len(self.held)

    @property
    def length(self) -> int:
        """Tokens that a row has room for."""
        return self._cache.size

    @property
    def kv(self) -> Tensor:
        """The memory: [layers, 2, N, K, S, D]."""
        return self._cache.kv

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

    def view(self, first: int, last: int) -> KVCache:
        """Rows first .. last-1 as a cache for the model, at the lengths of what they hold."""
        part = copy(self._cache)  # over the same memory
        part.kv, part.lengths = self.kv[:, :, first:last], [len(ids) for ids in self.held[first:last]]
        return part

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

    def _copy(self, source: int, target: int, tokens: int) -> None:
        self.kv[:, :, target, :, :tokens] = self.kv[:, :, source, :, :tokens]

    def _swap(self, a: int, b: int) -> None:
        tokens = max(len(self.held[a]), len(self.held[b]))
        kept = self.kv[:, :, a, :, :tokens].clone()
        self._copy(b, a, tokens)
        self.kv[:, :, b, :, :tokens] = kept
        for each in (self.held, self._used):
            each[a], each[b] = each[b], each[a]  # type: ignore[assignment]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((at for at, (x, y) in pairs if x != y), min(len(a), len(b)))
