"""Instruction data for supervised fine-tuning: Alpaca, chat and prompt/response files as samples, loss on the answers.

Why not as others do it: TRL and axolotl want to be told the format, and take fields that they do not know for granted;
the book's chapter 7 takes the loss on the instructions too. Here the format follows from the fields, an unknown field
is refused by name, and what was left out, cut or not learnt is counted and said. (`prompts.py`: how a mask is exact.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.wording import few, shown
from ..errors import FormatError, LoadstoneError
from ..tokenizer import Tokenizer
from .batch import IGNORED, Sample
from .prompts import RESPONSE, ChatStyle, Message, PieceStyle, Style, UnsuitedError, alpaca, plain
from .records import Fields, Ragged, Sources, paths_of, read_records, split, text_of

# Bookkeeping that says nothing to the model, as published data sets have it.
_HARMLESS = frozenset(
    "id idx index uuid conversation_id prompt_id source dataset category language lang score num_turns text".split()
)
_CHAT_ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
_SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "tool": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class Conversation:
    """A record that was understood; `place` is where it stands, `line 3`."""

    place: str
    messages: tuple[Message, ...]

    @property
    def prompt(self) -> str:
        """All before the first answer: records of the same prompt are never split."""
        roles = [message.role for message in self.messages]
        return repr(self.messages[: roles.index("assistant")])


class _Reader:
    """The fields of one record, and errors that name its place."""

    def __init__(self, path: Path, place: str, fields: Fields, ignore: Collection[str]) -> None:
        self.path, self.place, self.fields, self.ignore = path, place, fields, ignore

    def text(self, name: str) -> str:
        return text_of(self.path, self.place, name, self.fields[name])

    def turns(self, name: str, role: str, content: str, roles: Mapping[str, str]) -> list[Message]:
        """A list of messages, of which each has a role and a content under these names."""
        values = self.fields[name]
        if not isinstance(values, list) or not values:
            raise self.wrong(f"{name} should be a list of messages, found {shown(values)}.")
        found = []
        for number, value in enumerate(values):
            here = f"{name}[{number}]"
            if not isinstance(value, dict) or not {role, content} <= value.keys():
                raise self.wrong(f"{here} should have {role!r} and {content!r}, found {shown(value)}.")
            self.refuse_others(value, {role, content}, here)
            if not isinstance(value[role], str) or value[role] not in roles:
                raise self.wrong(f"{here}.{role} is {shown(value[role])}; known are {', '.join(roles)}.")
            text = text_of(self.path, self.place, f"{here}.{content}", value[content])
            found.append(Message(roles[value[role]], text))
        return found

    def refuse_others(self, fields: Fields, known: Collection[str], where: str = "the record") -> None:
        others = [
            name for name, value in fields.items()
            if name not in known and name not in _HARMLESS and name not in self.ignore and value not in (None, "", [])
        ]  # fmt: skip
        if others:
            raise self.wrong(
                f"{where} has the field {few(map(shown, others))}, which would not be learnt from.",
                f"If it says nothing to the model, name it in `ignore`: {few(others)}.",
            )

    def wrong(self, problem: str, hint: str = "") -> FormatError:
        return FormatError(self.path, f"{self.place}: {problem}", hint)


def _alpaca(record: _Reader) -> list[Message]:
    context = record.text("input") if record.fields.get("input") is not None else ""
    return [Message("user", record.text("instruction"), context), Message("assistant", record.text("output"))]


def _pair(answer: str) -> Callable[[_Reader], list[Message]]:
    return lambda record: [Message("user", record.text("prompt")), Message("assistant", record.text(answer))]


def _turns(name: str, role: str, content: str, roles: Mapping[str, str]) -> Callable[[_Reader], list[Message]]:
    return lambda record: record.turns(name, role, content, roles)


@dataclass(frozen=True)
class Format:
    """How one kind of file says a conversation: the fields of each record, those it may have, and how to read it."""

    name: str
    fields: frozenset[str]
    read: Callable[[_Reader], list[Message]]
    optional: frozenset[str] = frozenset()


FORMATS = (
    Format("Alpaca", frozenset({"instruction", "output"}), _alpaca, frozenset({"input"})),
    Format("chat", frozenset({"messages"}), _turns("messages", "role", "content", _CHAT_ROLES)),
    Format("ShareGPT", frozenset({"conversations"}), _turns("conversations", "from", "value", _SHAREGPT_ROLES)),
    Format("prompt/response", frozenset({"prompt", "response"}), _pair("response")),
    Format("prompt/completion", frozenset({"prompt", "completion"}), _pair("completion")),
)  # fmt: skip
STYLES: Mapping[str, Callable[[Tokenizer], Style]] = {
    "chat": ChatStyle,
    "alpaca": lambda tokenizer: PieceStyle(tokenizer, alpaca),
    "plain": lambda tokenizer: PieceStyle(tokenizer, plain),
}


def read_conversations(sources: Sources, ignore: Collection[str] = ()) -> tuple[Format, list[Conversation]]:
    """The conversations of JSON or JSONL files, whose format follows from the first record's fields.

    Args:
        sources: a file, or several of one format.
        ignore: fields that you know to say nothing to the model.

    Raises FormatError, naming the record, for an unknown format, a record of another one, and unknown fields.
    """
    paths, kind, found = paths_of(sources), None, list[Conversation]()
    for path in paths:
        for place, fields in read_records(path):
            record = _Reader(path, place, fields, ignore)
            own = _recognised(record)
            kind = kind or own
            if own is not kind:
                raise record.wrong(
                    f"it is of the format {own.name}, and those before are {kind.name}.", "Train on each by itself."
                )
            record.refuse_others(fields, own.fields | own.optional)
            messages = own.read(record)
            if "assistant" not in [message.role for message in messages]:
                raise record.wrong("it has no message of the assistant, so there is nothing to learn.", "Remove it.")
            found.append(Conversation(place if len(paths) == 1 else f"{path.name} {place}", tuple(messages)))
    if kind is None:
        raise FormatError(paths[0], "it holds no record.", "Name a file with the data.")
    return kind, found


def _recognised(record: _Reader) -> Format:
    fits = [kind for kind in FORMATS if kind.fields <= record.fields.keys()]
    if len(fits) == 1:
        return fits[0]
    known = "; ".join(f"{kind.name}: {', '.join(sorted(kind.fields))}" for kind in FORMATS)
    if fits:
        raise record.wrong(
            f"its fields fit several formats ({', '.join(kind.name for kind in fits)}).",
            "Keep the fields of one of them: " + known + ".",
        )
    has = few(map(shown, record.fields), 8) or "none at all"
    raise record.wrong(f"its fields are {has}, and they are those of no known format.", f"Known are {known}.")


@dataclass(frozen=True)
class Rows:
    """Tokenised conversations as samples: targets are the next tokens, IGNORED where they belong to no answer.

    Attributes:
        ids: the rows, one token longer than the samples' ids.
        answer: [all tokens] which of them are learnt.
    """

    ids: Ragged
    answer: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Sample:
        ids = self.ids[index]
        index = range(len(self))[index]
        learnt = self.answer[self.ids.offsets[index] : self.ids.offsets[index + 1]]
        return Sample(ids[:-1], np.where(learnt[1:], ids[1:], IGNORED))

    @cached_property
    def identity(self) -> str:
        return self.ids.digest(self.answer)


@dataclass
class Report:
    """What became of a file. `left_out`: reason -> places."""

    path: str
    format: str
    style: str
    records: int
    mask_prompt: bool
    train: int = 0
    validation: int = 0
    cut: int = 0
    tokens: int = 0
    learnt: int = 0
    ends: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Sentences for people."""
        loss = f"the {self.learnt:,} of the answers" if self.mask_prompt else "all of them"
        found = [
            f"{self.path}: {self.records:,} records, format {self.format}, written in the style {self.style}; "
            f"{self.train:,} to train on, {self.validation:,} to validate",
            f"{self.tokens:,} tokens; the loss is taken on {loss}; answers end with "
            + (" or ".join(map(repr, self.ends)) or "nothing"),
        ]
        found += [f"{self.cut:,} are too long and were cut at the end"] if self.cut else []
        return found + self.left_out_lines() + self.notes

    def left_out_lines(self) -> list[str]:
        return [f"{len(places):,} left out ({few(places)}): {why}" for why, places in self.left_out.items()]


