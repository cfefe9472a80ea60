"""The measured updates: right numbers, exact zeros, and the same lines after a resume."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loadstone.model import GPT
from loadstone.train import updates
from loadstone.train.updates import UpdateTracker, group_of, learning
from small_gpt import Wrapped, small_gpt


def jolt(model: GPT, seed: int, *parts: str) -> None:
    """Change some modules at random, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith(parts):
                weight.add_(0.05 * torch.randn(weight.shape, generator=generator))


def flat(model: GPT, group: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    parts = [weight for name, weight in model.named_parameters() if name.startswith(group + ".")]
    return np.concatenate([weight.detach().double().numpy().ravel() for weight in parts])


def test_groups_are_the_model_s_modules_in_its_order() -> None:
    found = UpdateTracker(model := small_gpt(3, tied=False)).measure(model)
    block = [f"blocks.{i}.{part}" for i in range(3) for part in ("norm1", "attn", "norm2", "mlp")]
    assert list(found) == ["tok_emb", "pos_emb", *block, "norm", "head"]
    assert "head" not in UpdateTracker(tied := small_gpt(3)).measure(tied)
    assert group_of("blocks.11.attn.out.bias") == "blocks.11.attn"


@pytest.mark.parametrize("chunk", [1, 50, 1 << 20])
def test_the_number_is_the_relative_frobenius_norm_of_weights_and_biases(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(updates, "_CHUNK", chunk)
    model = small_gpt(3)
    groups = UpdateTracker(model).measure(model)
    before = {group: flat(model, group) for group in groups}
    tracker = UpdateTracker(model)
    jolt(model, 1, "")
    for group, measured in tracker.measure(model).items():
        expected = np.linalg.norm(flat(model, group) - before[group]) / np.linalg.norm(before[group])
        assert measured == pytest.approx(expected, rel=1e-12), group


def test_each_interval_is_measured_from_the_end_of_the_last() -> None:
    tracker = UpdateTracker(model := small_gpt(3))
    jolt(model, 1, "norm.")
    assert tracker.measure(model)["norm"] > 0
    assert set(tracker.measure(model).values()) == {0.0}


@given(frozen=st.sets(st.sampled_from(["tok_emb", "pos_emb", "blocks.0", "blocks.1.attn", "blocks.2.mlp", "norm"])))
@settings(max_examples=20, deadline=None)
def test_frozen_modules_move_by_exactly_zero_under_adamw(frozen: set[str]) -> None:
    model = small_gpt(3)
    for name, weight in model.named_parameters():
        weight.requires_grad_(not name.startswith(tuple(f"{part}." for part in frozen)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
    tracker = UpdateTracker(model)
    model(torch.arange(12)[None]).square().mean().backward()
    optimizer.step()
    for group, moved in tracker.measure(model).items():
        assert (moved == 0.0) == any(f"{group}.".startswith(f"{part}.") for part in frozen), group


def test_a_change_that_float32_sums_would_lose_is_measured() -> None:
    """One weight of the embedding by 1e-7 of its own size: a change far below the norm's float32 precision."""
    model = small_gpt(3)
    tracker = UpdateTracker(model)
    with torch.no_grad():
        weight = model.tok_emb.weight
        weight[43, 3] = torch.nextafter(weight[43, 3], torch.tensor(9.0))
    assert 0 < tracker.measure(model)["tok_emb"] < 1e-8


def test_what_was_all_zeros_has_moved_by_one() -> None:
    model = small_gpt(3)
    with torch.no_grad():
        for weight in model.blocks[1].parameters():
            weight.zero_()
    tracker = UpdateTracker(model)
    jolt(model, 1, "blocks.1.attn.q.bias")
    found = tracker.measure(model)
    assert found["blocks.1.attn"] == 1.0
    assert found["blocks.1.mlp"] == 0.0


def test_what_is_not_finite_is_nan_and_never_hidden() -> None:
    tracker = UpdateTracker(model := small_gpt(3))
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    assert math.isnan(tracker.measure(model)["norm"])
    tracker = UpdateTracker(model := small_gpt(3))
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.bias.zero_()  # type: ignore[union-attr]
        tracker.measure(model)
        model.norm.weight[0] = math.nan
    assert math.isnan(tracker.measure(model)["norm"])


def test_weights_that_lie_transposed_in_memory_and_half_precision_are_measured_too() -> None:
    model = small_gpt(3).to(torch.bfloat16)
    weight = model.get_parameter("blocks.0.mlp.up.weight")
    weight.data = weight.data.t().contiguous().t()  # as HuggingFace's GPT-2 is loaded
    before = flat(model, "blocks.0.mlp")
    tracker = UpdateTracker(model)
    jolt(model, 5, "blocks.0.mlp")
    expected = np.linalg.norm(flat(model, "blocks.0.mlp") - before) / np.linalg.norm(before)
    assert tracker.measure(model)["blocks.0.mlp"] == pytest.approx(expected, rel=1e-12)


def test_a_resumed_run_measures_what_the_uninterrupted_one_does() -> None:
    """Measured at step 1, saved at 2, resumed, measured at 3."""
    model = small_gpt(3)
    tracker = UpdateTracker(model)
    jolt(model, 1, "")
    tracker.measure(model)
    jolt(model, 2, "blocks.2")
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = {name: weight.clone() for name, weight in tracker.state_dict(model).items()}
    jolt(model, 3, "blocks.2.mlp", "norm")
    expected = tracker.measure(model)

    again = small_gpt(3)
    again.load_state_dict(weights)
    resumed = UpdateTracker(again)
    resumed.load_state_dict(again, state)
    jolt(again, 3, "blocks.2.mlp", "norm")
    assert resumed.measure(again) == expected
    assert expected["blocks.2.attn"] > 0  # moved before the checkpoint only


def test_the_saved_state_holds_only_what_the_checkpoint_does_not() -> None:
    tracker = UpdateTracker(model := small_gpt(3))
    assert tracker.state_dict(model) == {}
    jolt(model, 1, "blocks.1.attn.q")
    assert set(tracker.state_dict(model)) == {"blocks.1.attn.q.weight", "blocks.1.attn.q.bias"}
    tracker.measure(model)
    assert tracker.state_dict(model) == {}


def test_a_wrapper_s_prefix_is_no_part_of_a_group() -> None:
    found = UpdateTracker(model := Wrapped(small_gpt(3))).measure(model)
    assert list(found)[:3] == ["tok_emb", "pos_emb", "blocks.0.norm1"]
    assert list(found)[-2:] == ["norm", "score"]


def test_which_groups_learn_and_which_share_of_them() -> None:
    model = small_gpt(3, tied=False)
    assert set(learning(model).values()) == {1.0}
    for weight in model.parameters():
        weight.requires_grad_(False)
    assert set(learning(model).values()) == {0.0}
    model.norm.requires_grad_(True)
    model.get_submodule("blocks.2.attn.q").requires_grad_(True)  # one of four
    expected = dict.fromkeys(UpdateTracker(model).measure(model), 0.0) | {"blocks.2.attn": 0.25, "norm": 1.0}
    assert learning(model) == expected
