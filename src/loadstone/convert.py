"""Any dialect of a model to any other of its architecture: plan, stream, read back, certify, rename into place.

Peak memory is the largest tensor rule plus a constant. What was written is read back and compared with what went in,
tensor by tensor, before it takes its name; a conversion that fails leaves nothing behind and destroys nothing.

Why not as others do it: litgpt and llama.cpp convert one way with a function per family and check nothing; rasbt's
loaders read only; transformers needs the whole model in memory. None can say afterwards that the file is intact.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from . import certificate
from .checkpoint import open_checkpoint, proof
from .checkpoint.atomic import atomic_file, atomic_folder
from .checkpoint.base import DTYPES, Checkpoint
from .checkpoint.streaming import same_bytes
from .checkpoint.wording import few, shown, size_text
from .config import to_own
from .config.losses import require_fields
from .errors import LoadstoneError, SourceError
from .hashing import Background, Description, hash_tensor
from .layouts import LAYOUTS, Job, Layout
from .load import load_tokenizer_for, open_source, settle_tie
from .weightmap import Identity, Translated, identify, table_for
from .weightmap.canonical import parameter_count

BLOCK_TYPES = ("q8_0", "q4_0")  # what only GGUF has
SHARD_SIZE = 5_000_000_000  # bytes, as hubs like it
# Both models run in float32 for the parity figures; above this much of weights that takes longer than converting.
PARITY_UP_TO = 2_000_000_000
HEADROOM = 50_000_000  # bytes for headers, tokenizer and certificate

Stages = Callable[[str, int, int], None]  # "writing" or "reading back", bytes done, bytes in all


def convert(
    source: Any,
    destination: str | Path,
    *,
    to: str,
    dtype: str = "keep",
    shard_size: int | None = SHARD_SIZE,
    accept: Collection[str] = (),
    force: bool = False,
    parity: bool | None = None,
    progress: Stages | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Write a checkpoint in another dialect, with config and tokenizer as that dialect's program wants them.

    Args:
        source: whatever `load.open_source` takes, a live module too; it also documents `options`.
        destination: a folder for `hf`, `openai`, `meta` and `loadstone`; a file for `raschka`, `nanogpt`, `lesson` and
            `gguf`.
        to: the dialect.
        dtype: `keep`, `float32`, `float16`, `bfloat16`; for GGUF also `q8_0` and `q4_0`.
        shard_size: most bytes of tensors in one safetensors file; None: one file.
        accept: config fields that the dialect cannot express and whose change you accept.
        force: replace what an earlier conversion wrote there.
        parity: run both models and compare their logits, at the context limit too; None: at short lengths, and only if
            the model is not too large. The limit is run up to 2,048 tokens.
        progress: called with ("writing" or "reading back", bytes done, bytes in all).

    Returns the certificate (see `certificate`), which also lies in or beside the destination, with `remarks`.
    Raises a LoadstoneError before anything is written if the source is unsound or the dialect cannot express it, and
    leaves nothing half-written whatever happens.
    """
    if shard_size is not None and (type(shard_size) is not int or shard_size < 1):
        raise LoadstoneError(f"shard_size {shard_size!r}: expected a number of bytes of at least 1, or None.")
    accepted = (accept,) if isinstance(accept, str) else tuple(accept)
    require_fields(accepted)
    identity = opened(source, options)
    table, layout = table_for(identity.config.architecture, to), LAYOUTS[to]
    path = _named(destination, layout)
    translated = Translated(identity, table, element_type(dtype, to))
    job = Job(identity, translated, load_tokenizer_for(identity), dtype, shard_size, accepted)
    if progress:
        job.progress = partial(progress, "writing")
    may_replace(path, identity.checkpoint, layout, force)
    with destination_for(path, layout, layout.nbytes(job) + HEADROOM) as places:
        return fill(path, places, job, to, parity=parity, progress=progress)


def fill(
    path: Path,
    places: tuple[Path, Path],
    job: Job,
    to: str,
    *,
    parity: bool | None = False,
    progress: Stages | None = None,
) -> dict[str, Any]:
    """Write everything that will be at `path` to its temporary places, read it back; returns the certificate."""
    temporary, proof_file = places
    with Background() as background:
        source = background.describe(_source_files(job.identity))
        LAYOUTS[to].write(job, temporary)
        folder = temporary.is_dir()
        files = background.describe({f.name: f for f in temporary.iterdir()} if folder else {path.name: temporary})
        written = _read_back(path, temporary, job, progress)
        values = _certificate(job, written, source(), files())
    values["parity"] = _parity(job.identity, _reopened(written, job.identity, to), job.dtype, parity)
    values["remarks"] = job.identity.remarks + job.remarks
    proof.write(values, proof_file)
    return values


