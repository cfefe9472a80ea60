"""`quantize`: a model's matrices on the grids of ggml's block types, with a report of what each of them lost.

The model is changed in place and then computes with exactly the values that the file will hold, so that what is
evaluated is what is written. Layer by layer: each is calibrated on what the layers before it, rounded already, pass on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..calibrate.rows import Rows
from ..calibrate.walk import Stage, walk
from ..errors import LoadstoneError
from ..model import GPT
from .blocks import TYPES
from .budget import Choice, choose
from .gptq import gptq
from .grid import Rounded, nearest
from .sensitivity import sensitivities
from .units import HALF, Unit, units_of

METHODS = ("rtn", "gptq")
Progress = Callable[[str, int, int], None]  # "measuring" or "rounding", done, of all


@dataclass(frozen=True)
class Settings:
    """What is asked for.

    Attributes:
        type: of the linear layers, one of TYPES; with a budget the smallest. None: Q8_0, or Q4_0 with a budget.
        method: `rtn` (round to nearest) or `gptq`.
        embedding: type of the token embedding and the head; F16: float16.
        budget_size: most bytes of all matrices; `budget_loss`: most nats per token that may be lost by estimate.
    """

    type: str | None = None
    method: str = "rtn"
    embedding: str = "Q8_0"
    budget_size: int | None = None
    budget_loss: float | None = None

    def __post_init__(self) -> None:
        for good, problem in (
            (self.type in (None, *TYPES), f"type {self.type}: there are {', '.join(TYPES)}"),
            (self.embedding in (*TYPES, HALF), f"type {self.embedding}: there are {', '.join([*TYPES, HALF])}"),
            (self.method in METHODS, f"--method {self.method!r}: there are {', '.join(METHODS)}"),
            (self.budget_loss is None or self.budget_loss > 0, "--budget-loss must be above 0, in nats per token"),
        ):
            if not good:
                raise LoadstoneError(f"{problem}.")

    @property
    def with_budget(self) -> bool:
        return self.budget_size is not None or self.budget_loss is not None

    @property
    def needs_rows(self) -> bool:
        return self.with_budget or self.method == "gptq"

    @property
    def smallest(self) -> str:
        return self.type or ("Q4_0" if self.with_budget else "Q8_0")


@dataclass(frozen=True)
class UnitReport:
    """What became of one matrix.

    Attributes:
        weight_error: |Q - W| / |W|, Frobenius.
        output_error: |(Q - W) X| / |W X| for the inputs X of the calibration rows; None without, and for embeddings.
        losses: type -> estimated nats per token lost if this matrix alone were rounded to nearest in it.
    """

    name: str
    shape: tuple[int, int]
    type: str
    nbytes: int
    weight_error: float
    output_error: float | None = None
    losses: Mapping[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> float | None:
        """The estimate for the type that it has; 0 for float16."""
        return self.losses.get(self.type, 0.0) if self.losses else None


@dataclass
class Quantised:
    """What `quantize` did. `rounded`: parameter -> its codes and scales; `halves`: those that became float16."""

    settings: Settings
    units: list[UnitReport]
    rounded: dict[str, Rounded]
    halves: list[str]
    rows: Rows | None

    @property
    def nbytes(self) -> int:
        return sum(unit.nbytes for unit in self.units)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / sum(unit.shape[0] * unit.shape[1] for unit in self.units)

    def as_dict(self) -> dict[str, Any]:
        return {
            "settings": asdict(self.settings), "calibration": self.rows.as_dict() if self.rows else None,
            "matrix_bytes": self.nbytes, "bits_per_weight": self.bits_per_weight,
            "units": [asdict(unit) for unit in self.units],
        }  # fmt: skip


@torch.no_grad()
def quantize(model: GPT, settings: Settings, rows: Rows | None = None, progress: Progress | None = None) -> Quantised:
    """Round a float32 model in place.

    Args:
        rows: text to calibrate on; without it only `rtn` without a budget is possible, and no loss is estimated.

    Raises LoadstoneError for a budget that cannot be met, and for text on which the model computes no numbers.
    """
    if rows is None and settings.needs_rows:
        raise LoadstoneError("gptq and budgets need text to calibrate on (--calibration).")
    units = units_of(model.config)
    losses = _estimated(model, units, settings, rows, progress) if rows else {}
    types = _chosen(units, settings, losses)
    return _Rounding(model, units, types, settings, progress).run(rows, losses)


def _estimated(
    model: GPT, units: Mapping[str, Unit], settings: Settings, rows: Rows, progress: Progress | None
) -> dict[str, dict[str, float]]:
    """Unit -> type -> loss; of a fused tensor the sum of its parts'."""
    candidates = {
        name: {kind.name: nearest(model.get_parameter(name), kind) for kind in TYPES.values()}
        for unit in units.values()
        for name in (unit.parameters if unit.in_blocks else ())
    }
    found = sensitivities(
        model, candidates, rows.ids, progress=progress and (lambda done, total: progress("measuring", done, total))
    )
    return {
        name: {kind: sum(found[part][kind] for part in unit.parameters) for kind in TYPES}
        for name, unit in units.items()
        if unit.in_blocks
    }


