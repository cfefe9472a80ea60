"""`adapter.json`: what an adapter is, and which base it belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..config import GPTConfig, from_own, to_own
from ..errors import ConfigError, FormatError, SourceError
from .lora import LoRA

VERSION = 1
RECORD, WEIGHTS = "adapter.json", "adapter_model.safetensors"
_MAX_BYTES = 10_000_000
_FOLDER = f"An adapter is a folder with {RECORD} and {WEIGHTS}."


@dataclass(frozen=True)
class Adapter:
    """A saved adapter, without its tensors.

    Attributes:
        lora: how it is built.
        source: the base, as its user named it.
        config: the base's; None for an adapter that PEFT wrote.
        weights: hash of the base's parameters, but for the `whole` ones; None likewise.
        whole: parameters that were trained themselves (`score.weight`, say); the file holds all of each.
        labels: of a classifier, in the order of its scores.
    """

    lora: LoRA
    source: str
    config: GPTConfig | None = None
    weights: str | None = None
    whole: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()


def write(adapter: Adapter, digest: str, for_peft: bool, path: Path) -> None:
    """Write the record beside a weights file with the hash `digest`, in PEFT's names or ours."""
    config = to_own(adapter.config) if adapter.config else None
    values = {
        "adapter": VERSION,
        "lora": asdict(adapter.lora),
        "base": {"source": adapter.source, "config": config, "weights": adapter.weights},
        "whole": adapter.whole,
        "labels": adapter.labels,
        "peft": for_peft,
        "sha256": digest,
    }
    write_json(path / RECORD, values)


def read(path: Path) -> tuple[Adapter, GPTConfig, str, bool]:
    """What `write` wrote to a folder: the adapter, its base's config, the hash, and whether the names are PEFT's.

    Raises FormatError unless everything is there and of the right kind, SourceError if there is no such file.
    """
    values = read_json(path / RECORD)
    lora, base = values.get("lora"), values.get("base")
    if (
        values.get("adapter") != VERSION
        or not isinstance(lora, dict)
        or lora.keys() != {field.name for field in fields(LoRA)}
        or not _is_texts(lora["targets"])
        or not isinstance(base, dict)
        or not isinstance(base.get("config"), dict)
        or not all(isinstance(text, str) for text in (base.get("source"), base.get("weights"), values.get("sha256")))
        or not _is_texts(values.get("whole"))
        or not _is_texts(values.get("labels"))
        or not isinstance(values.get("peft"), bool)
    ):
        raise FormatError(path / RECORD, f"it is no record of an adapter of version {VERSION}.", "Save it again.")
    try:
        settings = LoRA(**{**lora, "targets": tuple(lora["targets"])})
        config = from_own(base["config"], "base")
    except ConfigError as error:
        raise FormatError(path / RECORD, f"it describes an adapter that cannot be: {error}") from None
    whole, labels = tuple(values["whole"]), tuple(values["labels"])
    adapter = Adapter(settings, base["source"], config, base["weights"], whole, labels)
    return adapter, config, values["sha256"], values["peft"]


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FormatError for anything else, SourceError if there is no such file."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError("too large")
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{path}: there is no such file. {_FOLDER}") from None
    except OSError as error:
        raise FormatError(path, f"it cannot be read ({error.strerror}).", "Check its permissions.") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(path, f"it is no valid JSON ({error}).", "Copy it again.") from None
    if not isinstance(values, dict):
        raise FormatError(path, "it holds no JSON object.", "Copy it again.")
    return values


def require_weights(path: Path) -> Path:
    """The weights file of a folder. Raises SourceError if there is none."""
    if not (path / WEIGHTS).is_file():
        raise SourceError(f"{path / WEIGHTS}: there is no such file. {_FOLDER}")
    return path / WEIGHTS
