"""Tokenizers and chat templates: one `Tokenizer`, and where it can come from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import TokenizerError
from .base import TextStream, Tokenizer, check_tokenizer
from .files import from_folder
from .gguf_vocab import from_gguf
from .gpt2 import gpt2_tokenizer

__all__ = [
    "TextStream",
    "Tokenizer",
    "check_tokenizer",
    "from_folder",
    "from_gguf",
    "gpt2_tokenizer",
    "load_tokenizer",
]


def load_tokenizer(
    folder: Path | None, gguf_metadata: Mapping[str, Any] | None = None, *, gpt2_fallback: bool = False
) -> Tokenizer | None:
    """The tokenizer that belongs to a model.

    A GGUF file's own vocabulary comes first, because the folder around it (a download folder, often) may hold another
    model's files; they count where that vocabulary cannot be read.

    Args:
        folder: the model's folder: tokenizer.json, vocab.json + merges.txt, or encoder.json + vocab.bpe.
        gguf_metadata: key-values of a GGUF file.
        gpt2_fallback: the model is a GPT-2, so its tokenizer is known by name.

    Returns None if there is none. Raises TokenizerError if one is damaged or cannot be read.
    """
    if gguf_metadata is not None and "tokenizer.ggml.tokens" in gguf_metadata:
        try:
            return from_gguf(gguf_metadata, f"the GGUF file in {folder}" if folder else "the GGUF file")
        except TokenizerError:
            beside = from_folder(folder) if folder else None
            if beside is None:
                raise
            return beside
    tokenizer = from_folder(folder) if folder else None
    return gpt2_tokenizer(folder) if tokenizer is None and gpt2_fallback else tokenizer
