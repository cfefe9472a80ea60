"""`Dataset` and `Tokens`: a folder of token shards, memory-mapped, with a sidecar that says all about them.

    dataset.json               version, tokenizer hash, vocabulary, and of each split: shards, documents, text bytes
    train-00000.bin, ...       little-endian uint16 or uint32 ids, and nothing else
    train-documents.bin        little-endian uint64: where each document starts, counted in tokens over all shards
    validation-...             the same
    tokenizer.json, ...        the tokenizer, as HuggingFace's files

Why not as others do it: nanoGPT's train.bin is bare (which tokenizer? how many bytes of text? cut short?), litdata's
chunks can be read by litdata alone. Here a shard is bare as well, so that `numpy.memmap` reads it, and the sidecar
is compared with it at opening.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.wording import shown
from ..errors import FormatError

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

SIDECAR = "dataset.json"
VERSION = 1
DTYPES: Mapping[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
STARTS: np.dtype[Any] = np.dtype("<u8")
Ids = NDArray[np.unsignedinteger[Any]]
_COMPARED = 1000  # ids that must say the same to two tokenizers
_AGAIN = "Prepare it again (`loadstone prepare`), or copy the folder again."


@dataclass(frozen=True)
class Shard:
    """One file of ids."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """What the sidecar says of `train` or `validation`; `text_bytes` are UTF-8, separators not counted."""

    tokens: int
    documents: int
    text_bytes: int
    shards: tuple[Shard, ...]
    starts_sha256: str


@dataclass(frozen=True)
class Info:
    """The sidecar.

    Attributes:
        tokenizer_sha256: `fingerprint` of the tokenizer.
        vocab_size: highest id of the tokenizer + 1.
        max_id: the highest id that occurs.
        separator_id: the token that ends each document, if the tokenizer has one.
        dtype: uint16 or uint32.
        splits: by name.
        empty: documents that were left out, as there was nothing in them.
        spelled_ends: how often the text of the separator stands in the documents; it was encoded as plain text.
        made_from: sources and arguments, for whoever asks later.
    """

    tokenizer_sha256: str
    vocab_size: int
    max_id: int
    separator_id: int | None
    dtype: str
    splits: Mapping[str, Split]
    empty: int
    spelled_ends: int
    made_from: Mapping[str, Any]

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)}, indent=2) + "\n"


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of all that decides about the ids of a plain text: not of what is put around it, nor of a spelling."""
    from ..tokenizer.parts import Parts

    steps = {**Parts.of(tokenizer).portable(), "post_processor": None}
    deciding = json.dumps([steps, tokenizer.eos_ids[:1]], sort_keys=True)
    return hashlib.sha256(deciding.encode(errors="surrogatepass")).hexdigest()


def starts_file(split: str) -> str:
    return f"{split}-documents.bin"


def shard_file(split: str, number: int) -> str:
    return f"{split}-{number:05d}.bin"


class Tokens:
    """The ids of one split as one long array over all shards; a slice reads no more than it needs.

    Attributes:
        documents: [documents] uint64, where each starts.
        nbytes_of_text: bytes of UTF-8 that the ids stand for, the separators' not counted.
        identity: changes with any id.
    """

    def __init__(
        self, arrays: list[Ids], documents: NDArray[np.uint64], *, nbytes_of_text: int, max_id: int, identity: str,
        where: str,
    ) -> None:  # fmt: skip
        self._arrays, self.documents, self.nbytes_of_text = arrays, documents, nbytes_of_text
        self.max_id, self.identity, self._where = max_id, identity, where
        self._ends = np.cumsum([len(array) for array in arrays], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, wanted: slice) -> Ids:
        """Ids from `start` to below `stop`: a view of one shard, or a copy where the slice crosses into the next.

        Raises FormatError for an id above the sidecar's `max_id`: the shard was changed, and the model may lack a row.
        """
        start, stop, step = wanted.indices(len(self))
        if step != 1:
            raise IndexError("tokens are read in steps of 1")
        pieces, first = [], int(np.searchsorted(self._ends, start, side="right"))
        for array, end in zip(self._arrays[first:], self._ends[first:], strict=True):
            if start >= stop:
                break
            offset = int(end) - len(array)
            pieces.append(array[start - offset : stop - offset])
            start = int(end)
        ids = pieces[0] if len(pieces) == 1 else np.concatenate([*pieces, self._arrays[0][:0]])
        if len(ids) and int(ids.max()) > self.max_id:
            raise FormatError(
                self._where,
                f"a shard holds id {int(ids.max())}, and the highest should be {self.max_id}: it was changed after it "
                "was written.",
                _AGAIN,
            )
        return ids


