"""serve: models behind an API that OpenAI's clients speak, and a page to look inside."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from ..errors import LoadstoneError
from .options import EngineOptions, Many, progress_bar

if TYPE_CHECKING:
    from ..native import NativeEngine
    from ..weightmap import Identity

KEY = "LOADSTONE_API_KEY"
LOCAL = ("127.0.0.1", "localhost", "::1")


def serve(
    sources: Annotated[list[str], typer.Argument(metavar="SRC...", help="One model or several; NAME=SRC names one.")],
    options: EngineOptions,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is the whole network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    rows: Annotated[int, typer.Option(min=1, help="Requests of a model that run at the same time.")] = 16,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a request and its answer. Default: the model's, at most 4096."),
    ] = None,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more are answered with 429.")] = 64,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that an answer may take.")] = 600.0,
    drain: Annotated[int, typer.Option(min=0, help="Seconds that running answers get when the server is ended.")] = 30,
    body_limit: Annotated[int, typer.Option(min=1, metavar="BYTES", help="Longest request.")] = 4 << 20,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help=f"Ask for this key (its first line); or set {KEY}.")
    ] = None,
    cors: Annotated[
        Many, typer.Option(metavar="ORIGIN", help="Origin of a web page that may call; may be repeated.")
    ] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not prove first that it loaded right.")] = False,
) -> None:
    """Serve models: OpenAI's API at /v1, a page to look inside at /, figures at /metrics (docs/serve.md)."""
    key, origins = _key(api_key_file), [_origin(given) for given in cors or ()]
    try:
        from ..serve import app as server
        from ..serve.opening import open_served
        from ..serve.running import bind, run
    except ImportError as error:
        raise LoadstoneError(f'serve needs the extra `serve`: pip install "loadstone[serve]" ({error}).') from None
    named = _names(sources)
    options.check()
    with bind(host, port) as bound:  # before anything is loaded
        served = []
        for name, source in named.items():
            identity = options.open(source)
            engine = _engine(options, identity)
            dtype = "float32" if options.dtype in ("q8", "q4") else options.dtype  # the model only looks inside then
            model, tokenizer = options.load_opened(identity, dtype, options.device)
            each = open_served(
                name, identity, model, tokenizer, rows=rows, context=context, waiting=queue, proved=not no_verify,
                engine=engine,
            )  # fmt: skip
            print(each.summary, file=sys.stderr)
            served.append(each)
        if key is None and host not in LOCAL:
            print(f"note: no API key is asked for, and {host} can be reached by others: set {KEY}.", file=sys.stderr)
        settings = server.Settings(api_key=key, timeout=timeout, body_limit=body_limit, origins=origins)
        run(server.create_app(served, settings), bound, drain=drain)


def _engine(options: EngineOptions, identity: Identity) -> NativeEngine | None:
    """What answers, if it is not the model itself."""
    name = options.engine_for(identity)
    if name == "torch":
        return None
    if name != "native":
        raise LoadstoneError(f"--engine {name}: serve runs on torch or native; {name} is for generate and chat.")
    from ..native import open_native

    with progress_bar("packing for native"):
        return open_native(identity, width=options.dtype)


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


def _origin(given: str) -> str:
    """As browsers send it: scheme, host and port, and no slash at the end."""
    parts = urlsplit(given)
    if given != "*" and not (parts.netloc and given == f"{parts.scheme}://{parts.netloc}"):
        raise LoadstoneError(f"--cors {given}: an origin is written as https://example.org or http://localhost:3000.")
    return given


def _key(file: Path | None) -> str | None:
    if file is None:
        if not (key := os.environ.get(KEY, "unset").strip()):
            raise LoadstoneError(f"{KEY} is set, but there is no key in it: unset it, or give it one.")
        return key if KEY in os.environ else None
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LoadstoneError(f"--api-key-file {file}: cannot be read ({error}).") from None
    if not lines or not lines[0].strip():
        raise LoadstoneError(f"--api-key-file {file}: there is no key in its first line.")
    return lines[0].strip()
