"""convert: a checkpoint in another program's dialect."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..checkpoint.wording import size_text, visible
from ..errors import LoadstoneError
from .options import Json, Many, OpenOptions, Src, config_fields, print_json, progress_bar

if TYPE_CHECKING:
    from ..convert import Stages

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def convert(
    source: Src,
    destination: Annotated[
        str,
        typer.Argument(
            metavar="DST",
            help="A folder for hf, openai, meta and loadstone; a file for raschka, nanogpt, lesson and gguf.",
        ),
    ],
    options: OpenOptions,
    to: Annotated[
        str, typer.Option(help="Dialect to write: hf, openai, raschka, nanogpt, lesson, meta, gguf or loadstone.")
    ],
    dtype: Annotated[
        str, typer.Option(help="keep, float32, float16 or bfloat16; for gguf also q8_0 and q4_0.")
    ] = "keep",
    shard_size: Annotated[str, typer.Option(help="Most tensor bytes in one safetensors file, or `none`.")] = "5GB",
    accept: Annotated[
        Many,
        typer.Option(metavar="FIELD", help="Config field that DST's program lacks and you can do without."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what an earlier conversion wrote to DST.")] = False,
    parity: Annotated[
        bool | None,
        typer.Option(
            help="Compare both models' logits up to the context limit. By itself: 64 tokens, if below 2 GB in float32."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write SRC in another dialect, checked on the way, with a certificate (loadstone.json) beside it."""
    from ..convert import convert as run

    size = parse_size(shard_size)
    arguments: dict[str, Any] = options.as_arguments() | {"revision": options.revision}
    with _stages() as progress:
        found = run(
            source, destination, to=to, dtype=dtype, shard_size=size, accept=accept or (), force=force, parity=parity,
            progress=progress, config=config_fields(options.sets), **arguments,
        )  # fmt: skip
    if as_json:
        print_json(found)
        return
    for label, text in _lines(destination, found):
        print(f"{label:<10} {visible(text)}")


def _lines(destination: str, found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    source, written, counts = found["source"], found["written"], found["counts"]
    total = sum(entry["bytes"] for entry in written["files"].values())
    yield "from", f"{source['path']} ({source['dialect']}, {source['format']})"
    yield "to", f"{destination} ({written['dialect']}, {written['format']})"
    files = f"{len(written['files'])} files" if len(written["files"]) > 1 else "1 file"
    yield "written", f"{counts['tensors']} tensors, {counts['parameters']:,} parameters, {size_text(total)} in {files}"
    yield "checked", "every tensor was read back and hashed"
    if found["parity"]["run"]:
        worst = max(found["parity"]["lengths"], key=lambda parity: parity["max_abs"])
        lengths = ", ".join(str(parity["length"]) for parity in found["parity"]["lengths"])
        yield "parity", f"logits at lengths {lengths}: max difference {worst['max_abs']:.1e}, KL {worst['kl']:.1e} nats"
    else:
        yield "parity", f"not run: {found['parity']['why']}"
    for line in source["assumed"]:
        yield "assumed", line
    for line in found["remarks"]:
        yield "note", line
    yield "check it", f"loadstone verify --certificate {shlex.quote(destination)}"


@contextmanager
def _stages() -> Iterator[Stages | None]:
    """One bar for both passes, writing and reading back; on a terminal only."""
    with progress_bar("converting") as advance:
        if advance is None:
            yield None
        else:
            yield lambda stage, done, total: advance(done + (total if stage == "reading back" else 0), 2 * total)


def parse_size(text: str, option: str = "--shard-size") -> int | None:
    """`5GB`, `500MB`, `2GiB`, `none`. Raises LoadstoneError for anything else."""
    if text.lower() == "none":
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.upper())
    if not match or not 0 < float(match[1]) < 1e18:
        raise LoadstoneError(f"{option} {text}: expected a size such as 5GB, 500MB, 2GiB, or none.")
    return max(1, int(float(match[1]) * UNITS[match[2] or ""]))