def opened(source: Any, options: dict[str, Any]) -> Identity:
    identity = open_source(source, **options)
    identity.plan.require_clean(str(identity.checkpoint.path))
    settle_tie(identity)
    return identity


def element_type(dtype: str, to: str) -> str | None:
    if dtype in BLOCK_TYPES and to != "gguf":
        raise LoadstoneError(f"dtype {dtype} is one of GGUF's block types, and {to} has none. Choose --to gguf.")
    if dtype not in ("keep", "float32", "float16", "bfloat16", *BLOCK_TYPES):
        known = ", ".join(("keep", "float32", "float16", "bfloat16", *BLOCK_TYPES))
        raise LoadstoneError(f"dtype {dtype!r} is not supported; use one of {known}.")
    # GGUF's writer encodes by itself, from whatever type the source has.
    return None if to == "gguf" or dtype == "keep" else dtype


def _named(destination: str | Path, layout: Layout) -> Path:
    if layout.file and str(destination).endswith("/"):
        raise SourceError(
            f"{destination}: this dialect is a single file; name it, for example {destination}{layout.file}."
        )
    return Path(destination)


def may_replace(path: Path, source: Checkpoint, layout: Layout, force: bool) -> None:
    """Only what a conversion wrote, all of it and nothing else, is ever replaced, and only when asked."""
    try:
        there = path.exists() and not (path.is_dir() and not any(path.iterdir()))
        is_folder, real, place = path.is_dir(), source.path.resolve(), path.resolve()
    except (OSError, RuntimeError) as error:
        raise SourceError(f"{path}: nothing can be written there ({error}). Choose another name.") from None
    if is_folder and layout.file:
        raise SourceError(f"{path}: this dialect is a single file; name it, for example {path / layout.file}.")
    if place == Path.cwd():
        raise SourceError(f"{path}: this is the folder that you are in, and it would be replaced. Name a new one.")
    if there and (place == real or place in real.parents):
        raise SourceError(f"{path}: the source itself lies there, and would be lost. Choose another name.")
    if not there:
        return
    if not layout.file and not is_folder:
        raise SourceError(f"{path}: this dialect is a folder, and that is a file. Name a new folder.")
    if not proof.beside(path).is_file():
        raise SourceError(
            f"{path}: it is there already, and no conversion wrote it ({proof.beside(path).name} is missing), so it is "
            "left alone. Choose a new name, or remove it yourself."
        )
    if not force:
        raise SourceError(f"{path}: it is there already. Replace it with --force, or choose a new name.")
    files = proof.read(proof.beside(path))["written"]["files"]
    strangers = certificate.strangers_in(path, files) if is_folder else []
    if mine := certificate.changed_files(path, files) + [f"{shown(name)} came later" for name in strangers]:
        raise SourceError(
            f"{path}: a conversion wrote it, but not as it is now, which would be lost: {few(mine)}. Choose a new "
            "name, or remove it yourself."
        )


@contextmanager
def destination_for(path: Path, layout: Layout, need: int) -> Iterator[tuple[Path, Path]]:
    """Temporary places for the result and for its certificate, which take their names when all is well."""
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SourceError(f"{path}: its folder cannot be made ({error.strerror}). Choose another place.") from None
    try:
        if not layout.file:
            with atomic_folder(path, replace=True, need=need) as folder:
                yield folder, folder / proof.NAME
            return
        with atomic_file(proof.beside(path)) as beside, atomic_file(path, need=need) as file:
            yield file, beside
            # Should the run end between the next two renames, then with no certificate rather than with a wrong one.
            proof.beside(path).unlink(missing_ok=True)
    except BaseException:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise


def _read_back(path: Path, temporary: Path, job: Job, progress: Stages | None) -> tuple[Checkpoint, dict[str, str]]:
    """Open what was written, compare each tensor with what the source gives once more, and hash it.

    Raises LoadstoneError if it is not what went in.
    """
    checkpoint = open_checkpoint(temporary)
    hashes: dict[str, str] = {}
    wrong = [name for name in job.tensors.tensors if name not in checkpoint.tensors]
    rounded = 0
    stored = [name for name in checkpoint.tensors if name not in checkpoint.aliases]
    total, done = sum(checkpoint.info(name).nbytes for name in stored), 0
    for name in stored:
        array = checkpoint.read(name)
        hashes[name] = hash_tensor(array)
        if name in job.tensors.tensors and name not in job.encoded:
            given = DTYPES[job.tensors.info(name).dtype]
            if not np.can_cast(given, array.dtype, "safe") or checkpoint.info(name).dtype not in DTYPES:
                rounded += 1
            elif not same_bytes(array, job.tensors.read(name).astype(array.dtype, copy=False)):
                wrong.append(name)  # GGUF may have widened it
        done += checkpoint.info(name).nbytes
        if progress:
            progress("reading back", done, total)
    if wrong:
        raise LoadstoneError(
            f"{path}: what was read back is not what was written: {few(wrong)}. Nothing was kept. Check the disk, and "
            "whether another program changes the source."
        )
    if rounded:
        job.remarks.append(
            f"{rounded} tensors were rounded by the container's types; the parity figures, where run, say by how much"
        )
    return checkpoint, hashes


