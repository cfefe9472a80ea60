"""`Request`: what a user asks for, as data. Flags and a TOML or JSON file make one; run.json keeps it for a resume."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .settings import Settings

KINDS = ("text", "sft", "classify")


@dataclass(frozen=True)
class DataRequest:
    """What is learnt from.

    Attributes:
        sources: text files, folders, JSONL, archives, hub data sets; or one folder that `loadstone prepare` made.
        kind: `text` (next tokens), `sft` (instructions or chats, loss on the answers) or `classify` (text and label).
        tokenizer: for `text` that is not prepared: gpt2, char, bpe:N, or a SRC; empty: the model's own.
        validation: share of the documents that is kept for evaluation.
        validation_sources: evaluated on instead.
        text_field: of JSONL.
        style: how instructions are written: chat, alpaca or plain (see data/sft.py).
        balance: as many texts of each class.
    """

    sources: tuple[str, ...] = ()
    kind: str = "text"
    tokenizer: str = ""
    validation: float = 0.05
    validation_sources: tuple[str, ...] = ()
    text_field: str = "text"
    style: str = "auto"
    balance: bool = False


@dataclass(frozen=True)
class Tuning:
    """What of a loaded model is trained (see finetune/)."""

    strategy: str = "full"
    layer_decay: float = 1.0
    untie: bool = False
    lora: int = 0  # rank; 0: no adapter
    lora_alpha: float = 0.0  # 0: twice the rank
    lora_targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """One run. `model` is for training from scratch: `preset` and config fields; `source` for fine-tuning."""

    source: str = ""
    model: Mapping[str, Any] = field(default_factory=dict)
    data: DataRequest = DataRequest()
    tuning: Tuning = Tuning()
    settings: Settings = field(default_factory=Settings)
    device: str = "cpu"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def merged(self, values: Mapping[str, Any], where: str) -> Request:
        """A copy with the given values over it. Raises ConfigError for unknown names and wrong kinds."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where}: expected names and values, found {values!r}.")
        parts = {"data": self.data, "tuning": self.tuning}
        changed: dict[str, Any] = {}
        for key, value in values.items():
            if key in ("source", "device"):
                changed[key] = _checked(value, str, f"{where}: {key}")
            elif key in ("model", "settings", *parts) and not isinstance(value, Mapping):
                raise ConfigError(f"{where}: [{key}] must be a table of names and values, found {value!r}.")
            elif key == "model":
                lists = {name: tuple(item) for name, item in value.items() if isinstance(item, list)}  # as of JSON
                changed[key] = {**self.model, **value, **lists}
            elif key == "settings":
                changed[key] = self.settings.merged(value, where)
            elif key in parts:
                changed[key] = _replaced(parts[key], value, f"{where}: [{key}]")
            else:
                known = ", ".join(("source", "device", "model", "settings", *parts))
                raise ConfigError(f"{where}: there is no {key!r}; known: {known}.")
        return replace(self, **changed)

    def require_sense(self) -> None:
        """Raises ConfigError if something is said that this kind of run would pass over."""
        data, tuning = self.data, self.tuning
        for wrong, problem in (
            (data.kind not in KINDS, f"[data] kind {data.kind!r} is none of {', '.join(KINDS)}."),
            (data.style != "auto" and data.kind != "sft", "a style is that of instructions and chats (--sft)."),
            (data.balance and data.kind != "classify", "classes are balanced where there are labels (--classify)."),
            (not self.source and tuning != Tuning(), "[tuning] is for a pretrained model: loadstone finetune SRC."),
            (
                not tuning.lora and (tuning.lora_alpha or tuning.lora_targets),
                "lora_alpha and lora_targets say how an adapter is made, and none is: its rank is --lora RANK.",
            ),
        ):
            if wrong:
                raise ConfigError(problem)

    def changes(self, other: Request) -> list[str]:
        """What differs so that a resumed run would not be the same run."""
        mine, theirs = self.as_dict(), other.as_dict()
        differ = [f"source: {self.source!r} instead of {other.source!r}"] * (self.source != other.source)
        for part in ("model", "data", "tuning"):
            for name in {**theirs[part], **mine[part]}:
                ours, old = mine[part].get(name), theirs[part].get(name)
                if ours != old:
                    differ.append(f"{part}.{name}: {ours!r} instead of {old!r}")
        return differ + self.settings.changes(other.settings)


def read_request(path: Path) -> dict[str, Any]:
    """A TOML or JSON file. Raises ConfigError if it is neither."""
    try:
        text = path.read_text(encoding="utf-8")
    except IsADirectoryError:
        raise ConfigError(
            f"{path}: this is a folder, and a training config is a file. Data are named with --data."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the training config cannot be read ({error}).") from None
    try:
        if path.suffix == ".json":
            values = json.loads(text)
        elif sys.version_info >= (3, 11):
            import tomllib

            values = tomllib.loads(text)
        else:
            import tomli

            values = tomli.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not {'JSON' if path.suffix == '.json' else 'TOML'} ({error}).") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a table of names and values, found {type(values).__name__}.")
    return values


def _replaced(part: Any, values: Mapping[str, Any], where: str) -> Any:
    current = asdict(part)
    if unknown := sorted(values.keys() - current.keys()):
        raise ConfigError(f"{where}: there is no {', '.join(unknown)}; known: {', '.join(current)}.")
    return replace(
        part, **{key: _checked(value, type(current[key]), f"{where} {key}") for key, value in values.items()}
    )


def _checked(value: Any, kind: type, where: str) -> Any:
    if kind is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
            raise ConfigError(f"{where}: expected texts, found {value!r}.")
        return tuple(items)
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ConfigError(f"{where}: expected {kind.__name__}, found {value!r}.")
    return float(value) if isinstance(value, int) and kind is float else value
