"""Blocks: our bytes, decoded by the gguf package, are the chosen codes times the chosen scales, to the last bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from loadstone.quantize.blocks import SIZE, TYPES, BlockType, decode, encode
from loadstone.quantize.grid import Grid, best_grid, nearest

gguf = pytest.importorskip("gguf")
KINDS = st.sampled_from(list(TYPES.values()))


def package_decodes(kind: BlockType, blocks: Any) -> Any:
    from gguf.quants import dequantize

    return dequantize(blocks, gguf.GGMLQuantizationType[kind.name])


@st.composite
def chosen(draw: Any) -> tuple[BlockType, Any, list[Any]]:
    """Any codes, with any scales and minima."""
    kind, rows, groups = draw(KINDS), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    codes = draw(hnp.arrays(np.int8, (rows, groups, SIZE), elements=st.integers(kind.low, kind.high)))
    halves = hnp.arrays(np.float16, (rows, groups), elements=st.floats(-60000, 60000, width=16))
    return kind, codes, [draw(halves) for _ in range(1 + kind.minimum)]


@settings(deadline=None, max_examples=80)
@given(chosen())
def test_the_gguf_package_reads_what_was_chosen(given: tuple[BlockType, Any, list[Any]]) -> None:
    kind, codes, halves = given
    blocks = encode(kind, codes, *halves)
    assert blocks.shape == (codes.shape[0], codes.shape[1] * kind.nbytes)
    assert kind.nbytes == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]][1]
    read = package_decodes(kind, blocks)
    assert read.tobytes() == decode(codes, *halves).tobytes()
    scales, *minima = (each.astype(np.float64)[..., None] for each in halves)
    meant = scales * codes + (minima[0] if minima else 0)
    assert np.allclose(read, meant.reshape(len(codes), -1), rtol=1e-6, atol=1e-2)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), KINDS)
def test_rounding_twice_changes_nothing(seed: int, kind: BlockType) -> None:
    """What is on a grid of ours, with codes at both ends, is found again: scale, minimum and codes."""
    codes = np.random.default_rng(seed).integers(kind.low, kind.high, (2, 2, SIZE), dtype=np.int8, endpoint=True)
    codes[..., 0], codes[..., 1] = kind.low, kind.high
    halves = [np.full((2, 2), 0.0123 + 0.1 * part, np.float16) for part in range(1 + kind.minimum)]
    values = decode(codes, *halves)
    assert np.array_equal(nearest(torch.from_numpy(values), kind).values().numpy(), values)


def test_ggmls_own_rounding_would_have_changed_them() -> None:
    from gguf.quants import dequantize, quantize

    codes = np.tile(np.arange(-2, 6, dtype=np.int8), 4).reshape(1, 1, SIZE)
    values = decode(codes, np.full((1, 1), 0.1, np.float16))
    q4 = gguf.GGMLQuantizationType.Q4_0
    assert not np.array_equal(dequantize(quantize(values, q4), q4), values)


def test_codes_out_of_range_are_a_defect() -> None:
    with pytest.raises(AssertionError, match="codes of Q4_0"):
        encode(TYPES["Q4_0"], np.full((1, 1, SIZE), 8, np.int8), np.ones((1, 1), np.float16))


WEIGHTS = hnp.arrays(np.int32, (2, 64), elements=st.integers(-(2**17), 2**17)).map(lambda n: n.astype(np.float32) / 512)


@settings(deadline=None, max_examples=40)
@given(WEIGHTS, KINDS)
def test_nearest_is_nearest_and_finite(weights: Any, kind: BlockType) -> None:
    rounded = nearest(torch.from_numpy(weights), kind)
    values = rounded.values()
    assert bool(torch.isfinite(values).all())
    assert int(rounded.codes.min()) >= kind.low
    assert int(rounded.codes.max()) <= kind.high
    blocks, codes = torch.from_numpy(weights).view(2, -1, SIZE), rounded.codes.float()
    wrong = (rounded.grid.values(codes) - blocks).abs()
    for step in (-1, 1):
        other = (rounded.grid.values((codes + step).clamp(kind.low, kind.high)) - blocks).abs()
        assert bool((wrong <= other * (1 + 1e-5) + 1e-6).all())


@settings(deadline=None, max_examples=40)
@given(WEIGHTS, KINDS)
def test_the_searched_scale_is_no_worse_than_ggmls(weights: Any, kind: BlockType) -> None:
    from gguf.quants import dequantize, quantize

    qtype = gguf.GGMLQuantizationType[kind.name]
    theirs = np.square(dequantize(quantize(weights, qtype), qtype) - weights).reshape(-1, SIZE).sum(1)
    ours = (nearest(torch.from_numpy(weights), kind).values().numpy() - weights) ** 2
    assert (ours.reshape(-1, SIZE).sum(1) <= theirs * (1 + 1e-3) + 1e-9).all()


@pytest.mark.parametrize("kind", TYPES.values(), ids=lambda kind: kind.name)
def test_hostile_blocks(kind: BlockType) -> None:
    """Zeros, one weight alone, what is below and beyond float16."""
    rows = torch.zeros(6, SIZE)
    rows[1, 5], rows[2, 7], rows[3] = 1.0, -3.0, 1e-12
    rows[4, 0], rows[5] = 1e9, torch.linspace(-1e7, 1e7, SIZE)
    values = nearest(rows, kind).values()
    assert bool(torch.isfinite(values).all())
    assert not values[0].any()
    assert torch.allclose(values[1:3], rows[1:3], rtol=1e-3, atol=1e-3)
    assert values[4, 0] == 65504 * (max(-kind.low, kind.high) + kind.minimum)  # the largest there is


def test_importance_moves_the_scale_to_what_matters() -> None:
    torch.manual_seed(0)
    blocks = torch.randn(200, SIZE)
    importance = torch.ones(SIZE)
    importance[3] = 1000.0
    kind = TYPES["Q4_0"]

    def error_of_3(grid: Grid) -> float:
        return float((grid.values(grid.codes(blocks, kind)) - blocks)[:, 3].square().sum())

    assert error_of_3(best_grid(blocks, kind, importance)) < 0.5 * error_of_3(best_grid(blocks, kind))
