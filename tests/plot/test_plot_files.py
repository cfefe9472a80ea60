"""Pictures as files, and the command: valid, searchable, the same bytes each time, no display, errors as paragraphs."""

from __future__ import annotations

import ast
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer
from typer.testing import CliRunner

pytest.importorskip("matplotlib")

import matplotlib

import loadstone
from loadstone.cli.options import spread
from loadstone.cli.plot import plot as command
from loadstone.errors import LoadstoneError
from loadstone.plot import plot
from loadstone.plot.style import DPI
from run_folders import training, typical_run, write_extension, write_quantised, write_run

KINDS = ("loss", "updates", "schedule", "vocabulary", "sensitivity")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_quantised(write_extension(typical_run(tmp_path / "my $run$ & <co>", steps=60), 10, 2))


def texts(svg: Path) -> set[str]:
    """What a reader can search for."""
    root = ElementTree.fromstring(svg.read_bytes())
    return {"".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")}


def size_of_png(file: Path) -> tuple[int, int]:
    raw = file.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    assert raw[-8:-4] == b"IEND"
    return struct.unpack(">II", raw[16:24])


def test_all_pictures_are_drawn_into_the_run(run: Path) -> None:
    pictures = plot([run])
    assert [(picture.kind, picture.why_not) for picture in pictures] == [(kind, "") for kind in KINDS]
    files = {f"{kind}.{suffix}" for kind in KINDS for suffix in ("png", "svg")}
    assert {file.name for file in (run / "plots").iterdir()} == files
    assert {Path(name).name for picture in pictures for name in picture.files} == files
    for kind in KINDS:
        width, height = size_of_png(run / "plots" / f"{kind}.png")
        assert width in (8 * DPI, 9 * DPI)
        assert height > 2 * DPI


def test_the_svg_is_text_that_can_be_searched(run: Path) -> None:
    plot([run], formats=["svg"])
    labels = {
        "loss": {"Loss of my $run$ & <co>", "loss (nats per token)", "validation", "perplexity = exp(loss)"},
        "updates": {"Weight updates of my $run$ & <co>", "block 0  attn", "exactly zero: frozen", "step"},
        "schedule": {"blocks 0 to 1", "learning rate", "frozen"},
        "vocabulary": {"before: 10 × 8", "after: 12 × 8", "10  <|new0|>", "rows of new tokens"},
        "sensitivity": {"token_embd", "block 1", "attn_q", "Q4_0", "what was written"},
    }
    for kind, wanted in labels.items():
        assert wanted <= texts(run / "plots" / f"{kind}.svg"), kind


def test_the_same_data_give_the_same_bytes_whatever_the_user_s_settings(run: Path, tmp_path: Path) -> None:
    kinds = ["updates", "schedule"]
    plot([run], tmp_path / "a", kinds=kinds)
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "axes.facecolor": "red"}):
        plot([run], tmp_path / "b", kinds=kinds)
        assert matplotlib.rcParams["font.size"] == 30
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
        assert b"<dc:date>" not in file.read_bytes()


def test_a_long_run_is_no_large_file(tmp_path: Path) -> None:
    folder = write_run(tmp_path, [training(step, 3 + step % 7 / 10) for step in range(1, 20_001)])
    plot([folder], kinds=["loss"], formats=["svg"])
    assert (folder / "plots" / "loss.svg").stat().st_size < 150_000


def test_what_the_data_do_not_allow_is_left_out_with_its_reason(tmp_path: Path) -> None:
    pictures = plot([write_run(tmp_path / "r", [training(1)])])
    assert {picture.kind: picture.why_not for picture in pictures} == {
        "loss": "",
        "schedule": "",
        "updates": "updates.jsonl has no measurement (training writes them with --updates-every)",
        "vocabulary": "there is no extend.json (`loadstone extend` writes it)",
        "sensitivity": "there is no quantize.json with estimates (`loadstone quantize --calibration ...` writes it)",
    }
    assert {file.stem for file in (tmp_path / "r" / "plots").iterdir()} == {"loss", "schedule"}


