"""From the tensors of a checkpoint to the engine's packed matrices, with little memory beside these and no torch."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.gguf import Gguf
from ..config.frequencies import frequencies_of
from ..errors import LoadstoneError
from ..load import parameters
from ..weightmap import Identity
from ..weightmap.ops import Transpose
from ..weightmap.plan import Step
from .library import Packing, library

Array = NDArray[Any]

# engine.h's enumerations.
F32, F16, BF16, Q8, Q4, Q4M = range(6)
KINDS = {"float32": 0, "float16": 1, "bfloat16": 2, "Q8_0": 3, "Q4_0": 4, "Q4_1": 5}
AS_STORED = {"float32": F32, "float64": F32, "float16": F16, "bfloat16": BF16, "Q8_0": Q8, "Q4_0": Q4, "Q4_1": Q4M}
MATRICES = ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.gate", "mlp.up", "mlp.down")
VECTORS = (
    "norm1.weight norm1.bias attn.q.bias attn.k.bias attn.v.bias attn.out.bias norm2.weight norm2.bias "
    "mlp.gate.bias mlp.up.bias mlp.down.bias"
).split()
OTHERS = ("norm.weight", "norm.bias", "pos_emb.weight", "frequencies")
# Types of (layers, head and embedding) for a width. The head's errors reach the scores directly.
WIDTHS = {"float32": (F32, F32), "bfloat16": (BF16, BF16), "float16": (F16, F16), "q8": (Q8, Q8), "q4": (Q4, Q8)}
# One native call packs many tensors, so that it seldom waits for Python's lock, which a tokenizer's reader may hold.
# Views of mapped files cost nothing to keep until then but address space and a descriptor each.
TOGETHER = 128  # tensors
HELD = 16 << 20  # bytes of those that are no views of files
PIECE = 4 << 20  # bytes of a tensor that numpy converts at once


class Slots:
    """Where each parameter goes: names -> the engine's numbers."""

    def __init__(self, identity: Identity) -> None:
        config = identity.config
        layers, tied = config.n_layers, config.tied
        self.matrices = {
            f"blocks.{i}.{name}.weight": i * len(MATRICES) + n for i in range(layers) for n, name in enumerate(MATRICES)
        }
        end = layers * len(MATRICES)
        self.matrices |= {"tok_emb.weight": end if tied else end + 1, "head.weight": end}
        self.vectors = {
            f"blocks.{i}.{name}": i * len(VECTORS) + n for i in range(layers) for n, name in enumerate(VECTORS)
        }
        self.vectors |= {name: layers * len(VECTORS) + n for n, name in enumerate(OTHERS)}
        self.count = end + 2


def choose_types(identity: Identity, slots: Slots, width: str) -> NDArray[np.int32]:
    """The type of each matrix. Raises LoadstoneError for an unknown width and for weights that are integers."""
    if width != "auto" and width not in WIDTHS:
        raise LoadstoneError(f"width must be auto, {', '.join(WIDTHS)}; found {width!r}.")
    types, widened = np.zeros(slots.count, np.int32), set()
    for step in identity.plan.steps:
        if step.dtype.startswith(("int", "uint", "bool", "complex")):
            raise LoadstoneError(
                f"{identity.checkpoint.path}: {step.source} holds {step.dtype}; weights are floating point."
            )
        for target in step.targets:
            if target in slots.matrices:
                types[slots.matrices[target]] = _type(step.dtype, width, head=not target.startswith("blocks."))
                if width == "auto" and step.dtype not in AS_STORED:
                    widened.add(step.dtype)
    if widened:
        identity.remarks.append(
            f"the engine native rounds {', '.join(sorted(widened))} to blocks of 8 bits (Q8_0); --dtype float32 or "
            "--engine torch keeps every value."
        )
    return types


def _type(dtype: str, width: str, head: bool) -> int:
    stored = AS_STORED.get(dtype, Q8)  # blocks of other kinds, and fp8, are decoded and become Q8
    if width == "auto":
        return stored
    wanted = WIDTHS[width][head]
    return stored if wanted == Q4 and stored == Q4M else wanted


def fill(handle: int, identity: Identity, slots: Slots, types: NDArray[np.int32]) -> None:
    """Pack every parameter."""
    checkpoint, config = identity.checkpoint, identity.config

    def read(step: Step) -> Array:
        same = all(AS_STORED.get(step.dtype) == types[slots.matrices[t]] for t in step.targets if t in slots.matrices)
        turned = any(isinstance(op, Transpose) for op in step.ops)
        blocks = step.targets[0] in slots.matrices and KINDS.get(step.dtype, 0) >= KINDS["Q8_0"]
        if isinstance(checkpoint, Gguf) and blocks and same and not turned:
            return checkpoint.read_blocks(step.source)
        return checkpoint.read(step.source)

    stored = {target: step.dtype for step in identity.plan.steps for target in step.targets}
    batch = _Batch(handle)
    for target, array in parameters(identity, read=read):
        if target in slots.matrices:
            batch.add(slots.matrices[target], array, stored[target])
        else:
            _vector(handle, slots.vectors[target], array)
    batch.pack()
    if config.rope:
        frequencies, _ = frequencies_of(config.rope, config.rope.dims or config.head_dim)
        _vector(handle, slots.vectors["frequencies"], frequencies)


def _vector(handle: int, slot: int, array: Array) -> None:
    values = np.ascontiguousarray(array, np.float32)
    _must(library().ls_vector(handle, slot, values.ctypes.data, values.size))


class _Batch:
    """Tensors that one native call will pack."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._works: list[Packing] = []
        self._kept: list[Array] = []
        self._held = 0

    def add(self, slot: int, array: Array, dtype: str) -> None:
        kind = KINDS.get(dtype if array.dtype == np.uint8 else array.dtype.name)
        if kind is not None:
            self._add(slot, array, kind, 0)
            return
        rows = max(PIECE // array.strides[0] // 16 * 16, 16)
        for first in range(0, len(array), rows):
            self._add(slot, np.ascontiguousarray(array[first : first + rows], np.float32), KINDS["float32"], first)

    def _add(self, slot: int, array: Array, kind: int, first: int) -> None:
        mapped = has_own_mapping(array)
        self._works.append(Packing(array.ctypes.data, *array.strides, slot, kind, first, len(array), mapped))
        self._kept.append(array)
        self._held += 0 if mapped else array.nbytes
        if self._held > HELD or len(self._works) == TOGETHER:
            self.pack()

    def pack(self) -> None:
        works = (Packing * len(self._works))(*self._works)
        _must(library().ls_pack(self._handle, works, len(works)))
        self._works, self._kept, self._held = [], [], 0


def has_own_mapping(array: Array) -> bool:
    """Whether this is a view of a file's mapping that holds one tensor, and but for its first page nothing else.

    No one else can have written to it, so its pages may be given back when they are read.
    """
    root: Any = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    mapped = root.base.obj if isinstance(root.base, memoryview) else None
    return isinstance(mapped, mmap.mmap) and 0 <= len(mapped) - root.nbytes < mmap.ALLOCATIONGRANULARITY


def _must(status: int) -> None:
    if status:
        raise AssertionError(f"the native engine refused a tensor that fits the config (status {status})")
