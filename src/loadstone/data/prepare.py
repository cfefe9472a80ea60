"""`prepare`: documents to token shards; killed at any moment, the next run goes on where it was.

Why not as others do it: nanoGPT's prepare.py and litdata's `optimize` start again from nothing (marin#2212: for ever,
where machines are reclaimed), and litdata's files depend on the number of workers (litData#758). Here one reader feeds
the threads of `tokenizers` (as fast as processes of our own, measured, and nobody needs `if __name__ == "__main__"`),
ids are written in the order of the documents, and a journal says up to which piece of text they are on the disk.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ..checkpoint.atomic import atomic_folder
from ..checkpoint.wording import few
from ..errors import ConfigError, LoadstoneError
from ..tokenizer import Tokenizer
from ..tokenizer.export import tokenizer_files
from .corpus import Corpus, Document
from .encoding import Piece, encoded, pieces_of
from .mixing import key_of
from .shards import SIDECAR, Dataset, Info, fingerprint
from .writing import Shards

TRAIN, VALIDATION = "train", "validation"
SHARD_TOKENS = 1 << 27  # 256 MB of uint16
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
_JOURNAL = "journal.json"
Progress = Callable[[int, int], None]
Source = str | Path


def prepare(
    sources: Sequence[Source] | Source,
    destination: Source,
    tokenizer: Tokenizer,
    *,
    validation: float | Sequence[Source] = 0.05,
    seed: int = 0,
    field: str = "text",
    separator: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> Dataset:
    """Tokenize documents into a folder of shards. The same arguments give the same bytes, interrupted or not.

    Args:
        sources: see `Corpus`, also for `field` and `separator`.
        destination: a new folder.
        tokenizer: each document is encoded as plain text and ends with the tokenizer's end token, if it has one.
        validation: sources of their own; or the part of the documents that is set aside, chosen by a hash of each
            document's id and the seed. Of a single document it is the last part of the text. 0: none.
        seed: of that choice.
        force: replace the prepared data set that lies at `destination`; nothing else is ever replaced.
        progress: called with (bytes read, bytes in all) of the sources.
        shard_tokens: a shard is closed at the end of the document that makes it this large.

    Raises a LoadstoneError if a source cannot be read as text, a split gets no document, the tokenizer lacks a
    character, or the destination cannot be written. What was done until then is kept for the next run.
    """
    destination = Path(destination)
    if force:
        _check_replaceable(destination)
    reading = _Reading(sources, validation, seed, field, separator, progress)
    made_from = {**reading.arguments, "shard_tokens": shard_tokens, "tokenizer": fingerprint(tokenizer)}
    with (
        atomic_folder(destination, replace=force) as folder,
        _work_folder(destination) as work,
        Shards(work, tokenizer.vocab_size, shard_tokens, reading.splits) as shards,
    ):
        spelled_ends = _encode_all(shards, made_from, reading, tokenizer)
        reading.check(shards)
        info = Info(
            tokenizer_sha256=fingerprint(tokenizer),
            vocab_size=tokenizer.vocab_size,
            separator_id=next(iter(tokenizer.eos_ids), None),
            dtype=shards.dtype.name,
            splits=shards.described(),
            max_id=shards.max_id,
            empty=reading.empty,
            spelled_ends=spelled_ends,
            made_from=made_from,
        )
        _fill(folder, shards, tokenizer, info)
    shutil.rmtree(work, ignore_errors=True)
    return Dataset.open(destination)


def _fill(folder: Path, shards: Shards, tokenizer: Tokenizer, info: Info) -> None:
    """The new folder. Shards are linked into it where that can be, so that a run killed here loses nothing."""
    for file in shards.files():
        try:
            os.link(file, folder / file.name)
        except OSError:
            file.replace(folder / file.name)
    for name, content in tokenizer_files(tokenizer, "hf").items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    (folder / SIDECAR).write_text(info.to_json())


def _check_replaceable(destination: Path) -> None:
    """Raises LoadstoneError if something lies there that no preparation wrote."""
    if not destination.is_dir() or not any(destination.iterdir()):
        return
    own = {SIDECAR, *TOKENIZER_FILES}
    if (destination / SIDECAR).is_file():
        own.update(path.name for path in Dataset.open(destination).files())
    if strangers := sorted({path.name for path in destination.iterdir()} - own):
        raise LoadstoneError(
            f"{destination}: it holds {few(strangers)}, which no preparation wrote and which would be lost. "
            "Choose a new folder, or move that away."
        )


class _Reading:
    """The sources, and which of their documents goes to which split."""

    def __init__(
        self, sources: Sequence[Source] | Source, validation: float | Sequence[Source], seed: int, field: str,
        separator: str | None, progress: Progress | None,
    ) -> None:  # fmt: skip
        self._train = Corpus(_listed(sources), field=field, separator=separator)
        self._seed, self._progress, self._other, self._part = seed, progress, None, 0.0
        if isinstance(validation, (float, int)):
            if not 0 <= validation < 1:
                raise ConfigError(f"A validation part of {validation} is none; it must be from 0 to below 1, 0.05 say.")
            self._part = float(validation)
        else:
            self._other = Corpus(_listed(validation), field=field, separator=separator)
        self.splits = [TRAIN, VALIDATION] if self._other or self._part else [TRAIN]
        self.arguments = {
            "sources": self._train.sources,
            "validation": self._other.sources if self._other else self._part,
            "seed": seed,
            "field": field,
            "separator": separator,
        }

    @property
    def empty(self) -> int:
        return sum(corpus.empty for corpus in self._corpora)

    @property
    def _corpora(self) -> list[Corpus]:
        return [self._train, self._other] if self._other else [self._train]

    def advance(self) -> None:
        if self._progress:
            self._progress(sum(c.done for c in self._corpora), sum(c.total for c in self._corpora))

    def documents(self) -> Iterator[tuple[str, Document]]:
        """(split, document), from the beginning."""
        yield from self._divided()
        for document in self._other or ():
            yield VALIDATION, document

    def _divided(self) -> Iterator[tuple[str, Document]]:
        documents = iter(self._train)
        first = list(islice(documents, 2))
        if self._part and len(first) == 1:
            [(name, text)] = first
            cut = int(len(text) * (1 - self._part))
            halves = (TRAIN, text[:cut]), (VALIDATION, text[cut:])
            yield from ((split, Document(name, half)) for split, half in halves if half)
            return
        for document in chain(first, documents):
            aside = key_of("split", self._seed, document.id) < self._part * 2**64
            yield (VALIDATION if aside else TRAIN), document

    def check(self, shards: Shards) -> None:
        """Raises ConfigError if a split got no document."""
        for name, split in shards.splits.items():
            if not split.documents:
                count = sum(split.documents for split in shards.splits.values())
                found = "its one document" if count == 1 else f"its {count:,} documents"
                raise ConfigError(
                    f"{self._train.sources[0]}: of {found} none fell to the {name} split, at a part of {self._part:g} "
                    "for validation. Choose another part or seed, name validation sources of their own, or cut the "
                    "text into documents with a separator."
                )


def _listed(sources: Sequence[Source] | Source) -> list[str]:
    return [str(source) for source in ([sources] if isinstance(sources, (str, Path)) else sources)]


# -- going on where an earlier run was killed


def _encode_all(shards: Shards, made_from: dict[str, Any], reading: _Reading, tokenizer: Tokenizer) -> int:
    """Every document into the shards. Returns how often the texts spell the tokenizer's end token."""
    journal = shards.folder / _JOURNAL
    progress = _Seen(tokenizer)
    pieces = pieces_of(reading.documents(), tokenizer)
    if earlier := _earlier(journal, made_from, shards):
        for piece in islice(pieces, earlier["pieces"]):
            progress.add(piece)
            reading.advance()
        if progress.state() != {"pieces": earlier["pieces"], "digest": earlier["digest"]}:
            journal.unlink()  # the sources have changed: from the beginning
            return _encode_all(shards, made_from, reading, tokenizer)
    else:
        shards.clear()
    for group in encoded(pieces, tokenizer, shards.dtype):
        for piece, ids in group:
            progress.add(piece)
            shards.append(piece.split, ids, len(piece.text.encode()), first=piece.first, last=piece.last)
        state = {"made_from": made_from, **progress.state(), "shards": shards.checkpoint()}
        _write_flushed(journal, json.dumps(state))
        reading.advance()
    return progress.spelled_ends


