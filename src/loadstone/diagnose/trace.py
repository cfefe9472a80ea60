"""`Trace`: what a program computed from fixed prompts, kept so that others can be held against it later.

On disk it is one safetensors file: `prompts.64.ids`, `prompts.64.positions`, `prompts.64.logits`, and
`prompts.64.activations.<point>`; the metadata holds `loadstone_trace` (a version) and, as JSON, config and provenance.
It needs neither the program nor its weights. All numbers are float32, whatever type the weights are stored in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._version import __version__
from ..checkpoint import open_checkpoint
from ..checkpoint.atomic import atomic_file
from ..checkpoint.base import Array, Checkpoint
from ..checkpoint.memory import Arrays
from ..checkpoint.wording import shown
from ..checkpoint.write_safetensors import write_safetensors_file
from ..config import GPTConfig
from ..config.own import from_own, to_own
from ..errors import FormatError, LoadstoneError
from ..load import to_tensor
from .points import Weights, block_points, is_point, width_of
from .precision import is_known

KEY, VERSION = "loadstone_trace", "1"
LENGTHS = (1, 7, 64)
LIMIT = 2048  # tokens; a longer context is not run to its end
KEPT = 64  # logits are kept at so many positions of a longer prompt, spread evenly, the last among them
ACTIVATIONS_UP_TO = 64  # tokens; activations of longer prompts would cost gigabytes
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass
class Prompt:
    """One prompt and what came of it, all float32.

    Attributes:
        ids: [T].
        positions: [P], where logits were kept.
        logits: [P, V].
        activations: point -> [T, width]; of a long prompt the embedding alone.
    """

    ids: Tensor
    positions: Tensor
    logits: Tensor
    activations: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Trace:
    """Prompts run through one model.

    Attributes:
        config: of the model.
        stored: the least precise element type of its weights.
        origin: where the weights lie and which program ran them, for people.
        weights: its parameters; None in a trace that was read from a file.
        assumed: what nothing beside its weights told, and was taken by convention.
    """

    config: GPTConfig
    stored: str
    origin: str
    prompts: list[Prompt]
    weights: Weights | None = None
    assumed: tuple[str, ...] = ()

    @property
    def has_activations(self) -> bool:
        return any(len(prompt.activations) > 1 for prompt in self.prompts)


def default_lengths(context_length: int) -> list[int]:
    """1, 7, 64 and the context limit, as far as the context goes; the limit is capped so that a CPU can do it."""
    limit = min(context_length, LIMIT)
    return sorted({length for length in (*LENGTHS, limit) if length <= limit})


def prompt_ids(vocab_size: int, length: int) -> Tensor:
    """The fixed prompt of one length, [T]: spread over the vocabulary, and no two prompts alike at any position.

    The last rows of a vocabulary are left out: they may be padding, which another copy of the model does not have.
    """
    usable = max(1, vocab_size - min(vocab_size // 8, 128))
    steps = (torch.arange(length, dtype=torch.float64) + 1 + 31 * length) * GOLDEN
    return ((steps % 1) * usable).long()


def kept_positions(length: int) -> Tensor:
    if length <= KEPT:
        return torch.arange(length)
    return torch.linspace(0, length - 1, KEPT, dtype=torch.float64).round().long()


def save_trace(trace: Trace, path: Path) -> None:
    """Write it as one safetensors file, under its name only when complete."""
    arrays: dict[str, Array] = {}
    for prompt in trace.prompts:
        at = f"prompts.{len(prompt.ids)}"
        arrays |= {f"{at}.ids": prompt.ids.numpy(), f"{at}.positions": prompt.positions.numpy()}
        arrays[f"{at}.logits"] = prompt.logits.numpy()
        arrays |= {f"{at}.activations.{point}": value.numpy() for point, value in prompt.activations.items()}
    bad = [len(prompt.ids) for prompt in trace.prompts if not _is_finite(prompt)]
    if bad:
        raise LoadstoneError(
            f"{trace.origin}: it computes NaN or infinity for {bad[0]} tokens, so nothing can be compared with it. "
            "`loadstone verify` says where they come from."
        )
    facts = {"config": to_own(trace.config), "stored": trace.stored, "origin": trace.origin, "loadstone": __version__}
    facts["assumed"] = list(trace.assumed)
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with atomic_file(path, need=sum(array.nbytes for array in arrays.values())) as temporary:
        metadata = {KEY: VERSION, "trace": json.dumps(facts)}
        write_safetensors_file(Arrays(path, arrays), temporary, metadata=metadata)


def is_trace(path: Path) -> bool:
    """Whether a file says in its header that it is a trace."""
    try:
        return KEY in open_checkpoint(path).metadata
    except LoadstoneError:
        return False


def load_trace(path: Path) -> Trace:
    """Read a trace. Raises FormatError if it is none, is of another version, or does not hold what it should."""
    checkpoint = open_checkpoint(path)
    metadata = checkpoint.metadata
    if KEY not in metadata:
        raise FormatError(path, "this is no trace.", "`loadstone trace SRC -o trace.safetensors` writes one.")
    if metadata[KEY] != VERSION:
        problem = f"a trace of version {shown(metadata[KEY])}; this Loadstone reads version {VERSION}."
        raise FormatError(path, problem, "Write it again with `loadstone trace`.")
    facts = _facts(path, metadata.get("trace", ""))
    prompts = list(_prompts(path, checkpoint, facts["config"]))
    return Trace(prompts=prompts, **facts)


def _facts(path: Path, text: str) -> dict[str, Any]:
    try:
        facts = json.loads(text)
        if not is_known(facts["stored"]):
            raise ValueError(f"no element type is called {shown(facts['stored'])}")
        found = {name: str(facts[name]) for name in ("stored", "origin")}
        config, assumed = from_own(facts["config"], str(path)), tuple(map(str, facts["assumed"]))
        return {"config": config, "assumed": assumed, **found, "origin": f"{path} (of {found['origin']})"}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"its description cannot be read ({type(error).__name__}: {error})") from None


def _prompts(path: Path, checkpoint: Checkpoint, config: GPTConfig) -> Iterable[Prompt]:
    lengths = sorted(int(n[8:-4]) for n in checkpoint.tensors if n.startswith("prompts.") and n[8:-4].isdecimal())
    if not lengths:
        raise _damaged(path, "it holds no prompts")
    for length in lengths:
        at = f"prompts.{length}."
        found = {n[len(at) :]: to_tensor(checkpoint.read(n)) for n in checkpoint.tensors if n.startswith(at)}
        start = "activations."
        activations = {n.removeprefix(start): value for n, value in found.items() if n.startswith(start)}
        if not {"ids", "positions", "logits"} <= set(found) or not _is_whole(activations, config):
            raise _damaged(path, f"the prompt of length {length} lacks something or has what no such model computes")
        prompt = Prompt(found["ids"], found["positions"], found["logits"], activations)
        _check(path, prompt, length, config)
        yield prompt


def _is_whole(activations: Mapping[str, Tensor], config: GPTConfig) -> bool:
    """All points but the logits, or the embedding alone, or none; counted, as the number of layers may be a lie."""
    counts = (0, 1, config.n_layers * len(block_points(config)) + 2)
    known = all(is_point(name, config) and name != "logits" for name in activations)
    return known and len(activations) in counts and (not activations or "embedding" in activations)


def _check(path: Path, prompt: Prompt, length: int, config: GPTConfig) -> None:
    shapes = [prompt.ids.shape == (length,), prompt.ids.dtype == prompt.positions.dtype == torch.int64]
    shapes += [prompt.positions.dim() == 1, prompt.logits.shape == (len(prompt.positions), config.vocab_size)]
    shapes += [value.shape == (length, width_of(n, config)) for n, value in prompt.activations.items()]
    shapes += [value.dtype == torch.float32 for value in (prompt.logits, *prompt.activations.values())]
    if not all(shapes):
        raise _damaged(path, f"the tensors of the prompt of length {length} do not have the shapes of its model")
    if not _is_finite(prompt):
        raise _damaged(path, f"the prompt of length {length} holds NaN or infinity")
    for values, end in ((prompt.ids, config.vocab_size), (prompt.positions, length)):
        if len(values) == 0 or int(values.min()) < 0 or int(values.max()) >= end:
            raise _damaged(path, f"the prompt of length {length} has token ids or positions out of range")


def _is_finite(prompt: Prompt) -> bool:
    return all(bool(torch.isfinite(values).all()) for values in (prompt.logits, *prompt.activations.values()))


def _damaged(path: Path, what: str) -> FormatError:
    return FormatError(path, f"a damaged trace: {what}.", "Write it again with `loadstone trace`.")
