"""The sensitivity map shows exactly what quantize.json says; damaged reports are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.collections import QuadMesh

from figures import curves, laid_out, legend, row_labels
from loadstone.errors import FormatError
from loadstone.plot.quantised import Sensitivity, read_sensitivity
from loadstone.plot.reading import read_run
from loadstone.plot.sensitivity import sensitivity_figure
from run_folders import quantised_units, write_quantised

NAN = np.nan


def read(folder: Path) -> Sensitivity:
    found = read_run(write_quantised(folder)).sensitivity
    assert found is not None
    return found


def coloured(axes: Any, layer: int = 1) -> Any:
    """What has a colour of the scale, or (layer 0) that of nothing."""
    mesh = [part for part in axes.collections if isinstance(part, QuadMesh)][layer]
    return np.ma.array(mesh.get_array()).filled(NAN)


def test_exactly_nothing_has_a_colour_of_its_own(tmp_path: Path) -> None:
    units = [{**unit, "losses": {"Q4_0": 0.0, "Q8_0": 0.5 * n}} for n, unit in enumerate(quantised_units())]
    found = read_run(write_quantised(tmp_path, units)).sensitivity
    assert found is not None
    figure = laid_out(sensitivity_figure(found, "m"))
    assert not np.isfinite(coloured(figure.axes[0])).any()
    assert np.nansum(coloured(figure.axes[0], 0) == 0) == 7
    assert np.nanmin(coloured(figure.axes[1])) == 0.5
    assert legend(figure) == ["what was written", "nothing lost: on this grid already"]


def test_the_table(tmp_path: Path) -> None:
    found = read(tmp_path)
    assert (found.types, found.columns) == (("Q4_0", "Q8_0"), ("attn_q", "attn_k"))
    assert found.rows == ("token_embd", "block 0", "block 1", "output")
    assert np.array_equal(found.losses[0], [[0.01, 0.01], [0.02, 0.03], [0.04, NAN], [0.05, 0.05]], equal_nan=True)
    assert found.chosen.tolist() == [[1, 1], [0, 1], [0, -1], [-1, -1]]  # the head is F16, which nobody estimates


def test_the_figure(tmp_path: Path) -> None:
    found = read(tmp_path)
    figure = laid_out(sensitivity_figure(found, "my model"))
    panels = figure.axes[:2]
    assert [axes.get_title("left") for axes in panels] == ["Q4_0", "Q8_0"]
    for axes, losses in zip(panels, found.losses, strict=True):
        assert np.array_equal(coloured(axes), losses, equal_nan=True)
        assert [text.get_text() for text in axes.get_xticklabels()] == ["attn_q", "attn_k"]
    dots = [next(iter(curves(axes).values())).tolist() for axes in panels]
    assert dots == [[[0.5, 1.5], [0.5, 2.5]], [[0.5, 0.5], [1.5, 0.5], [1.5, 1.5]]]
    assert row_labels(panels[0]) == ["token_embd", "block 0", "block 1", "output"]
    assert panels[0].get_ylim() == (4, 0)
    assert legend(figure) == ["what was written"]


def test_without_calibration_there_is_nothing_to_draw(tmp_path: Path) -> None:
    units = [dict(unit, losses={}) for unit in quantised_units()]
    assert read_run(write_quantised(tmp_path, units)).sensitivity is None


def test_one_tensor_and_no_loss_at_all(tmp_path: Path) -> None:
    unit = {"name": "odd name", "type": "Q8_0", "losses": {"Q8_0": 0.0}}
    found = read_run(write_quantised(tmp_path, [unit])).sensitivity
    assert found is not None
    laid_out(sensitivity_figure(found, "x" * 200))


@pytest.mark.parametrize(
    "units",
    [
        [{"name": "a", "type": "Q8_0"}],
        [{"name": "a", "type": "Q8_0", "losses": {"Q8_0": -1}}],
        [{"name": "a", "type": "Q8_0", "losses": {"Q8_0": "nan"}}],
        [{"name": "a", "type": "Q8_0", "losses": [1]}],
        [7],
        {"a": 1},
    ],
)
def test_damaged_reports(units: Any, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"quantize\.json: this is not what `loadstone quantize` writes"):
        read_sensitivity(write_quantised(tmp_path, units) / "quantize.json")