def _chosen(units: Mapping[str, Unit], settings: Settings, losses: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """Unit -> type."""
    types = {name: settings.embedding if unit.embedding else settings.smallest for name, unit in units.items()}
    types |= {name: HALF for name, unit in units.items() if not unit.in_blocks}
    if not settings.with_budget:
        return types
    allowed = [kind for kind in TYPES.values() if kind.nbytes >= TYPES[settings.smallest].nbytes]
    free = {
        name: [Choice(kind.name, unit.nbytes(kind.name), losses[name][kind.name]) for kind in allowed]
        for name, unit in units.items()
        if unit.in_blocks and not unit.embedding
    }
    others = [name for name in units if name not in free]
    fixed = Choice(
        "as asked",
        sum(units[name].nbytes(types[name]) for name in others),
        sum(losses.get(name, {}).get(types[name], 0.0) for name in others),
    )
    return types | choose(free, fixed, most_bytes=settings.budget_size, most_loss=settings.budget_loss)


class _Rounding:
    """One run over the matrices, with what is known of each."""

    def __init__(
        self, model: GPT, units: Mapping[str, Unit], types: Mapping[str, str], settings: Settings,
        progress: Progress | None,
    ) -> None:  # fmt: skip
        self.model, self.units, self.types, self.settings, self.progress = model, units, types, settings, progress
        self.unit_of = {part: unit for unit in units.values() for part in unit.parameters}
        self.rounded: dict[str, Rounded] = {}
        self.halves: list[str] = []
        self.done = 0
        self.squares: dict[str, list[Tensor]] = {}  # unit -> sums over its parts, see `_note`

    def run(self, rows: Rows | None, losses: Mapping[str, Mapping[str, float]]) -> Quantised:
        # Embeddings first: what the blocks are calibrated on has passed through them.
        for name in [name for name, unit in self.unit_of.items() if unit.embedding]:
            self._round(name)
        if rows is None:
            for name in [name for name, unit in self.unit_of.items() if not unit.embedding]:
                self._round(name)
        else:
            calibrated = self.settings.method == "gptq"
            for stage in walk(self.model, rows.ids, remember=calibrated):
                # Each step of a block reads what the steps before it, rounded already, make.
                for step in stage.steps() if calibrated else [list(stage.linears)]:
                    if layers := [layer for layer in step if f"{layer}.weight" in self.unit_of]:  # a router is none
                        self._round_step(stage, layers)
        reports = [self._report(name, unit, losses.get(name, {})) for name, unit in self.units.items()]
        return Quantised(self.settings, reports, self.rounded, self.halves, rows)

    def _round_step(self, stage: Stage, layers: list[str]) -> None:
        moments = stage.moments(layers)
        together: dict[tuple[str | None, str], list[str]] = {}  # same inputs, same type: one matrix, rounded at once
        for layer in layers:
            kind = self.types[self.unit_of[f"{layer}.weight"].name]
            together.setdefault((moments.leaders.get(layer), kind), []).append(layer)
        for (leader, kind), parts in together.items():
            gram, names = moments.of(parts[0]), [f"{layer}.weight" for layer in parts]
            if self.settings.method == "gptq" and leader and gram is not None and kind != HALF:
                weights: list[Tensor] = [self.model.get_parameter(name) for name in names]
                found = gptq(torch.cat(weights), gram, TYPES[kind], moments.shift_of(leader))
                self.rounded |= dict(zip(names, found.split([len(weight) for weight in weights]), strict=True))
            for name in names:
                self._round(name, gram)

    def _round(self, name: str, gram: Tensor | None = None) -> None:
        """Put a matrix on its grid: the one that GPTQ has chosen, or the nearest."""
        weight, kind = self.model.get_parameter(name).detach(), self.types[self.unit_of[name].name]
        if kind == HALF:
            self.halves.append(name)
            values = weight.half().float()
        else:
            if name not in self.rounded:
                self.rounded[name] = nearest(weight, TYPES[kind])
            values = self.rounded[name].values()
        self._note(name, weight, values, gram)
        self.model.get_parameter(name).data = values
        self.done += 1
        if self.progress:
            self.progress("rounding", self.done, len(self.unit_of))

    def _note(self, name: str, weight: Tensor, values: Tensor, gram: Tensor | None) -> None:
        """|Q - W|^2, |W|^2 and, over the inputs, |(Q - W) X|^2, |W X|^2 (NaN where they are unknown)."""
        wrong, nan = values - weight, torch.tensor(torch.nan)
        sums = [wrong.square().sum(), weight.square().sum()]
        sums += [nan, nan] if gram is None else [((m @ gram) * m).sum() for m in (wrong, weight)]
        self.squares.setdefault(self.unit_of[name].name, []).append(torch.stack(sums).double())

    def _report(self, name: str, unit: Unit, losses: Mapping[str, float]) -> UnitReport:
        wrong, whole, wrong_out, whole_out = torch.stack(self.squares[name]).sum(0).tolist()
        kind = self.types[name]
        return UnitReport(
            name, unit.shape, kind, unit.nbytes(kind),
            _relative(wrong, whole) or 0.0, _relative(wrong_out, whole_out), losses,
        )  # fmt: skip


def _relative(part: float, whole: float) -> float | None:
    return (max(part, 0.0) / whole) ** 0.5 if whole > 0 else None