@dataclass(frozen=True)
class Instructions:
    """What `load_instructions` returns."""

    train: Rows
    validation: Rows
    report: Report


def load_instructions(
    sources: Sources,
    tokenizer: Tokenizer,
    context_length: int,
    *,
    style: str = "auto",
    mask_prompt: bool = True,
    validation: float | Sequence[str | Path] = 0.05,
    seed: int = 0,
    ignore: Collection[str] = (),
) -> Instructions:
    """Files of instructions, tokenised and split.

    Args:
        sources: JSON or JSONL; `FORMATS` says what the records may be.
        tokenizer: the model's.
        context_length: the model's; longer conversations are cut at the end.
        style: `chat` (the tokenizer's template), `alpaca`, `plain` (prompt and answer as they are); `auto`: plain if
            the prompts were written in Alpaca's form already, else chat where there is a template, else alpaca, or
            plain for pairs.
        mask_prompt: take the loss on the answers alone, their end tokens included; False: on every token.
        validation: share of the records, of which those of the same prompt stay on one side; or files.
        seed: of the split.
        ignore: see `read_conversations`.

    Raises a LoadstoneError if a file is unsound, or no record can be used.
    """
    kind, found = read_conversations(sources, ignore)
    if isinstance(validation, (int, float)):
        sides = split([conversation.prompt for conversation in found], (1 - validation, validation), seed)
        train, held = ([found[i] for i in side] for side in sides)
    else:
        train, held = found, read_conversations(validation, ignore)[1]
    name = _chosen(style, kind, found, tokenizer)
    render = STYLES[name](tokenizer)
    paths = ", ".join(map(str, paths_of(sources)))
    report = Report(paths, kind.name, name, len(train) + len(held), mask_prompt)
    rows = [_rows(side, render, context_length, report) for side in (train, held)]
    report.train, report.validation = map(len, rows)
    if not report.train:
        why = ". ".join(report.left_out_lines()) or "the split left none"
        raise FormatError(paths, f"nothing to train on is left of {report.records:,} records: {why}.")
    _note_ends(report, render, tokenizer)
    return Instructions(rows[0], rows[1], report)


