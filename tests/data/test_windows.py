"""Windows, crops and packed rows: their laws."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadstone.data.batch import Sample, Samples
from loadstone.data.windows import Packed, RandomCrops, Windows
from loadstone.errors import ConfigError

TOKENS = np.arange(1000, dtype=np.uint16)


def each(samples: Samples) -> list[Sample]:
    with pytest.raises(IndexError):
        samples[len(samples)]
    return [samples[i] for i in range(len(samples))]


@given(st.integers(2, 200), st.integers(1, 30), st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_the_windows_of_document_003(count: int, length: int, stride: int) -> None:
    tokens = np.arange(count, dtype=np.uint32)
    expected = [
        (list(tokens[i : i + length]), list(tokens[i + 1 : i + length + 1])) for i in range(0, count - length, stride)
    ]
    if not expected:
        with pytest.raises(ConfigError):
            Windows(tokens, length, stride)
        return
    windows = Windows(tokens, length, stride)
    assert [(list(ids), list(targets)) for ids, targets, _ in each(windows)] == expected
    if stride <= length:  # every token is seen, up to a rest that is shorter than a stride and its target
        seen = {token for ids, targets, _ in each(windows) for token in [*ids, *targets]}
        assert seen == set(range(max(seen) + 1))
        assert count - len(seen) < stride


def test_by_default_no_target_is_seen_twice_and_rows_are_int64() -> None:
    windows = Windows(TOKENS, 64)
    targets = [target for sample in each(windows) for target in sample.targets]
    assert len(targets) == len(set(targets)) == 64 * len(windows)
    assert windows[0].ids.dtype == windows[0].targets.dtype == np.int64
    np.testing.assert_array_equal(windows[-1].ids, windows[len(windows) - 1].ids)


def test_a_corpus_shorter_than_one_window_says_what_to_change() -> None:
    message = r"corpus has 64 tokens, and one window needs 65: 64 to see.*Give more text, or a shorter context"
    for make in (lambda: Windows(TOKENS[:64], 64), lambda: RandomCrops(TOKENS[:64], 64, 3)):
        with pytest.raises(ConfigError, match=message):
            make()
    assert len(Windows(TOKENS[:65], 64)) == 1
    assert list(RandomCrops(TOKENS[:65], 64, 1)[0].targets) == list(range(1, 65))
    with pytest.raises(ConfigError, match="window of 0 tokens"):
        Windows(TOKENS, 0)
    with pytest.raises(ConfigError, match="stride of 0 never moves"):
        Windows(TOKENS, 4, 0)


def test_crops_depend_on_seed_and_index_alone() -> None:
    crops = RandomCrops(TOKENS, 8, 2000, seed=1)
    starts = [int(sample.ids[0]) for sample in each(crops)]
    assert [int(crops[i].ids[0]) for i in reversed(range(2000))] == starts[::-1]
    assert starts != [int(sample.ids[0]) for sample in each(RandomCrops(TOKENS, 8, 2000, seed=2))]
    assert starts[:5] == [int(sample.ids[0]) for sample in each(RandomCrops(TOKENS, 8, 5, seed=1))]
    assert starts[:4] == PINNED  # whatever version of numpy: a resumed run must see the same
    assert min(starts) < 10
    assert 980 < max(starts) <= 991
    assert abs(np.mean(starts) - 496) < 20
    assert all(list(sample.targets[:-1]) == list(sample.ids[1:]) for sample in each(crops))


PINNED = [89, 798, 788, 51]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 24))
@settings(max_examples=200, deadline=None)
def test_packing_predicts_every_token_but_the_first_of_its_document_once(sizes: list[int], length: int) -> None:
    starts = np.cumsum([0, *sizes[:-1]]).astype(np.uint64)
    tokens = np.arange(sum(sizes))
    document = np.repeat(np.arange(len(sizes)), sizes)
    if max(sizes) == 1:
        with pytest.raises(ConfigError, match="Nothing to learn from"):
            Packed(tokens, length, starts)
        return
    predicted: Counter[int] = Counter()
    for ids, targets, segments in each(Packed(tokens, length, starts)):
        assert segments is not None
        assert len(ids) == len(targets) == len(segments) <= length
        assert (targets == ids + 1).all()  # the next token of the same text
        assert (document[ids] == document[targets]).all()  # and of the same document
        assert segments[0] == 0
        changes = np.diff(segments)
        assert set(changes) <= {0, 1}
        assert ((changes == 0) <= (np.diff(ids) == 1)).all()  # one segment is one stretch of text
        predicted.update(targets.tolist())
    assert set(predicted.values()) == {1}
    assert set(predicted) == set(range(sum(sizes))) - set(starts.astype(int).tolist())


def test_packed_rows_are_well_filled() -> None:
    sizes = np.random.default_rng(0).integers(2, 200, 3000)
    starts = np.cumsum([0, *sizes[:-1]]).astype(np.uint64)
    rows = Packed(np.arange(sizes.sum()), 256, starts)
    filled = (sizes - 1).sum() / (256 * len(rows))
    assert filled > 0.97


def test_packing_needs_documents() -> None:
    with pytest.raises(ConfigError, match="where documents start"):
        Packed(TOKENS, 8)
    with pytest.raises(ConfigError, match="row of 0 tokens"):
        Packed(TOKENS, 0, np.array([0], np.uint64))


def test_identities_tell_rows_apart() -> None:
    starts, other = np.array([0, 500], np.uint64), TOKENS.copy()
    other[7] += 1
    made: list[Samples] = [
        Windows(TOKENS, 8), Windows(TOKENS, 8, 4), Windows(TOKENS, 9), Windows(other, 8), Packed(TOKENS, 8, starts),
        Packed(TOKENS, 9, starts), RandomCrops(TOKENS, 8, 5), RandomCrops(TOKENS, 8, 6), RandomCrops(TOKENS, 8, 5, 1),
    ]  # fmt: skip
    assert len({made_of.identity for made_of in made}) == len(made)  # type: ignore[attr-defined]
    assert Windows(TOKENS, 8).identity == Windows(TOKENS.copy(), 8).identity
    assert isinstance(made[0][0], Sample)
