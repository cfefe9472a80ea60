"""What a run wrote, read back: exact, while it goes on, after it was resumed, and when it is damaged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadstone.errors import LoadstoneError
from loadstone.plot.reading import distinct_names, read_run
from run_folders import Row, evaluation, groups, lines, training, typical_run, updated, write_extension, write_run


def test_arrays_are_what_the_lines_say(tmp_path: Path) -> None:
    metrics = [evaluation(0, 4.0), training(10, 3.0), training(20, 2.5), evaluation(20, 2.75)]
    run = read_run(write_run(tmp_path / "r", metrics, [updated(20, {"tok_emb": 0.5, "norm": 0.0})]))
    assert run.name == "r"
    assert run.training.step.tolist() == [10, 20]
    assert run.training.loss.tolist() == [3.0, 2.5]
    assert run.training.tokens.tolist() == [5120, 10240]
    assert run.training.lr.tolist() == [1e-3 / 11, 1e-3 / 21]
    assert run.evaluation.val_loss.tolist() == [4.0, 2.75]
    assert run.evaluation.best == 1
    assert run.evaluation.perplexity[1] == math.exp(2.75)
    assert (run.updates.since.tolist(), run.updates.until.tolist()) == ([0], [20])
    assert run.updates.groups == ("tok_emb", "norm")
    assert run.updates.moved.tolist() == [[0.5], [0.0]]
    assert run.last_step == 20


def test_which_parts_learn_from_when_on(tmp_path: Path) -> None:
    run = read_run(typical_run(tmp_path / "r"))
    assert run.learning.since.tolist() == [0, 100]
    assert run.learning.groups == tuple(groups(4))
    shares = dict(zip(run.learning.groups, run.learning.shares.T.tolist(), strict=True))
    assert (shares["tok_emb"], shares["blocks.2.mlp"], shares["norm"]) == ([0, 1], [1, 1], [1, 1])


def test_a_folder_of_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    run = read_run(tmp_path)
    assert not len(run.training.step)
    assert run.evaluation.best is None
    assert run.updates.moved.shape == (0, 0)
    assert run.learning.shares.shape == (0, 0)
    assert run.last_step == 0


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_last_line_that_is_still_being_written_is_left_out(tmp_path: Path, cut: int) -> None:
    whole = lines([training(10), training(20)])
    (tmp_path / "metrics.jsonl").write_text(whole + lines([evaluation(20, 3.0)])[:cut])
    run = read_run(tmp_path)
    assert run.training.step.tolist() == [10, 20]
    assert not len(run.evaluation.step)


def test_a_complete_last_line_counts_without_its_end(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(lines([training(10), training(20)]).rstrip("\n"))
    assert read_run(tmp_path).training.step.tolist() == [10, 20]


def test_what_a_resumed_run_did_again_replaces_what_was_there(tmp_path: Path) -> None:
    """Killed at 40, resumed from a checkpoint of 20, with another log interval, and still going on at 35."""
    metrics = [training(10, 1.0), training(20, 2.0), evaluation(20, 9.0), training(30, 3.0), training(40, 4.0)]
    again = [training(25, 5.0), training(30, 6.0), training(35, 7.0)]
    updates = [updated(20, {"norm": 0.1}), updated(40, {"norm": 0.2}), updated(40, {"norm": 0.3})]
    run = read_run(write_run(tmp_path, [*metrics, *again], updates))
    assert run.training.step.tolist() == [10, 20, 25, 30, 35]
    assert run.training.loss.tolist() == [1, 2, 5, 6, 7]
    assert run.evaluation.step.tolist() == [20]
    assert run.updates.moved.tolist() == [[0.1, 0.3]]


def test_a_resumed_run_that_tells_its_phase_again_begins_no_new_one(tmp_path: Path) -> None:
    phases = [(0, 0.0), (60, 1.0), (150, 1.0), (100, 1.0)]
    rows = [{"step": step, "phase": 0, "learns": {"norm": 1.0, "tok_emb": share}} for step, share in phases]
    run = read_run(write_run(tmp_path, rows))
    assert run.learning.since.tolist() == [0, 60]


def test_null_and_what_is_missing_are_nan(tmp_path: Path) -> None:
    rows: list[Row] = [{"step": 1, "loss": None}, {"step": 2, "loss": 3}]
    run = read_run(write_run(tmp_path, rows, [updated(2, {"norm": None, "head": 0.5}), updated(3, {"head": 1.0})]))
    assert np.isnan(run.training.loss[0])
    assert np.isnan(run.training.lr).all()
    assert np.isnan(run.updates.moved[0]).all()
    assert run.updates.moved[1].tolist() == [0.5, 1.0]
    rows = [{"step": 1, "val_loss": None}]
    assert read_run(write_run(tmp_path / "b", rows)).evaluation.best is None


def test_intervals_without_a_beginning_begin_where_the_last_one_ended(tmp_path: Path) -> None:
    rows = [{"step": 20, "updates": {"norm": 1}}, {"step": 50, "updates": {"norm": 1}}]
    assert read_run(write_run(tmp_path, [], rows)).updates.since.tolist() == [0, 20]


def test_runs_of_the_same_name_are_told_apart_by_the_folder_above(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "other"]
    runs = [read_run(write_run(path, [training(1)])) for path in paths]
    assert distinct_names(runs) == ["a/run", "b/run", "other"]


def test_an_extension_is_read_as_it_was_written(tmp_path: Path) -> None:
    extension = read_run(write_extension(tmp_path, 10, 3, padding=2)).extension
    assert extension is not None
    assert (extension.before.shape, extension.after.shape) == ((10, 8), (11, 8))
    assert extension.before.kinds == ("old",) * 8 + ("padding",) * 2
    assert extension.after.kinds == ("old",) * 8 + ("new",) * 3
    assert extension.after.rms[:, 0].tolist() == [0.01 * (row + 1) for row in range(11)]
    assert extension.tokens == {8: "<|new0|>", 9: "<|new1|>", 10: "<|new2|>"}


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadstoneError, match=r"there is no such folder\. Name the folder that a training run"):
        read_run(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LoadstoneError, match=r"neither metrics\.jsonl nor updates\.jsonl .* nor extend\.json"):
        read_run(tmp_path)


DAMAGE = {
    "garbled": ("{]", r"metrics\.jsonl: line 2 is not JSON\. Take the damaged part out of it, or move"),
    "not an object": ("[1]", "line 2 is not a JSON object with a `step`"),
    "no step": ('{"loss": 1}', "line 2 is not a JSON object with a `step`"),
    "a text for a loss": ('{"step": 3, "loss": "low"}', "line 2: loss should be a number, and is 'low'"),
    "true for a loss": ('{"step": 3, "loss": true}', "line 2: loss should be a number, and is True"),
    "negative step": ('{"step": -1, "loss": 1}', r"line 2: step -1\.0 is no step"),
    "no step at all": ('{"step": null, "loss": 1}', "line 2: step nan is no step"),
    "gigantic step": ('{"step": 1%s}' % ("0" * 400), "line 2: step nan is no step"),
    "numbers of thousands of digits": ('{"step": 1%s}' % ("0" * 9000), "line 2 is not JSON"),
    "nested": ("[" * 100_000, "line 2 is not JSON"),
    "not UTF-8": ("\udcff", "line 2 is not JSON"),
    "not a table": ('{"step": 3, "learns": 7}', "the line of step 3 has no object `learns`"),
    "a text for a share": ('{"step": 3, "learns": {"norm": "x"}}', "`norm` should be a number, and is 'x'"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_line_is_named(tmp_path: Path, damage: str) -> None:
    text, message = DAMAGE[damage]
    damaged = lines([training(1)]) + text + "\n" + lines([training(2)])
    (tmp_path / "metrics.jsonl").write_bytes(damaged.encode(errors="surrogateescape"))
    with pytest.raises(LoadstoneError, match=message):
        read_run(tmp_path)


def test_updates_without_a_table_are_named(tmp_path: Path) -> None:
    with pytest.raises(LoadstoneError, match=r"updates\.jsonl: the line of step 20 has no object `updates`"):
        read_run(write_run(tmp_path, [], [{"step": 20}]))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(LoadstoneError, match=r"metrics\.jsonl: it cannot be read"):
        read_run(tmp_path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "updates.jsonl", "extend.json"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_files_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    folder = write_extension(typical_run(tmp_path_factory.mktemp("run"), n_layers=1, steps=40), 6, 2)
    raw = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 20))] = data.draw(
            st.one_of(st.binary(max_size=6), st.sampled_from([b"null", b"-1", b"1e999", b"[]", b"{}", b'""', b"NaN"]))
        )
    (folder / name).write_bytes(raw)
    try:
        run = read_run(folder)
    except LoadstoneError:
        return
    assert (np.diff(run.training.step) > 0).all()
    assert not np.isinf(run.updates.moved).any()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("view", "columns"), [0, 4]),
        (("view", "columns"), [0, 8, 4]),
        (("view", "columns"), []),
        (("view", "before", "shape"), [11, 8]),
        (("view", "after", "shape"), ["x", 8]),
        (("view", "after", "blocks"), []),
        (("view", "after", "blocks", 3, "start"), 1),
        (("view", "after", "blocks", 3, "kind"), "odd"),
        (("view", "after", "blocks", 3, "rms"), [1]),
        (("view", "after", "blocks", 3, "rms"), [1, 10**400]),
        (("view", "after", "blocks", 3, "rms"), [1, float("nan")]),
        (("view", "after", "blocks", 3, "rms"), [1, -1]),
        (("view", "after"), None),
        (("report",), {}),
        (("report", "tokens"), [3]),
    ],
)
def test_an_extension_that_makes_no_sense_is_refused(tmp_path: Path, path: tuple[Any, ...], value: object) -> None:
    file = write_extension(tmp_path, 10, 3) / "extend.json"
    values = found = json.loads(file.read_text())
    for key in path[:-1]:
        found = found[key]
    found[path[-1]] = value
    file.write_text(json.dumps(values))
    with pytest.raises(LoadstoneError, match=r"extend\.json: this is not what `loadstone extend` writes \("):
        read_run(tmp_path)
