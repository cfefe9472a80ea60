"""ggml's blocks of 32 weights: which values each type can hold, and its bytes from codes and scales, as they are.

`gguf.quants.quantize` and ggml make codes out of floats. Rounding values of the grid again is not the identity: the
scale is taken from the largest value *that occurs*, so a block whose largest code is not the extreme one gets another
scale. What GPTQ has chosen must arrive as it was chosen, so here codes and scales go in, and no float is rounded.
Layouts: ggml's `block_q4_0`, `block_q4_1`, `block_q5_0`, `block_q8_0` (ggml-common.h).

Shapes: M rows, G blocks of a row, 32 weights of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

SIZE = 32  # weights that share a scale, in all these types
Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]
Halves = NDArray[np.float16]


@dataclass(frozen=True)
class BlockType:
    """value = scale * code, the scale of either sign; or, with a minimum, value = scale * code + minimum.

    Attributes:
        name: ggml's.
        bits: of a code.
        low, high: the codes, whole numbers. Q8_0 could hold -128 as well, which ggml never writes.
        nbytes: of a block.
        minimum: whether a block has one, a float16 like the scale.
    """

    name: str
    bits: int
    low: int
    high: int
    nbytes: int
    minimum: bool = False


TYPES: Mapping[str, BlockType] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            BlockType("Q4_0", 4, -8, 7, 18),
            BlockType("Q4_1", 4, 0, 15, 20, minimum=True),
            BlockType("Q5_0", 5, -16, 15, 22),
            BlockType("Q8_0", 8, -127, 127, 34),
        )
    }
)


def decode(codes_MG32: Codes, scales_MG: Halves, minima_MG: Halves | None = None) -> NDArray[np.float32]:
    """The values [M, 32 G] that ggml and the gguf package make of a block: a float32 product, and a float32 sum."""
    values = scales_MG.astype(np.float32)[..., None] * codes_MG32.astype(np.float32)
    if minima_MG is not None:
        values += minima_MG.astype(np.float32)[..., None]
    return values.reshape(len(values), -1)


def encode(kind: BlockType, codes_MG32: Codes, scales_MG: Halves, minima_MG: Halves | None = None) -> Bytes:
    """The bytes of the blocks, [M, G * nbytes]. Codes must be from `low` to `high`."""
    if not ((codes_MG32 >= kind.low) & (codes_MG32 <= kind.high)).all() or kind.minimum == (minima_MG is None):
        raise AssertionError(f"codes of {kind.name} go from {kind.low} to {kind.high}")
    floats = [each for each in (scales_MG, minima_MG) if each is not None]
    heads = [np.ascontiguousarray(each, "<f2").view(np.uint8).reshape(*each.shape, 2) for each in floats]
    unsigned = (codes_MG32.astype(np.int16) - (kind.low if kind.bits < 8 else 0)).astype(np.uint8)
    blocks: Bytes = np.concatenate([*heads, *_PACKED[kind.bits](unsigned)], axis=-1)
    return blocks.reshape(len(blocks), -1)


def _nibbles(codes: Bytes) -> Bytes:
    """Weight j beside weight j + 16: the first in the low half of a byte."""
    low, high = codes[..., : SIZE // 2], codes[..., SIZE // 2 :]
    return np.bitwise_or(low & 15, high << 4, dtype=np.uint8)


def _fifth_bits(codes: Bytes) -> Bytes:
    """32 bits in 4 bytes, the first weight's lowest."""
    return np.packbits(codes >> 4, axis=-1, bitorder="little")


_PACKED: Mapping[int, Callable[[Bytes], list[Bytes]]] = MappingProxyType(
    {
        4: lambda codes: [_nibbles(codes)],
        5: lambda codes: [_fifth_bits(codes), _nibbles(codes)],
        8: lambda codes: [codes],  # two's complement
    }
)
