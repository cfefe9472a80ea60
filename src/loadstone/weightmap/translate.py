"""`Translated`: a checkpoint read as if it had been written in another dialect, one tensor at a time.

The source's table is read forward and the target's backward; nothing of the model is held. Writers, `diff` and the
certificate all work on this one view, so conversion has no code of its own per pair of dialects.

Why not as others do it: transformers' converters load a whole model and save it; litgpt has a function per pair and
direction. Here every pair follows from two tables, and its names, shapes and sizes are known from headers alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from ..checkpoint.arrays import row_blocks
from ..checkpoint.base import DTYPES, Array, Checkpoint, TensorInfo
from ..errors import LoadstoneError, PlanError
from .canonical import Shape, parameter_shapes
from .identify import TABLES, Identity
from .ops import apply, apply_shapes
from .plan import Step
from .rules import LAYER, Rule, WeightMap


def table_for(architecture: str, dialect: str) -> WeightMap:
    """The table of one dialect, the usual one where it has several ways to write the same thing.

    Raises PlanError with the dialects that there are.
    """
    known: dict[str, WeightMap] = {}
    for table in TABLES:
        if table.architecture == architecture:
            known.setdefault(table.dialect, table)
    if dialect not in known:
        raise PlanError(
            f"there is no dialect {dialect!r} of {architecture}; its dialects: {', '.join(known)}. A conversion never "
            "changes the architecture."
        )
    return known[dialect]


class Translated(Checkpoint):
    """The weights of an opened source in the dialect of `weight_map`.

    Args:
        identity: the source; its plan must be clean and its tie settled (`load.settle_tie`).
        weight_map: the dialect that is wanted, of the same architecture.
        dtype: `float32`, ... for every tensor; None keeps each tensor's own (block-quantised ones are float32).

    Raises PlanError if the dialect has no name for a parameter.
    """

    def __init__(self, identity: Identity, weight_map: WeightMap, dtype: str | None = None) -> None:
        super().__init__(identity.checkpoint.path, identity.checkpoint.format)
        self.dialect = weight_map.name
        self._identity, self._steps = identity, {t: step for step in identity.plan.steps for t in step.targets}
        self._rules: dict[str, Rule] = {}
        self._masks: dict[str, Shape] = {}
        self._last: tuple[Step, list[Array]] | None = None
        config, parameters = identity.config, parameter_shapes(identity.config)
        self._refuse_nameless(weight_map, parameters)
        for rule in weight_map.needed(config, parameters):
            wanted = dtype or _joined_dtype([self._steps[target].dtype for target in rule.target])
            (shape,) = apply_shapes(rule.ops, [parameters[t] for t in rule.target], config, inverse=True)
            self._announce(weight_map.written_name(rule), shape, wanted)
            self._rules[weight_map.written_name(rule)] = rule
        if config.tied and weight_map.shares_head:
            self._share_head(weight_map)
        self._add_masks(weight_map)

    def read(self, name: str) -> Array:
        """The tensor in the target's layout and type. Raises LoadstoneError if a value is beyond the type's range."""
        info = self.info(name)
        name = self.aliases.get(name, name)
        if name in self._masks:
            return np.triu(np.ones(self._masks[name], DTYPES[info.dtype]), 1)
        rule = self._rules[name]
        arrays = [self._parameter(target) for target in rule.target]
        (array,) = apply(rule.ops, arrays, self._identity.config, inverse=True)
        return _cast(array, DTYPES[info.dtype], name)

    def origin(self, name: str) -> tuple[list[str], list[str]]:
        """Where a tensor comes from: the source's tensors and the ops on the way, `undo` before the target's."""
        rule = self._rules.get(name)
        if rule is None:
            return [], ["causal mask"] if name in self._masks else []
        steps = list({self._steps[target].source: self._steps[target] for target in rule.target}.values())
        ops = list(dict.fromkeys(op.label for step in steps for op in step.ops))
        return [step.source for step in steps], ops + [f"undo {op.label}" for op in reversed(rule.ops)]

    def _parameter(self, target: str) -> Array:
        """One of the model's parameters. The last fused matrix is kept, since it gives several."""
        step = self._steps[target]
        if self._last is not None and self._last[0] is step:
            return self._last[1][step.targets.index(target)]
        keep = len(step.targets) > 1 and len(step.source_shape) > 1
        if keep:
            self._last = None  # freed before the next is read: only one is ever held
        arrays = apply(step.ops, [self._identity.checkpoint.read(step.source)], self._identity.config)
        self._last = (step, arrays) if keep else self._last
        return arrays[step.targets.index(target)]

    def _announce(self, name: str, shape: Shape, dtype: str) -> None:
        self.tensors[name] = TensorInfo(shape, dtype, math.prod(shape) * DTYPES[dtype].itemsize)

    def _refuse_nameless(self, weight_map: WeightMap, parameters: Iterable[str]) -> None:
        config = self._identity.config
        named = {target for rule in weight_map.expand(config.n_layers, config.n_experts) for target in rule.target}
        if nameless := [parameter for parameter in parameters if parameter not in named]:
            raise PlanError(
                f"{self.path}: {weight_map.name} has no name for {', '.join(nameless[:4])}, so this model cannot be "
                "written in that dialect without losing it."
            )

    def _share_head(self, weight_map: WeightMap) -> None:
        """A tied head under its own name too, as a second name of the embedding."""
        names = {target: weight_map.written_name(r) for r in weight_map.rules for target in r.target}
        head, embedding = names["head.weight"], names["tok_emb.weight"]
        self.tensors[head], self.aliases[head] = self.tensors[embedding], embedding

    def _add_masks(self, weight_map: WeightMap) -> None:
        """The causal masks that the dialect's program insists on; all layers' are one tensor."""
        context, layers = self._identity.config.context_length, self._identity.config.n_layers
        for entry in weight_map.ignored:
            if entry.written:
                first, *others = (weight_map.prefix + entry.source.replace(LAYER, str(i)) for i in range(layers))
                self._masks[first] = (context, context)
                self._announce(first, (context, context), "float32")
                for other in others:
                    self.tensors[other], self.aliases[other] = self.tensors[first], first


def _joined_dtype(stored: list[str]) -> str:
    """The type that holds all parts of one tensor; blocks (Q4_1, ...) are read as float32."""
    known = [DTYPES.get(dtype, DTYPES["float32"]) for dtype in stored]
    return known[0].name if len(set(known)) == 1 else np.result_type(*known).name


def _cast(array: Array, dtype: np.dtype[np.generic], name: str) -> Array:
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    for before, after in row_blocks(array, cast):
        if (lost := np.isinf(after) & np.isfinite(before)).any():
            worst = float(np.abs(before[lost]).max())
            raise LoadstoneError(
                f"{name}: it holds {worst:.3g}, beyond the range of {dtype.name}: it would become infinite. Choose "
                "bfloat16 or float32."
            )
    return cast
