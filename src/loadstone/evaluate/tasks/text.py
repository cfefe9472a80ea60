"""Perplexity of the usual texts, as they are and as the GPT-2 paper reads them; and of any file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...data.hub import hub_rows
from ...data.records import text_of as field_text
from ...tokenizer import Tokenizer
from ..data import Found, Source, find
from ..detokenise import detokenised
from ..intervals import Metric
from ..perplexity import Stream, Text, perplexities, read_text, stream, text_of
from ..scoring import Request
from .base import Scored, Settings


@dataclass(frozen=True)
class TextTask:
    """A text.

    Attributes:
        spelling: the de-tokeniser that it is put through first, if any.
        path: of a user's own file, which is looked for nowhere else.
    """

    name: str
    title: str
    source: Source
    spelling: str = ""
    path: Path | None = None

    def prepare(self, given: str | None, tokenizer: Tokenizer, settings: Settings) -> PreparedText:
        found = Found(self.path, "") if self.path else find(self.name, self.source, given)
        text = read_text(found.path) if found.path else _hub_text(found.hub)
        if self.spelling:
            text = detokenised(text, self.spelling)
        return PreparedText(text, tokenizer, settings)


def _hub_text(hub: str) -> Text:
    """The field `text` of all rows as one text. WikiText's empty rows are the lines ` ` of the published file."""
    rows = (field_text(hub, f"row {number}", "`text`", row.get("text")) for number, row in enumerate(hub_rows(hub), 1))
    return text_of("".join(row or " \n" for row in rows), hub)


def file_task(path: Path) -> TextTask:
    """Perplexity of a user's own file."""
    return TextTask(str(path), f"perplexity of {path.name}", Source(path.name), path=path)


@dataclass
class PreparedText:
    text: Text
    tokenizer: Tokenizer
    settings: Settings
    notes: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.notes = list(self.text.notes)
        n = len(self.stream.ids) - 1
        if n < self.settings.context:
            self.notes.append(
                f"the text has {n:,} tokens, fewer than the context of {self.settings.context:,}: it is one window, "
                "and the stride makes no difference"
            )

    @cached_property
    def stream(self) -> Stream:
        return stream(self.text, self.tokenizer, self.settings.context, self.settings.stride)

    @cached_property
    def items(self) -> Sequence[Sequence[Request]]:
        return [[request] for request in self.stream.requests()]

    @property
    def protocol(self) -> Mapping[str, Any]:
        return self.stream.protocol()

    def metrics(self, scored: Scored) -> list[Metric]:
        nats = np.concatenate(
            [-scores.logprobs.astype(np.float64) for item in sorted(scored) for scores in scored[item]]
        )
        return perplexities(nats, self.stream)

    def groups(self, scored: Scored) -> dict[str, list[Metric]]:
        return {}


_WIKITEXT2 = Source("wikitext2.test.raw.txt", "hub:Salesforce/wikitext/wikitext-2-raw-v1:test")
_PTB = Source("ptb.test.txt")
TEXTS = (
    TextTask("wikitext2", "WikiText-2 raw, test set, as it is", _WIKITEXT2),
    TextTask("wikitext2_paper", "WikiText-2 raw, test set, de-tokenised as in the GPT-2 paper", _WIKITEXT2, "wikitext"),
    TextTask("ptb", "Penn Treebank, test set, as it is", _PTB),
    TextTask("ptb_paper", "Penn Treebank, test set, de-tokenised as in the GPT-2 paper", _PTB, "ptb"),
)
