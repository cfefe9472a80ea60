"""The laws of every op: the inverse undoes it, and the shapes that it announces are true."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from loadstone.config import GPTConfig
from loadstone.weightmap.ops import Op, RotaryHalves, ShapeError, SplitQKV, Squeeze, Transpose, apply, apply_shapes

ORDERS = ("qkv", "qvk", "kqv", "kvq", "vqk", "vkq")


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[Op, ...], GPTConfig, NDArray[Any]]:
    """Ops, a config, and an array that they apply to: random values, so that any wrong index shows."""
    group, kv_heads, half = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    heads = group * kv_heads
    config = GPTConfig(5, 6, heads * 2 * half, 1, heads, n_kv_heads=kv_heads)
    q, kv = heads * 2 * half, kv_heads * 2 * half
    columns = draw(st.lists(st.integers(1, 4), max_size=1))
    per_head = draw(st.booleans()) and group == 1
    kinds: list[tuple[tuple[Op, ...], tuple[int, ...]]] = [
        ((Transpose(),), (q, 3)),
        ((Squeeze(),), (1, *columns, 2)),
        ((Squeeze(), Transpose()), (1, 4, q)),
        ((SplitQKV(draw(st.sampled_from(ORDERS)), per_head),), (q + 2 * kv, *columns)),
        ((Transpose(), SplitQKV()), (3, q + 2 * kv)),
        ((RotaryHalves("n_heads"),), (q, *columns)),
        ((RotaryHalves("n_kv_heads"),), (kv, *columns)),
    ]
    ops, shape = draw(st.sampled_from(kinds))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return ops, config, rng.standard_normal(shape).astype(np.float32)


@given(cases())
@settings(max_examples=300, deadline=None)
def test_inverse_undoes_forward_and_shapes_are_true(case: tuple[tuple[Op, ...], GPTConfig, NDArray[Any]]) -> None:
    ops, config, array = case
    there = apply(ops, [array], config)
    (back,) = apply(ops, there, config, inverse=True)
    assert back.shape == array.shape
    assert np.array_equal(back, array)
    announced = apply_shapes(ops, [array.shape], config)
    assert [part.shape for part in there] == announced
    assert apply_shapes(ops, announced, config, inverse=True) == [array.shape]
    assert sum(part.size for part in there) == array.size


@pytest.mark.parametrize("ops", [(Transpose(),), (Squeeze(), Transpose()), (Transpose(), SplitQKV())])
def test_transpose_squeeze_and_split_are_views(ops: tuple[Op, ...]) -> None:
    config = GPTConfig(5, 6, 8, 1, 2)
    array = np.zeros((1, 8, 24) if isinstance(ops[0], Squeeze) else (8, 24), np.float32)
    assert all(np.shares_memory(part, array) for part in apply(ops, [array], config))


def test_split_order_and_interleave_by_hand() -> None:
    config = GPTConfig(5, 6, 4, 1, 2)  # 2 heads of 2
    rows = np.arange(12)
    assert [part.tolist() for part in SplitQKV().forward([rows], config)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]
    assert SplitQKV("vqk").forward([rows], config)[0].tolist() == [4, 5, 6, 7]
    # head 0: q 0,1  k 2,3  v 4,5; head 1: q 6,7  k 8,9  v 10,11
    assert [part.tolist() for part in SplitQKV(per_head=True).forward([rows], config)] == [
        [0, 1, 6, 7],
        [2, 3, 8, 9],
        [4, 5, 10, 11],
    ]


def test_grouped_heads_split_unequally() -> None:
    config = GPTConfig(5, 6, 8, 1, 4, n_kv_heads=2)
    assert [part.tolist() for part in SplitQKV().forward([np.arange(16)], config)] == [
        list(range(8)), [8, 9, 10, 11], [12, 13, 14, 15],
    ]  # fmt: skip


def test_rotary_rows_by_hand() -> None:
    config = GPTConfig(5, 6, 8, 1, 2)  # 2 heads of 4: pairs (0 1)(2 3) -> halves 0 2 | 1 3
    (halves,) = RotaryHalves("n_heads").forward([np.arange(8)], config)
    assert halves.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(
    ("op", "shape"), [(Transpose(), (3,)), (Transpose(), (1, 2, 3)), (Squeeze(), (2, 3)), (SplitQKV(), (25, 8))]
)
def test_shapes_that_an_op_cannot_take_are_refused(op: Op, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError):
        op.shapes([shape], GPTConfig(5, 6, 8, 1, 2))
