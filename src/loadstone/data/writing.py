"""`Shards`: token shards while they grow, so that what is complete up to a checkpoint can be told and gone back to."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .shards import DTYPES, STARTS, Shard, Split, shard_file, starts_file


@dataclass
class Growing:
    """One split so far: closed shards, and the tokens of the one that is open."""

    documents: int = 0
    text_bytes: int = 0
    open_tokens: int = 0
    shards: list[Shard] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards) + self.open_tokens


class Shards:
    """Append ids document by document to the shards of several splits.

    Args:
        folder: where the files grow.
        vocab_size: ids are below it.
        shard_tokens: a shard is closed at the end of the document that makes it this large.
        splits: their names.
    """

    def __init__(self, folder: Path, vocab_size: int, shard_tokens: int, splits: Sequence[str]) -> None:
        self.folder, self._shard_tokens = folder, shard_tokens
        self.dtype = DTYPES["uint16" if vocab_size <= 1 << 16 else "uint32"]
        self.splits = {name: Growing() for name in splits}
        self.max_id = 0
        self._streams: dict[str, BinaryIO] = {}
        self._hashes: dict[str, Any] = {}

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *exception: object) -> None:
        for stream in self._streams.values():
            with suppress(OSError):  # of a full disk somebody was told already
                stream.close()

    def append(self, split: str, ids: NDArray[Any], text_bytes: int, *, first: bool, last: bool) -> None:
        """The ids of a part of a document; `first` and `last` mark its beginning and end."""
        grown = self.splits[split]
        if first:
            self._write(starts_file(split), np.array([grown.tokens], STARTS).tobytes())
            grown.documents += 1
        self._write(shard_file(split, len(grown.shards)), ids.tobytes())
        grown.open_tokens += len(ids)
        grown.text_bytes += text_bytes
        self.max_id = max(self.max_id, int(ids.max(initial=0)))
        if last and grown.open_tokens >= self._shard_tokens:
            self._close(split)

    def clear(self) -> None:
        """Begin anew. What other runs left here may be linked elsewhere, so it is removed and not written into."""
        self.__exit__()
        for path in self.folder.iterdir():
            path.unlink()
        self.splits, self.max_id = {name: Growing() for name in self.splits}, 0
        self._streams, self._hashes = {}, {}

    def checkpoint(self) -> dict[str, Any]:
        """Flush everything to the disk; what `resume` needs to come back to this point."""
        for stream in self._streams.values():
            stream.flush()
            os.fsync(stream.fileno())
        return {"max_id": self.max_id, "splits": {name: asdict(grown) for name, grown in self.splits.items()}}

    def resume(self, state: dict[str, Any]) -> bool:
        """Go back to a checkpoint of an earlier process: cut off what was written later. False if files are missing."""
        splits = {
            name: Growing(**{**grown, "shards": [Shard(**shard) for shard in grown["shards"]]})
            for name, grown in state["splits"].items()
        }
        expected: dict[str, int] = {}
        for name, grown in splits.items():
            expected[starts_file(name)] = grown.documents * STARTS.itemsize
            expected[shard_file(name, len(grown.shards))] = grown.open_tokens * self.dtype.itemsize
            expected |= {shard.file: shard.tokens * self.dtype.itemsize for shard in grown.shards}
        if any(self._size(file) < size for file, size in expected.items()):
            return False
        for file, size in expected.items():
            if self._size(file) > size:
                os.truncate(self.folder / file, size)
        self.splits, self.max_id = splits, state["max_id"]
        for name in splits:
            for file in (starts_file(name), self._open_file(name)):
                if (self.folder / file).exists():
                    self._open(file, "ab", (self.folder / file).read_bytes())
        return True

    def described(self) -> dict[str, Split]:
        """Close all shards; the sidecar's words for each split."""
        for name, grown in self.splits.items():
            if grown.open_tokens:
                self._close(name)
        self.checkpoint()
        return {
            name: Split(
                grown.tokens,
                grown.documents,
                grown.text_bytes,
                tuple(grown.shards),
                self._hashes[starts_file(name)].hexdigest(),
            )
            for name, grown in self.splits.items()
        }

    def files(self) -> Iterator[Path]:
        """All files, once they are closed."""
        for name, grown in self.splits.items():
            yield self.folder / starts_file(name)
            yield from (self.folder / shard.file for shard in grown.shards)

    def _open_file(self, split: str) -> str:
        return shard_file(split, len(self.splits[split].shards))

    def _size(self, file: str) -> int:
        path = self.folder / file
        return path.stat().st_size if path.is_file() else 0

    def _write(self, file: str, data: bytes) -> None:
        if file not in self._streams:
            self._open(file, "wb", b"")
        self._streams[file].write(data)
        self._hashes[file].update(data)

    def _open(self, file: str, mode: str, written: bytes) -> None:
        self._streams[file] = (self.folder / file).open(mode)  # type: ignore[assignment]
        self._hashes[file] = hashlib.sha256(written)

    def _close(self, split: str) -> None:
        grown, file = self.splits[split], self._open_file(split)
        stream = self._streams.pop(file)
        stream.flush()
        os.fsync(stream.fileno())
        stream.close()
        grown.shards.append(Shard(file, grown.open_tokens, self._hashes.pop(file).hexdigest()))
        grown.open_tokens = 0
