"""serve: models behind an API that OpenAI's clients speak, and a page to look inside."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import LoadstoneError
from .options import Many, RunOptions, need

if TYPE_CHECKING:
    from ..serve.served import Served

KEY = "LOADSTONE_API_KEY"


def serve(
    sources: Annotated[list[str], typer.Argument(metavar="SRC...", help="One model or several; NAME=SRC names one.")],
    options: RunOptions,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is the whole network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    rows: Annotated[int, typer.Option(min=1, help="Requests of a model that run at the same time.")] = 16,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a request, prompt and answer. Default: the model's, at most 4096.")
    ] = None,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more are answered with 429.")] = 64,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that an answer may take.")] = 600.0,
    drain: Annotated[float, typer.Option(min=0, help="Seconds that running answers get when the server is ended.")] = 30.0,
    body_limit: Annotated[int, typer.Option(min=1, metavar="BYTES", help="Longest request.")] = 4 << 20,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help=f"Ask for this key (first line); or set {KEY}.")
    ] = None,
    cors: Annotated[Many, typer.Option(metavar="ORIGIN", help="A web page's origin that may call; may be repeated.")] = None,
) -> None:
    """Serve models: OpenAI's API at /v1, a page at /, figures at /metrics (docs/serve.md)."""
    key = _key(api_key_file)
    try:
        import uvicorn

        from ..serve.app import Settings, create_app
    except ImportError as error:
        raise LoadstoneError(f'serve needs the extra `serve`: pip install "loadstone[serve]" ({error}).') from None
    served = [_load(name, source, options, rows, context, queue) for name, source in _names(sources).items()]
    settings = Settings(
        api_key=key, timeout=timeout, body_limit=body_limit, origins=tuple(cors or ()), drain=drain
    )  # fmt: skip
    if key is None and host not in ("127.0.0.1", "localhost", "::1"):
        print(f"note: no API key is asked for, and {host} can be reached by others: set {KEY}.", file=sys.stderr)
    app = create_app(served, settings)
    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=int(drain) + 1)


def _names(sources: list[str]) -> dict[str, str]:
    """Name -> SRC. A name is what was given before `=`, or the last part of the source."""
    found: dict[str, str] = {}
    for source in sources:
        name, equals, rest = source.partition("=")
        if not equals or "/" in name:
            name, rest = Path(source).name or source, source
        if name in found:
            raise LoadstoneError(f"two models would be called {name}: name one of them, as in mine={rest}.")
        found[name] = rest
    return found


def _load(
    name: str, source: str, options: RunOptions, rows: int, context: int | None, queue: int
) -> Served:  # fmt: skip
    from ..serve.engine import Engine
    from ..serve.served import Served

    identity, model, tokenizer = options.load(source)
    tokenizer = need(tokenizer, source)
    model.eval()
    length = min(context or 4096, model.config.context_length)
    n_tokens = min(tokenizer.vocab_size, model.config.vocab_size)
    engine = Engine(model, rows=rows, length=length, waiting=queue, n_tokens=n_tokens)
    return Served(name, model, tokenizer, engine, int(time.time()), {"plan": identity.plan})


def _key(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get(KEY) or None
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LoadstoneError(f"--api-key-file {file}: cannot be read ({error}).") from None
    if not lines or not lines[0].strip():
        raise LoadstoneError(f"--api-key-file {file}: there is no key in its first line.")
    return lines[0].strip()
