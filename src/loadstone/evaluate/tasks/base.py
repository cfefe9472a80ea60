"""What a task is: it prepares items for a model, and makes figures of their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np

from ...tokenizer import Tokenizer
from ..data import Source
from ..intervals import Metric
from ..scoring import Request, Scores

Scored = Mapping[int, Sequence[Scores]]  # number of the item -> scores of its requests; of those that were run


class Settings(NamedTuple):
    """How to ask. Only what a text's perplexity depends on; a task of items has no stride."""

    context: int
    stride: int


class Prepared(Protocol):
    """A task with its data, for one tokenizer.

    Attributes:
        items: the requests of each.
        protocol: whatever the figures depend on besides the model; results are kept under its hash.
        notes: what a reader of the figures should know.
    """

    @property
    def items(self) -> Sequence[Sequence[Request]]: ...
    @property
    def protocol(self) -> Mapping[str, Any]: ...
    @property
    def notes(self) -> Sequence[str]: ...

    def metrics(self, scored: Scored) -> list[Metric]:
        """Figures of the items that were run, at least one."""

    def groups(self, scored: Scored) -> dict[str, list[Metric]]:
        """The same for parts of the task; empty where it has none."""


class Task(Protocol):
    """Attributes: name, as typed; title, for a heading; source, where the data come from."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def source(self) -> Source: ...

    def prepare(self, given: str | None, tokenizer: Tokenizer, settings: Settings) -> Prepared:
        """Find and read the data. Raises LoadstoneError if they are not there or are not what was expected."""


@dataclass
class Asked:
    """Contexts and continuations as requests, tokenized as lm-evaluation-harness does.

    The continuation's tokens are those that the whole text has more than its context, so that a word boundary between
    the two is cut as in a text. White space at the end of a context belongs to the continuation. Before an empty
    context stands the begin token; where the vocabulary has none, the continuation's first token is only read.
    What is longer than the context loses its beginning.
    """

    tokenizer: Tokenizer
    context: int
    cut: int = field(default=0, init=False)
    unbegun: int = field(default=0, init=False)

    def request(self, context: str, continuation: str) -> Request:
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        begin = self._begin(empty=not kept)
        before = self.tokenizer.encode(kept, add_special=False) if kept else []
        whole = self.tokenizer.encode(kept + continuation, add_special=False)
        targets = max(1, len(whole) - len(before))
        ids = [*begin, *whole]
        if targets >= len(ids):
            targets = len(ids) - 1
            self.unbegun += 1
        if len(ids) > self.context + 1:
            self.cut += 1
            ids = ids[-(self.context + 1) :]
            targets = min(targets, self.context)
        return Request(np.array(ids), targets)

    def _begin(self, *, empty: bool) -> list[int]:
        bos = self.tokenizer.bos_id
        if bos is None or not (empty or self.adds_begin):
            return []
        return [bos]

    @cached_property
    def adds_begin(self) -> bool:
        """Whether the tokenizer itself puts a begin token before every text (Llama's does, GPT-2's does not)."""
        return self.tokenizer.encode("a")[:1] == [self.tokenizer.bos_id]

    def notes(self) -> list[str]:
        found = []
        if self.cut:
            found.append(
                f"{self.cut:,} requests are longer than the context of {self.context} and lost their beginning"
            )
        if self.unbegun:
            found.append(f"{self.unbegun:,} texts have no begin token before them: their first token is not scored")
        return found


def total(scores: Scores) -> float:
    """The log-probability of a whole continuation."""
    return float(scores.logprobs.sum(dtype=np.float64))
