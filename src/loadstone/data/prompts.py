"""A conversation as tokens, and which of them are answers: by the model's chat template, Alpaca's prompt, or plain.

Why not as others do it: TRL asks the template for `{% generation %}` marks and trains on nothing, or on everything,
where a template has none (trl#4147, transformers' all-zero masks); axolotl and torchtune look for the tokenizer's end
token and so never teach Gemma to end a turn (axolotl#3754); alpaca-lora and litgpt count the tokens of the prompt alone
and are one off where tokens join across the border (alpaca-lora#306). Here a template is rendered once with marks for
the messages: what it puts around each answer is known to the character. Text is tokenised in pieces that end where
an answer begins, as at inference; pieces that would say another text than the whole are never used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

from ..errors import LoadstoneError, TokenizerError
from ..tokenizer import Tokenizer

# Stanford Alpaca's prompt (tatsu-lab/stanford_alpaca), as most programs write it today: a line break ends it.
_INTRODUCTION = "Below is an instruction that describes a task"
PREAMBLE = f"{_INTRODUCTION}. Write a response that appropriately completes the request."
PREAMBLE_WITH_INPUT = (
    f"{_INTRODUCTION}, paired with an input that provides further context. Write a response that appropriately "
    "completes the request."
)
RESPONSE = "### Response:\n"

# What stands for message i while a template is examined. The em spaces tell whether it strips its messages.
_SPACE = "\u2003"
_MARK = "\ue000{}\ue001"
_MARKED = re.compile(f"({_SPACE}?)\ue000(\\d+)\ue001({_SPACE}?)")


class UnsuitedError(LoadstoneError):
    """A conversation that cannot be rendered so that its answers are known to the token."""


class Message(NamedTuple):
    """One turn.

    Attributes:
        role: system, user, assistant, ...
        content: what was said.
        context: Alpaca's `input`, of a user's message.
    """

    role: str
    content: str
    context: str = ""


class Piece(NamedTuple):
    """A part of a rendering.

    Attributes:
        text: never cut inside.
        answer: the model is to learn it.
        special: texts of special tokens in it are these tokens; what people wrote is plain text.
    """

    text: str
    answer: bool
    special: bool = False


class Row(NamedTuple):
    """ids, and for each whether it belongs to an answer."""

    ids: list[int]
    answer: list[bool]


class Style(Protocol):
    """A way to render conversations. `ends` are the texts found to end an answer; an empty one: nothing does."""

    ends: set[str]

    def __call__(self, messages: Sequence[Message], /) -> Row:
        """Raises UnsuitedError."""


def plain(messages: Sequence[Message]) -> list[Piece]:
    """The prompt as it stands and the answer right behind it."""
    if [message.role for message in messages] != ["user", "assistant"]:
        raise UnsuitedError("the plain style is for one prompt and its answer")
    return [Piece(_question(messages[0]), False), Piece(messages[1].content, True)]


def alpaca(messages: Sequence[Message]) -> list[Piece]:
    """Alpaca's prompt. A system message takes the place of its first sentences; later turns follow the end token."""
    system = [message.content for message in messages[:1] if message.role == "system"]
    pieces = []
    for number, message in enumerate(messages[len(system) :]):
        if message.role != ("user", "assistant")[number % 2]:
            raise UnsuitedError(
                "Alpaca's prompt is for a user and an assistant who take turns, and the messages are not so"
            )
        if message.role == "assistant":
            pieces.append(Piece(message.content, True))
            continue
        before = (system or [PREAMBLE_WITH_INPUT if message.context else PREAMBLE]) if not number else [""]
        context = [f"### Input:\n{message.context}"] if message.context else []
        text = "\n\n".join([*before, f"### Instruction:\n{message.content}", *context, RESPONSE])
        pieces.append(Piece(text, False))
    return pieces


