"""The certificate of a converted checkpoint, `loadstone.json`: what it was made from, how, and every tensor's hash.

Written with each conversion and checked without the source, the network or torch. For a folder it lies inside, for a
single file beside it (`model.pth.loadstone.json`). Where a dialect has no place for a config (the book's `.pth`), the
certificate is also where the model's config is kept.

Why: an export of transformers, litgpt or llama.cpp says neither what it came from nor whether it is still intact; a
flipped byte in the weights gives slightly worse text and nothing else.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ._version import __version__
from .checkpoint import open_checkpoint, proof
from .checkpoint.base import Checkpoint
from .checkpoint.streaming import Progress
from .checkpoint.wording import few, shown
from .checks import Check
from .errors import LoadstoneError, SourceError
from .hashing import hash_file, hash_tensor


def versions() -> dict[str, str]:
    """Of everything that had a hand in the numbers."""
    found = {"loadstone": __version__, "python": platform.python_version()}
    for package in ("numpy", "torch", "gguf"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def find(path: Path) -> dict[str, Any]:
    """The certificate of a folder or file. Raises SourceError if it has none, FormatError if it is damaged."""
    if not proof.beside(path).is_file():
        raise SourceError(
            f"{path}: it has no certificate ({proof.beside(path).name} is not there). "
            + (
                f"The one of its folder is about all that lies there: verify --certificate {path.parent}."
                if (path.parent / proof.NAME).is_file()
                else "`loadstone convert` writes one; other checkpoints are verified without --certificate."
            )
        )
    return proof.read(proof.beside(path))


def check(path: Path, progress: Progress | None = None) -> list[Check]:
    """Compare a converted folder or file with its certificate, tensor by tensor; nothing else is needed.

    Raises SourceError if there is no certificate, FormatError if it is damaged.
    """
    certified = find(path)
    total = sum(entry["bytes"] for entry in certified["written"]["files"].values())
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress(done, max(total, done))

    return [_check_files(path, certified["written"]["files"], advance), *_check_tensors(path, certified)]


def _check_files(path: Path, files: Mapping[str, Any], advance: Callable[[int], None]) -> Check:
    title, wrong = "files are as certified", changed_files(path, files, advance)
    if wrong:
        return Check(title, False, f"{len(wrong)} of {len(files)}: {few(wrong)}")
    strangers = strangers_in(path, files) if path.is_dir() else []
    more = f"; not in the certificate: {few(map(shown, strangers))}" if strangers else ""
    return Check(title, True, f"{len(files)} files, byte for byte (SHA-256){more}")


def changed_files(
    path: Path, files: Mapping[str, Any], advance: Callable[[int], None] = lambda nbytes: None
) -> list[str]:
    """What is not as certified among the `files` of a conversion: a sentence each, by size and SHA-256."""
    base = path if path.is_dir() else path.parent
    wrong = []
    for name, entry in files.items():
        try:
            size = (base / name).stat().st_size
            if size != entry["bytes"]:
                wrong.append(f"{shown(name)} has {size:,} bytes, certified were {entry['bytes']:,}")
            elif hash_file(base / name, advance) != entry["sha256"]:
                wrong.append(f"{shown(name)} has changed")
        except FileNotFoundError:
            wrong.append(f"{shown(name)} is missing")
        except OSError as error:
            wrong.append(f"{shown(name)} cannot be read ({error.strerror})")
    return wrong


def strangers_in(folder: Path, files: Mapping[str, Any]) -> list[str]:
    """What lies in a converted folder that its certificate does not know."""
    return sorted(file.name for file in folder.iterdir() if file.name not in {*files, proof.NAME})


def _check_tensors(path: Path, certified: Mapping[str, Any]) -> list[Check]:
    title = "tensors are as certified"
    try:
        checkpoint = open_checkpoint(path)
        return [Check(title, *_compare_tensors(checkpoint, certified))]
    except LoadstoneError as error:
        return [Check(title, False, f"it cannot be read any more: {error}")]


def _compare_tensors(checkpoint: Checkpoint, certified: Mapping[str, Any]) -> tuple[bool, str]:
    tensors, aliases = certified["tensors"], certified["aliases"]
    wrong = [f"{shown(name)} is missing" for name in {**tensors, **aliases} if name not in checkpoint.tensors]
    wrong += [f"{shown(name)} is new" for name in checkpoint.tensors if name not in {**tensors, **aliases}]
    wrong += [f"{shown(a)} is no longer {shown(b)}" for a, b in aliases.items() if checkpoint.aliases.get(a) != b]
    for name, entry in tensors.items():
        if name not in checkpoint.tensors:
            continue
        info = checkpoint.info(name)
        if [*info.shape] != entry.get("shape") or info.dtype != entry.get("dtype"):
            wrong.append(f"{shown(name)} is {info.dtype} {[*info.shape]}, certified was {entry.get('dtype')} of "
                         f"{entry.get('shape')}")  # fmt: skip
        elif hash_tensor(checkpoint.read(name)) != entry["sha256"]:
            wrong.append(f"{shown(name)} has other values")
    if wrong:
        return False, f"{len(wrong)} of {len(tensors)}: {few(wrong)}"
    return True, f"{len(tensors)} tensors, bit for bit (SHA-256)"
