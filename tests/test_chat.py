"""The prompt loop: who it answers, how it is left, what it remembers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from loadstone.chat import Conversation, run
from loadstone.config import GPTConfig
from loadstone.model import GPT
from test_generate import Letters


class Templated(Letters):
    """Letters with a chat template: `<u text>` for the user, `<a text>` for the model."""

    chat_template = "a template"

    def apply_chat(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
        text = "".join(f"<{message['role'][0]} {message['content']}>" for message in messages)
        return text + ("<a " if add_generation_prompt else "")


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(97, 64, 32, 1, 2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def session(model: GPT, typed: list[Any], tokenizer: Any = None, **options: Any) -> tuple[str, Conversation]:
    """What the loop shows when these lines (or exceptions) are typed."""
    shown: list[str] = []
    lines: Iterator[Any] = iter(typed)

    def ask(prompt: str) -> str:
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return str(line)

    chosen: Any = tokenizer or Templated()
    conversation = Conversation(model, chosen, **({"max_new_tokens": 5} | options))
    run(conversation, ask=ask, show=shown.append)
    return "".join(shown), conversation


@pytest.mark.parametrize("word", ["quit", "exit", "q", " QUIT ", EOFError(), KeyboardInterrupt()], ids=repr)
def test_ways_to_leave(model: GPT, word: Any) -> None:
    shown, conversation = session(model, [word, "never read"])
    assert shown.strip() == ""
    assert conversation.messages == []


def test_empty_lines_ask_again(model: GPT) -> None:
    shown, conversation = session(model, ["", "   ", "hello", "q"])
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    assert shown.strip() == conversation.messages[1]["content"].strip()


def test_the_conversation_is_remembered_and_answers_as_if_read_anew(model: GPT) -> None:
    _, conversation = session(model, ["one", "two", "q"], system="be")
    assert [message["role"][0] for message in conversation.messages] == list("suaua")
    _, again = session(model, ["one", "q"], system="be")
    again.session.ids, again.session.cache.lengths = [], [0]  # nothing cached
    again.answer("two", lambda piece: None)
    assert again.messages == conversation.messages


def test_without_a_template_each_prompt_stands_alone(model: GPT) -> None:
    first, _ = session(model, ["one", "q"], Letters())
    both, conversation = session(model, ["two", "one", "q"], Letters())
    assert both.endswith(first)
    assert conversation.messages == []


def test_ctrl_c_during_an_answer_ends_the_answer_only(model: GPT) -> None:
    pieces: list[str] = []

    def show(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    lines = iter(["hello", "q"])
    tokenizer: Any = Templated()
    conversation = Conversation(model, tokenizer, max_new_tokens=30)
    run(conversation, ask=lambda _: next(lines), show=show)
    assert conversation.messages[1]["content"] == "".join(pieces[:2])
    assert len(pieces[1]) < 30


def test_a_long_conversation_goes_on_from_its_end(model: GPT) -> None:
    shown, conversation = session(model, ["x" * 50, "y" * 50, "z" * 80, "q"], overflow="window")
    assert len(conversation.messages) == 6
    assert "context" not in shown


def test_an_error_is_shown_and_the_loop_goes_on(model: GPT) -> None:
    shown, conversation = session(model, ["x" * 80, "hi", "q"], overflow="refuse")
    assert "the context is 64" in shown
    assert conversation.messages[0]["content"] == "hi"
