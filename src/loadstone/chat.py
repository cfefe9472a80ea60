"""The interactive prompt loop: ask, stream the answer, ask again (document 004's, with a conversation where one is).

A model with a chat template talks; one without continues each prompt on its own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .engines import Engine
from .errors import LoadstoneError
from .generate import Session, stream_text
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .model import GPT

LEAVE = ("quit", "exit", "q")


class Conversation:
    """Messages so far and the cache that holds them, so that each turn reads only what is new."""

    def __init__(self, model: GPT | Engine, tokenizer: Tokenizer, *, system: str | None = None, **options: Any) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.messages = [{"role": "system", "content": system}] if system else []
        if system and tokenizer.chat_template is None:
            raise LoadstoneError("a system message needs a chat template, and this model has none.")
        self.session = Session(model.new_cache(allocate=512))

    def answer(self, text: str, show: Callable[[str], None]) -> str:
        """Stream one answer through `show`; returns it whole. Raises LoadstoneError if the conversation is too long."""
        if self.tokenizer.chat_template is None:
            prompt = self.tokenizer.encode(text)
        else:
            messages = [*self.messages, {"role": "user", "content": text}]
            prompt = self.tokenizer.encode(
                self.tokenizer.apply_chat(messages, add_generation_prompt=True), add_special=False, parse_special=True
            )
        pieces: list[str] = []
        try:
            for piece in stream_text(self.model, self.tokenizer, prompt, session=self.session, **self.options):
                pieces.append(piece)
                show(piece)
        finally:  # an answer that the user cut short was said all the same
            if self.tokenizer.chat_template is not None and pieces:
                self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "".join(pieces)}]
        return "".join(pieces)


def run(
    conversation: Conversation,
    *,
    ask: Callable[[str], str] = input,
    show: Callable[[str], None] = lambda piece: print(piece, end="", flush=True),
) -> None:
    """Loop until quit, exit, q, Ctrl-D, or Ctrl-C at the prompt (during an answer it only ends the answer)."""
    while True:
        try:
            text = ask(">>> ").strip()
        except (EOFError, KeyboardInterrupt):
            show("\n")
            return
        if text.lower() in LEAVE:
            return
        if not text:
            continue
        try:
            conversation.answer(text, show)
        except KeyboardInterrupt:
            pass
        except LoadstoneError as error:
            show(f"({error})")
        show("\n")


def line_editing(history: Path) -> None:
    """Arrow keys and history at the prompt, kept in a file between runs, where the system has readline."""
    try:
        import atexit
        import readline
    except ImportError:
        return
    try:
        history.parent.mkdir(parents=True, exist_ok=True)
        if history.exists():
            readline.read_history_file(history)
        readline.set_history_length(1000)
    except OSError:
        return  # a read-only home is no reason not to chat

    def save() -> None:
        with suppress(OSError):
            readline.write_history_file(history)

    atexit.register(save)
