"""generate, chat: text from a model; engines: what can run it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .options import ChatOptions, EngineOptions, Json, Src, TextOptions, need, print_json


def generate(
    source: Src,
    prompt: Annotated[
        list[str], typer.Argument(metavar="PROMPT...", help="Text to continue; several run as one batch.")
    ],
    text: TextOptions,
    options: EngineOptions,
    overflow: Annotated[
        str, typer.Option(help="A prompt beyond the context: refuse, or window (keep its end).")
    ] = "refuse",
    as_json: Json = False,
) -> None:
    """Continue a text."""
    model, tokenizer = options.start(source)
    tokenizer = need(tokenizer, source)
    from ..generate import generate_texts, stream_text

    arguments = text.as_arguments() | {"overflow": overflow}
    if len(prompt) == 1 and not as_json:
        pieces = stream_text(model, tokenizer, prompt[0], **arguments)
        print(prompt[0], end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
        return
    results = generate_texts(model, tokenizer, prompt, **arguments)
    if as_json:
        print_json([{"prompt": p, "text": r.text, "finish": r.finish} for p, r in zip(prompt, results, strict=True)])
        return
    for asked, result in zip(prompt, results, strict=True):
        print(f"{asked}{result.text}\n")


def chat(
    source: Src,
    text: ChatOptions,
    options: EngineOptions,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask this once and leave.")] = None,
    system: Annotated[str | None, typer.Option(help="System message, where the model's template has one.")] = None,
) -> None:
    """Talk with a model (or, if it has no chat template, let it continue prompt after prompt)."""
    model, tokenizer = options.start(source)
    tokenizer = need(tokenizer, source)
    from .. import chat as loop
    from ..checkpoint.hub import cache_folder

    conversation = loop.Conversation(model, tokenizer, system=system, overflow="window", **text.as_arguments())
    if prompt is not None:
        conversation.answer(prompt, lambda piece: print(piece, end="", flush=True))
        print()
        return
    if sys.stdin.isatty():
        loop.line_editing(cache_folder() / "chat_history")
        kind = "" if tokenizer.chat_template else " This model has no chat template: it continues what you write."
        print(f"quit, exit, q, Ctrl-C or Ctrl-D leave.{kind}")
    loop.run(conversation)


def engines(as_json: Json = False) -> None:
    """Which engines can run models here, which is used if none is named, and why not the others."""
    from ..engines import ENGINES

    found = {name: kind.missing() for name, kind in ENGINES.items()}
    default = "torch" if found["native"] else "native"
    here = {name: "" if found[name] else kind.here() for name, kind in ENGINES.items()}
    if as_json:
        print_json(
            [
                {"engine": name, "default": name == default, "available": not reason, "about": ENGINES[name].about}
                | ({"missing": reason} if reason else {"here": here[name]} if here[name] else {})
                for name, reason in found.items()
            ]
        )
        return
    for name, reason in found.items():
        mark = "no " if reason else "ok "
        print(f"{mark} {name:8} {ENGINES[name].about}" + (" (used if none is named)" if name == default else ""))
        if reason or here[name]:
            print(f"             not here: {reason}" if reason else f"             here: {here[name]}")
    if default != "torch":
        print("If none is named, models, types and devices that native does not know go to torch.")
