"""Tokenizers of our own from a corpus: byte-level BPE of GPT-2's kind, or one token a character.

Why not as others do it: `ByteLevelBPETokenizer` puts its special tokens first and names no end token, so each program
that loads it guesses one; nanoGPT's characters live in a pickle that no other program reads. Here both are files like
any model's, with an end token where there is one.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from ..errors import SourceError, TokenizerError
from ..tokenizer.base import BYTE_OF, Tokenizer, refusing
from ..tokenizer.bpe import add_tokens
from ..tokenizer.files import END_OF_TEXT
from .mixing import key_of, mix

SAMPLE = 48_000_000  # characters from which merges are learnt; more changes few of them
_PIECE = 1 << 16  # characters
CHARACTER = r"[\s\S]"
_CHAR_OF = {byte: char for char, byte in BYTE_OF.items()}


def train_bpe(
    texts: Iterable[str], vocab_size: int, special: Sequence[str] = (END_OF_TEXT,), *, sample: int = SAMPLE
) -> Tokenizer:
    """A byte-level BPE that is cut into words as GPT-2's, and gives any text back.

    Args:
        texts: documents; `sample` characters of them are used, the same ones every time.
        vocab_size: tokens in all; fewer if the texts do not have as many frequent pairs.
        special: put last, as in GPT-2; the first begins and ends a text, and pads.

    Raises TokenizerError if `vocab_size` has no room for the 256 bytes and the special tokens.
    """
    if vocab_size < 256 + len(special):
        raise TokenizerError(
            f"A byte-level BPE of {vocab_size} tokens has no room for the 256 bytes and {len(special)} special tokens. "
            f"Ask for at least {256 + len(special)}."
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special),
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pieces = sampled(texts, sample)
    with refusing("the corpus", "no tokenizer could be trained from it"):
        backend.train_from_iterator(pieces, trainer)
    add_tokens(backend, list(special), special=True)
    ends = [number for text in special[:1] if (number := backend.token_to_id(text)) is not None]
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), special[0]) if special else {}
    first = next(iter(ends), None)
    size = backend.get_vocab_size()
    return Tokenizer(backend, f"a byte-level BPE of {size} tokens", first, tuple(ends), first, special=names)


def sampled(texts: Iterable[str], most: int, *, key: str = "tokenizer") -> list[str]:
    """Pieces of the texts, `most` characters together, drawn evenly over all of them by a hash of their number."""
    number = held = 0
    kept: list[tuple[int, int, str]] = []  # a heap, the highest hash first
    for text in texts:
        for start in range(0, len(text), _PIECE):
            piece = text[start : start + _PIECE]
            rank = int(mix(np.array([number], np.uint64), key_of(key))[0])
            heapq.heappush(kept, (-rank, number, piece))
            number, held = number + 1, held + len(piece)
            while held > most and len(kept) > 1:
                held -= len(heapq.heappop(kept)[2])
    return [piece for _, _, piece in sorted(kept, key=lambda entry: entry[1])]


def character_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """One token a character, in order of code points, as nanoGPT's shakespeare_char. No other character can be encoded.

    There is no end token: documents follow each other without a mark.
    """
    characters = sorted(set().union(*map(set, texts)))
    if not characters:
        raise TokenizerError("A tokenizer of characters needs a text to find them in, and there is none.")
    # Each character is spelled in GPT-2's alphabet of bytes, so that decoders and streams treat it as any other token.
    vocab = {"".join(_CHAR_OF[byte] for byte in char.encode()): i for i, char in enumerate(characters)}
    backend = Backend(models.WordLevel(vocab, unk_token=""))
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(CHARACTER), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, f"a tokenizer of {len(characters)} characters")


def tokenizer_from(spec: str, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """A tokenizer by name.

    Args:
        spec: `gpt2`; `bpe:8192` or `char`, made from the texts; or a folder, file, alias or hub name that has one.
        texts: called where the texts are needed.

    Raises TokenizerError if there is none.
    """
    from ..tokenizer import gpt2_tokenizer

    if spec == "gpt2":
        return gpt2_tokenizer()
    if spec == "char":
        return character_tokenizer(texts())
    if spec.startswith("bpe:"):
        size = re.fullmatch(r"bpe:([0-9]{1,7})", spec)
        if not size:
            raise TokenizerError(f"{spec}: expected bpe: and a number of tokens, bpe:8192 for example.")
        return train_bpe(texts(), int(size[1]))
    return _of_source(spec)


def _of_source(source: str) -> Tokenizer:
    from ..checkpoint.hub import resolve
    from ..load import load_tokenizer_for, open_source
    from ..tokenizer import from_folder

    try:
        path = resolve(source)
    except SourceError as error:
        raise TokenizerError(f"{error} A tokenizer is gpt2, char, bpe:8192, or a place that has one.") from None
    folder = path.parent if path.name == "tokenizer.json" else path
    if folder.is_dir() and (tokenizer := from_folder(folder)) is not None:
        return tokenizer
    tokenizer = load_tokenizer_for(open_source(path))
    if tokenizer is None:
        raise TokenizerError(f"{source}: no tokenizer lies there. Name one: gpt2, char, bpe:8192, or another place.")
    return tokenizer
