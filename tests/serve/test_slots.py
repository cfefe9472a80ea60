"""The cache of a changing batch: whatever joins and leaves, each row's logits are those of the prompt alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loadstone.load import open_source
from loadstone.model import GPT
from loadstone.native import NativeEngine, missing, open_native
from loadstone.sampling import Floats
from loadstone.serve.caches import slots_of
from loadstone.serve.slots import LEAST, Slots
from small_gpt import small_gpt, small_llama

GPTS = [small_gpt(layers=2), small_llama(layers=2)]
RUNNERS: list[GPT | NativeEngine] = [*GPTS, *([] if missing() else [open_native(open_source(model)) for model in GPTS])]
PREFIX = [n % 61 for n in range(3, 3 + LEAST)]  # the context of these models is 24


def feed(slots: Slots, row: int, ids: list[int]) -> Floats:
    return slots.read(row, row + 1, [ids])[0]


def alone(number: int, ids: list[int]) -> Floats:
    logits: Floats = GPTS[number % 2](torch.tensor([ids]))[0, -1].detach().numpy()
    return logits


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_that_join_and_leave_hold_what_they_should(data: st.DataObject) -> None:
    number = data.draw(st.integers(0, len(RUNNERS) - 1))
    slots = slots_of(RUNNERS[number], 3, 24)
    requests: list[list[int]] = []
    for _ in range(data.draw(st.integers(1, 12))):
        if slots.busy and (slots.busy == slots.rows or data.draw(st.booleans())):
            row = data.draw(st.integers(0, slots.busy - 1))
            moved = slots.release(row)
            requests[row] = requests[moved]
            requests.pop()
        else:
            shared = data.draw(st.sampled_from([[], PREFIX, PREFIX[:-1], [*PREFIX, 7]]))
            ids = [*shared, *data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=5))]
            row = slots.busy
            known = slots.admit(ids)
            assert known == 0 or LEAST <= known < len(ids)
            feed(slots, row, ids[known:])
            requests.append(ids)
        assert slots.held[: slots.busy] == requests
    for row, ids in enumerate(requests):
        np.testing.assert_allclose(feed(slots, row, [1]), alone(number, [*ids, 1]), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("number", range(len(RUNNERS)))
def test_a_prefix_is_found_in_a_row_that_ended_and_in_one_that_goes_on(number: int) -> None:
    slots = slots_of(RUNNERS[number], 3, 24)
    feed(slots, 0, [*PREFIX, 1, 2][slots.admit([*PREFIX, 1, 2]) :])
    assert slots.admit([*PREFIX, 5]) == LEAST  # copied: the first one goes on
    slots.release(0)
    slots.release(0)
    assert slots.busy == 0
    assert slots.admit([*PREFIX, 1, 2, 3]) == LEAST + 2
    assert slots.admit([*PREFIX[:-1], 40]) == 0  # less than LEAST


def test_room_is_made_where_nothing_was_used_for_longest() -> None:
    slots = slots_of(GPTS[0], 3, 24)
    prompts = [[n] * (LEAST + 1) for n in (1, 2, 3)]
    for prompt in prompts:
        row = slots.busy
        slots.admit(prompt)
        feed(slots, row, prompt)
    for _ in prompts:
        slots.release(0)  # the first ends first, then the last, then the second
    slots.admit([9, 9])
    kept = [held for held in slots.held if len(held) > LEAST]
    assert prompts[0] not in kept
    assert len(kept) == 2
