"""ggml's blocks of 32 weights: which values each type can hold, and its bytes from codes and scales, as they are.

`gguf.quants.quantize` and ggml make codes out of floats. Rounding values of the grid again is not the identity: the
scale is taken from the largest value *that occurs*, so a block whose largest code is not the extreme one gets another
scale. What GPTQ has chosen must arrive as it was chosen, so here codes and scales go in, and no float is rounded.
Layouts: ggml's `block_q4_0`, `block_q5_0`, `block_q8_0` (ggml-common.h).

Shapes: M rows, G blocks of a row, 32 weights of a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIZE = 32  # weights that share a scale, in all these types
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class BlockType:
    """A symmetric type: value = scale * code, the scale a float16 of either sign, the code a whole number.

    Attributes:
        name: ggml's.
        bits: of a code.
        low, high: the codes. Q8_0 could hold -128 as well, which ggml never writes.
        nbytes: of a block.
    """

    name: str
    bits: int
    low: int
    high: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / SIZE


BY_BITS: Mapping[int, BlockType] = MappingProxyType(
    {
        4: BlockType("Q4_0", 4, -8, 7, 18),
        5: BlockType("Q5_0", 5, -16, 15, 22),
        8: BlockType("Q8_0", 8, -127, 127, 34),
    }
)


def decode(codes_MG32: NDArray[np.int8], scales_MG: NDArray[np.float16]) -> NDArray[np.float32]:
    """The values [M, 32 G] that ggml and the gguf package make of a block: a float32 product."""
    values = scales_MG.astype(np.float32)[..., None] * codes_MG32.astype(np.float32)
    return values.reshape(len(values), -1)


def encode(kind: BlockType, codes_MG32: NDArray[np.int8], scales_MG: NDArray[np.float16]) -> Bytes:
    """The bytes of the blocks, [M, G * nbytes]. Codes must be from `low` to `high`."""
    if not ((codes_MG32 >= kind.low) & (codes_MG32 <= kind.high)).all():
        raise AssertionError(f"codes of {kind.name} go from {kind.low} to {kind.high}")
    scales = np.ascontiguousarray(scales_MG, "<f2").view(np.uint8).reshape(*scales_MG.shape, 2)
    parts = [scales, *_PACKED[kind.bits](codes_MG32)]
    blocks: Bytes = np.concatenate(parts, axis=-1)
    return blocks.reshape(len(blocks), -1)


def _packed_8(codes: NDArray[np.int8]) -> list[Bytes]:
    return [codes.view(np.uint8)]


def _packed_4(codes: NDArray[np.int8]) -> list[Bytes]:
    return [_nibbles((codes + 8).astype(np.uint8))]


def _packed_5(codes: NDArray[np.int8]) -> list[Bytes]:
    """The fifth bits come first, 32 of them in 4 bytes, the first weight's lowest."""
    unsigned = (codes + 16).astype(np.uint8)
    return [np.packbits(unsigned >> 4, axis=-1, bitorder="little"), _nibbles(unsigned & 15)]


def _nibbles(unsigned: Bytes) -> Bytes:
    """Weight j beside weight j + 16: the first in the low half of a byte."""
    return unsigned[..., : SIZE // 2] | (unsigned[..., SIZE // 2 :] << 4)


_PACKED: Mapping[int, Any] = MappingProxyType({4: _packed_4, 5: _packed_5, 8: _packed_8})
