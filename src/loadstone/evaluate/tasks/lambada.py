"""LAMBADA: the last word of a passage that only its beginning gives away (Paperno et al. 2016), OpenAI's variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...data.records import text_of
from ...errors import FormatError
from ...tokenizer import Tokenizer
from ..data import Source, find, records
from ..intervals import Metric, accuracy, interval_of_mean
from ..perplexity import metric_of
from ..scoring import Request
from .base import Asked, Scored, Settings, total


@dataclass(frozen=True)
class LastWord:
    """The last word, given all before it."""

    name: str
    title: str
    source: Source

    def prepare(self, given: str | None, tokenizer: Tokenizer, settings: Settings) -> PreparedWords:
        found = find(self.name, self.source, given)
        asked = Asked(tokenizer, settings.context)
        rows, items = [], []
        for place, fields in records(found):
            where = found.place
            passage = text_of(where, place, "`text`", fields.get("text"))
            context, space, word = passage.rstrip().rpartition(" ")
            if not space:
                raise FormatError(where, f"{place}: a passage of a single word has no last word to guess.")
            rows.append(fields)
            items.append([asked.request(context, space + word)])
        protocol = {
            **found.protocol(rows),
            "context": settings.context, "asked": "the last word and the space before it, given all before",
        }  # fmt: skip
        return PreparedWords(items, protocol, asked.notes())


@dataclass
class PreparedWords:
    items: Sequence[Sequence[Request]]
    protocol: Mapping[str, Any]
    notes: Sequence[str]

    def metrics(self, scored: Scored) -> list[Metric]:
        words = [scores for (scores,) in scored.values()]
        last = [float(scores.logprobs[-1]) for scores in words]
        return [
            accuracy("acc", [bool(s.greedy.all()) for s in words], "every token of the last word is the likeliest"),
            _perplexity("perplexity", [total(s) for s in words], "exp(mean nats of the last word)"),
            accuracy(
                "last_token_acc", [bool(s.greedy[-1]) for s in words], "the last token is, given the word's others"
            ),
            _perplexity("last_token_perplexity", last, "exp(mean nats of the last token)"),
        ]

    def groups(self, scored: Scored) -> dict[str, list[Metric]]:
        return {}


def _perplexity(name: str, logprobs: Sequence[float], meaning: str) -> Metric:
    nats = -np.array(logprobs)
    return metric_of(name, interval_of_mean((nats, np.ones_like(nats))), 1.0, meaning)


LAMBADA = LastWord(
    "lambada",
    "LAMBADA, OpenAI's variant: the last word of a passage",
    Source("lambada_test.jsonl", "hub:EleutherAI/lambada_openai/en:test"),
)