class Dataset:
    """An opened folder of token shards. Only the sidecar is read at opening; sizes are compared with it.

    Attributes:
        folder: where it lies.
        info: the sidecar.
    """

    def __init__(self, folder: Path, info: Info) -> None:
        self.folder, self.info = folder, info

    @classmethod
    def open(cls, folder: str | Path) -> Dataset:
        """Raises FormatError if there is no sidecar, it is damaged or newer, or a file is missing or cut short."""
        folder = Path(folder)
        info = _read_sidecar(folder / SIDECAR)
        width = DTYPES[info.dtype].itemsize
        for name, split in info.splits.items():
            _check_size(folder / starts_file(name), split.documents * STARTS.itemsize)
            for shard in split.shards:
                _check_size(folder / shard.file, shard.tokens * width)
        return cls(folder, info)

    def tokens(self, split: str = "train") -> Tokens:
        """Raises FormatError if there is no such split."""
        found = self.info.splits.get(split)
        if found is None:
            known = ", ".join(self.info.splits)
            raise FormatError(
                self.folder, f"there is no split {split!r}, only {known}.", "Prepare it with --validation."
            )
        dtype = DTYPES[self.info.dtype]
        return Tokens(
            [  # as plain arrays over the mappings, which are cut in half the time
                np.asarray(np.memmap(self.folder / shard.file, dtype, "r", shape=(shard.tokens,)))
                for shard in found.shards
            ],
            np.memmap(self.folder / starts_file(split), STARTS, "r", shape=(found.documents,)),
            nbytes_of_text=found.text_bytes,
            max_id=self.info.max_id,
            identity=hashlib.sha256("".join(shard.sha256 for shard in found.shards).encode()).hexdigest(),
            where=str(self.folder),
        )

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids. Raises FormatError if another one lies there now."""
        from ..tokenizer import load_tokenizer

        tokenizer = load_tokenizer(self.folder)
        if tokenizer is None or fingerprint(tokenizer) != self.info.tokenizer_sha256:
            problem = "its tokenizer files are missing, or are not those that made the ids beside them."
            raise FormatError(self.folder, problem, _AGAIN)
        return tokenizer

    def require_fits(self, vocab_size: int) -> None:
        """Raises FormatError if an id has no row in a model of `vocab_size` rows."""
        if self.info.max_id >= vocab_size:
            raise FormatError(
                self.folder,
                f"its highest id is {self.info.max_id}, and the model has {vocab_size} rows (ids 0 to "
                f"{vocab_size - 1}): the data was made with another tokenizer than the model's.",
                f"Prepare it with the model's own (`loadstone prepare --tokenizer MODEL`), or give the model at least "
                f"{self.info.vocab_size} rows.",
            )

    def require_same_text(self, tokenizer: Tokenizer) -> None:
        """Raises FormatError if the ids say one thing to the tokenizer that made them and another to this one."""
        if fingerprint(tokenizer) == self.info.tokenizer_sha256:
            return
        split = self.tokens(next(iter(self.info.splits)))
        ids = [int(token) for token in split[: min(len(split), _COMPARED)]]
        meant, found = self.tokenizer().decode(ids), tokenizer.decode(ids)
        if meant != found:
            raise FormatError(
                self.folder,
                f"the data were made with another tokenizer than the model's: they begin {shown(meant[:40])}, and to "
                f"the model these ids say {shown(found[:40])}.",
                "Prepare them with the model's own (`loadstone prepare --tokenizer MODEL`).",
            )

    @cached_property
    def identity(self) -> str:
        """Changes with any id of any split and with the tokenizer."""
        return hashlib.sha256(replace(self.info, made_from={}).to_json().encode()).hexdigest()

    def files(self) -> dict[Path, str]:
        """Shards and starts of all splits, and what their SHA-256 should be."""
        found = {}
        for name, split in self.info.splits.items():
            found[self.folder / starts_file(name)] = split.starts_sha256
            found |= {self.folder / shard.file: shard.sha256 for shard in split.shards}
        return found

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read and hash every file. Raises FormatError for one that is not as it was written."""
        expected = self.files()
        total, done = sum(path.stat().st_size for path in expected), 0
        for path, digest in expected.items():
            found = hashlib.sha256()
            with path.open("rb") as stream:
                while block := stream.read(1 << 20):
                    found.update(block)
                    done += len(block)
                    if progress:
                        progress(done, total)
            if found.hexdigest() != digest:
                raise FormatError(path, "its content is not what was written (SHA-256 differs).", _AGAIN)


