"""Multiple choice by likelihood: which continuation the model finds likelier, and minimal pairs as a case of it.

How a record is read follows from its fields: each task knows its own data set's, and all know the plain form
`query`, `choices`, `gold` (or `context_options`, `continuation`, `gold`) that llm-foundry's files have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...checkpoint.wording import shown
from ...data.records import text_of
from ...errors import FormatError
from ...tokenizer import Tokenizer
from ..data import Source, find, records
from ..intervals import Metric, accuracy
from ..scoring import Request, Scores
from .base import Asked, Scored, Settings, total

Fields = Mapping[str, Any]


class Question(NamedTuple):
    """Options (context, continuation), the number of the right one, and the group that the question belongs to."""

    options: Sequence[tuple[str, str]]
    gold: int
    group: str = ""


Reader = Callable[[Fields, str], Question]  # of a record and the text that ends a question before its answer


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):  # a text, too, has parts: its characters
        raise TypeError(f"expected a list, found {shown(value)}")
    return value


def _plain(row: Fields, cue: str) -> Question:
    return Question([(row["query"].rstrip() + cue, " " + choice) for choice in _list(row["choices"])], int(row["gold"]))


def _partial(row: Fields, cue: str) -> Question:
    """Partial scoring (Trinh and Le 2018): the options differ in the context, and what follows is scored."""
    continuation = " " + row["continuation"].lstrip()
    return Question([(context, continuation) for context in _list(row["context_options"])], int(row["gold"]))


def _winogrande(row: Fields, cue: str) -> Question:
    before, _, after = row["sentence"].partition("_")
    options = [(before + row[name], " " + after.strip()) for name in ("option1", "option2")]
    return Question(options, int(row["answer"]) - 1)


def _piqa(row: Fields, cue: str) -> Question:
    context = "Question: " + row["goal"] + cue
    return Question([(context, " " + row[name]) for name in ("sol1", "sol2")], int(row["label"]))


def _copa(row: Fields, cue: str) -> Question:
    link = {"cause": "because", "effect": "therefore"}[row["question"]]
    context = f"{row['premise'].strip().removesuffix('.')} {link}"
    choices = [row[name] for name in ("choice1", "choice2")]
    return Question([(context, f" {choice[:1].lower()}{choice[1:]}") for choice in choices], int(row["label"]))


def _arc(row: Fields, cue: str) -> Question:
    choices = row["choices"]
    options = [("Question: " + row["question"] + cue, " " + text) for text in _list(choices["text"])]
    return Question(options, _list(choices["label"]).index(row["answerKey"]))


def _hellaswag(row: Fields, cue: str) -> Question:
    return Question([(row["ctx"], " " + ending) for ending in _list(row["endings"])], int(row["label"]))


def _blimp(row: Fields, cue: str) -> Question:
    return Question([("", row["sentence_good"]), ("", row["sentence_bad"])], 0, row["UID"])


# Fields that tell the form, and its reader; the first that fits.
PLAIN: tuple[tuple[frozenset[str], Reader], ...] = (
    (frozenset({"query", "choices", "gold"}), _plain),
    (frozenset({"context_options", "continuation", "gold"}), _partial),
)


@dataclass(frozen=True)
class ChoiceTask:
    """Attributes: cue, what ends a question before its answer; forms, the readers of its data set's own records."""

    name: str
    title: str
    source: Source
    forms: tuple[tuple[frozenset[str], Reader], ...]
    cue: str = ""
    normalised: bool = True

    def prepare(self, given: str | None, tokenizer: Tokenizer, settings: Settings) -> PreparedChoices:
        found = find(self.name, self.source, given)
        where = str(found.place)
        asked = Asked(tokenizer, settings.context)
        rows, questions = [], []
        for place, fields in records(found):
            rows.append(fields)
            questions.append(self.read(fields, where, place))
        protocol = {
            **found.protocol(rows), "context": settings.context,
            "cue": self.cue, "asked": "log-probability of each option's continuation, given its context",
        }  # fmt: skip
        items = [[asked.request(*option) for option in question.options] for question in questions]
        return PreparedChoices(questions, items, protocol, asked.notes(), self.normalised)

    def read(self, fields: Fields, where: str, place: str) -> Question:
        """Raises FormatError for a record that has no form that is known here."""
        for names, reader in (*self.forms, *PLAIN):
            if names <= set(fields):
                try:
                    question = reader(fields, self.cue)
                except (LookupError, ValueError, TypeError, AttributeError, OverflowError) as error:
                    raise FormatError(
                        where, f"{place}: its fields {', '.join(sorted(names))} are not as in {self.name} ({error!r})."
                    ) from None
                return self._checked(question, where, place)
        known = " or ".join("{" + ", ".join(sorted(names)) + "}" for names, _ in (*self.forms, *PLAIN))
        raise FormatError(where, f"{place}: expected fields {known}, found {', '.join(map(str, fields))}.")

    def _checked(self, question: Question, where: str, place: str) -> Question:
        if len(question.options) < 2 or not 0 <= question.gold < len(question.options):
            raise FormatError(
                where,
                f"{place}: {len(question.options)} options, and number {question.gold} (from 0) is the right one.",
            )
        text_of(where, place, "the group", question.group)
        for context, continuation in question.options:
            text_of(where, place, "a context", context)
            if not text_of(where, place, "an option", continuation).strip():
                raise FormatError(where, f"{place}: an option is empty.")
        return question