class _Seen:
    """How many pieces went by, and a hash of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._end = "".join(map(tokenizer.token_text, tokenizer.eos_ids[:1]))
        self._count, self._digest, self.spelled_ends = 0, hashlib.sha256(), 0

    def add(self, piece: Piece) -> None:
        self._count += 1
        self._digest.update(json.dumps([piece.split, piece.document, piece.last, len(piece.text)]).encode())
        self._digest.update(piece.text.encode())
        self.spelled_ends += piece.text.count(self._end) if self._end else 0

    def state(self) -> dict[str, Any]:
        return {"pieces": self._count, "digest": self._digest.hexdigest()}


def _earlier(journal: Path, made_from: dict[str, Any], shards: Shards) -> dict[str, Any] | None:
    """The journal of an interrupted run with the same arguments whose files are still there."""
    try:
        state: dict[str, Any] = json.loads(journal.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return state if state["made_from"] == made_from and shards.resume(state["shards"]) else None


def _write_flushed(path: Path, text: str) -> None:
    temporary = path.with_suffix(".new")
    with temporary.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


@contextmanager
def _work_folder(destination: Path) -> Iterator[Path]:
    """`.NAME.preparing` beside the destination, locked; it outlives a killed run.

    Raises LoadstoneError if another run has it.
    """
    target = Path(os.path.realpath(destination))
    work = target.with_name(f".{target.name}.preparing")
    work.mkdir(exist_ok=True)
    descriptor = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LoadstoneError(f"{destination}: another run is preparing it right now. Wait for it.") from None
        try:
            yield work
        finally:
            if not (work / _JOURNAL).exists():  # nothing to go on from
                shutil.rmtree(work, ignore_errors=True)
    finally:
        os.close(descriptor)
