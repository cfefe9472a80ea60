"""Records of JSON and JSONL files, each with the place that it came from; how they are split; rows of unequal length.

A split follows from a hash of each record's key and the seed, so it depends neither on the order of the file nor on a
library's random numbers, and records of the same key never end up on two sides: copies in the test set would be marks
for memory (pandas and scikit-learn, which most recipes use, split them like any other; sms.tsv has 403 copies).
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.wording import shown
from ..errors import FormatError, LoadstoneError, SourceError

Fields = Mapping[str, Any]
Sources = str | Path | Sequence[str | Path]


def paths_of(sources: Sources) -> list[Path]:
    """One file or several. Raises SourceError if there is none."""
    found = [Path(source) for source in ([sources] if isinstance(sources, (str, Path)) else sources)]
    if not found:
        raise SourceError("no data file was named.")
    return found


def read_bytes(path: Path) -> bytes:
    """A data file, whole. Raises SourceError if it cannot be read, FormatError if it is empty."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path}: it cannot be read ({error.strerror}). Name a file with the data.") from None
    if not raw.strip():
        raise FormatError(path, "it is empty.", "Name a file with the data.")
    return raw


def decoded(path: Path, raw: bytes, place: str = "") -> str:
    """UTF-8 text, with or without a byte order mark."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{place}: " if place else ""
        line = raw.count(b"\n", 0, error.start) + 1
        raise FormatError(
            path,
            f"{where or f'line {line}: '}it is no UTF-8 text (byte 0x{raw[error.start]:02X}).",
            "Convert it: iconv -f latin1 -t utf-8 FILE.",
        ) from None


def read_records(path: Path) -> Iterator[tuple[str, Fields]]:
    """The objects of a JSON array or of JSONL, told apart by the first character; each with its place, `line 3`.

    Raises FormatError, naming the place, for anything that is no JSON object.
    """
    raw = read_bytes(path)
    if raw.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        for number, value in enumerate(_parsed(path, "the file", decoded(path, raw)), 1):
            yield f"record {number}", _object(path, f"record {number}", value)
        return
    for number, line in enumerate(BytesIO(raw), 1):  # never splitlines() of a text, which may hold U+2028
        if line.strip():
            place = f"line {number}"
            yield place, _object(path, place, _parsed(path, place, decoded(path, line, place)))


def _parsed(path: Path, place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(
            path,
            f"{place}: it is no JSON ({error}).",
            "Expected was a JSON array of objects, or JSONL: one object a line. A file that ends in the middle was cut "
            "short.",
        ) from None


def _object(path: Path, place: str, value: Any) -> Fields:
    if not isinstance(value, dict):
        raise FormatError(path, f"{place}: expected an object with named fields, found {shown(value)}.")
    return value


def text_of(path: Path | str, place: str, name: str, value: Any) -> str:
    """A field's text. Raises FormatError if it is none, or holds half a surrogate pair, which JSON can spell."""
    if not isinstance(value, str):
        raise FormatError(path, f"{place}: {name} should be a text, found {shown(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise FormatError(
            path, f"{place}: {name} holds U+{ord(value[error.start]):04X}, a lone surrogate, which is no character."
        ) from None
    return value


def split(keys: Sequence[str], shares: Sequence[float], seed: int) -> list[list[int]]:
    """Indices for each share, in order of the file.

    Args:
        keys: of each record; equal ones stay together.
        shares: of the whole, at least 0, of sum 1.
        seed: another one gives another split.
    """
    if not shares or any(not 0 <= share <= 1 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise LoadstoneError(f"the shares {list(shares)} must be numbers from 0 to 1 that add up to 1.")
    together: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        together.setdefault(key, []).append(index)
    parts: list[list[int]] = [[] for _ in shares]
    bounds = np.cumsum(shares) * len(keys)
    done = 0
    for key in sorted(together, key=lambda key: shuffled("split", seed, key)):
        members = together[key]
        middle = done + len(members) / 2  # a group goes where most of it lies
        parts[min(int(np.searchsorted(bounds, middle)), len(parts) - 1)] += members
        done += len(members)
    return [sorted(part) for part in parts]


def shuffled(purpose: str, seed: int, key: str) -> bytes:
    """Sort by this for an order that looks random, and is the same everywhere and for ever.

    `purpose`: two orders that must not have to do with each other (who is chosen, who is tested) need two names.
    """
    return hashlib.sha256(f"{purpose}\0{seed}\0{key}".encode()).digest()


@dataclass(frozen=True)
class Ragged:
    """Rows of token ids of unequal length, in two arrays: four bytes a token, eight a row.

    Attributes:
        tokens: [all tokens] int32, row after row.
        offsets: [rows + 1] int64, where each begins.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]]) -> Ragged:
        tokens, offsets = array("i"), array("q", [0])
        for row in rows:
            tokens.extend(row)
            offsets.append(len(tokens))
        return cls(np.frombuffer(tokens, np.int32), np.frombuffer(offsets, np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        # IndexError beyond the end, so that a plain `for` ends; negative indices count from it.
        index = range(len(self))[index]
        return self.tokens[self.offsets[index] : self.offsets[index + 1]].astype(np.int64)

    def digest(self, *more: NDArray[Any]) -> str:
        """Changes when a row does, or when one of the other arrays does."""
        found = hashlib.sha256()
        for values in (self.tokens, self.offsets, *more):
            found.update(np.ascontiguousarray(values).data)
        return found.hexdigest()
