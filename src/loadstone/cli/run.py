"""generate, chat: text from a model."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from .options import (
    Device,
    Dialect,
    Dtype,
    Ignore,
    IgnoreConfig,
    Json,
    MaxNew,
    MinP,
    Penalty,
    Revision,
    Seed,
    Sets,
    Src,
    Stop,
    Temperature,
    TopK,
    TopP,
    load_with,
    need,
    print_json,
)


def generate(
    source: Src,
    prompt: Annotated[
        list[str], typer.Argument(metavar="PROMPT...", help="Text to continue; several run as one batch.")
    ],
    max_new_tokens: MaxNew = 100,
    temperature: Temperature = 0.8,
    top_k: TopK = 50,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    overflow: Annotated[
        str, typer.Option(help="A prompt beyond the context: refuse, or window (keep its end).")
    ] = "refuse",
    dtype: Dtype = "auto",
    device: Device = "cpu",
    revision: Revision = None,
    dialect: Dialect = None,
    sets: Sets = None,
    ignore: Ignore = None,
    ignore_config: IgnoreConfig = None,
    as_json: Json = False,
) -> None:
    """Continue a text."""
    _, model, tokenizer = load_with(source, dtype, device, revision, dialect, sets, ignore, ignore_config)
    tokenizer = need(tokenizer, source)
    from ..generate import generate_texts, stream_text

    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "seed": seed, "stop": stop or (), "overflow": overflow,
    }  # fmt: skip
    if len(prompt) == 1 and not as_json:
        pieces = stream_text(model, tokenizer, prompt[0], **options)
        print(prompt[0], end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
        return
    results = generate_texts(model, tokenizer, prompt, **options)
    if as_json:
        print_json([{"prompt": p, "text": r.text, "finish": r.finish} for p, r in zip(prompt, results, strict=True)])
        return
    for text, result in zip(prompt, results, strict=True):
        print(f"{text}{result.text}\n")


def chat(
    source: Src,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask this once and leave.")] = None,
    system: Annotated[str | None, typer.Option(help="System message, where the model's template has one.")] = None,
    max_new_tokens: MaxNew = 512,
    temperature: Temperature = 0.8,
    top_k: TopK = 50,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    revision: Revision = None,
    dialect: Dialect = None,
    sets: Sets = None,
    ignore: Ignore = None,
    ignore_config: IgnoreConfig = None,
) -> None:
    """Talk with a model (or, if it has no chat template, let it continue prompt after prompt)."""
    _, model, tokenizer = load_with(source, dtype, device, revision, dialect, sets, ignore, ignore_config)
    tokenizer = need(tokenizer, source)
    from .. import chat as loop
    from ..checkpoint.hub import cache_folder

    conversation = loop.Conversation(
        model, tokenizer, system=system, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
        top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, seed=seed, stop=stop or (), overflow="window",
    )  # fmt: skip
    if prompt is not None:
        conversation.answer(prompt, lambda piece: print(piece, end="", flush=True))
        print()
        return
    if sys.stdin.isatty():
        loop.line_editing(cache_folder() / "chat_history")
        kind = "" if tokenizer.chat_template else " This model has no chat template: it continues what you write."
        print(f"quit, exit, q, Ctrl-C or Ctrl-D leave.{kind}")
    loop.run(conversation)