def _reopened(written: tuple[Checkpoint, dict[str, str]], identity: Identity, to: str) -> Identity:
    """The result as a source of its own: its names must fill the same model."""
    found = identify(written[0], dialect=to, overrides=to_own(identity.config))
    found.plan.require_clean(str(written[0].path))
    settle_tie(found)
    return found


def _certificate(
    job: Job, written: tuple[Checkpoint, dict[str, str]], source_files: Description, files: Description
) -> dict[str, Any]:
    checkpoint, hashes = written
    identity, source, translated = job.identity, job.identity.checkpoint, job.tensors
    return {
        "certificate": proof.VERSION,
        "source": {
            "path": str(source.path),
            "format": source.format,
            "dialect": identity.weight_map.name,
            "config_source": identity.config_source,
            "assumed": identity.assumed,
            "left_aside": identity.plan.ignored,
            "files": source_files,
        },
        "written": {"format": checkpoint.format, "dialect": translated.dialect, "dtype": job.dtype, "files": files},
        "config": to_own(identity.config),
        "accepted": sorted(job.accept),
        "counts": {"parameters": parameter_count(identity.config), "tensors": len(hashes)},
        "tensors": {name: _tensor_entry(checkpoint, translated, name, hashes[name]) for name in hashes},
        "aliases": checkpoint.aliases,
        "versions": certificate.versions(),
    }


def _tensor_entry(checkpoint: Checkpoint, translated: Translated, name: str, digest: str) -> dict[str, Any]:
    info = checkpoint.info(name)
    sources, ops = translated.origin(name)
    return {"shape": [*info.shape], "dtype": info.dtype, "sha256": digest, "from": sources, "ops": ops}


def _source_files(source: Identity) -> dict[str, Path]:
    """The files that hold the source's tensors, and the one beside them that its config was read from."""
    folder = source.checkpoint.folder
    if folder is None:
        return {}
    names = {info.file for info in source.checkpoint.tensors.values() if info.file} | {source.config_source}
    return {name: folder / name for name in sorted(names) if (folder / name).is_file()}


def _parity(source: Identity, result: Identity, dtype: str, wanted: bool | None) -> dict[str, Any]:
    """Logits of the result against those of the source, both run in float32.

    Raises LoadstoneError if they differ by more than the element types explain.
    """
    size = 4 * parameter_count(source.config)
    if wanted is False or (wanted is None and size > PARITY_UP_TO):
        reason = "not asked for" if wanted is False else f"{size_text(size)} in float32; ask for it with --parity"
        return {"run": False, "why": reason}
    from .diagnose.compare import compare, failed, model_logits
    from .diagnose.precision import loosest, stored_type
    from .diagnose.reference import trace_module
    from .diagnose.trace import LENGTHS, default_lengths
    from .load import load_model

    lengths = default_lengths(source.config.context_length)
    lengths = lengths if wanted else [length for length in lengths if length <= max(LENGTHS)] or lengths[:1]
    kind = loosest([stored_type(source), stored_type(result)])
    first, second = load_model(source, dtype="float32"), load_model(result, dtype="float32")
    trace = trace_module(
        first, source, lengths, vocab_size=source.config.vocab_size, origin="the source", stored=kind, activations=False
    )
    found = compare(model_logits(second), trace, dtype=kind, limit=max(lengths))
    if failed(found):
        worst = max(found, key=lambda parity: parity.relative)
        raise LoadstoneError(
            f"{source.checkpoint.path}: the converted model does not compute the same: {worst.check().detail}, at "
            f"length {worst.length}. Nothing was kept. `loadstone verify` on the source says whether it is sound"
            + (f"; {dtype} may be too coarse for this model." if dtype != "keep" else ".")
        )
    return {"run": True, "type": kind, "lengths": [asdict(parity) for parity in found]}
