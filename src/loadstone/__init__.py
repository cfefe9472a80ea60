"""Load any GPT checkpoint, prove that it loaded right, and run it.

The public names. They are imported on first use, so that `import loadstone` (and every command that reads headers
only) does not wait for torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .checkpoint import open_checkpoint
    from .checkpoint.base import Checkpoint, TensorInfo
    from .config import GPTConfig, Rope
    from .convert import convert
    from .diff import diff
    from .errors import LoadstoneError
    from .generate import Completion, Generation, Session, Stream, generate, generate_text, generate_texts, stream_text
    from .load import load, load_model, load_tokenizer_for, open_source
    from .model import GPT
    from .positions import KVCache
    from .sampling import Sampling
    from .tokenizer import Tokenizer
    from .verify import VerifyReport, verify

__all__ = [
    "GPT",
    "Checkpoint",
    "Completion",
    "GPTConfig",
    "Generation",
    "KVCache",
    "LoadstoneError",
    "Rope",
    "Sampling",
    "Session",
    "Stream",
    "TensorInfo",
    "Tokenizer",
    "VerifyReport",
    "__version__",
    "convert",
    "diff",
    "generate",
    "generate_text",
    "generate_texts",
    "load",
    "load_model",
    "load_tokenizer_for",
    "open_checkpoint",
    "open_source",
    "stream_text",
    "verify",
]

_HOME = {
    "open_checkpoint": "checkpoint",
    "Checkpoint": "checkpoint.base",
    "TensorInfo": "checkpoint.base",
    "GPTConfig": "config",
    "Rope": "config",
    "LoadstoneError": "errors",
    "Completion": "generate",
    "Generation": "generate",
    "Session": "generate",
    "Stream": "generate",
    "generate_text": "generate",
    "generate_texts": "generate",
    "stream_text": "generate",
    "load_model": "load",
    "load_tokenizer_for": "load",
    "open_source": "load",
    "GPT": "model",
    "KVCache": "positions",
    "Sampling": "sampling",
    "Tokenizer": "tokenizer",
    "VerifyReport": "verify",
}
# Functions that bear their module's name: `loadstone.load` is the function, whoever imported the module first.
_SAME_NAME = ("convert", "diff", "generate", "load", "verify")


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SAME_NAME and isinstance(value, ModuleType):  # the import system publishing a submodule
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        home = name if name in _SAME_NAME else _HOME.get(name)
        if home is None:
            raise AttributeError(f"module 'loadstone' has no attribute {name!r}")
        value = getattr(import_module(f".{home}", __name__), name)
        setattr(self, name, value)
        return value


sys.modules[__name__].__class__ = _Package
