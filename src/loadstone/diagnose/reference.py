"""What `--against REF` may name: a stored trace, transformers reading a source, or any other source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.hub import resolve
from ..errors import LoadstoneError
from ..load import load_model, open_source
from ..model import GPT
from ..weightmap import Identity
from .points import Parameters
from .precision import stored_type
from .record import record
from .trace import Trace, default_lengths, is_trace, load_trace, prompt_ids

TRANSFORMERS = "transformers"


@dataclass(frozen=True)
class Reference:
    """A reference that was found; nothing of its weights is read before `trace`.

    Attributes:
        name: as the user gave it.
        program: `transformers`, or empty: Loadstone's own model.
        path: of the weights or the stored trace; None: the source that is verified.
    """

    name: str
    program: str
    path: Path | None

    def trace(self, source: Identity) -> Trace:
        """What the reference computes, in float32, of prompts that the model of `source` can take.

        Raises LoadstoneError if the reference cannot be read or run.
        """
        if self.path and not self.program and is_trace(self.path):
            return load_trace(self.path)
        path = self.path or source.checkpoint.path
        is_gguf = path.suffix == ".gguf" or (self.path is None and source.checkpoint.format == "gguf")
        module, identity = _transformers(path, is_gguf=is_gguf) if self.program else _ours(path)
        ours, theirs = source.config, identity.config
        return trace_module(
            module,
            identity,
            default_lengths(min(ours.context_length, theirs.context_length)),
            vocab_size=min(ours.vocab_size, theirs.vocab_size),
            origin=self.name,
            stored=_stored_type(path) if self.program else stored_type(identity),
        )


def find_reference(name: str) -> Reference:
    """What REF names. Raises LoadstoneError if there is no such thing; called before anything is loaded."""
    if not name.strip():
        raise LoadstoneError("--against: no reference is named. Is a variable of your shell empty?")
    program, _, path = name.partition(":")
    if program == TRANSFORMERS:
        if find_spec(TRANSFORMERS) is None:
            raise LoadstoneError(
                f'--against {name}: the package is not installed (pip install "transformers>=5"). A trace that was '
                "written where it is installed (`loadstone trace transformers:PATH -o trace.safetensors`) needs no "
                "transformers, and any other source can be the reference too."
            )
        return Reference(name, TRANSFORMERS, Path(path) if path else None)
    return Reference(name, "", Path(resolve(name)))


def trace_module(
    module: nn.Module,
    identity: Identity,
    lengths: Sequence[int],
    *,
    vocab_size: int,
    origin: str,
    stored: str,
    activations: bool = True,
) -> Trace:
    """Run the fixed prompts of these lengths through a live model of any program."""
    live = _opened(module)  # the module's own names, which are not always those of its file
    prompts = record(module, live, [prompt_ids(vocab_size, n) for n in lengths], activations=activations)
    weights = Parameters.of(module if isinstance(module, GPT) else load_model(live))
    return Trace(identity.config, stored, origin, prompts, weights, tuple(identity.assumed))


def trace_source(
    name: str, source: Identity | None, lengths: Sequence[int] | None = None, *, activations: bool = True
) -> Trace:
    """A trace to keep: of a source that was opened, or, without one, of what transformers makes of `name`.

    Args:
        name: what the user called it: SRC or `transformers:PATH`.
        lengths: tokens of each prompt; the default ones if not given.

    Raises LoadstoneError for lengths beyond the context.
    """
    if source is not None:
        source.plan.require_clean(name)
        module: nn.Module = load_model(source, dtype="float32")
        identity, stored = source, stored_type(source)
    else:
        path = find_reference(name).path
        if path is None:
            raise LoadstoneError(f"trace {name}: say what transformers is to read, as transformers:PATH.")
        module, identity = _transformers(path, is_gguf=path.suffix == ".gguf")
        stored = _stored_type(path)
    limit = identity.config.context_length
    if lengths and not 0 < min(lengths) <= max(lengths) <= limit:
        raise LoadstoneError(f"--lengths: each must be from 1 to the context limit of this model, {limit}.")
    return trace_module(
        module,
        identity,
        sorted(set(lengths)) if lengths else default_lengths(limit),
        vocab_size=identity.config.vocab_size,
        origin=name,
        stored=stored,
        activations=activations,
    )


def _stored_type(path: Path) -> str:
    """Of weights that another program reads; float32 where we cannot read them ourselves."""
    try:
        return stored_type(open_source(path))
    except LoadstoneError:
        return "float32"


def _ours(path: Path) -> tuple[nn.Module, Identity]:
    identity = open_source(path)
    identity.plan.require_clean(str(path))
    return load_model(identity, dtype="float32"), identity


def _transformers(path: Path, *, is_gguf: bool) -> tuple[nn.Module, Identity]:
    """A source as transformers loads it, in float32. Raises LoadstoneError if it cannot."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"gguf_file": path.name} if is_gguf else {}
    folder = path if path.is_dir() else path.parent
    try:
        module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise LoadstoneError(f"{path}: transformers cannot read it, so there is nothing to compare: {reason}") from None
    return module.eval(), _opened(module)


def _opened(module: nn.Module) -> Identity:
    """A live module as a source. It computes by itself: settings unknown to us will show as differences."""
    to_dict = getattr(getattr(module, "config", None), "to_dict", None)
    return open_source(module, ignore_config=to_dict() if to_dict else ())
