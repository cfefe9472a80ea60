"""`Corpus`: documents out of text files, JSON lines, folders, tar archives and hub data sets, one after the other.

Everything is streamed: an archive is never unpacked to the disk, and one document is in memory at a time. Why not as
others do it: nanoGPT and litgpt hold one hard-wired file as a whole (nanoGPT#90, #176: out of memory), and libraries
that guess turn a row without text into the word "None". Here what is no text is refused, with file and line.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar, cast

from ..checkpoint.wording import few, shown, size_text
from ..errors import FormatError, LoadstoneError, SourceError
from .hub import hub_rows
from .shards import SIDECAR

TEXT, LINES = (".txt", ".md"), (".jsonl", ".ndjson")
# First bytes -> how to read on. The name of a file says only what its text means: plain, or JSON lines.
_PACKED: Mapping[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": lambda raw: gzip.GzipFile(fileobj=raw),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
}
_PACKED_SUFFIXES = (".gz", ".bz2", ".xz")
_BLOCK = 512  # of a tar archive
Data = TypeVar("Data", bytes, bytearray)
LARGEST = 1 << 30  # bytes of one document, which is held in memory whole


class Document(NamedTuple):
    """One document.

    Attributes:
        id: the same wherever the corpus lies: `books.tar.xz:books/Emma.txt`, `pile.jsonl:17`, `notes/a.txt`.
        text: not empty, and valid Unicode.
    """

    id: str
    text: str


class Corpus:
    """The documents of several sources, in order; can be iterated anew.

    Args:
        sources: files, folders (all .txt, .md and .jsonl in them), or `hub:owner/name[/config][:split]`.
        field: where the text of a JSON line or hub row is.
        separator: cut text files at this text, `<|endoftext|>` for example, into documents.

    Attributes:
        total: bytes of all sources on the disk (0 for hub data sets), for a progress bar.
        empty: documents left out as there was nothing in them, since iteration began.

    Raises SourceError for a source that is not there; while iterating, FormatError for what cannot be read as text.
    """

    def __init__(self, sources: Sequence[str | Path], *, field: str = "text", separator: str | None = None) -> None:
        if isinstance(sources, (str, Path)):
            sources = [sources]
        self.sources, self.field, self.separator = [str(source) for source in sources], field, separator
        if separator == "":
            raise LoadstoneError("The separator of documents is empty, and would cut nowhere.")
        self._files = [file for source in self.sources for file in _files(source)]
        seen: Counter[str] = Counter()
        for number, (name, path) in enumerate(self._files):
            seen[name] += 1
            if seen[name] > 1:  # a/data.txt and b/data.txt: two documents, two ids
                self._files[number] = f"{name}({seen[name]})", path
        self.total = sum(path.stat().st_size for _, path in self._files if path)
        self.empty = self._done = 0
        self._raw: IO[bytes] | None = None

    @property
    def done(self) -> int:
        """Bytes of `total` that were read."""
        return self._done + (self._raw.tell() if self._raw and not self._raw.closed else 0)

    def __iter__(self) -> Iterator[Document]:
        self.empty = self._done = 0
        found = False
        for name, path in self._files:
            for document in self._read(name, path) if path else self._hub(name):
                if not document.text or document.text.isspace():
                    self.empty += 1
                else:
                    found = True
                    yield document
        if not found:
            nothing = "every document is empty" if self.empty else "there is no document"
            raise SourceError(f"{few(self.sources)}: {nothing}, so there is nothing to learn from.")

    def _hub(self, name: str) -> Iterator[Document]:
        for number, row in enumerate(hub_rows(name)):
            yield Document(f"{name}:{number}", _text_of(f"{name}, row {number}", row, self.field))

    def _read(self, name: str, path: Path) -> Iterator[Document]:
        with _damage(path), path.open("rb") as raw:
            self._raw = raw
            stream = _unpacked(raw)
            start = stream.peek(_BLOCK)[:_BLOCK]
            if _is_tar(start):
                yield from self._members(name, path, stream)
            else:
                yield from self._texts(name, path, stream, path.name)
            self._raw = None
        self._done += path.stat().st_size

    def _members(self, name: str, path: Path, stream: IO[bytes]) -> Iterator[Document]:
        known, tail = 0, _Tail(stream)
        with tarfile.open(fileobj=cast(IO[bytes], tail), mode="r|") as archive:
            for member in archive:
                if not member.isfile() or not _is_wanted(member.name):
                    continue
                known += 1
                inner = archive.extractfile(member)
                if inner is not None:
                    where = Path(f"{path}:{member.name}")
                    yield from self._texts(f"{name}:{member.name}", where, _unpacked(inner), member.name)
                archive.members.clear()  # type: ignore[attr-defined]  # else it remembers them all
        if tail.last.strip(b"\0"):
            raise FormatError(path, "the archive ends without the mark of its end: it was cut short.", "Get it again.")
        if not known:
            raise FormatError(path, f"the archive holds no {', '.join(TEXT + LINES)} file.", "Name another source.")

    def _texts(self, name: str, where: Path, stream: IO[bytes], file: str) -> Iterator[Document]:
        """The documents of one file: its lines of JSON, its parts between separators, or all of it."""
        suffix = _suffix(file)
        if suffix == ".json":
            raise FormatError(
                where,
                "a .json file is data, not a text, and would be learnt with its braces.",
                'Write one object a line, {"text": "..."}, to a .jsonl file.',
            )
        if suffix in LINES:
            yield from self._lines(name, where, stream)
        elif self.separator is None:
            yield Document(name, _decoded(where, _whole(where, stream)))
        else:
            for number, part in enumerate(_split(where, stream, self.separator.encode()), 1):
                yield Document(f"{name}:{number}", _decoded(f"{where}, document {number}", part))

    def _lines(self, name: str, where: Path, stream: IO[bytes]) -> Iterator[Document]:
        number = 0
        while line := _limited(where, stream.readline(LARGEST + 1)):
            number += 1
            if line.strip():
                yield Document(f"{name}:{number}", _field(f"{where}, line {number}", line, self.field))


# -- sources to files


def _files(source: str) -> list[tuple[str, Path | None]]:
    """(name for ids, path) of each file; a hub data set has its own name and no path."""
    if source.startswith("hub:"):
        return [(source, None)]
    path = Path(source)
    if path.is_dir():
        inside = sorted(_inside(path), key=lambda file: file.as_posix())
        if not inside:
            raise SourceError(f"{source}: the folder holds no {', '.join(TEXT + LINES)} file.")
        return [(file.as_posix(), path / file) for file in inside]
    if not path.is_file():
        what = "there is no such file or folder" if not path.exists() else "it is no regular file"
        raise SourceError(f"{source}: {what}. A data set of the hub is written hub:owner/name.")
    return [(path.name, path)]


def _inside(path: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(path):
        if SIDECAR in files:  # what was prepared from here, with the merges.txt of its tokenizer
            folders.clear()
        else:
            inside = (Path(folder, file).relative_to(path) for file in files)
            yield from (file for file in inside if _is_wanted(file.as_posix()))


def _is_wanted(name: str) -> bool:
    """Whether a file in a folder or archive is text by its name, and not hidden (`._x.txt` is macOS's, and binary)."""
    return _suffix(name) in TEXT + LINES and not any(part.startswith(".") for part in name.split("/") if part != ".")


def _suffix(name: str) -> str:
    path = Path(name)
    return (Path(path.stem) if path.suffix.lower() in _PACKED_SUFFIXES else path).suffix.lower()


# -- bytes to texts


def _unpacked(raw: IO[bytes]) -> io.BufferedReader:
    stream: Any = raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw)
    start = stream.peek(8)
    for magic, unpack in _PACKED.items():
        if start.startswith(magic):
            return io.BufferedReader(unpack(stream), 1 << 16)
    return stream


