"""Building blocks that several sources share: a checked BPE, and what is added around every text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, models, processors
from tokenizers import Tokenizer as Backend

from ..checkpoint.wording import shown
from ..errors import TokenizerError
from .base import refusing

Merge = tuple[str, str]


def build_bpe(where: Path | str, vocab: Mapping[str, int], merges: Sequence[Merge], **options: Any) -> Backend:
    """A BPE over `vocab` (token -> id), `merges` in order of rank.

    Raises TokenizerError if two tokens share an id, or a merge names or makes a token that is not in the vocabulary.
    """
    if not _is_sound(vocab, merges):
        _refuse(where, vocab, merges)
    with refusing(where, "the vocabulary is not accepted"):
        return Backend(models.BPE(vocab=dict(vocab), merges=list(merges), **options))


def _is_sound(vocab: Mapping[str, int], merges: Sequence[Merge]) -> bool:
    """Whether `_refuse` would find nothing, in a fifth of its time: a process waits for this before its first token."""
    ids = vocab.values()
    if not ids or {*map(type, ids)} != {int} or min(ids) < 0 or max(ids) >= 2**31 or len({*ids}) != len(ids):
        return not vocab and not merges
    return vocab.keys() >= {*chain.from_iterable(merges)} and vocab.keys() >= {*map("".join, merges)}


def _refuse(where: Path | str, vocab: Mapping[str, int], merges: Sequence[Merge]) -> None:
    """Raises TokenizerError with the first thing that is wrong."""
    owners: dict[int, str] = {}
    for token, number in vocab.items():
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**31:
            raise TokenizerError(f"{where}: the id of token {shown(token)} is {shown(number)}, not a number from 0 up.")
        if (other := owners.setdefault(number, token)) != token:
            raise TokenizerError(f"{where}: tokens {shown(other)} and {shown(token)} both have id {number}.")
    for rank, (left, right) in enumerate(merges):
        for part in (left, right, left + right):
            if part not in vocab:
                raise TokenizerError(
                    f"{where}: merge {rank} ({shown(left)} + {shown(right)}) needs the token {shown(part)}, which the "
                    "vocabulary does not have. The two lists belong to different tokenizers, or the file is damaged."
                )


def add_tokens(backend: Backend, tokens: Sequence[str], *, special: bool) -> None:
    """Tokens that are matched whole, before everything else; special ones only where special text is parsed."""
    backend.add_tokens([AddedToken(token, special=special, normalized=False) for token in tokens])


def surround(backend: Backend, before: int | None, after: int | None) -> None:
    """Have `encode` put these tokens around every text."""
    ids = {"before": before, "after": after}
    backend.post_processor = processors.TemplateProcessing(
        single=[*(["before"] if before is not None else []), "$A", *(["after"] if after is not None else [])],
        special_tokens=[
            {"id": name, "ids": [number], "tokens": [backend.id_to_token(number)]}
            for name, number in ids.items()
            if number is not None
        ],
    )
