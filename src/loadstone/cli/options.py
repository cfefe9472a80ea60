"""What the commands share: their options, opening and loading with them, progress bars, JSON."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import LoadstoneError

if TYPE_CHECKING:
    from ..model import GPT
    from ..tokenizer import Tokenizer
    from ..weightmap import Identity

Src = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="A file, a folder, a hub name (owner/name, owner/name@revision), an alias (gpt2, gpt2-medium, gpt2-large, "
        "gpt2-xl, distilgpt2, smollm2), openai:124M, or a URL.",
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub name.")]
Dialect = Annotated[
    str | None, typer.Option(help="Insist on a dialect: hf, openai, raschka, nanogpt, lesson, meta, gguf.")
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Config field that you know better.")
]
Ignore = Annotated[list[str] | None, typer.Option(metavar="NAME", help="Tensor to leave out, by exact name.")]
IgnoreConfig = Annotated[list[str] | None, typer.Option(metavar="FIELD", help="Unknown config field that is harmless.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on standard output.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]
MaxNew = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Most tokens to generate.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy; above 1 is wilder, below 1 tamer.")]
TopK = Annotated[int | None, typer.Option(help="Choose among the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Choose among the likeliest tokens that hold this much probability.")]
MinP = Annotated[
    float | None, typer.Option(help="Choose among tokens at least this many times as likely as the likeliest.")
]
Penalty = Annotated[float, typer.Option(help="Above 1 makes tokens less likely that were there before.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text.")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End when this text comes; it is not shown.")]


def open_with(
    source: str,
    revision: str | None,
    dialect: str | None,
    sets: list[str] | None,
    ignore: list[str] | None,
    ignore_config: list[str] | None,
) -> Identity:
    from ..load import open_source

    return open_source(
        source,
        revision=revision,
        dialect=dialect,
        config=config_fields(sets),
        ignore=ignore or (),
        ignore_config=ignore_config or (),
    )


def load_with(source: str, dtype: str, device: str, *options: Any) -> tuple[Identity, GPT, Tokenizer | None]:
    """Open, plan and load with a progress bar; a plan with problems ends here."""
    identity = open_with(source, *options)
    identity.plan.require_clean(str(identity.checkpoint.path))
    from ..load import load_model, load_tokenizer_for

    with progress_bar("loading") as progress:
        model = load_model(identity, dtype=dtype, device=device, progress=progress)
    tokenizer = load_tokenizer_for(identity)
    for label, lines in (("assumed", identity.assumed), ("note", identity.remarks)):
        for line in lines:
            print(f"{label}: {line}", file=sys.stderr)
    return identity, model, tokenizer


def need(tokenizer: Tokenizer | None, source: str) -> Tokenizer:
    if tokenizer is None:
        raise LoadstoneError(
            f"{source}: no tokenizer lies beside the weights (tokenizer.json, vocab.json + merges.txt, or encoder.json "
            "+ vocab.bpe), so text cannot be turned into tokens. Put the model's own tokenizer files into its folder."
        )
    return tokenizer


def config_fields(sets: list[str] | None) -> dict[str, Any]:
    """`n_heads=8` -> {"n_heads": 8}; values are JSON where they are, text otherwise."""
    found: dict[str, Any] = {}
    for item in sets or ():
        field, equals, value = item.partition("=")
        if not equals:
            raise LoadstoneError(f"--set {item}: expected FIELD=VALUE, for example --set n_heads=12.")
        try:
            parsed = json.loads(value.lower() if value.lower() in ("true", "false", "null") else value)
        except (ValueError, RecursionError):
            parsed = value
        found[field] = tuple(parsed) if isinstance(parsed, list) else parsed
    return found


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on standard error, on a terminal only."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_json(value: Any) -> None:
    """Strict JSON, in ASCII: no NaN, and nothing that a terminal's encoding or a lone surrogate could break."""
    print(json.dumps(_finite(value), indent=2, allow_nan=False, default=str))


def _finite(value: Any) -> Any:
    """NaN and infinities as null, which is what JSON has."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
