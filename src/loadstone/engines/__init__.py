"""Engines: ways to run a model. The table says which there are; nothing heavy is imported before one is started."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import LoadstoneError
from . import probes
from .protocol import Cache, Engine, EngineMissingError

if TYPE_CHECKING:
    from ..config import GPTConfig
    from ..model import GPT
    from ..weightmap import Identity

__all__ = [
    "AUTO",
    "ENGINES",
    "Cache",
    "Engine",
    "EngineMissingError",
    "Kind",
    "best_engine",
    "engine_of",
    "open_engine",
    "require_engine",
    "start_engine",
]


@dataclass(frozen=True)
class Kind:
    """An entry of the table.

    Attributes:
        about: what it is, in one line.
        home: `module:Class` in this package; the class is called with a model, or, `from_source`, see `open_engine`.
        missing: why it cannot run on this machine, and what to do about it; empty if it can. Imports nothing heavy.
        devices: where it runs; empty means wherever torch does.
        dtypes: what it computes in; empty means whatever torch does.
        here: how it runs on this machine, where there is something to tell.
    """

    about: str
    home: str
    missing: Callable[[], str] = lambda: ""
    devices: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    from_source: bool = False
    here: Callable[[], str] = lambda: ""


AUTO = "auto"  # `best_engine` chooses
ENGINES: dict[str, Kind] = {
    "torch": Kind("the model as it is written, operation by operation; everything works", "eager:start"),
    "compile": Kind(
        "torch.compile with static shapes: warms up for a minute or so, then runs faster", "compiled:CompileEngine",
        probes.compiler,
    ),
    "max": Kind(
        "Modular's MAX: one graph, compiled once per model shape and cached on disk", "max_engine:MaxEngine",
        probes.max_package, ("cpu",), ("float32",),
    ),
    "native": Kind(
        "C++ for this machine's CPU, weights packed for it; GGUF's blocks as stored, 8 and 4 bits (--dtype q8, q4)",
        "native_engine:start", probes.native, ("cpu",), ("float32", "bfloat16", "float16", "q8", "q4"),
        from_source=True, here=probes.native_here,
    ),
}  # fmt: skip


def engine_of(model: GPT | Engine) -> Engine:
    """An engine as it is; a model with the engine `torch`."""
    if isinstance(model, Engine):
        return model
    from .eager import TorchEngine

    return TorchEngine(model)


def best_engine(config: GPTConfig, device: str = "cpu", dtype: str = "auto") -> str:
    """`native` where it is built and knows the model, the type and the device; `torch`, which knows all, elsewhere."""
    kind = ENGINES["native"]
    if kind.missing() or device not in kind.devices or dtype not in ("auto", *kind.dtypes):
        return "torch"
    from ..config.common import unknown_fields

    return "torch" if unknown_fields(config) else "native"


def require_engine(name: str, device: str = "cpu", dtype: str = "auto") -> Kind:
    """The table's entry. Raises LoadstoneError for a name that is not there and for what the engine cannot do here."""
    kind = ENGINES.get(name)
    if kind is None:
        raise LoadstoneError(f"no engine is called {name!r}; known: {', '.join(ENGINES)} (`loadstone engines`).")
    if reason := kind.missing():
        raise EngineMissingError(f"engine {name}: {reason} Without it, --engine torch runs every model.")
    if kind.devices and device not in kind.devices:
        raise LoadstoneError(f"engine {name} runs on {' and '.join(kind.devices)} only; device {device} was asked for.")
    if kind.dtypes and dtype not in ("auto", *kind.dtypes):
        raise LoadstoneError(
            f"engine {name} computes in {' and '.join(kind.dtypes)} only, and {dtype} was asked for: load the model "
            f"with --dtype {kind.dtypes[0]} (dtype={kind.dtypes[0]!r})."
        )
    return kind


def start_engine(name: str, model: GPT) -> Engine:
    """The model on an engine. Raises LoadstoneError if that is missing, or cannot run this model."""
    weight = model.tok_emb.weight
    kind = require_engine(name, str(weight.device), str(weight.dtype).removeprefix("torch."))
    if not kind.from_source:
        return _started(kind, model)
    from ..load import open_source

    return _started(kind, open_source(model), "auto")  # a live model is a source too


def open_engine(name: str, identity: Identity, dtype: str = "auto") -> Engine:
    """An opened source (`load.open_source`) on an engine that packs its weights itself, in one of its `dtypes`.

    Raises LoadstoneError if the engine is missing, cannot run this model, or the plan has problems.
    """
    return _started(require_engine(name, dtype=dtype), identity, dtype)


def _started(kind: Kind, *arguments: Any) -> Engine:
    module, _, attribute = kind.home.partition(":")
    started: Engine = getattr(importlib.import_module(f".{module}", __name__), attribute)(*arguments)
    return started
