"""Finds the weights in what a torch pickle holds: the state dict, or a whole module walked into one.

Nothing is guessed: known keys in a fixed order, else the only mapping of tensors, else an error that names the choices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import FormatError
from .pickle_names import is_dangerous
from .pickle_plain import Budget, BudgetError, UnfoldingError, plain, state_of, state_parts
from .pickle_vm import GlobalRef, PickledDict, Record, printable
from .torch_values import TensorRef

WEIGHT_KEYS = ("model_state_dict", "state_dict", "model", "module", "weights", "params", "net", "ema", "model_ema")
OTHER_STATE = ("optim", "sched", "scaler", "rng")  # keys that contain these hold tensors, but no weights
MAX_WRAPPERS = 3  # {"checkpoint": {"model": {...}}} and one more
MAX_MODULE_DEPTH = 100
MAX_LISTED = 12  # names in one message
MAX_NAME = 1000  # characters
MODULE_COST = 100  # of the budget: a child may be shared, so that a few modules unfold to any number

SAVE_WEIGHTS = "Save weights with torch.save(model.state_dict(), path), or as .safetensors."
_NEVER = "Loadstone never executes what a file contains; do not load it with other programs."

_TENSOR_MAKERS = ("_rebuild", "Tensor", "Parameter", "_load_from_bytes")  # parts of the names of torch's

_Keys = tuple[str, ...]


@dataclass(slots=True)
class Weights:
    """The named tensors of a checkpoint, every one checked against its storage, and whatever lay beside them."""

    tensors: dict[str, TensorRef] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left_aside: list[str] = field(default_factory=list)
    budget: Budget = field(default_factory=Budget)

    def set_aside(self, keys: _Keys, value: Any) -> None:
        """Keep what is no weight: plain values as metadata, the rest by name alone."""
        label, count = f"'{printable('.'.join(keys))}'", self.count_tensors(value)
        if count:
            self.left_aside.append(f"{label} ({count} tensor{'s' * (count > 1)})")
            return
        try:
            self.metadata.setdefault(keys[-1], plain(value, self.budget))
        except UnfoldingError:
            self.left_aside.append(label)

    def count_tensors(self, value: Any) -> int:
        return sum(is_tensor(node) for node in _walk(value, self.budget))


def find_weights(path: Path, root: Any, globals_seen: Iterable[str]) -> Weights:
    """The weights in an unpickled object. Raises FormatError if there are none, several, or unreadable ones."""
    try:
        return _find_weights(path, root, globals_seen)
    except BudgetError:
        problem = "its values refer to each other so often that they unfold without end."
        raise FormatError(path, problem, SAVE_WEIGHTS) from None


def _find_weights(path: Path, root: Any, globals_seen: Iterable[str]) -> Weights:
    weights, found = Weights(), _search(root, (), set())
    if not found:
        raise hostile(path, root, globals_seen) or FormatError(path, f"no weights: {_describe(root)}.", SAVE_WEIGHTS)
    if len(found) > 1:  # a loss function is a module too
        found = [(keys, value) for keys, value in found if weights.count_tensors(value)] or found[:1]
    if len(found) > 1:
        counts = [(printable(".".join(keys)), weights.count_tensors(value)) for keys, value in found[:MAX_LISTED]]
        choices = ", ".join(f"'{label}' ({count} tensors)" for label, count in counts)
        raise FormatError(path, f"it holds several sets of weights: {choices}.", "Save the one that you want alone.")
    keys, state = found[0]
    _set_siblings_aside(root, keys, weights)
    _collect(path, state, weights)
    if isinstance(state, Record) and is_module(state):
        weights.notes.append(f"a whole pickled module ({state}): its tensors were named without importing its class")
    where = [f"weights found under '{printable('.'.join(keys))}'"] if keys else []
    more = [f"and {len(weights.left_aside) - MAX_LISTED} more"] * (len(weights.left_aside) > MAX_LISTED)
    aside = ["left aside: " + ", ".join(weights.left_aside[:MAX_LISTED] + more)] if weights.left_aside else []
    weights.notes += ["; ".join(where + aside)] if where or aside else []
    if risky := [printable(name) for name in globals_seen if is_dangerous(name)]:
        weights.notes.append(f"the pickle asks for {', '.join(risky[:MAX_LISTED])}: {_NEVER}")
    return weights


# -- what things are


def is_module(value: Any) -> bool:
    """An instance with the two attributes by which every `nn.Module` keeps its state."""
    parts = state_parts(value) if isinstance(value, Record) else []
    return any(as_mapping(part.get("_parameters")) is not None and "_modules" in part for part in parts)


def is_tensor(value: Any) -> bool:
    """A tensor, or an object of torch's that stands where a tensor would (quantised, sparse, distributed, ...)."""
    if isinstance(value, Record):
        return value.module.split(".")[0] == "torch" and any(part in value.name for part in _TENSOR_MAKERS)
    return isinstance(value, TensorRef)


def as_mapping(value: Any) -> dict[Any, Any] | None:
    """A dictionary, or what a dictionary subclass of unknown class holds."""
    if isinstance(value, dict):
        return value
    return value.entries if isinstance(value, Record) and value.entries else None


def _walk(value: Any, budget: Budget) -> Iterator[Any]:
    """Every value inside `value`, each container once; safe on structures that contain themselves."""
    pending, seen = [value], set[int]()
    while pending:
        node = pending.pop()
        budget.spend(1)
        if id(node) in seen:
            continue
        if isinstance(node, dict | list | tuple | set | frozenset | Record | TensorRef):
            seen.add(id(node))
        yield node
        if isinstance(node, dict):
            pending.extend(node.values())
        elif isinstance(node, list | tuple | set | frozenset):
            pending.extend(node)
        elif isinstance(node, Record):
            pending += [node.args, node.state, node.items, node.entries]


