"""A quantised model as a folder with `model.gguf`: the chosen codes and scales as blocks, the rest as floats.

Why GGUF: every command of ours reads it like any source, llama.cpp runs it, and a block of it is a group of 32 weights
with a scale, which is what is asked for. Before the file takes its name it is loaded again, and every parameter must
have the bits of the model that was evaluated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint import open_checkpoint
from ..checkpoint.atomic import atomic_file
from ..checkpoint.base import Array, Checkpoint
from ..checkpoint.wording import few
from ..config import to_own
from ..convert import HEADROOM, destination_for, fill, may_replace, opened
from ..errors import LoadstoneError, SourceError
from ..layouts import LAYOUTS, Job
from ..load import load_model, open_source
from ..model import GPT
from ..tokenizer.export import tokenizer_files
from ..weightmap import Translated, apply, parameter_shapes, table_for
from .run import Quantised

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

FILE, REPORT = "model.gguf", "quantize.json"


def write_quantised(
    model: GPT,
    quantised: Quantised,
    folder: Path,
    tokenizer: Tokenizer | None,
    report: Mapping[str, Any],
    *,
    source: Path,
    force: bool = False,
) -> dict[str, Any]:
    """Write `model.gguf`, its certificate, and the report. Returns the certificate.

    Raises a LoadstoneError if it cannot be written; then nothing was changed.
    """
    job = _job(model, quantised, tokenizer, source)
    path, layout = folder / FILE, LAYOUTS["gguf"]
    may_replace(path, job.identity.checkpoint, layout, force)
    with destination_for(path, layout, layout.nbytes(job) + HEADROOM) as places:
        certificate = fill(path, places, job, "gguf")
        _require_same(places[0], model)
        if tokenizer and "tokenizer.ggml.tokens" not in open_checkpoint(places[0]).metadata:
            _write_tokenizer(tokenizer, folder)
    with atomic_file(folder / REPORT) as temporary:
        temporary.write_text(
            json.dumps({**report, "remarks": certificate["remarks"]}, indent=2, allow_nan=False) + "\n"
        )
    return certificate


def require_place(folder: Path, source: Checkpoint, *, force: bool) -> None:
    """Before hours of work: raises LoadstoneError if nothing may be written there."""
    if folder.suffix == ".gguf":
        raise LoadstoneError(
            f"{folder}: DST is a folder, in which {FILE} will lie. Name it, for example {folder.stem}."
        )
    if folder.is_dir() and any(folder.iterdir()) and not (folder / FILE).is_file():
        raise SourceError(f"{folder}: other things lie there. Name a new folder.")
    may_replace(folder / FILE, source, LAYOUTS["gguf"], force)


def _write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Beside a file that cannot hold it: our commands find it there."""
    for name, content in tokenizer_files(tokenizer, "hf").items():
        with atomic_file(folder / name) as temporary:
            temporary.write_bytes(content if isinstance(content, bytes) else content.encode())


@torch.no_grad()
def _require_same(file: Path, model: GPT) -> None:
    """Raises LoadstoneError if what a reader of the file gets is not the model that was evaluated, bit for bit."""
    read = load_model(open_source(file, config=to_own(model.config)))
    wanted = dict(model.named_parameters())
    wrong = [name for name, value in read.named_parameters() if not torch.equal(value, wanted[name])]
    if wrong:
        raise LoadstoneError(f"{file}: what was read back is not the model that was evaluated: {few(wrong)}.")


def _job(model: GPT, quantised: Quantised, tokenizer: Tokenizer | None, source: Path) -> Job:
    identity = opened(model, {})
    identity.checkpoint.path = source
    table = table_for(model.config.architecture, "gguf")
    types: dict[str, str] = {}
    encoded: dict[str, Array] = {}
    for rule in table.needed(model.config, parameter_shapes(model.config)):
        name, parts = table.written_name(rule), [quantised.rounded.get(target) for target in rule.target]
        if all(parts):
            blocks = [part.blocks() for part in parts if part]
            # What moves rows of weights moves rows of blocks: a block lies within a row.
            (encoded[name],) = apply(rule.ops, blocks, model.config, inverse=True)
            types[name] = parts[0].kind.name  # type: ignore[union-attr]
        elif set(rule.target) <= {*quantised.halves}:
            types[name] = "F16"
    return Job(identity, Translated(identity, table), tokenizer, types=types, encoded=encoded)