def alpaca_template(tokenizer: Tokenizer) -> str:
    """`alpaca` as a chat template, so that a model which learnt that style is asked in it by every program."""
    begin, ends = PieceStyle(tokenizer, alpaca).borders()
    before, response = (json.dumps(text) for text in (PREAMBLE, RESPONSE))
    return (
        "{% set system = messages[0]['role'] == 'system' %}"
        "{% for message in (messages[1:] if system else messages) %}{% if message['role'] == 'assistant' %}"
        f"{{{{ message['content'] + {json.dumps(ends)} }}}}{{% else %}}"
        f"{{% if loop.first %}}{{{{ {json.dumps(begin)} + (messages[0]['content'] if system else {before}) }}}}"
        "{% endif %}"
        f"{{{{ '\\n\\n### Instruction:\\n' + message['content'] + '\\n\\n' + {response} }}}}{{% endif %}}{{% endfor %}}"
    )


def _question(message: Message) -> str:
    return f"{message.content}\n\n{message.context}" if message.context else message.content


class PieceStyle:
    """Pieces tokenised one by one, as at inference, with the begin token before them and the end token after answers.

    Special text in them is plain text.
    """

    def __init__(self, tokenizer: Tokenizer, write: Callable[[Sequence[Message]], list[Piece]]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._begin = [token for token in tokenizer.encode("a")[:1] if token == tokenizer.bos_id]
        self._end = tokenizer.eos_ids[:1]
        self.ends = {"".join(map(tokenizer.token_text, self._end))}

    def borders(self) -> tuple[str, str]:
        """The texts of the begin token and of the end token, empty where there is none."""
        begin, end = ("".join(map(self._tokenizer.token_text, ids)) for ids in (self._begin, self._end))
        return begin, end

    def __call__(self, messages: Sequence[Message], /) -> Row:
        row = Row([], [])
        _extend(row, self._begin, False)
        for piece in self._write(messages):
            _extend(row, self._tokenizer.encode(piece.text, add_special=False), piece.answer)
            _extend(row, self._end if piece.answer else (), piece.answer)
        return row


def _extend(row: Row, ids: Sequence[int], answer: bool) -> None:
    row.ids.extend(ids)
    row.answer.extend([answer] * len(ids))


class Slot(NamedTuple):
    """Where a message stands in a rendered conversation.

    Attributes:
        before: what the template writes between the message before and this one; of that, `header` characters do not
            belong to an answer.
        message: its index.
        strip: (left, right): the template strips its text there.
        ending: of what follows the message, so many characters belong to an answer.
    """

    before: str
    message: int
    strip: tuple[bool, bool]
    header: int
    ending: int


class ChatStyle:
    """The tokenizer's own chat template. Raises TokenizerError if there is none."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.chat_template is None:
            raise TokenizerError(
                f"{tokenizer.source}: there is no chat template, so the chat style cannot be had. Choose the style "
                "alpaca, or put the model's chat_template.jinja beside its tokenizer."
            )
        self.ends: set[str] = set()
        self._tokenizer = tokenizer
        added = tokenizer.backend.get_added_tokens_decoder().values()
        self._special = sorted((token.content for token in added if token.special), key=len)
        self._known: dict[tuple[str, ...], tuple[list[Slot], str]] = {}

    def __call__(self, messages: Sequence[Message], /) -> Row:
        texts = [_question(message) for message in messages]
        roles = tuple(message.role for message in messages)
        whole = self._render(roles, texts)
        pieces = self._pieces(roles, texts)
        if "".join(piece.text for piece in pieces) != whole:
            self._known.pop(roles, None)  # a template may write the date, which may have changed
            pieces = self._pieces(roles, texts)
        if "".join(piece.text for piece in pieces) != whole:
            raise UnsuitedError("the chat template changes the text of its messages")
        return self._tokens(whole, pieces)

    def _render(self, roles: Sequence[str], texts: Sequence[str], *, prompt: bool = False) -> str:
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        try:
            return self._tokenizer.apply_chat(messages, add_generation_prompt=prompt)
        except TokenizerError as error:
            raise UnsuitedError(str(error)) from None

    def _pieces(self, roles: tuple[str, ...], texts: Sequence[str]) -> list[Piece]:
        if roles not in self._known:
            self._known[roles] = self._examine(roles)
        slots, last = self._known[roles]
        pieces, ending = [], 0
        for slot in slots:
            answer, text = roles[slot.message] == "assistant", texts[slot.message]
            text = text.lstrip() if slot.strip[0] else text
            text = text.rstrip() if slot.strip[1] else text
            pieces += [
                Piece(slot.before[:ending], True, True),
                Piece(slot.before[ending : slot.header], False, True),
                Piece(slot.before[slot.header :], answer, True),
                Piece(text, answer),
            ]
            ending = slot.ending
        pieces += [Piece(last[:ending], True, True), Piece(last[ending:], False, True)]
        return [piece for piece in pieces if piece.text]

    def _examine(self, roles: Sequence[str]) -> tuple[list[Slot], str]:
        """How the template lays out messages of these roles: their slots, and what follows the last one."""
        marks = [_SPACE + _MARK.format(i) + _SPACE for i in range(len(roles))]
        whole = self._render(roles, marks)
        found = list(_MARKED.finditer(whole))
        for i, role in enumerate(roles):
            if role == "assistant" and [int(match[2]) for match in found].count(i) != 1:
                raise UnsuitedError("the chat template leaves out an answer, or says it twice")
        slots, end = [], 0
        for position, match in enumerate(found):
            before, message = whole[end : match.start()], int(match[2])
            end = match.end()
            header, ending = len(before), 0
            if roles[message] == "assistant":
                after = whole[end : found[position + 1].start() if position + 1 < len(found) else None]
                header = self._header(roles[:message], marks[:message], whole[: match.start()], before)
                ending = self._ending(roles[: message + 1], marks[: message + 1], after)
            slots.append(Slot(before, message, (not match[1], not match[3]), header, ending))
        return slots, whole[end:]

    def _header(self, roles: Sequence[str], marks: Sequence[str], until: str, before: str) -> int:
        """How much of `before` is what the model is given at inference: up to the end of the generation prompt."""
        prompt = self._render(roles, marks, prompt=True)
        start = len(prompt) - (len(until) - len(before))
        if until.startswith(prompt) and start >= 0:
            return start
        # Templates that tell the last turn differently (from reasoning, say): its header is the same all the same.
        header = prompt.removeprefix(self._render(roles, marks))
        if header and header != prompt and before.count(header) == 1:
            return before.index(header) + len(header)
        raise UnsuitedError("the chat template does not begin an answer as its generation prompt does")

    def _ending(self, roles: Sequence[str], marks: Sequence[str], after: str) -> int:
        """How much of `after` ends the answer: up to its first special token, whatever that is called."""
        tail = _MARKED.split(self._render(roles, marks))[-1]
        if not after.startswith(tail):
            raise UnsuitedError("the chat template ends an answer otherwise when another message follows")
        starts = {tail.find(text): text for text in self._special if text in tail}
        first = starts[min(starts)] if starts else ""
        self.ends.add(first)
        return tail.index(first) + len(first) if first else len(tail.rstrip())

    def _tokens(self, whole: str, pieces: Sequence[Piece]) -> Row:
        forged = [text for text in self._special if any(text in p.text for p in pieces if not p.special)]
        if not forged:
            runs = [
                Piece("".join(piece.text for piece in run), answer, True)
                for answer, run in groupby(pieces, key=lambda piece: piece.answer)
            ]
            return self._runs(whole, runs)
        row = self._joined(pieces)
        if self._says(row.ids) != whole:
            raise UnsuitedError(
                f"a message holds the text of the special token {forged[0]}, and cannot be told from it"
            )
        return row

    def _runs(self, whole: str, runs: Sequence[Piece]) -> Row:
        row, ids = self._joined(runs), self._encode(whole, True)
        if row.ids == ids or self._says(row.ids) == self._says(ids):
            return row
        # Pieces say another text (SentencePiece puts a space before each): then the borders must be found in the whole.
        answer, text = list[bool](), ""
        for run in runs:
            text += run.text
            until = self._encode(text, True)
            if ids[: len(until)] != until:
                raise UnsuitedError("no border between two tokens lies where an answer begins or ends")
            answer += [run.answer] * (len(until) - len(answer))
        return Row(ids, answer)

    def _joined(self, pieces: Sequence[Piece]) -> Row:
        row = Row([], [])
        for piece in pieces:
            _extend(row, self._encode(piece.text, piece.special), piece.answer)
        return row

    def _encode(self, text: str, special: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special=False, parse_special=special)

    def _says(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=False)