def test_several_runs_share_one_loss_picture(tmp_path: Path) -> None:
    runs = [typical_run(tmp_path / name / "run", steps=40) for name in "ab"]
    empty = write_run(tmp_path / "empty")
    (empty / "metrics.jsonl").touch()
    pictures = plot([*runs, empty], tmp_path / "out", formats=["svg"])
    drawn = {(picture.run, picture.kind) for picture in pictures if picture.files}
    assert drawn == {("a/run, b/run", "loss"), *((f"{n}/run", kind) for n in "ab" for kind in ("updates", "schedule"))}
    assert {"a/run: best 4.000", "b/run: best 4.000"} <= texts(tmp_path / "out" / "loss-compared.svg")
    found = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*.svg")}
    each = {f"{name}/run/{kind}.svg" for name in "ab" for kind in ("updates", "schedule")}
    assert found == {"loss-compared.svg", *each}
    assert next(picture.why_not for picture in pictures if picture.run == "empty") == "metrics.jsonl has no loss yet"


def test_pictures_replace_older_ones_and_leave_nothing_else(run: Path) -> None:
    plot([run], kinds=["loss"])
    before = {file: file.read_bytes() for file in (run / "plots").iterdir()}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(training(70, 1.0)) + "\n")
    plot([run], kinds=["loss"])
    after = {file: file.read_bytes() for file in (run / "plots").iterdir()}
    assert before.keys() == after.keys()
    assert all(before[file] != after[file] for file in before)


# -- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ["loss", "pie"]}, r"'pie' is no picture; known: loss, updates, schedule, vocabulary, sensitivity\."),
        ({"formats": ["gif"]}, r"'gif' is no format; known: png, svg\."),
        ({"kinds": []}, "'' is no picture; known"),
    ],
)
def test_unknown_words_are_refused(run: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(LoadstoneError, match=message):
        plot([run], **options)


def test_a_place_that_cannot_be_written_to_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LoadstoneError, match=r"file: the folder for the pictures cannot be made .*--out"):
        plot([run], tmp_path / "file")


def test_without_matplotlib_the_extra_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(LoadstoneError, match=r"not installed: pip install 'loadstone\[plot\]'\. The"):
        plot([run])


# -- no display


def test_neither_pyplot_nor_a_display_is_needed(run: Path) -> None:
    code = (
        "import sys; from loadstone.plot import plot; assert 'matplotlib' not in sys.modules;"
        f"assert all(p.files for p in plot([{str(run)!r}]));"
        "assert not {'matplotlib.pyplot', 'tkinter', 'torch'} & {*sys.modules}"
    )
    hidden = ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    paths = [str(Path(loadstone.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)


def test_matplotlib_is_imported_by_the_drawing_modules_alone() -> None:
    package = Path(loadstone.__file__).parent
    for file in package.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
        found = {name for name in names if name.split(".")[0] == "matplotlib"}
        assert not found or file.parent == package / "plot", file
        assert not any("pyplot" in name for name in found), file


# -- the command


@pytest.fixture
def cli() -> typer.Typer:
    app = typer.Typer()
    app.command()(spread(command))
    return app


def test_the_command_says_what_was_drawn(cli: typer.Typer, run: Path) -> None:
    result = CliRunner().invoke(cli, [str(run), "--kind", "loss, updates", "--format", "svg"])
    assert result.exit_code == 0
    folder = run / "plots"
    assert result.stdout == (
        f"drawn      loss        my $run$ & <co>: {folder}/loss.svg\n"
        f"drawn      updates     my $run$ & <co>: {folder}/updates.svg\n"
    )


def test_the_command_in_json(cli: typer.Typer, run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, [str(run), "--kind", "loss", "--out", str(tmp_path / "o"), "--json"])
    files = [str(tmp_path / "o" / f"loss.{suffix}") for suffix in ("png", "svg")]
    picture = {"run": "my $run$ & <co>", "kind": "loss", "files": files, "why_not": ""}
    assert json.loads(result.stdout) == {"pictures": [picture]}


def test_the_status_is_1_if_there_is_nothing_to_draw(cli: typer.Typer, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    result = CliRunner().invoke(cli, [str(tmp_path)])
    assert result.exit_code == 1
    assert "not drawn  loss       " in result.stdout
    assert not (tmp_path / "plots").exists()


def test_the_command_refuses_what_is_no_run(cli: typer.Typer, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, [str(tmp_path)])
    assert isinstance(result.exception, LoadstoneError)