def _check_size(path: Path, expected: int) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != expected:
        problem = "it is missing" if found is None else f"it has {found:,} bytes"
        raise FormatError(path, f"{problem}, and {SIDECAR} speaks of {expected:,}.", _AGAIN)


# -- the sidecar, read as if a stranger had written it


def _read_sidecar(path: Path) -> Info:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FormatError(
            path.parent, f"no {SIDECAR} lies there, so it is no prepared data set.", "Make one: `loadstone prepare`."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(path, f"it cannot be read as JSON ({error}).", _AGAIN) from None
    version = values.get("version") if isinstance(values, dict) else None
    if version != VERSION:
        raise FormatError(path, f"its version is {shown(version)}, and this program reads {VERSION}.", _AGAIN)
    try:
        return _info(values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(path, f"a field is missing or is not what it should be ({error!r}).", _AGAIN) from None


def _info(values: Mapping[str, Any]) -> Info:
    separator = values["separator_id"]
    info = Info(
        tokenizer_sha256=_text(values["tokenizer_sha256"]),
        vocab_size=_count(values["vocab_size"], 1),
        max_id=_count(values["max_id"]),
        separator_id=None if separator is None else _count(separator),
        dtype=_text(values["dtype"]),
        splits={_text(name): _split(name, entry) for name, entry in values["splits"].items()},
        empty=_count(values["empty"]),
        spelled_ends=_count(values["spelled_ends"]),
        made_from=dict(values["made_from"]),
    )
    if info.dtype not in DTYPES:
        raise ValueError(f"dtype {shown(info.dtype)}; known: {', '.join(DTYPES)}")
    if info.max_id >= info.vocab_size:
        raise ValueError(f"max_id {info.max_id} is beyond the vocabulary of {info.vocab_size}")
    if not info.splits:
        raise ValueError("no split")
    return info


def _split(name: str, entry: Mapping[str, Any]) -> Split:
    shards = tuple(
        Shard(_text(shard["file"]), _count(shard["tokens"], 1), _text(shard["sha256"])) for shard in entry["shards"]
    )
    split = Split(
        _count(entry["tokens"], 1),
        _count(entry["documents"], 1),
        _count(entry["text_bytes"]),
        shards,
        _text(entry["starts_sha256"]),
    )
    if [shard.file for shard in shards] != [shard_file(name, i) for i in range(len(shards))]:
        raise ValueError(f"the shards of {shown(name)} are not {shard_file(name, 0)} and so on")  # no path leaves
    if sum(shard.tokens for shard in shards) != split.tokens:
        raise ValueError(f"the shards of {shown(name)} do not add up to its {split.tokens} tokens")
    return split


def _count(value: object, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**62:
        raise ValueError(f"{shown(value)} is no count of at least {least}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or "/" in value or "\0" in value:
        raise ValueError(f"{shown(value)} is no name")
    return value
