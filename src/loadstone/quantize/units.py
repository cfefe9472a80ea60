"""What is rounded, and what a tensor of the file is made of: GGUF may fuse q, k and v, and then all have one type."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..config import GPTConfig
from ..weightmap import parameter_shapes, table_for
from .blocks import SIZE, TYPES

EMBEDDINGS = ("tok_emb.weight", "head.weight")
HALF = "F16"  # what stays floating point


@dataclass(frozen=True)
class Unit:
    """One matrix of the GGUF file.

    Attributes:
        name: GGUF's.
        parameters: the model's, which lie one below the other in it.
        shape: rows, and inputs, which the blocks run along.
        embedding: the token embedding (a tied head with it) or the head.
    """

    name: str
    parameters: tuple[str, ...]
    shape: tuple[int, int]
    embedding: bool

    @property
    def in_blocks(self) -> bool:
        """Whether its rows are whole blocks; what is not stays float16, as llama.cpp's converter has it."""
        return self.shape[1] % SIZE == 0

    def nbytes(self, kind: str) -> int:
        """In the file."""
        size = math.prod(self.shape)
        return 2 * size if kind == HALF else size // SIZE * TYPES[kind].nbytes


def units_of(config: GPTConfig) -> dict[str, Unit]:
    """Every matrix but position embeddings, which llama.cpp wants as float32.

    Raises PlanError for an architecture without a table for GGUF.
    """
    return {unit.name: unit for unit in _units(config)}


def _units(config: GPTConfig) -> Iterator[Unit]:
    shapes = parameter_shapes(config)
    table = table_for(config.architecture, "gguf")
    for rule in table.needed(config, shapes):
        parts: Mapping[str, tuple[int, ...]] = {name: shapes[name] for name in rule.target}
        if all(len(shape) == 2 for shape in parts.values()) and "pos_emb.weight" not in parts:
            rows, inputs = sum(shape[0] for shape in parts.values()), next(iter(parts.values()))[1]
            embedding = any(name in EMBEDDINGS for name in parts)
            yield Unit(table.written_name(rule), rule.target, (rows, inputs), embedding)
