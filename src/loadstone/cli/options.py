"""What the commands share: their options, opening and loading with them, progress bars, JSON."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from inspect import Parameter, Signature, signature
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from ..engines import AUTO, best_engine, open_engine, require_engine, start_engine
from ..errors import LoadstoneError

if TYPE_CHECKING:
    from ..engines import Engine
    from ..model import GPT
    from ..tokenizer import Tokenizer
    from ..weightmap import Identity

Src = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="A file, a folder, a hub name (owner/name, owner/name@revision), an alias (gpt2, gpt2-medium, gpt2-large, "
        "gpt2-xl, distilgpt2, smollm2, tiny), openai:124M, or a URL.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on standard output.")]
Many = list[str] | None
DIALECTS = "hf, openai, raschka, nanogpt, lesson, meta, gguf, loadstone"


@dataclass
class OpenOptions:
    """How to read SRC: what `load.open_source` takes besides it."""

    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub name.")] = None
    dialect: Annotated[str | None, typer.Option(help=f"Insist on a dialect: {DIALECTS}.")] = None
    sets: Annotated[Many, typer.Option("--set", metavar="FIELD=VALUE", help="Config field that you know better.")] = (
        None
    )
    ignore: Annotated[Many, typer.Option(metavar="NAME", help="Tensor to leave out, by exact name.")] = None
    ignore_config: Annotated[Many, typer.Option(metavar="FIELD", help="Unknown config field that is harmless.")] = None

    def as_arguments(self) -> dict[str, Any]:
        """For `identify` and, with `revision`, for `open_source`."""
        return {"dialect": self.dialect, "ignore": self.ignore or (), "ignore_config": self.ignore_config or ()}

    def open(self, source: str) -> Identity:
        from ..load import open_source

        return open_source(source, revision=self.revision, config=config_fields(self.sets), **self.as_arguments())

    def load_as(self, source: str, dtype: str, device: str = "cpu") -> tuple[Identity, GPT, Tokenizer | None]:
        """Open, plan and load with a progress bar; a plan with problems ends here."""
        identity = self.open(source)
        return identity, *self.load_opened(identity, dtype, device)

    def load_opened(self, identity: Identity, dtype: str, device: str = "cpu") -> tuple[GPT, Tokenizer | None]:
        """The rest of `load_as`."""
        identity.plan.require_clean(str(identity.checkpoint.path))
        from ..load import load_model, load_tokenizer_for

        with progress_bar("loading") as progress:
            model = load_model(identity, dtype=dtype, device=device, progress=progress)
        tokenizer = load_tokenizer_for(identity)
        _tell(identity)
        return model, tokenizer


def _tell(identity: Identity) -> None:
    for label, lines in (("assumed", identity.assumed), ("note", identity.remarks)):
        for line in lines:
            print(f"{label}: {line}", file=sys.stderr)


@dataclass
class RunOptions(OpenOptions):
    """How to read SRC and in which type and where to hold it."""

    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16, float16 or float64.")] = "auto"
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")] = "cpu"

    def load(self, source: str) -> tuple[Identity, GPT, Tokenizer | None]:
        return self.load_as(source, self.dtype, self.device)


@dataclass
class EngineOptions(RunOptions):
    """How to read SRC and what runs it."""

    dtype: Annotated[
        str, typer.Option(help="auto (as stored), float32, bfloat16, float16, float64; with the engine native q8, q4.")
    ] = "auto"
    engine: Annotated[
        str,
        typer.Option(
            help="torch, compile, max or native (`loadstone engines` tells which work here); auto: native for models "
            "that it knows, on a CPU; torch otherwise."
        ),
    ] = AUTO

    def check(self) -> None:
        """Refuse an engine that cannot run here before anything is opened."""
        if self.engine != AUTO:
            require_engine(self.engine, self.device, self.dtype)

    def engine_for(self, identity: Identity) -> str:
        return best_engine(identity.config, self.device, self.dtype) if self.engine == AUTO else self.engine

    def start(self, source: str) -> tuple[Engine, Tokenizer | None]:
        """The model on the engine."""
        self.check()
        identity = self.open(source)
        name = self.engine_for(identity)
        kind = require_engine(name, self.device, self.dtype)
        if kind.from_source:
            return self._open_engine(name, identity)
        dtype = kind.dtypes[0] if self.dtype == "auto" and kind.dtypes else self.dtype
        model, tokenizer = self.load_opened(identity, dtype, self.device)
        with progress_bar(f"starting {name}"):
            return start_engine(name, model), tokenizer

    def _open_engine(self, name: str, identity: Identity) -> tuple[Engine, Tokenizer | None]:
        from ..load import load_tokenizer_for

        with progress_bar(f"packing for {name}"):
            engine = open_engine(name, identity, self.dtype)
        tokenizer = load_tokenizer_for(identity)
        _tell(identity)
        return engine, tokenizer


@dataclass
class TextOptions:
    """How to generate: what `generate.stream_text` takes besides model, tokenizer and prompt."""

    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Most tokens to generate.")] = 100
    temperature: Annotated[float, typer.Option(help="0 is greedy; above 1 is wilder, below 1 tamer.")] = 0.8
    top_k: Annotated[int | None, typer.Option(help="Choose among the k likeliest tokens.")] = 50
    top_p: Annotated[
        float | None, typer.Option(help="Choose among the likeliest tokens that hold this much probability.")
    ] = None
    min_p: Annotated[
        float | None, typer.Option(help="Choose among tokens at least this many times as likely as the likeliest.")
    ] = None
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1 makes tokens less likely that were there before.")
    ] = 1.0
    seed: Annotated[int | None, typer.Option(help="Same seed, same text.")] = None
    stop: Annotated[Many, typer.Option(metavar="TEXT", help="End when this text comes; it is not shown.")] = None

    def as_arguments(self) -> dict[str, Any]:
        return asdict(self) | {"stop": self.stop or ()}


@dataclass
class ChatOptions(TextOptions):
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Most tokens of one answer.")] = 512


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Typer has no groups of options: a parameter that is a dataclass becomes one option per field."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    parameters = []
    for name, parameter in signature(command).parameters.items():
        if name in groups:
            kinds = get_type_hints(groups[name], include_extras=True)
            found = [(field.name, kinds[field.name], field.default) for field in fields(groups[name])]
        else:
            found = [(name, hints[name], parameter.default)]
        parameters += [Parameter(n, Parameter.KEYWORD_ONLY, default=d, annotation=kind) for n, kind, d in found]

    def run(**given: Any) -> None:
        for name, kind in groups.items():
            given[name] = kind(**{field.name: given.pop(field.name) for field in fields(kind)})
        command(**given)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return run


def need(tokenizer: Tokenizer | None, source: str) -> Tokenizer:
    from ..load import require_tokenizer

    return require_tokenizer(tokenizer, source)


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
