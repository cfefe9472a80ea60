"""What belongs to a model besides its weights, compared: the config field by field, and the vocabularies."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..checkpoint.base import Checkpoint
from ..weightmap import Identity

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

_UNRECORDED = {"bos_id": None, "eos_ids": ()}  # what these fields are where a file does not tell them
_FOLLOWS = {"head_dim": "n_heads", "n_kv_heads": "n_heads"}  # field -> the one that it is computed from


@dataclass(frozen=True)
class Difference:
    """One config field (`n_heads`, `rope.theta`). `known`: both sides record it, so that it is a difference indeed."""

    field: str
    a: Any
    b: Any
    known: bool


def config_differences(a: Identity, b: Identity) -> list[Difference]:
    """Fields whose values differ. Numbers count as equal to float32's precision, which is what GGUF keeps of them."""
    values = [asdict(identity.config) for identity in (a, b)]
    if all(side["rope"] for side in values):
        values = [side | {f"rope.{name}": value for name, value in side.pop("rope").items()} for side in values]
    found = []
    for field in values[0]:
        x, y = (side[field] for side in values)
        if not _equal(x, y):
            found.append(Difference(field, x, y, all(_is_known(identity, field) for identity in (a, b))))
    return found


def _equal(x: Any, y: Any) -> bool:
    if isinstance(x, float) and isinstance(y, float):
        return math.isclose(x, y, rel_tol=1e-6)
    if isinstance(x, tuple) and isinstance(y, tuple) and len(x) == len(y):
        return all(map(_equal, x, y))
    return bool(x == y)


def _is_known(identity: Identity, field: str) -> bool:
    """False for what the file does not tell: assumed values, and token ids that it has none of."""
    if field in _UNRECORDED and getattr(identity.config, field) == _UNRECORDED[field]:
        return False
    word = _FOLLOWS.get(field, field.split(".")[0])
    return not any(re.search(rf"\b{word}\b", line.split("(")[0]) for line in identity.assumed)


def tokenizer_differences(a: Checkpoint, b: Checkpoint) -> list[str]:
    """How the vocabularies differ that lie beside or inside both, as sentences; none if a side has no tokenizer.

    Raises TokenizerError if one of them is broken.
    """
    from ..tokenizer import load_tokenizer

    one, two = (load_tokenizer(side.folder, side.metadata if side.format == "gguf" else None) for side in (a, b))
    return _vocabularies(one, two) if one and two else []


def _vocabularies(a: Tokenizer, b: Tokenizer) -> list[str]:
    one, two = ({i: text for text, i in side.backend.get_vocab(with_added_tokens=True).items()} for side in (a, b))
    first = next((i for i in sorted(one.keys() | two.keys()) if one.get(i) != two.get(i)), None)
    if first is None:
        return []
    sizes = "" if len(one) == len(two) else f"A has {len(one):,} tokens, B {len(two):,}; "
    texts = f"{_shown(one, first)} in A, {_shown(two, first)} in B"
    return [f"the vocabularies differ: {sizes}the first token that differs is {first}: {texts}"]


def _shown(vocabulary: dict[int, str], token: int) -> str:
    return repr(vocabulary[token][:40]) if token in vocabulary else "not there"
