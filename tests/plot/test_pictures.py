"""The pictures of loss and weight updates show exactly the data: lines, cells, bars and labels."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("matplotlib")

from figures import bars, cells, curves, laid_out, legend, mesh, row_labels
from loadstone.plot.loss import loss_figure, smoothed
from loadstone.plot.reading import read_run
from loadstone.plot.schedule import schedule_figure
from loadstone.plot.style import round_numbers, shortened
from loadstone.plot.updates import updates_figure
from run_folders import Row, evaluation, groups, training, typical_run, updated, write_run

# -- loss


def test_the_loss_of_one_run(tmp_path: Path) -> None:
    run = read_run(typical_run(tmp_path / "my run"))
    figure = laid_out(loss_figure([run]))
    axes = figure.axes[0]
    found = curves(axes)
    assert set(found) == {"training", "validation", "_best"}
    assert found["training"].tolist() == np.column_stack([run.training.step, run.training.loss]).tolist()
    assert found["validation"].tolist() == [[0, 4.0], [50, 2.1 + 0.2], [100, 2.1 + 0.1], [150, 2.1], [200, 2.1 + 0.1]]
    assert found["_best"].tolist() == [[150, 2.1]]
    assert axes.get_title("left") == "Loss of my run"
    assert axes.get_xlabel() == "step (102,400 tokens in all)"
    assert axes.get_ylabel() == "loss (nats per token)"
    assert legend(figure) == ["training", "validation", "lowest validation loss: 2.1 at step 150 (perplexity 8.166)"]


def test_perplexity_is_on_the_right_beside_its_loss(tmp_path: Path) -> None:
    figure = laid_out(loss_figure([read_run(typical_run(tmp_path))]))
    (right,) = figure.axes[0].child_axes
    low, high = figure.axes[0].get_ylim()
    assert right.get_ylim() == pytest.approx((math.exp(low), math.exp(high)))
    assert right.get_ylabel() == "perplexity = exp(loss)"
    assert "10" in row_labels(right)


def test_a_classifier_has_no_perplexity(tmp_path: Path) -> None:
    rows = [training(10), {"step": 10, "val_loss": 0.5, "accuracy": 0.9}]
    figure = laid_out(loss_figure([read_run(write_run(tmp_path, rows))]))
    assert not figure.axes[0].child_axes
    assert figure.axes[0].get_ylabel() == "loss (nats)"
    assert legend(figure)[-1] == "lowest validation loss: 0.5 at step 10"


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=300))
@settings(max_examples=40, deadline=None)
def test_smoothing_is_a_mean_around_each_value(values: list[float]) -> None:
    found, over = smoothed(np.array(values))
    half = over // 2
    assert over == (2 * (len(values) // 40) + 1 if len(values) >= 80 else 1)
    for i, mean in enumerate(found):
        window = values[i - min(half, i) : i + min(half, i) + 1]
        assert mean == pytest.approx(np.mean(window), abs=1e-9)


def test_a_long_run_is_smoothed_and_its_raw_curve_is_there(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [training(step, 3 + float(rng.normal())) for step in range(1, 801)]
    rows[400] = training(401, 50.0)  # a spike
    rows[500] = training(501, math.nan)
    run = read_run(write_run(tmp_path, [dict(row) | {"loss": None} if row["step"] == 501 else row for row in rows]))
    axes = laid_out(loss_figure([run])).axes[0]
    found = curves(axes)
    known = np.isfinite(run.training.loss)
    assert found["training"].tolist() == np.column_stack([run.training.step, run.training.loss])[known].tolist()
    assert found["training, mean of 39 values"][:, 1].tolist() == smoothed(run.training.loss[known])[0].tolist()
    assert axes.get_ylim()[1] < 10  # the spike runs out of the picture


def test_a_cut_beginning_is_said(tmp_path: Path) -> None:
    rows = [training(step, 11.0 if step < 10 else 3 + 1 / step) for step in range(1, 1001)]
    axes = laid_out(loss_figure([read_run(write_run(tmp_path, rows))])).axes[0]
    assert axes.get_ylim()[1] < 8
    assert [text.get_text() for text in axes.texts] == ["cut off at the top: the loss begins at 11"]
    whole = laid_out(loss_figure([read_run(typical_run(tmp_path / "b"))])).axes[0]
    assert not whole.texts
    assert whole.get_ylim()[1] > 4


@pytest.mark.parametrize(
    "rows",
    [
        [training(1, 4.0)],
        [evaluation(0, 4.0)],
        [training(1, 4.0), evaluation(1, 4.0)],
        [training(1, 0.0), training(2, 0.0)],
        [training(1, 900.0), evaluation(2, 900.0)],
        [training(1, 1e30), training(2, -1e30)],
        [training(2**53, 1.0), training(1, 1.0)],
    ],
)
def test_runs_of_one_step_and_worse_are_drawn(tmp_path: Path, rows: list[Row]) -> None:
    run = read_run(write_run(tmp_path, rows))
    laid_out(loss_figure([run]))
    laid_out(schedule_figure(run))


def test_several_runs_are_compared_by_tokens(tmp_path: Path) -> None:
    runs = [read_run(typical_run(tmp_path / f"run-{i}", offset=i)) for i in range(3)]
    figure = laid_out(loss_figure(runs))
    axes = figure.axes[0]
    assert axes.get_xlabel() == "tokens seen in training"
    assert axes.get_title("left") == "Loss of 3 runs"
    for i, run in enumerate(runs):
        found = curves(axes)[f"run-{i}: best {2.1 + i:.3f}"]
        assert found.tolist() == np.column_stack([run.evaluation.tokens, run.evaluation.val_loss]).tolist()
    assert legend(figure) == [*(f"run-{i}: best {2.1 + i:.3f}" for i in range(3)), "lowest validation loss",
                              "faint: training"]  # fmt: skip
    looks = {
        (str(line.get_linestyle()), str(line.get_marker())) for line in axes.lines if "best " in str(line.get_label())
    }
    assert len(looks) == 3  # without colour, too


def test_runs_without_tokens_are_compared_by_steps(tmp_path: Path) -> None:
    runs = [
        read_run(typical_run(tmp_path / "one")),
        read_run(write_run(tmp_path / "two", [{"step": 5, "loss": 3.0}, {"step": 9, "loss": 2.0}])),
    ]
    axes = laid_out(loss_figure(runs)).axes[0]
    assert axes.get_xlabel() == "step"
    assert curves(axes)["two (training)"].tolist() == [[5, 3], [9, 2]]


# -- updates


def test_the_heat_map_is_the_measured_norms(tmp_path: Path) -> None:
    run = read_run(typical_run(tmp_path / "run"))
    axes = laid_out(updates_figure(run)).axes[0]
    shown = [i for i, group in enumerate(run.updates.groups) if "norm1" not in group and "norm2" not in group]
    found, measured = cells(axes), run.updates.moved[shown]
    assert found.shape == (2 + 2 * 4 + 1, 10)
    assert (found.mask == (measured == 0)).all()
    assert found.compressed().tolist() == measured[measured > 0].tolist()
    assert row_labels(axes) == [
        "token embedding = head", "position embedding",
        *(label for i in range(4) for label in (f"block {i}  attn", "mlp")), "final norm",
    ]  # fmt: skip
    assert axes.get_ylim() == (11, 0)  # the embeddings on top
    assert axes.get_xlim() == (0, 200)


def test_frozen_cells_are_hatched_and_no_others(tmp_path: Path) -> None:
    run = read_run(typical_run(tmp_path / "run"))
    figure = laid_out(updates_figure(run))
    frozen = [0, 1, 2, 3, 4, 5]  # the embeddings, attention and MLP of blocks 0 and 1
    assert sorted(bars(figure.axes[0], "/////")) == [(0, 100, row, row + 1) for row in frozen]
    assert legend(figure) == ["exactly zero: frozen"]


def test_the_color_scale_is_logarithmic_from_the_least_to_the_greatest(tmp_path: Path) -> None:
    rows = [updated(20, {"tok_emb": 1e-6, "norm": 0.0}), updated(40, {"tok_emb": 1e-2, "norm": 0.0})]
    figure = laid_out(updates_figure(read_run(write_run(tmp_path, [], rows))))
    norm = mesh(figure.axes[0]).norm
    assert (norm.vmin, norm.vmax) == (1e-6, 1e-2)
    assert norm(1e-4) == pytest.approx(0.5)  # type: ignore[arg-type]
    assert figure.axes[1].get_ylabel() == "relative change in the interval, ‖ΔW‖ / ‖W‖"
    assert row_labels(figure.axes[1]) == ["1e-06", "1e-05", "0.0001", "0.001", "0.01"]


def test_a_head_of_its_own_is_a_row_and_the_embedding_is_not_called_it(tmp_path: Path) -> None:
    rows = [updated(20, dict.fromkeys(groups(1, head=True), 0.1))]
    labels = row_labels(laid_out(updates_figure(read_run(write_run(tmp_path, [], rows)))).axes[0])
    assert labels == ["token embedding", "position embedding", "block 0  attn", "mlp", "final norm", "head"]


def test_norms_within_blocks_are_shown_where_they_alone_move(tmp_path: Path) -> None:
    moved = {group: 0.1 if "norm" in group else 0.0 for group in groups(2)}
    axes = laid_out(updates_figure(read_run(write_run(tmp_path, [], [updated(20, moved)])))).axes[0]
    assert row_labels(axes)[2:6] == ["block 0  norm1", "attn", "norm2", "mlp"]
    assert np.ma.getmaskarray(cells(axes))[:, 0].tolist() == [value == 0 for value in moved.values()]


def test_intervals_of_unequal_length_gaps_and_what_is_not_finite(tmp_path: Path) -> None:
    rows = [updated(10, {"norm": 0.1}, 0), updated(50, {"norm": None}, 10), updated(70, {"norm": 0.3}, 60)]
    figure = laid_out(updates_figure(read_run(write_run(tmp_path, [], rows))))
    axes = figure.axes[0]
    edges = np.asarray(mesh(axes).get_coordinates())[0, :, 0]
    assert edges.tolist() == [0, 10, 50, 60, 70]
    assert cells(axes).filled(-1).tolist() == [[0.1, -1, -1, 0.3]]
    assert bars(axes, "xxxx") == [(10, 50, 0, 1)]  # measured; and nothing over the gap
    assert legend(figure) == ["not a finite number"]


@pytest.mark.parametrize(
    "rows",
    [
        [updated(20, dict.fromkeys(groups(2), 0.0))],
        [updated(20, {"norm": 0.1})],
        [updated(20, {"norm": 5e-324, "tok_emb": 1e30})],
        [updated(20, {"norm": None})],
        [updated(0, {"norm": 0.5}), updated(1, {"norm": -0.5})],
        [updated(20, {"norm": 0.5}, since=90), updated(30, {"norm": 0.5}, since=0)],
        [updated(20, {"an unknown group with a name of some length\n$": 0.5, "blocks.x.attn": 0.1, "blocks.1": 0.1})],
        [updated(step, dict.fromkeys(groups(48, head=True), 0.1)) for step in (20, 40)],
    ],
)
def test_odd_updates_are_drawn(tmp_path: Path, rows: list[Row]) -> None:
    laid_out(updates_figure(read_run(write_run(tmp_path, [], rows))))


def test_forty_eight_blocks_have_labels_that_do_not_overlap(tmp_path: Path) -> None:
    rows = [updated(20, dict.fromkeys(groups(48, head=True), 0.1))]
    figure = laid_out(updates_figure(read_run(write_run(tmp_path, [], rows))))
    labels = figure.axes[0].get_yticklabels()
    assert [text.get_text() for text in labels[1:4]] == ["position embedding", "block 0", "block 3"]
    boxes = [text.get_window_extent() for text in labels]
    overlap = [upper.y0 - lower.y1 for upper, lower in pairwise(boxes)]
    assert min(overlap) > -4  # the boxes are taller than the letters in them


# -- looks


@given(st.floats(1e-12, 1e12), st.floats(1e-6, 1e12))
@settings(max_examples=100, deadline=None)
def test_ticks_are_few_and_within_view(low: float, span: float) -> None:
    high = low * (1 + span)
    ticks = round_numbers(low, high)
    assert len(ticks) <= 12
    assert ticks == sorted(set(ticks))
    assert all(low <= tick <= high for tick in ticks)


def test_long_names_are_shortened_and_made_printable() -> None:
    assert shortened("run\x1b[31m") == "run\\x1b[31m"
    assert shortened("abcdefghijkl", 8) == "abc…ijkl"
    assert len(shortened("x" * 500)) == 50