def _is_tar(start: bytes) -> bool:
    """A header with the right checksum: old archives have no other mark."""
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


class _Tail:
    """Remembers the end of what was read: a complete archive ends in zeros, and tarfile does not look."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.last = stream, b""

    def read(self, size: int) -> bytes:
        block = self._stream.read(size)
        self.last = (self.last + block)[-_BLOCK:]
        return block


def _limited(where: Path, data: Data) -> Data:
    if len(data) > LARGEST:
        raise FormatError(
            where,
            f"one document is larger than {size_text(LARGEST)}, and a document is held in memory whole.",
            "Cut it: `--separator TEXT` at a text between its parts, or one document a line in a .jsonl file.",
        )
    return data


def _whole(where: Path, stream: IO[bytes]) -> bytearray:
    data = bytearray()  # read(LARGEST) would allocate as much
    while block := stream.read(1 << 20):
        data += block
        _limited(where, data)
    return data


def _split(where: Path, stream: IO[bytes], separator: bytes) -> Iterator[bytearray]:
    rest, searched = bytearray(), 0
    while block := stream.read(1 << 20):
        rest += block
        while (found := rest.find(separator, searched)) >= 0:
            yield rest[:found]
            del rest[: found + len(separator)]
            searched = 0
        searched = max(0, len(rest) - len(separator) + 1)
        _limited(where, rest)
    yield rest


def _decoded(where: Path | str, data: bytearray) -> str:
    """UTF-8 (a byte order mark is dropped). Raises FormatError for anything else."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = f"byte {error.start:,} (0x{data[error.start]:02x}) is not UTF-8"
    else:
        if "\0" not in text:
            return text
        wrong = f"character {text.index(chr(0)):,} is NUL, as in UTF-16 or in a binary file"
    raise FormatError(
        where, f"it is no UTF-8 text: {wrong}.", "Convert it (`iconv -f latin1 -t utf-8`), or leave it out."
    )


def _field(where: str, line: bytes, field: str) -> str:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise FormatError(where, f"the line is no JSON ({error}).", "Correct it, or take it out.") from None
    if not isinstance(value, dict):
        raise FormatError(where, f"the line is {shown(value)}, and an object with `{field}` was expected.")
    return _text_of(where, value, field)


def _text_of(where: str, row: Mapping[str, Any], field: str) -> str:
    """The text of a row. Raises FormatError if there is none."""
    if field not in row:
        raise FormatError(
            where, f"there is no field `{field}`, only {few(map(shown, row))}.", "Name the right one with --field."
        )
    text = row[field]
    if not isinstance(text, str):
        raise FormatError(
            where, f"`{field}` holds {shown(text)}, and a text was expected.", "Name another with --field."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FormatError(where, f"`{field}` holds half a surrogate pair at character {error.start:,}.") from None
    return text


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """What the readers of the standard library raise, as ours."""
    try:
        yield
    except LoadstoneError:
        raise
    # Of the last two kinds is what tarfile says to numbers in a header that make no sense.
    except (
        EOFError,
        zlib.error,
        lzma.LZMAError,
        tarfile.TarError,
        gzip.BadGzipFile,
        ValueError,
        OverflowError,
    ) as error:
        raise FormatError(path, f"the archive is damaged or cut short ({error}).", "Get it again.") from None
    except OSError as error:
        raise SourceError(f"{path}: it cannot be read ({error.strerror or error}).") from None
