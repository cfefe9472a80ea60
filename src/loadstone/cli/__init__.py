"""The command line: one thin command per verb. Heavy imports happen inside the commands that need them.

Exit status: 0 good, 1 the answer is no, 2 the input is bad. Errors are one paragraph on standard error.
"""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Iterable
from importlib import import_module
from types import FrameType
from typing import Annotated

import typer

from ..checkpoint.wording import visible
from ..errors import LoadstoneError
from .options import spread

VERBS = {  # and the module of each (with the function, if it has another name), in the order of --help
    "inspect": "look", "plan": "look", "verify": "prove", "trace": "prove", "diff": "diff", "compare": "compare",
    "generate": "run", "chat": "run", "engines": "run", "serve": "serve", "convert": "write", "pull": "fetch",
    "prepare": "prepare", "train": "train", "finetune": "train", "merge": "adapter", "classify": "classify",
    "extend": "extend", "plot": "plot", "quantize": "quantize", "prune": "prune", "upcycle": "upcycle",
    "eval": "eval:evaluate",
}  # fmt: skip


def command_line(verbs: Iterable[str] = VERBS) -> typer.Typer:
    """The program with some of its commands: one that does not run costs no time."""
    app = typer.Typer(
        name="loadstone",
        help="Load any GPT checkpoint, prove that it loaded right, and run it.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_main)
    for verb in verbs:
        module, _, function = VERBS[verb].partition(":")
        app.command(verb)(spread(getattr(import_module(f".{module}", __name__), function or verb)))
    return app


def _main(version: Annotated[bool, typer.Option("--version", help="Show the version and leave.")] = False) -> None:
    if version:
        from .._version import __version__

        print(f"loadstone {__version__}")
        raise typer.Exit


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def main() -> None:
    """Entry point: turns our errors into one paragraph and exit status 2."""
    # File names and token texts may hold what the terminal's encoding cannot show; that must not end a command.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for number in (
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # so that a conversion that is ended takes its half-written files along
        signal.signal(number, _leave)
    try:
        verb = sys.argv[1] if len(sys.argv) > 1 else ""
        command_line([verb] if verb in VERBS else VERBS)(prog_name="loadstone")
    except LoadstoneError as error:
        print(f"loadstone: {visible(str(error))}", file=sys.stderr)
        sys.exit(2)
    except MemoryError as error:
        detail = f" ({visible(str(error))})" if str(error) else ""
        print(
            f"loadstone: there is not enough memory{detail}. Nothing was changed. Close other programs, raise the "
            "limit (`ulimit -v`), or choose a smaller model or type.",
            file=sys.stderr,
        )
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
