"""`open_checkpoint`: any local file or folder as a `Checkpoint`, its format found from the bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType

from ..errors import FormatError, SourceError
from .base import Checkpoint
from .gguf import Gguf
from .links import leads_out
from .safetensors import Safetensors
from .shards import first_part, open_index, open_split, read_index
from .sniff import Kind, Sniffed, sniff
from .wording import few

# In a folder the first of these that it holds is opened.
_PRECEDENCE = ("safetensors index", "safetensors", "torch index", "torch", "gguf", "bundle", "unsure", "index")
# Among several files of one kind, the names that HuggingFace's `from_pretrained` looks for.
_USUAL = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json")
# What trainers (transformers, accelerate) save beside the weights, in the same format.
_TRAINER_STATE = re.compile(
    r"(training_args|optimizer|scheduler|scaler)(_\d+)?\.(bin|pt)|(rng_state|random_states)(_\d+)?\.(pth|pkl)"
)
_META_PART = re.compile(r"consolidated\.\d\d\.pth")
_SHARD = re.compile(r".+-\d{5}-of-\d{5}\.[a-z]+")


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a file, a folder, or a TensorFlow prefix (`.../model.ckpt`). Reads headers only.

    A folder may hold one checkpoint in several formats: safetensors come before PyTorch's files, then GGUF, then
    TensorFlow's; what is left aside is told in `notes`.

    Raises:
        SourceError: there is nothing at `path`, it cannot be read, or a folder holds no single checkpoint.
        FormatError: the file is damaged, or no checkpoint; the text says what it is.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _open_folder(path)
        if path.is_file():
            return _open_file(path)
        if path.with_name(f"{path.name}.index").is_file():
            return _bundle(path)
        raise SourceError(f"{path}: {_absence(path)}")
    except OSError as error:
        raise SourceError(f"{path}: it cannot be opened: {error}.") from None


def _open_file(path: Path) -> Checkpoint:
    sniffed = sniff(path)
    if sniffed.kind == "index":
        return open_index(path, _open_single)
    if sniffed.kind == "bundle":
        return _bundle(path)
    checkpoint = _open_single(path, sniffed)
    parts = checkpoint.metadata.get("split.count") if checkpoint.format == "gguf" else None
    if isinstance(parts, int) and parts > 1:
        return open_split(checkpoint, parts, _open_single)
    return checkpoint


def _open_single(path: Path, sniffed: Sniffed | None = None) -> Checkpoint:
    """Open a file that holds tensors itself: a shard cannot be an index again."""
    sniffed = sniffed or sniff(path)
    reader = _READERS.get(sniffed.kind)
    if reader is None:
        raise FormatError(path, f"this is {sniffed.what}.", sniffed.hint)
    return reader(path)


def _torch(path: Path) -> Checkpoint:
    from .torch_pickle import TorchPickle

    return TorchPickle(path)


def _bundle(path: Path) -> Checkpoint:
    from .tensor_bundle import TensorBundle

    return TensorBundle(path)


_READERS: Mapping[Kind, Callable[[Path], Checkpoint]] = MappingProxyType(
    {"safetensors": Safetensors, "gguf": Gguf, "torch": _torch, "unsure": _torch}
)


def _absence(path: Path) -> str:
    if path.exists():
        return "it is neither a file nor a folder (a device, a pipe or a socket)."
    if path.is_symlink():
        return f"it is a link to {path.readlink()}, which does not exist."
    folder = path.parent
    if not folder.is_dir():
        return f"there is no such file, and no folder {folder}."
    names = [entry.name for entry in folder.iterdir()]
    near = get_close_matches(path.name, names, n=3, cutoff=0.5)
    return "there is no such file or folder" + (f"; the nearest names there: {', '.join(near)}." if near else ".")


# -- folders


def _open_folder(folder: Path) -> Checkpoint:
    files = sorted(entry for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith("."))
    sniffed = {file: _sniff_readable(file) for file in files}
    groups: dict[str, list[Path]] = {}
    for file, found in sniffed.items():
        groups.setdefault(_group(file) if found.kind == "index" else found.kind, []).append(file)
    best = next((group for group in _PRECEDENCE if group in groups), None)
    if best is None:
        inside = next((folder / name for name in ("best", "latest") if (folder / name).is_dir()), None)
        hint = f" It is a training run; its model is {inside}." if inside else ""
        raise SourceError(f"{folder}: this folder holds no checkpoint.{hint} {_inventory(folder, sniffed)}")
    if best == "bundle":
        chosen, checkpoint = folder, _bundle(folder)
    else:
        chosen = _choose(folder, best, groups[best])
        checkpoint = _open_file(chosen)
    aside = _left_aside(checkpoint, chosen, [file for group in _PRECEDENCE for file in groups.get(group, ())])
    if chosen.is_file() and (elsewhere := leads_out(chosen)):
        checkpoint.notes.append(f"{chosen.name} is a link to {elsewhere}")
    if aside:
        checkpoint.notes.append(f"opened {chosen.name}; left aside in this folder: {few(aside)}")
    return checkpoint


def _sniff_readable(file: Path) -> Sniffed:
    try:
        return sniff(file)
    except OSError as error:
        return Sniffed("other", f"unreadable ({error.strerror})", "Check its permissions.")


def _group(index: Path) -> str:
    """Downloads often fetch every JSON file: an index without its shards must not hide the weights that are there."""
    try:
        shards = dict.fromkeys(read_index(index)[0].values())
    except FormatError:
        return "index"
    kinds = (_sniff_readable(index.with_name(name)).kind for name in shards if index.with_name(name).is_file())
    kind = next(kinds, "other")
    return f"{kind} index" if f"{kind} index" in _PRECEDENCE else "index"


def _choose(folder: Path, group: str, files: list[Path]) -> Path:
    """The one file of a group to open. Raises SourceError if there are several equal ones."""
    usual = [file for name in _USUAL for file in files if file.name == name]
    if usual:
        return usual[0]
    files = [file for file in files if not _TRAINER_STATE.fullmatch(file.name)] or files
    whole = {first_part(file.name) if group == "gguf" else file.name: file for file in reversed(files)}
    if len(whole) == 1:
        return next(iter(whole.values()))
    advice = "Name one of them."
    if all(_META_PART.fullmatch(name) for name in whole):
        advice = "They are Meta's model-parallel parts, which Loadstone does not merge: use the HuggingFace version."
    elif all(_SHARD.fullmatch(name) for name in whole):
        advice = "They look like shards whose index (.index.json) is missing: download it too."
    raise SourceError(f"{folder}: this folder holds {len(whole)} {group} files: {few(sorted(whole))}. {advice}")


def _left_aside(checkpoint: Checkpoint, chosen: Path, files: list[Path]) -> list[str]:
    used = {info.file for info in checkpoint.tensors.values()} | {chosen.name}
    if checkpoint.format == "tensor-bundle":
        return [file.name for file in files if file.name != "checkpoint" and file.suffix != ".index"]
    return [file.name for file in files if file.name not in used]


def _inventory(folder: Path, sniffed: Mapping[Path, Sniffed]) -> str:
    """What the folder holds instead, the telling ones (a failed download, say) before plain texts."""
    order = sorted(
        sniffed, key=lambda file: sniffed[file].what.startswith(("a text", "a JSON file", "a model's config"))
    )
    found = few(f"{file.name} is {sniffed[file].what}" for file in order)
    folders = few(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
    return (f"In it: {found}." if found else "It holds no files.") + (f" Its folders: {folders}." if folders else "")
