"""Adapter files: what LoRA learnt, apart from the base, and which base it belongs to.

A folder holds `adapter.json` (how the adapter is built, the base's config and the hash of its weights) and
`adapter_model.safetensors`; where PEFT can read it (see `peft.py`), `adapter_config.json` as well.

Why not PEFT's format alone: it knows its base by name only, so an adapter on another revision, another size of
vocabulary or another model of the same shape loads without a word and talks nonsense.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint import open_checkpoint
from ..checkpoint.atomic import atomic_folder
from ..checkpoint.base import Array
from ..checkpoint.memory import Arrays
from ..checkpoint.streaming import chunks
from ..checkpoint.wording import few, shown
from ..checkpoint.write_safetensors import write_safetensors_file
from ..config import GPTConfig
from ..errors import FormatError, LoadstoneError
from ..hashing import hash_file
from ..load import ModuleCheckpoint, to_tensor
from ..model import GPT
from . import peft, record
from .classifier import Classifier
from .lora import adapted, add_lora, target_layers
from .record import RECORD, WEIGHTS, Adapter
from .selectors import LORA_PARTS, find_gpt
from .strategy import untie

_FILES = {RECORD, WEIGHTS, peft.CONFIG}
_NOT_THE_FUNCTION = ("bos_id", "eos_ids")  # config fields that dialects record differently


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    base: str,
    *,
    force: bool = False,
    beside: Callable[[Path], None] | None = None,
) -> Adapter:
    """Write a model's adapters, and whatever else of it is trainable, to a folder of its own; all of it or nothing.

    Args:
        model: one that `add_lora` made, or a classifier around it; it is left as it is.
        folder: new or empty; with `force` also one that holds an adapter and nothing else.
        base: where the base came from, for whoever merges later.
        beside: called with the folder before it takes its name, to add files.

    Raises LoadstoneError if there is no adapter, nothing of the base is frozen, or the folder cannot be written.
    """
    path, layers = Path(folder), [layer for _, layer in adapted(model)]
    if not layers:
        raise LoadstoneError(f"{path}: the model has no adapter to save. Save the model itself.")
    own = [name for name, _ in model.named_parameters() if name.endswith(LORA_PARTS)]
    rest = {name: parameter for name, parameter in model.named_parameters() if not name.endswith(LORA_PARTS)}
    # No base has a score layer, so it belongs to the adapter whether it learns or not.
    whole = [name for name, parameter in rest.items() if parameter.requires_grad or name.startswith("score.")]
    if len(whole) == len(rest):
        raise LoadstoneError(
            f"{path}: every weight of the base is trainable too, so an adapter would hold all of it. Merge it and save "
            "the model, or train with the strategy `lora`."
        )
    prefix, gpt = find_gpt(model)
    settings, labels = layers[0].settings, model.labels if isinstance(model, Classifier) else ()
    adapter = Adapter(settings, base, gpt.config, fingerprint(model, whole), tuple(whole), labels)
    names = None if whole or prefix else peft.names(gpt, settings)
    source = ModuleCheckpoint(model)
    arrays = {names[name] if names else name: source.read(name) for name in (*own, *whole)}
    with atomic_folder(path, replace=force and _is_adapter(path)) as temporary:
        write_safetensors_file(Arrays(path, arrays), temporary / WEIGHTS)
        if names:
            record.write_json(temporary / peft.CONFIG, peft.config(gpt, settings, base))
        record.write(adapter, hash_file(temporary / WEIGHTS), bool(names), temporary)
        if beside:
            beside(temporary)
    return adapter


def load_adapter(model: nn.Module, folder: str | Path) -> Adapter:
    """Put a saved adapter beside the layers of its base, ready to run, to train on or to merge.

    Where it was trained on an untied model (see `untie`), the model is untied too.

    Args:
        model: the base, in any dialect's copy, in the type it had in training or one that holds the same values; for a
            classifier's adapter, `around` the base.
        folder: what `save_adapter` or PEFT wrote.

    Raises LoadstoneError if the files are damaged or belong to another base; the model is then as it was.
    """
    path = Path(folder)
    if not (path / RECORD).is_file() and (path / peft.CONFIG).is_file():
        checkpoint = open_checkpoint(record.require_weights(path))
        found = peft.read(path, find_gpt(model)[1], record.read_json(path / peft.CONFIG), checkpoint)
        adapter, tensors = Adapter(found.lora, found.base), found.tensors
    else:
        adapter, tensors = _read(model, path)
    if adapter.config and not adapter.config.tied:
        untie(model)
    add_lora(model, adapter.lora)
    _copy(model, tensors)
    for name in adapter.whole:
        model.get_parameter(name).requires_grad_()
    return adapter


def fill_adapter(model: nn.Module, folder: str | Path) -> None:
    """Load a saved adapter into a model that has one already, as a run does that goes on.

    Raises LoadstoneError like `load_adapter`, and if the two are built differently.
    """
    adapter, tensors = _read(model, Path(folder))
    if wrong := [layer.settings for _, layer in adapted(model) if layer.settings != adapter.lora]:
        mine, saved = asdict(wrong[0]), asdict(adapter.lora)
        differ = few(f"{name} is {value}, not {saved[name]}" for name, value in mine.items() if value != saved[name])
        raise LoadstoneError(f"{folder}: this adapter is built in another way than the model's: {differ}.")
    _copy(model, tensors)


def around(gpt: GPT, folder: str | Path) -> GPT | Classifier:
    """What an adapter stands beside: the model itself, or a new classifier around it, with the adapter's labels."""
    if not (Path(folder) / RECORD).is_file():
        return gpt
    adapter = record.read(Path(folder))[0]
    return Classifier(gpt, adapter.labels, bias="score.bias" in adapter.whole) if adapter.labels else gpt