def hostile(path: Path, root: Any, globals_seen: Iterable[str]) -> FormatError | None:
    """The error for a pickle that carries a call instead of weights; None if it is merely something else."""
    called = isinstance(root, Record) and root.called
    risky = [printable(name) for name in globals_seen if is_dangerous(name)]
    if not called and not risky:
        return None
    return FormatError(
        path, f"this pickle asks to call {risky[0] if risky else root}(...) and holds no weights.", _NEVER
    )


def _describe(root: Any) -> str:
    mapping = as_mapping(root)
    if mapping is not None:
        keys = ", ".join(f"'{printable(key, 40)}'" for key in islice(mapping, MAX_LISTED) if type(key) is str)
        return f"it is a dictionary without tensors (keys: {keys or 'none'})"
    if isinstance(root, Record):
        return f"it holds an instance of {root}"
    return "it holds one tensor without a name" if is_tensor(root) else f"it holds a {type(root).__name__}"


# -- where the weights are


def _other(key: str) -> bool:
    return any(part in key.lower() for part in OTHER_STATE)


def _search(value: Any, keys: _Keys, seen: set[int]) -> list[tuple[_Keys, Any]]:
    """The mappings of tensors and the modules in `value`, with the keys that lead there; each mapping once."""
    if is_module(value):
        return [(keys, value)]
    mapping = as_mapping(value)
    if mapping is None or id(mapping) in seen or len(keys) > MAX_WRAPPERS:
        return []
    seen.add(id(mapping))
    for key in WEIGHT_KEYS:
        if found := _search(mapping.get(key), (*keys, key), seen):
            return found
    tensors = {key: item for key, item in mapping.items() if type(key) is str and is_tensor(item)}
    # A lone step counter or generator state beside an unknown wrapper is no evidence that this is the state dict.
    if any(not _other(key) and getattr(item, "shape", "?") != () for key, item in tensors.items()):
        return [(keys, mapping)]
    inside = [(key, item) for key, item in mapping.items() if type(key) is str and not _other(key)]
    found = [one for key, item in inside for one in _search(item, (*keys, key), seen)]
    return found or ([(keys, mapping)] if tensors else [])


def _set_siblings_aside(root: Any, keys: _Keys, weights: Weights) -> None:
    level = root
    for depth, chosen in enumerate(keys):
        mapping = as_mapping(level) or {}
        for key, value in mapping.items():
            if type(key) is str and key != chosen:
                weights.set_aside((*keys[:depth], key), value)
        level = mapping[chosen]


# -- names and tensors


def _collect(path: Path, state: Any, weights: Weights) -> None:
    mapping = None if is_module(state) else as_mapping(state)
    entries = _module_entries(path, state, weights.budget) if mapping is None else mapping.items()
    unnamed = 0
    for name, value in entries:
        if type(name) is not str:
            unnamed += 1
        elif isinstance(value, TensorRef):
            if problem := value.problem():
                raise FormatError(path, f"tensor '{printable(name)}': {problem}.", SAVE_WEIGHTS)
            weights.tensors[name] = value
        elif culprit := _culprit(value, weights.budget):
            problem = f"tensor '{printable(name)}' would be made by calling {culprit}(...)."
            raise FormatError(path, problem, _NEVER if is_dangerous(str(culprit)) else SAVE_WEIGHTS)
        else:
            weights.set_aside((name,), value)
    if unnamed:
        weights.left_aside.append(f"{unnamed} entries whose names are no text")
    if isinstance(mapping, PickledDict) and isinstance(mapping.state, dict):
        for name, value in mapping.state.items():
            weights.set_aside((str(name),), value)


def _culprit(value: Any, budget: Budget) -> Record | GlobalRef | None:
    """The call that a state dict's entry depends on, if it makes a tensor or is a dangerous one."""
    inner = [node for node in _walk(value, budget) if isinstance(node, Record | GlobalRef)]
    dangerous = [node for node in inner if is_dangerous(f"{node.module}.{node.name}")]
    if dangerous:
        return dangerous[0]
    return value if is_tensor(value) else None


def _module_entries(path: Path, root: Record, budget: Budget) -> Iterator[tuple[str, Any]]:
    """The state dict of a pickled module: own parameters, own persistent buffers, then each child's, in order."""
    pending: list[tuple[str, Any]] = [("", root)]
    while pending:
        prefix, module = pending.pop()
        if module is None:  # an optional child that is switched off
            continue
        if prefix.count(".") > MAX_MODULE_DEPTH or len(prefix) > MAX_NAME:
            raise FormatError(path, "its modules nest too deeply, or contain themselves.", SAVE_WEIGHTS)
        if not is_module(module):
            raise FormatError(path, f"its module '{printable(prefix[:-1])}' is no module.", SAVE_WEIGHTS)
        state = state_of(module)
        budget.spend(MODULE_COST + len(state))
        hidden = state.get("_non_persistent_buffers_set")
        for group, skipped in (("_parameters", ()), ("_buffers", hidden if isinstance(hidden, set) else ())):
            for name, value in (as_mapping(state.get(group)) or {}).items():
                budget.spend(1)
                if value is not None and name not in skipped:
                    yield f"{prefix}{name}", value
        children = [(f"{prefix}{name}.", child) for name, child in (as_mapping(state["_modules"]) or {}).items()]
        budget.spend(len(children))
        pending += reversed(children)
