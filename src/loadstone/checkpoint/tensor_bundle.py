"""`TensorBundle`: reads TensorFlow checkpoints (V2, "tensor bundles") such as OpenAI's GPT-2, without TensorFlow.

On disk: `model.ckpt.index` (names, shapes, places; see `bundle_index.py`), `model.ckpt.data-00000-of-00001` (the bytes,
a file per shard), and the text file `checkpoint`, which names the newest prefix (`model.ckpt`). OpenAI adds
`hparams.json`, the model's configuration.
"""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from ..errors import FormatError, SourceError
from .base import DTYPES, Array, Checkpoint, TensorInfo, view
from .bundle_index import Entry, Piece, read_index
from .datafile import DataFile
from .links import named_by
from .sstable import MAGIC, masked_crc32c

_SHARD_SUFFIX = re.compile(r"\.data-\d{5,}-of-\d{5,}$")
# A line of CheckpointState in protobuf's text format, where a string may hold C escapes.
_STATE_LINE = re.compile(rb'^[ \t]*model_checkpoint_path[ \t]*:[ \t]*"((?:[^"\\\n]|\\.)*)"', re.MULTILINE)
_ESCAPE = re.compile(rb"\\([0-7]{1,3}|.)")
_TEXT_LIMIT = 1 << 20  # bytes; both text files are far smaller
_AGAIN = "Download or copy it again."


