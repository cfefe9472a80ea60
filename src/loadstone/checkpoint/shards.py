"""`Sharded`: several files read as one checkpoint, by an index (HuggingFace) or by their names (split GGUF).

`model.safetensors.index.json` and `pytorch_model.bin.index.json` hold {"metadata": {...}, "weight_map": {tensor:
file}} (huggingface_hub). The parts of a split GGUF are called `NAME-00001-of-00003.gguf`, and say
inside which part of how many they are (llama.cpp, `tools/gguf-split`).
"""

from __future__ import annotations

import json
import re
from collections import ChainMap, Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from ..errors import FormatError
from .base import Array, Checkpoint
from .datafile import DataFile
from .links import named_by
from .safetensors import recorded_ties
from .wording import few, shown

_MAX_INDEX = 100_000_000  # bytes
_AGAIN = "Download the missing or changed files again, index included."
_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class Sharded(Checkpoint):
    """The tensors of all `parts`, each read from its own. Metadata that several parts hold comes from the first.

    Args:
        path: the index, or the first part.
        parts: file name -> the opened file.

    Raises:
        FormatError: a tensor lies in two parts, or the parts have different formats.
    """

    def __init__(self, path: Path, parts: Mapping[str, Checkpoint]) -> None:
        super().__init__(path)
        formats = {part.format for part in parts.values()}
        if len(formats) != 1:
            raise FormatError(path, f"its shards have different formats: {', '.join(sorted(formats))}.", _AGAIN)
        (self.format,) = formats
        self.parts = dict(parts)
        self.metadata = ChainMap(*(cast(dict[str, Any], part.metadata) for part in parts.values()))  # read only
        self._owner: dict[str, str] = {}
        twice = []
        for file, part in parts.items():
            for name in stored_names(part):
                if self._owner.setdefault(name, file) != file:
                    twice.append(f"{shown(name)} in {self._owner[name]} and {file}")
            self.notes += part.notes
        if twice:
            raise FormatError(path, f"tensors lie in two shards: {few(twice)}.", _AGAIN)
        for file, part in parts.items():
            self.tensors |= {name: info for name, info in part.tensors.items() if self._owner.get(name) == file}
            self.add_aliases(part.aliases)

    def read(self, name: str) -> Array:
        self.info(name)  # the error for an unknown name speaks of the whole checkpoint
        kept = self.aliases.get(name, name)
        return self.parts[self._owner[kept]].read(kept)

    def add_aliases(self, aliases: Mapping[str, str]) -> None:
        """A name that one shard drops as a duplicate may be stored in another: then it is no alias."""
        for name, kept in aliases.items():
            if name not in self._owner:
                self.aliases[name] = kept
                self.tensors[name] = self.tensors[kept]


def stored_names(part: Checkpoint) -> list[str]:
    return [name for name in part.tensors if name not in part.aliases]


# -- an index file


def open_index(path: Path, open_file: Callable[[Path], Checkpoint]) -> Sharded:
    """Open every shard that an index names, and compare both ways what is listed with what is there.

    Raises:
        FormatError: the index is damaged, or index and shards disagree; the text lists all disagreements.
    """
    weight_map, metadata = read_index(path)
    files = list(dict.fromkeys(weight_map.values()))
    present = {file: shard for file in files if (shard := named_by(path, file)).is_file()}
    missing = [file for file in files if file not in present]
    parts = {file: open_file(shard) for file, shard in present.items()}
    problems = [f"{len(missing)} of its {len(files)} shards are missing: {few(map(shown, missing))}"] if missing else []
    lacking = [f"{shown(n)} ({f})" for n, f in weight_map.items() if f in parts and n not in parts[f].tensors]
    if lacking:
        problems.append(f"{len(lacking)} tensors are listed but are not in their shard: {few(lacking)}")
    stray = [
        f"{shown(name)} ({file})" + (f", which is listed in {weight_map[name]}" if name in weight_map else "")
        for file, part in parts.items()
        for name in stored_names(part)
        if weight_map.get(name) != file
    ]
    if stray:
        problems.append(f"{len(stray)} tensors are in a shard but are not listed there: {few(stray)}")
    if problems:
        raise FormatError(path, f"the index and its shards disagree: {'; '.join(problems)}.", _AGAIN)
    sharded = Sharded(path, parts)
    sharded.metadata = {**sharded.metadata, **metadata}
    sharded.add_aliases(recorded_ties(metadata, sharded.tensors))
    return sharded


def read_index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """`weight_map` (tensor -> file name) and `metadata` of an index.

    Raises FormatError if it is damaged, or if a file name is more than a plain name: an index must not lead to
    files elsewhere.
    """
    file = DataFile(path)
    try:
        index = json.loads(file.read(0, len(file)), object_pairs_hook=_object) if len(file) <= _MAX_INDEX else None
    except (ValueError, RecursionError) as error:
        raise FormatError(path, f"it is not a valid JSON index: {error}.", "Download it again.") from None
    index = index if isinstance(index, dict) else {}
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        problem = 'an index of shards has a "weight_map" from tensor names to file names, and this file has none.'
        raise FormatError(path, problem, "Download it again.")
    for file in set(weight_map.values()):
        if file in ("", ".", "..") or any(character in file for character in "/\\\0"):
            problem = f"it names the shard {shown(file)}, and a shard is a plain file name in the index's own folder."
            raise FormatError(path, problem, "Do not trust it.")
    return weight_map, metadata if isinstance(metadata, dict) else {}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [name for name, times in Counter(name for name, _ in pairs).items() if times > 1]
    if twice:
        raise ValueError(f"listed twice: {few(map(shown, twice))}")
    return dict(pairs)


# -- a split GGUF


def first_part(name: str) -> str:
    """`NAME-00001-of-00003.gguf` for any part's file name; other names as they are."""
    match = _PART_NAME.fullmatch(name)
    return f"{match['stem']}-00001-of-{match['count']}.gguf" if match else name


def open_split(part: Checkpoint, count: int, open_file: Callable[[Path], Checkpoint]) -> Sharded:
    """Open all parts of a split GGUF through any of them. Raises FormatError if one is missing or misnamed."""
    match = _PART_NAME.fullmatch(part.path.name)
    if not match or int(match["count"]) != count:
        raise FormatError(
            part.path,
            f"it is one of {count} parts of a split GGUF, and its name does not tell where the others are.",
            f"Name them NAME-00001-of-{count:05d}.gguf and so on.",
        )
    files = [f"{match['stem']}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    missing = [file for file in files if not named_by(part.path, file).is_file()]
    if missing:
        raise FormatError(
            part.path, f"{len(missing)} of the {count} parts of this GGUF are missing: {few(missing)}.", _AGAIN
        )
    parts = {file: open_file(part.path.with_name(file)) for file in files}
    for number, (file, opened) in enumerate(parts.items()):
        said = (opened.metadata.get("split.no"), opened.metadata.get("split.count"))
        if said != (number, count):
            problem = f"{file} should be part {number} of {count} (split.no, split.count), and says {said}."
            raise FormatError(part.path, problem, _AGAIN)
    sharded = Sharded(part.path.with_name(files[0]), parts)
    announced = sharded.metadata.get("split.tensors.count", len(sharded.tensors))
    if announced != len(sharded.tensors):
        problem = f"its parts hold {len(sharded.tensors)} tensors together, and split.tensors.count says {announced}."
        raise FormatError(sharded.path, problem, _AGAIN)
    return sharded