@dataclass
class PreparedChoices:
    questions: Sequence[Question]
    items: Sequence[Sequence[Request]]
    protocol: Mapping[str, Any]
    notes: Sequence[str]
    normalised: bool

    def metrics(self, scored: Scored) -> list[Metric]:
        return self._metrics(scored, list(scored))

    def groups(self, scored: Scored) -> dict[str, list[Metric]]:
        members: dict[str, list[int]] = {}
        for item in sorted(scored):
            if group := self.questions[item].group:
                members.setdefault(group, []).append(item)
        return {group: self._metrics(scored, items) for group, items in members.items()}

    def _metrics(self, scored: Scored, items: Sequence[int]) -> list[Metric]:
        measures = MEASURES if self.normalised else {"acc": MEASURES["acc"]}
        return [
            accuracy(name, [self._right(item, scored[item], measure) for item in items], meaning)
            for name, (measure, meaning) in measures.items()
        ]

    def _right(self, item: int, scores: Sequence[Scores], measure: Callable[[str, Scores], float]) -> bool:
        question = self.questions[item]
        found = [measure(text, each) for (_, text), each in zip(question.options, scores, strict=True)]
        return found.index(max(found)) == question.gold  # of equals the first, as in lm-evaluation-harness


MEASURES: Mapping[str, tuple[Callable[[str, Scores], float], str]] = {
    "acc": (lambda text, scores: total(scores), "the right option has the highest log-probability"),
    "acc_norm": (
        lambda text, scores: total(scores) / len(text.removeprefix(" ")),
        "the same per character of the option, as lm-evaluation-harness",
    ),
    "acc_token": (
        lambda text, scores: total(scores) / len(scores.logprobs),
        "the same per token of the option, as llm.c's completion style",
    ),
}

_ANSWER = "\nAnswer:"
_ARC = (frozenset({"question", "choices", "answerKey"}), _arc)
CHOICES = (
    ChoiceTask(
        "piqa", "PIQA: everyday physics, 2 options", Source("choice/piqa.jsonl", "hub:baber/piqa:validation"),
        ((frozenset({"goal", "sol1", "sol2", "label"}), _piqa),), _ANSWER,
    ),
    ChoiceTask(
        "winogrande", "WinoGrande: what a pronoun means, 2 options, partial scoring",
        Source("choice/winogrande.jsonl", "hub:allenai/winogrande/winogrande_xl:validation"),
        ((frozenset({"sentence", "option1", "option2", "answer"}), _winogrande),), normalised=False,
    ),
    ChoiceTask(
        "copa", "COPA: cause or effect, 2 options", Source("choice/copa.jsonl", "hub:aps/super_glue/copa:validation"),
        ((frozenset({"premise", "choice1", "choice2", "question", "label"}), _copa),),
    ),
    ChoiceTask(
        "arc_easy", "ARC easy: questions at school, 3 to 5 options",
        Source("choice/arc_easy.jsonl", "hub:allenai/ai2_arc/ARC-Easy:test"), (_ARC,), _ANSWER,
    ),
    ChoiceTask(
        "arc_challenge", "ARC challenge: harder questions at school, 3 to 5 options",
        Source("choice/arc_challenge.jsonl", "hub:allenai/ai2_arc/ARC-Challenge:test"), (_ARC,), _ANSWER,
    ),
    ChoiceTask(
        "hellaswag", "HellaSwag: how a scene goes on, 4 options, completion style",
        Source("choice/hellaswag.jsonl", "hub:Rowan/hellaswag:validation"),
        ((frozenset({"ctx", "endings", "label"}), _hellaswag),),
    ),
    ChoiceTask(
        "blimp", "BLiMP: which of two sentences is grammatical", Source("blimp"),
        ((frozenset({"sentence_good", "sentence_bad", "UID"}), _blimp),), normalised=False,
    ),
)  # fmt: skip
