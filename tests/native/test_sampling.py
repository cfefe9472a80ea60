"""Sampling in numpy: the probabilities of torch's, for all settings, and draws that follow them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loadstone import sampling as torch_sampling
from loadstone.errors import LoadstoneError
from loadstone.native.sampling import choose, probabilities
from loadstone.sampling import Sampling

pytestmark = pytest.mark.usefixtures("unbuilt")

SETTINGS = st.builds(
    Sampling,
    temperature=st.floats(0.05, 3), top_k=st.none() | st.integers(1, 12), top_p=st.none() | st.floats(0.05, 1),
    min_p=st.none() | st.floats(0, 1), repetition_penalty=st.floats(0.5, 2),
)  # fmt: skip


@settings(deadline=None)
@given(st.integers(0, 99), SETTINGS, st.lists(st.integers(0, 9), max_size=5))
def test_probabilities_are_those_of_torch(seed: int, sampling: Sampling, history: list[int]) -> None:
    scores = np.random.default_rng(seed).normal(0, 3, (2, 10)).astype(np.float32)
    histories = [history, []]
    want = torch.from_numpy(scores)
    if sampling.repetition_penalty != 1:
        want = torch_sampling.penalise(want, histories, sampling.repetition_penalty)
    scaled = (want - want.amax(-1, keepdim=True)) / sampling.temperature
    expected = torch_sampling.keep(scaled, sampling).softmax(-1).numpy()
    found = probabilities(scores, histories, sampling)
    # A sum that meets top_p or min_p to the last bit may fall to either side: then one token more or less stays.
    same = ((found > 0) == (expected > 0)).all(-1)
    assert same.sum() >= 1
    np.testing.assert_allclose(found[same], expected[same], rtol=1e-4, atol=1e-7)


def test_greedy_ties_and_draws() -> None:
    assert choose(np.array([[1.0, 3, 3], [5, 0, 0]], np.float32), [[], []], Sampling(), []) == [1, 0]
    penalised = Sampling(repetition_penalty=2.0)
    generator = np.random.default_rng(0)
    assert choose(np.array([[1.0, 3, 2]], np.float32), [[1]], penalised, [generator]) == [2]
    scores = np.log(np.array([[0.5, 0.3, 0.2]], np.float32))
    draws = [choose(scores, [[]], Sampling(temperature=1.0), [generator])[0] for _ in range(3000)]
    np.testing.assert_allclose(np.bincount(draws) / 3000, [0.5, 0.3, 0.2], atol=0.03)
    top = [choose(scores, [[]], Sampling(temperature=1.0, top_k=1), [generator])[0] for _ in range(50)]
    assert set(top) == {0}


@pytest.mark.parametrize(
    "odd", [Sampling(temperature=5e-324), Sampling(1.0, top_p=5e-324), Sampling(1.0, repetition_penalty=5e-324)]
)
def test_settings_that_float32_takes_for_nothing(odd: Sampling) -> None:
    assert choose(np.array([[1.0, 3, 2]], np.float32), [[1]], odd, [np.random.default_rng(0)]) == [1]


def test_scores_that_are_no_numbers_are_told() -> None:
    for bad in (np.nan, np.inf):
        with pytest.raises(LoadstoneError, match="no finite score"):
            choose(np.array([[0, bad]], np.float32), [[]], Sampling(), [])
