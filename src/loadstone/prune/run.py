"""`prune`: weights to zero, or heads and layers out, block by block on what the blocks before pass on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..calibrate.rows import Rows
from ..calibrate.walk import Moments, Stage, walk
from ..errors import LoadstoneError
from ..model import GPT, Attention, Linear
from .masks import mask_of
from .structure import block_score, head_scores, kept_of, without_heads, without_layers

METHODS = ("magnitude", "wanda")
STRUCTURES = ("none", "2:4", "heads", "layers")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Settings:
    """What is asked for.

    Attributes:
        sparsity: the share that goes, of the weights of each linear layer (head and embedding stay whole), of the heads
            of each block, or of the blocks.
        method: `magnitude` looks at the weights alone, `wanda` at what they are multiplied with, too.
        structure: see STRUCTURES.
    """

    sparsity: float
    method: str = "wanda"
    structure: str = "none"

    def __post_init__(self) -> None:
        for good, problem in (
            (0 < self.sparsity < 1, f"--sparsity {self.sparsity:g}: it is a share, above 0 and below 1"),
            (self.method in METHODS, f"--method {self.method!r}: there are {', '.join(METHODS)}"),
            (self.structure in STRUCTURES, f"--structure {self.structure!r}: there are {', '.join(STRUCTURES)}"),
            (
                self.structure != "2:4" or self.sparsity == 0.5,
                f"--structure 2:4 takes out two of four weights: --sparsity 0.5, not {self.sparsity:g}",
            ),
        ):
            if not good:
                raise LoadstoneError(f"{problem}.")

    @property
    def needs_rows(self) -> bool:
        return self.method == "wanda"


@dataclass
class Pruned:
    """What became of a model.

    Attributes:
        model: the same one, its weights zeroed; or a smaller one.
        masks: parameter -> True where a weight stays; empty where the model became smaller.
        parts: linear layer -> share of zeros, and |(W - W') X| / |W X| where activations were looked at.
        kept: block -> K/V groups that stayed, or {-1: blocks that stayed}.
    """

    model: GPT
    settings: Settings
    rows: Rows | None
    parameters_before: int
    masks: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, dict[str, float | None]] = field(default_factory=dict)
    kept_heads: dict[int, list[int]] = field(default_factory=dict)
    kept_layers: list[int] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def zeros(self) -> int:
        return sum(int((~mask).sum()) for mask in self.masks.values())

    def as_dict(self) -> dict[str, Any]:
        return {
            "settings": asdict(self.settings), "calibration": self.rows.as_dict() if self.rows else None,
            "parameters_before": self.parameters_before, "parameters": self.parameters, "zeros": self.zeros,
            "kept_heads": self.kept_heads, "kept_layers": self.kept_layers, "parts": self.parts,
        }  # fmt: skip


@torch.no_grad()
def prune(model: GPT, settings: Settings, rows: Rows | None = None, progress: Progress | None = None) -> Pruned:
    """Prune a float32 model: in place if weights become zero, else a new one that shares what is left.

    Raises LoadstoneError if nothing would go or nothing would stay, and for wanda without rows.
    """
    if rows is None and settings.needs_rows:
        raise LoadstoneError("wanda needs text to calibrate on (--calibration).")
    found = Pruned(model, settings, rows, sum(parameter.numel() for parameter in model.parameters()))
    ids = rows.ids if rows else torch.zeros(1, 1, dtype=torch.int64)  # magnitude walks the blocks, but reads nothing
    _STRUCTURES[settings.structure](found, ids, progress)
    return found


def _weights(found: Pruned, ids: Tensor, progress: Progress | None) -> None:
    for stage in walk(found.model, ids):
        moments = _norms(stage, found)
        for name, linear in stage.linears.items():
            _zero(found, name, linear, moments)
        if progress:
            progress(stage.index + 1, found.model.config.n_layers)


def _zero(found: Pruned, name: str, linear: Linear, moments: Moments | None) -> None:
    weight, two_of_four = linear.weight, found.settings.structure == "2:4"
    if two_of_four and weight.shape[1] % 4:
        raise LoadstoneError(
            f"{name}: it has {weight.shape[1]} inputs, which are no whole fours. Use --structure none."
        )
    diagonal = None if moments is None else moments.of(name)
    norms = None if diagonal is None else diagonal.sqrt()
    mask = mask_of(weight, found.settings.sparsity, norms_K=norms, two_of_four=two_of_four)
    error = None
    if norms is not None:
        wrong, whole = ((weight.where(part, 0.0) * norms).square().sum() for part in (~mask, torch.ones_like(mask)))
        error = float((wrong / whole).sqrt()) if whole > 0 else 0.0
    found.masks[f"{name}.weight"] = mask
    found.parts[name] = {"zeros": float((~mask).float().mean()), "output_error": error}
    linear.weight.data = weight.masked_fill(~mask, 0.0)


def _heads(found: Pruned, ids: Tensor, progress: Progress | None) -> None:
    for stage in walk(found.model, ids):
        moments = _norms(stage, found)
        attention = next(module for module in stage.block.modules() if isinstance(module, Attention))
        name = next(name for name, linear in stage.linears.items() if linear is attention.out)
        diagonal = None if moments is None else moments.of(name)
        scores = head_scores(attention, None if diagonal is None else diagonal.sqrt())
        found.kept_heads[stage.index] = kept_of(scores.tolist(), found.settings.sparsity, "key/value heads")
        if progress:
            progress(stage.index + 1, found.model.config.n_layers)
    found.model = without_heads(found.model, found.kept_heads)


def _layers(found: Pruned, ids: Tensor, progress: Progress | None) -> None:
    scores = []
    for stage in walk(found.model, ids):
        scores.append(block_score(stage, by_weights=found.settings.method == "magnitude"))
        if progress:
            progress(stage.index + 1, found.model.config.n_layers)
    found.kept_layers = kept_of(scores, found.settings.sparsity, "blocks")
    found.model = without_layers(found.model, found.kept_layers)


def _norms(stage: Stage, found: Pruned) -> Moments | None:
    return stage.moments(diagonal=True) if found.settings.needs_rows else None


_STRUCTURES = {"none": _weights, "2:4": _weights, "heads": _heads, "layers": _layers}