def _chosen(style: str, kind: Format, found: Sequence[Conversation], tokenizer: Tokenizer) -> str:
    if style in STYLES:
        return style
    if style != "auto":
        raise LoadstoneError(f"there is no style {style!r}; known are auto, {', '.join(STYLES)}.")
    pairs = kind.name.startswith("prompt/")
    # A prompt that was rendered already must not be rendered again.
    if pairs and all(conversation.messages[0].content.endswith(RESPONSE) for conversation in found):
        return "plain"
    return "chat" if tokenizer.chat_template is not None else "plain" if pairs else "alpaca"


def _rows(found: Sequence[Conversation], render: Style, context_length: int, report: Report) -> Rows:
    answers = bytearray()

    def each() -> Iterator[Sequence[int]]:
        for conversation in found:
            try:
                ids, answer = render(conversation.messages)
            except UnsuitedError as error:
                report.left_out.setdefault(str(error), []).append(conversation.place)
                continue
            if not report.mask_prompt:
                answer = [True] * len(ids)
            end = len(answer) - answer[::-1].index(True) if True in answer else 0  # nothing is learnt from the rest
            kept = min(end, context_length + 1)
            if not any(answer[1:kept]):
                why = (
                    f"no answer begins within the context of {context_length:,} tokens"
                    if kept < end
                    else "its answers are empty"
                )
                report.left_out.setdefault(why, []).append(conversation.place)
                continue
            report.cut += kept < end
            report.tokens += kept
            report.learnt += sum(answer[1:kept])
            answers.extend(answer[:kept])
            yield ids[:kept]

    return Rows(Ragged.of(each()), np.frombuffer(answers, np.bool_))


def _note_ends(report: Report, render: Style, tokenizer: Tokenizer) -> None:
    stops = {tokenizer.token_text(token) for token in tokenizer.eos_ids}
    report.ends = sorted(render.ends - {""})
    if "" in render.ends:
        report.notes.append("no token ends an answer, so the model will not learn to stop")
    if strange := [end for end in report.ends if end not in stops]:
        report.notes.append(f"answers end with {few(map(repr, strange))}, where this model's generation does not stop")
