"""The pictures of schedule and vocabulary extension show exactly the data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from extendable import gpt2_like, hostile
from figures import bars, cells, laid_out, legend, mesh, row_labels
from loadstone.extend import extend, matrix_view
from loadstone.plot.reading import Learning, Run, read_run
from loadstone.plot.schedule import learning_rows, schedule_figure
from loadstone.plot.vocabulary import vocabulary_figure
from run_folders import groups, training, typical_run, write_extension, write_run

# -- schedule


def test_the_schedule_shows_rate_and_phases(tmp_path: Path) -> None:
    run = read_run(typical_run(tmp_path / "run"))
    figure = laid_out(schedule_figure(run))
    upper, lower = figure.axes
    assert upper.lines[0].get_xydata().tolist() == np.column_stack([run.training.step, run.training.lr]).tolist()  # type: ignore[union-attr]
    assert upper.get_ylabel() == "learning rate"
    assert lower.get_xlim() == (0, 200)
    assert row_labels(lower) == [
        "token embedding = head", "position embedding", "blocks 0 to 1", "blocks 2 to 3", "final norm",
    ]  # fmt: skip
    assert bars(lower, "/////") == [pytest.approx((0, 100, row + 0.1, row + 0.9)) for row in (0, 1, 2)]
    assert [line.get_xdata()[0] for line in lower.lines] == [100]  # type: ignore[index]
    assert legend(figure) == ["learns", "frozen"]


def test_a_run_without_phases_has_the_rate_alone(tmp_path: Path) -> None:
    figure = laid_out(schedule_figure(read_run(write_run(tmp_path / "run", [training(5), training(10)]))))
    assert len(figure.axes) == 1
    assert figure.axes[0].get_title("left") == "Learning rate: run"


def test_what_learns_in_part_and_parts_of_blocks_have_rows() -> None:
    names = (*groups(3), "score")
    first = [1.0 if "norm" in name else 0.125 if "attn" in name else 0.0 for name in names]
    then = [1.0 if name.startswith("blocks.2") else share for name, share in zip(names, first, strict=True)]
    rows = learning_rows(Learning(np.array([0.0, 5.0]), names, np.array([first, then])))
    assert [(row.label, row.shares) for row in rows] == [
        ("token embedding = head", (0, 0)), ("position embedding", (0, 0)),
        ("blocks 0 to 1: norm1, norm2", (1, 1)), ("blocks 0 to 1: attn", (0.125, 0.125)),
        ("blocks 0 to 1: mlp", (0, 0)),
        ("block 2: norm1, norm2", (1, 1)), ("block 2: attn", (0.125, 1)), ("block 2: mlp", (0, 1)),
        ("final norm", (1, 1)), ("classifier", (0, 0)),
    ]  # fmt: skip


# -- vocabulary


def vocabulary(folder: Path) -> tuple[Run, Figure]:
    run = read_run(folder)
    assert run.extension is not None
    return run, laid_out(vocabulary_figure(run.extension, run.name))


def outlines(axes: Axes) -> list[tuple[float, float, bool]]:
    """(top, bottom, hatched) of each mark over a matrix."""
    marks = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    return [(mark.get_y(), round(mark.get_y() + mark.get_height(), 9), mark.get_hatch() is not None) for mark in marks]


def test_the_extension_shows_both_matrices_and_marks_the_new_rows(tmp_path: Path) -> None:
    run, figure = vocabulary(write_extension(tmp_path / "chatty", 10, 2, padding=1))
    assert run.extension is not None
    before, after = figure.axes[:2]
    assert (before.get_title("left"), after.get_title("left")) == ("before: 10 × 8", "after: 11 × 8")
    assert cells(before).tolist() == run.extension.before.rms.tolist()
    assert cells(after).tolist() == run.extension.after.rms.tolist()
    edges = np.asarray(mesh(after).get_coordinates())[:, 0, 1].round(9)
    assert outlines(after) == [(edges[9], edges[11], False)]
    assert [mark[2] for mark in outlines(before)] == [True]  # the padding
    assert row_labels(after) == ["9 old rows\nrows 0 to 8", "9  <|new0|>", "10  <|new1|>"]
    assert row_labels(before) == ["9 old rows\nrows 0 to 8", "padding: row 9"]
    assert legend(figure) == ["rows of new tokens", "padding (rows without a token)"]
    assert figure.get_suptitle() == "Vocabulary extension: chatty (heights are not to scale)"


def test_many_new_tokens_are_one_label(tmp_path: Path) -> None:
    _, figure = vocabulary(write_extension(tmp_path, 50, 13))
    assert row_labels(figure.axes[1]) == ["50 old rows\nrows 0 to 49", "new: rows 50 to 62"]


def test_the_view_of_a_real_extension_is_drawn(tmp_path: Path) -> None:
    """The matrix that `loadstone extend` measured is the one in the picture: rms of the new rows, from the weights."""
    tokenizer = gpt2_like()
    model = hostile(tokenizer.vocab_size + 3)
    larger, renewed, report = extend(model, tokenizer, ["<|user|>", "<|assistant|>", "<|end|>", "<|tool|>"])
    view = matrix_view((model, tokenizer), (larger, renewed))
    (tmp_path / "extend.json").write_text(json.dumps({"report": report.as_dict(), "view": view}))
    _, figure = vocabulary(tmp_path)
    rms = larger.tok_emb.weight[-4:].detach().abs()  # 32 columns: each is a block of its own
    assert cells(figure.axes[1])[-4:].data == pytest.approx(rms.numpy(), rel=1e-3)
    assert row_labels(figure.axes[1])[1:] == ["401  <|user|>", "402  <|assistant|>", "403  <|end|>", "404  <|tool|>"]


def test_hundreds_of_new_tokens_in_between_fit_on_a_page(tmp_path: Path) -> None:
    file = write_extension(tmp_path, 800, 1) / "extend.json"
    values = json.loads(file.read_text())
    for row in range(0, 800, 2):
        values["view"]["after"]["blocks"][row]["kind"] = "new"
    file.write_text(json.dumps(values))
    _, figure = vocabulary(tmp_path)
    assert figure.get_figheight() < 15
    assert len(row_labels(figure.axes[1])) < 100