class TensorBundle(Checkpoint):
    """A TensorFlow checkpoint: an index and its data shards.

    All its numbers are in `tensors`, optimizer slots and `global_step` included. What numpy cannot hold (strings, such
    as Keras' object graph) is left out and noted. `metadata["hparams"]` is `hparams.json`, if there is one.

    Args:
        path: the folder, its `checkpoint` file, the `.index` file, a data shard, or the prefix (`.../model.ckpt`).

    Raises:
        SourceError: there is no checkpoint, or no single one, or it cannot be opened.
        FormatError: a file is damaged, incomplete, or of a kind that Loadstone does not read.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(Path(path), format="tensor-bundle")
        try:
            index = find_index(self.path)
            shards, self._entries = read_index(index)
            prefix = index.name.removesuffix(".index")
            used = sorted({piece.shard for entry in self._entries.values() for piece in entry.pieces})
            self._files = {i: named_by(index, f"{prefix}.data-{i:05d}-of-{shards:05d}") for i in used}
            self._check_sizes()
            # A shard of nothing but empty tensors is empty itself, and has nothing to be mapped.
            self._shards = {i: DataFile(file) for i, file in self._files.items() if file.stat().st_size}
            hparams = index.with_name("hparams.json")
            if hparams.is_file():
                self.metadata = {"hparams": _json_object(hparams)}
        except OSError as error:
            raise SourceError(f"{self.path}: it cannot be opened: {error}.") from None
        self._verified: set[Piece] = set()
        self._list_tensors()

    def read(self, name: str) -> Array:
        """The tensor: a view of its shard, mapped, or a copy if it is unaligned or a partitioned variable.

        The first reading compares the CRC32C of its bytes and raises FormatError if it differs.
        """
        dtype = DTYPES[self.info(name).dtype]
        entry = self._entries[name]
        parts = [view(self._bytes(name, piece), 0, piece.shape, dtype) for piece in entry.pieces]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, entry.axis)

    def _bytes(self, name: str, piece: Piece) -> memoryview:
        shard = self._shards.get(piece.shard)
        data = shard.tensor(piece.offset, piece.nbytes) if shard else memoryview(b"")
        if piece not in self._verified:
            found = masked_crc32c(data)
            if found != piece.crc32c:
                raise FormatError(
                    self._files[piece.shard],
                    f"tensor {name!r} ({piece.nbytes} bytes at offset {piece.offset}) is damaged: "
                    f"masked CRC32C {piece.crc32c:08x} expected, {found:08x} found.",
                    _AGAIN,
                )
            self._verified.add(piece)
        return data

    def _check_sizes(self) -> None:
        ends: dict[int, tuple[int, str]] = {}  # shard -> where its last tensor ends, and that tensor's name
        for name, entry in self._entries.items():
            for piece in entry.pieces:
                end = (piece.offset + piece.nbytes, name)
                ends[piece.shard] = max(end, ends.get(piece.shard, end))
        for shard, (expected, name) in ends.items():
            file = self._files[shard]
            size = file.stat().st_size if file.is_file() else None
            if size is None or size < expected:
                raise FormatError(
                    file,
                    f"this data shard {'is missing' if size is None else f'has {size} bytes'}, and it should have "
                    f"{expected} (tensor {name!r} ends there): the download is incomplete.",
                    _AGAIN,
                )

    def _list_tensors(self) -> None:
        first: dict[Entry, str] = {}
        left_out: dict[str, list[str]] = {}
        for name, entry in self._entries.items():
            if not entry.readable:
                left_out.setdefault(entry.dtype, []).append(name)
                continue
            nbytes = sum(piece.nbytes for piece in entry.pieces)
            files = dict.fromkeys(self._files[piece.shard].name for piece in entry.pieces)
            self.tensors[name] = TensorInfo(entry.shape, entry.dtype, nbytes, ", ".join(files))
            if nbytes and first.setdefault(entry, name) != name:
                self.aliases[name] = first[entry]
        for dtype, names in left_out.items():
            shown = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            self.notes.append(f"left out, as their type {dtype} holds no plain numbers: {shown}")


def find_index(path: Path) -> Path:
    """The `.index` file that a folder, a prefix, or any file of a TensorFlow checkpoint stands for.

    Raises SourceError if there is none, or several and no `checkpoint` file that chooses.
    """
    if path.is_dir():
        return _index_in_folder(path)
    for name in (f"{path.name}.index", _SHARD_SUFFIX.sub(".index", path.name)):
        if name != path.name and path.with_name(name).is_file():
            return path.with_name(name)
    if not path.is_file():
        raise SourceError(f"{path}: there is no such file or folder, and no {path.name}.index beside it.")
    if path.suffix == ".index" or _ends_with_magic(path):
        return path
    return _index_from_state(path)


def _index_in_folder(folder: Path) -> Path:
    state = folder / "checkpoint"
    if state.is_file():
        return _index_from_state(state)
    found = sorted(file.name for file in folder.glob("*.index") if file.is_file())
    if not found:
        raise SourceError(f"{folder}: this folder holds no TensorFlow checkpoint (no file `checkpoint`, no `*.index`).")
    if len(found) > 1:
        raise SourceError(
            f"{folder}: this folder holds {len(found)} TensorFlow checkpoints and no file `checkpoint` that chooses: "
            f"{', '.join(found)}. Name one of these files."
        )
    return folder / found[0]


def _index_from_state(state: Path) -> Path:
    """What a `checkpoint` file points to. It never leads out of its folder, whatever machine it was written on."""
    stored = _stored_prefix(state)
    elsewhere = next((pure for pure in (PurePosixPath(stored), PureWindowsPath(stored)) if pure.is_absolute()), None)
    prefix = state.parent / (elsewhere.name if elsewhere else stored)
    if ".." in PureWindowsPath(stored).parts or prefix == state.parent or "\0" in stored:
        raise FormatError(
            state,
            f"its model_checkpoint_path {stored!r} names no file in this folder, and Loadstone does not follow it out.",
            "Name the .index file itself.",
        )
    # TensorFlow's old V1 files have no suffix: reading one says so.
    for candidate in (prefix.with_name(f"{prefix.name}.index"), prefix):
        if candidate.is_file():
            return named_by(state, str(candidate.relative_to(state.parent)))
    raise SourceError(
        f"{state}: it names the checkpoint {stored!r}, and there is no {prefix.name}.index in {prefix.parent}. "
        "Copy the missing files there, or name another .index file."
    )


def _stored_prefix(state: Path) -> str:
    with state.open("rb") as file:
        line = _STATE_LINE.search(file.read(_TEXT_LIMIT))
    try:
        if line:
            return _ESCAPE.sub(_unescaped, line[1]).decode()
    except UnicodeDecodeError:
        pass
    raise FormatError(
        state,
        'it is neither the index of a TensorFlow checkpoint nor a text file with a line model_checkpoint_path: "...".',
        "Another format, or a damaged file.",
    )


def _unescaped(escape: re.Match[bytes]) -> bytes:
    code = escape[1]
    return bytes([int(code, 8) & 0xFF]) if code[:1] in b"01234567" else code


def _ends_with_magic(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - len(MAGIC), 0))
        return file.read(len(MAGIC)) == MAGIC


def _json_object(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        text = file.read(_TEXT_LIMIT + 1)
    try:
        value = json.loads(text) if len(text) <= _TEXT_LIMIT else None
    except (ValueError, RecursionError) as error:
        raise FormatError(path, f"it is not valid JSON: {error}.", _AGAIN) from None
    if not isinstance(value, dict):
        raise FormatError(path, f"it should be one JSON object of at most {_TEXT_LIMIT} bytes, and is not.", _AGAIN)
    return value
