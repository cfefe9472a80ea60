"""The certificate's file: where it lies, how it is sealed, and how it is read (`certificate.py` says what is in it)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FormatError, SourceError

NAME = "loadstone.json"
VERSION = 1
_MAX_BYTES = 200_000_000
_AGAIN = "Convert the checkpoint again, or remove this file."


def beside(path: Path) -> Path:
    """Where the certificate of a folder or file is."""
    return path / NAME if path.is_dir() else path.with_name(f"{path.name}.{NAME}")


def write(values: Mapping[str, Any], path: Path) -> None:
    sealed = {**values, "seal": _seal(values)}
    path.write_text(json.dumps(sealed, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read(file: Path) -> dict[str, Any]:
    """A certificate. Raises SourceError if it is not there, FormatError if it is damaged or was edited."""
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ValueError("too large")
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{file}: there is no such certificate.") from None
    except OSError as error:
        raise FormatError(file, f"it cannot be read ({error.strerror}).", "Check its permissions.") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(file, f"it is no valid JSON ({error}).", _AGAIN) from None
    if not isinstance(values, dict) or values.get("certificate") != VERSION or not _is_whole(values):
        raise FormatError(file, f"it is no certificate of version {VERSION}.", _AGAIN)
    if values.pop("seal", None) != _seal(values):
        raise FormatError(file, "it was changed since the conversion wrote it (its own hash differs).", _AGAIN)
    return values


def _seal(values: Mapping[str, Any]) -> str:
    """Against accidents and edits, not against forgers: whoever can write the file can seal it too."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _is_whole(values: Mapping[str, Any]) -> bool:
    """Whether what its readers use is there and of the right kinds."""
    written, tensors, aliases = values.get("written"), values.get("tensors"), values.get("aliases")
    if not all(isinstance(part, dict) for part in (written, tensors, aliases, values.get("config"))):
        return False
    files = written.get("files")  # type: ignore[union-attr]
    if not isinstance(files, dict) or not files or not all(Path(name).name == name for name in files):
        return False
    entries = [*files.values(), *tensors.values()]  # type: ignore[union-attr]
    whole = all(isinstance(entry, dict) and isinstance(entry.get("sha256"), str) for entry in entries)
    return whole and all(type(entry.get("bytes")) is int and entry["bytes"] >= 0 for entry in files.values())