def fingerprint(model: nn.Module, without: Iterable[str] = (), *, untied: bool = False) -> str:
    """SHA-256 of the base's names, shapes and values; adapters and the parameters in `without` do not count.

    Values are hashed as float32, so bf16 weights and their float32 copy are the same base, whatever dialect they
    were read from. With `untied`, as if `untie(model)` had been called.
    """
    digest, excluded = hashlib.sha256(), frozenset(without)
    for name, tensor in _base(model, untied):
        if name not in excluded:
            digest.update(f"{name} {list(tensor.shape)}\n".encode())
            rows = max(1, (4 << 20) // max(1, tensor[:1].numel()))
            for part in torch.split(tensor.detach(), rows):
                values: Array = part.to(torch.promote_types(tensor.dtype, torch.float32)).cpu().numpy()
                for chunk in chunks(values):
                    digest.update(chunk)
    return digest.hexdigest()


def _base(model: nn.Module, untied: bool) -> Iterator[tuple[str, Tensor]]:
    """The parameters of the base in the order of their names."""
    prefix, gpt = find_gpt(model)
    named: dict[str, Tensor] = dict(model.named_parameters())
    if untied and gpt.head is None:
        named[f"{prefix}head.weight"] = gpt.tok_emb.weight
    yield from sorted((name, tensor) for name, tensor in named.items() if not name.endswith(LORA_PARTS))


@torch.no_grad()
def _copy(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        model.get_parameter(name).copy_(tensor)


# -- checks


def _read(model: nn.Module, path: Path) -> tuple[Adapter, dict[str, Tensor]]:
    """An adapter of ours and its tensors by the model's names, all checked."""
    adapter, config, digest, for_peft = record.read(path)
    _require_base(model, adapter, config, path)
    checkpoint = open_checkpoint(record.require_weights(path))
    if hash_file(path / WEIGHTS) != digest:
        raise FormatError(path / WEIGHTS, f"it is not the file that {RECORD} was written for.", "Copy both again.")
    with torch.device("meta"):
        base = GPT(config)  # the model as it will be, untied or not
    shapes = _shapes(model, base, adapter)
    names = (peft.names(base, adapter.lora) if for_peft else None) or {}
    stored = {names.get(name, name): name for name in shapes}
    found = {name: info.shape for name, info in checkpoint.tensors.items()}
    if found != {name: shapes[own] for name, own in stored.items()}:
        wrong = few(map(shown, sorted(found.keys() ^ stored.keys()))) or "shapes differ"
        raise FormatError(path / WEIGHTS, f"its tensors are not those that {RECORD} announces: {wrong}.", "Save again.")
    return adapter, {own: to_tensor(checkpoint.read(name)) for name, own in stored.items()}


def _require_base(model: nn.Module, adapter: Adapter, config: GPTConfig, path: Path) -> None:
    """Raises LoadstoneError if the adapter was trained beside another config or other weights."""
    untied = not config.tied
    mine = asdict(find_gpt(model)[1].config) | ({"tied": False} if untied else {})
    given = {name: value for name, value in asdict(config).items() if name not in _NOT_THE_FUNCTION}
    differ = [name for name, value in given.items() if mine[name] != value]
    origin = f"It was trained beside {shown(adapter.source)}: give that one."
    if differ:
        listed = few(f"{name} is {shown(mine[name])}, not {shown(given[name])}" for name in differ)
        raise LoadstoneError(f"{path}: this adapter belongs to another base: {listed}. {origin}")
    if missing := [name for name in adapter.whole if name not in dict(_base(model, untied))]:
        raise LoadstoneError(
            f"{path}: this adapter comes with {few(map(shown, missing))}, which the model does not have. A "
            "classifier's adapter needs the classifier."
        )
    if fingerprint(model, adapter.whole, untied=untied) != adapter.weights:
        raise LoadstoneError(
            f"{path}: this adapter belongs to a base of the same shape with other weights (SHA-256 differs), and "
            f"beside these it would talk nonsense. {origin} If it is, load it in the type that it had in training."
        )


def _shapes(model: nn.Module, base: GPT, adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """What the file must hold, by the model's names."""
    shapes, rank, prefix = {}, adapter.lora.rank, find_gpt(model)[0]
    named = dict(_base(model, not base.config.tied))
    for name, layer in target_layers(base, adapter.lora).items():
        shapes[f"{prefix}{name}.lora_a"] = (rank, layer.in_features)
        shapes[f"{prefix}{name}.lora_b"] = (layer.out_features, rank)
    return shapes | {name: tuple(named[name].shape) for name in adapter.whole}


def _is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter and nothing else, so that no more than that is lost with it."""
    try:
        names = {entry.name for entry in path.iterdir()}
    except OSError:
        return False
    return RECORD in names and names <= _FILES
