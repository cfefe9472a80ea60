"""The loader: every row once an epoch, the same batches on any number of ranks, and from anywhere on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loadstone.data.batch import IGNORED, Batch, Sample, collate
from loadstone.data.loader import Loader
from loadstone.data.mixing import Permutation, key_of
from loadstone.errors import ConfigError


class Numbers:
    """Row i is i, i times or less."""

    def __init__(self, count: int, identity: str = "numbers") -> None:
        self.count, self.identity = count, identity

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> Sample:
        ids = np.full(index % 3 + 1, index)
        return Sample(ids, ids + 1)


def first_column(batch: Batch) -> list[int]:
    return batch.inputs[:, 0].tolist() if len(batch) else []


def rows(loader: Loader, batches: int) -> list[list[int]]:
    return [first_column(loader.next_batch()) for _ in range(batches)]


# -- the order


@given(st.integers(1, 5000), st.integers())
@settings(max_examples=100, deadline=None)
def test_a_permutation_is_one_and_any_part_of_it_is_the_same(size: int, key: int) -> None:
    permutation = Permutation(size, key)
    whole = permutation(0, size)
    assert sorted(whole) == list(range(size))
    np.testing.assert_array_equal(permutation(size // 3, size // 2), whole[size // 3 : size // 2])


def test_permutations_look_random_and_stay_the_same_for_ever() -> None:
    size = 2000
    orders = np.array([Permutation(size, key_of(seed))(0, size) for seed in range(300)])
    assert len({tuple(order) for order in orders}) == 300
    assert abs(np.corrcoef(orders[0], orders[1])[0, 1]) < 0.1
    assert abs(np.corrcoef(orders[0][:-1], orders[0][1:])[0, 1]) < 0.1
    # Where the first, middle and last row go is uniform over the seeds: a mean of 300 has sigma 33.
    for place in (0, size // 2, size - 1):
        assert abs(orders[:, place].mean() - (size - 1) / 2) < 120
    assert Permutation(10, 1)(0, 10).tolist() == PINNED
    assert Permutation(10**12, 1)(10**11, 10**11 + 2).tolist() == PINNED_LARGE


PINNED = [2, 1, 4, 6, 8, 3, 9, 0, 7, 5]
PINNED_LARGE = [238_826_611_965, 350_865_069_897]


def test_small_permutations_are_uniform() -> None:
    counts = np.zeros((5, 5))
    for seed in range(3000):
        counts[np.arange(5), Permutation(5, key_of("small", seed))(0, 5)] += 1
    assert np.abs(counts / 3000 - 0.2).max() < 0.04  # five sigma


@given(st.integers(1, 60), st.integers(1, 7), st.booleans(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_every_row_once_an_epoch(count: int, size: int, shuffle: bool, drop_last: bool) -> None:
    if count < size and drop_last:
        with pytest.raises(ConfigError, match=f"gives {count} rows, and a batch takes {size}"):
            Loader(Numbers(count), size, shuffle=shuffle, drop_last=drop_last)
        return
    loader = Loader(Numbers(count), size, seed=3, shuffle=shuffle, drop_last=drop_last)
    for epoch in range(3):
        assert loader.epoch == epoch
        seen = [row for batch in rows(loader, loader.batches_per_epoch) for row in batch]
        assert len(set(seen)) == len(seen) == (count - count % size if drop_last else count)
        if not shuffle:
            assert seen == list(range(len(seen)))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    loader = Loader(Numbers(100), 100)
    assert rows(loader, 1) != rows(loader, 1)
    assert rows(Loader(Numbers(100), 100, seed=1), 1) != rows(Loader(Numbers(100), 100), 1)


# -- ranks and resuming


@given(st.integers(8, 50), st.sampled_from([1, 2, 4, 8]), st.booleans(), st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_the_rows_of_all_ranks_are_the_batch_of_one_process(count: int, world: int, drop_last: bool, seed: int) -> None:
    alone = Loader(Numbers(count), 8, seed=seed, drop_last=drop_last)
    ranks = [Loader(Numbers(count), 8, seed=seed, rank=r, world=world, drop_last=drop_last) for r in range(world)]
    for _ in range(2 * alone.batches_per_epoch + 1):
        whole = first_column(alone.next_batch())
        assert [row for rank in ranks for row in first_column(rank.next_batch())] == whole
        assert {rank.position for rank in ranks} == {alone.position}


@given(st.integers(6, 40), st.integers(1, 6), st.booleans(), st.data())
@settings(max_examples=60, deadline=None)
def test_resumed_anywhere_the_same_batches_follow(count: int, size: int, drop_last: bool, data: st.DataObject) -> None:
    def make() -> Loader:
        return Loader(Numbers(count), size, seed=5, drop_last=drop_last)

    at = data.draw(st.integers(0, 3 * make().batches_per_epoch))
    whole = rows(make(), at + 4)
    stopped = make()
    rows(stopped, at)
    resumed = make()
    resumed.restore(stopped.state())
    assert resumed.position == stopped.position
    assert rows(resumed, 4) == whole[at:]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: Loader(Numbers(40), 4, seed=1), "its seed was 0 and is now 1"),
        (lambda: Loader(Numbers(40), 4, shuffle=False), "its seed was 0 and is now 'none"),
        (lambda: Loader(Numbers(41), 4), "its samples was 40 and is now 41"),
        (lambda: Loader(Numbers(40, "letters"), 4), "its corpus was 'numbers' and is now 'letters'"),
        (lambda: Loader(Numbers(40), 5), "stopped after 12 rows.*with batches of 5 .*none begins there"),
    ],
)
def test_another_corpus_seed_or_batch_size_is_refused(other: Any, message: str) -> None:
    loader = Loader(Numbers(40), 4)
    rows(loader, 3)
    with pytest.raises(ConfigError, match=message):
        other().restore(loader.state())


def test_another_batch_size_goes_on_where_no_row_is_lost() -> None:
    loader = Loader(Numbers(40), 4)
    seen = [row for batch in rows(loader, 4) for row in batch]
    larger = Loader(Numbers(40), 8)
    larger.restore(loader.state())
    seen += [row for batch in rows(larger, 3) for row in batch]
    assert sorted(seen) == list(range(40))
    # In batches of 6 an epoch has 36 of the 40 rows: beyond the first, position 120 is not the same place.
    rows(loader, 26)
    assert loader.position == 120
    with pytest.raises(ConfigError, match="rows would be seen twice or never"):
        Loader(Numbers(40), 6).restore(loader.state())


@pytest.mark.parametrize("position", [None, "12", -4, 2.5])
def test_a_damaged_position_is_refused(position: Any) -> None:
    loader = Loader(Numbers(40), 4)
    with pytest.raises(ConfigError, match="position of the data is damaged"):
        loader.restore({**loader.state(), "position": position})


def test_batches_that_ranks_cannot_share() -> None:
    with pytest.raises(ConfigError, match="6 rows cannot be shared evenly by 4 ranks"):
        Loader(Numbers(40), 6, world=4)
    with pytest.raises(ConfigError, match="0 rows"):
        Loader(Numbers(40), 0)


# -- batches


def test_rows_are_padded_on_the_right() -> None:
    one, two = np.array([5, 6, 7]), np.array([8])
    batch = collate([Sample(one, one + 1, np.array([0, 0, 1])), Sample(two, two + 1)])
    assert batch.inputs.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.targets.tolist() == [[6, 7, 8], [9, IGNORED, IGNORED]]
    assert batch.segments is not None
    assert batch.segments.tolist() == [[0, 0, 1], [0, -1, -1]]
    assert batch.lengths.tolist() == [3, 1]
    part = batch.rows(1, 2)
    assert (part.inputs.tolist(), part.lengths.tolist(), len(part)) == ([[8, 0, 0]], [1], 1)
    assert part.to("meta").targets.is_meta
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64


def test_labels_of_classification_and_no_rows_at_all() -> None:
    batch = collate([Sample(np.array([1, 2]), np.array([0])), Sample(np.array([3]), np.array([1]))])
    assert batch.targets.tolist() == [[0], [1]]
    assert batch.segments is None
    assert collate([]).inputs.shape == (0, 0)
