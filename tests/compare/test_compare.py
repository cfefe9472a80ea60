"""`loadstone compare`: the measurement, what a run tells, and the command."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compared import measured, saved, texts
from conftest import Run
from loadstone import generate_text, load
from loadstone.compare import Comparison
from loadstone.compare.align import TokenBits
from loadstone.compare.comparison import _names
from loadstone.compare.domains import DOMAINS, read_texts
from loadstone.compare.heat import LONGEST
from loadstone.compare.markdown import markdown
from loadstone.compare.measure import TextScore
from loadstone.compare.page import page
from loadstone.compare.tables import Row, amount, duration, figures, letter, signed, verdict
from loadstone.errors import LoadstoneError


def rows(found: Comparison) -> dict[str, Row]:
    return {row.label: row for group in figures(found) for row in group.rows}


def unscored(score: TextScore, first: int) -> TextScore:
    """As if nothing came before the first tokens."""
    bits = score.bits.bits.copy()
    bits[:first] = math.nan
    return replace(score, bits=TokenBits(score.bits.ends, bits))


def test_a_model_against_itself_differs_nowhere(comparison: Comparison) -> None:
    """The run and its best checkpoint, which is the same file."""
    for name in comparison.texts:
        assert all(piece.difference == 0 for piece in comparison.pieces(2, name))
    assert comparison.difference(2) == (0, 0, 0)
    assert "equally well" in verdict(comparison, 2)
    assert comparison.spans(2) == []
    assert "C differ most\n\nThey give every piece the same probability.\n" in markdown(comparison)
    first, _, third = comparison.models
    assert first.samples == third.samples
    assert first.history == third.history


def test_a_difference_has_its_sign_and_its_sum(comparison: Comparison) -> None:
    first, other, _ = comparison.models
    size = sum(len(text.content.encode()) for text in comparison.texts.values())
    bits = [sum(score.nats for score in model.scores.values()) / math.log(2) for model in (first, other)]
    assert comparison.bits_per_byte[:2] == pytest.approx([each / size for each in bits])
    assert comparison.difference(1).value == pytest.approx((bits[1] - bits[0]) / size)
    spans = [piece for _, piece in comparison.spans(1)]
    largest = max(abs(p.difference) for name in comparison.texts for p in comparison.pieces(1, name))
    assert abs(spans[0].difference) == pytest.approx(largest)
    assert [abs(s.difference) for s in spans] == sorted((abs(s.difference) for s in spans), reverse=True)
    better = "A" if bits[0] < bits[1] else "B"
    assert verdict(comparison, 1).startswith(f"{better} predicts these texts")
    assert rows(comparison)["Bits per byte"].best == ({0, 2} if better == "A" else {1})


def test_bits_per_byte_counts_what_all_models_scored(tmp_path: Path) -> None:
    """Where one vocabulary has no begin token, the first piece is left out for the other model as well."""
    found = measured(tmp_path, ["byte level", "byte level"], hard="Été là")
    first, second = found.models
    score = unscored(second.scores["hard"], 2)  # bytes of the same character
    without = replace(second, scores={"hard": score})
    values = replace(found, models=(first, without)).domains["hard"]
    rest = np.nansum(score.bits.bits) / len("té là".encode())
    assert values == pytest.approx([rest, rest])
    assert values != pytest.approx(found.domains["hard"])


def test_a_difference_is_that_of_the_figures_above_it(tmp_path: Path) -> None:
    """Also where only a third model leaves characters out."""
    found = measured(tmp_path, ["byte level", "sentencepiece", "padded GGUF"])
    assert found.difference(1).value == pytest.approx(found.bits_per_byte[1] - found.bits_per_byte[0])
    without = {name: unscored(score, 3) for name, score in found.models[2].scores.items()}
    third = replace(found, models=(*found.models[:2], replace(found.models[2], scores=without)))
    assert third.bits_per_byte[0] != found.bits_per_byte[0]
    for other in (1, 2):
        assert third.difference(other).value == pytest.approx(third.bits_per_byte[other] - third.bits_per_byte[0])


def test_nothing_that_all_scored_and_too_little_for_an_interval(tmp_path: Path) -> None:
    found = measured(tmp_path, ["byte level", "sentencepiece"], plain="The cat")
    assert re.match("[AB] predicts these texts better .* too short to rule out chance", verdict(found, 1))
    score = found.models[1].scores["plain"]
    scores = {"plain": replace(score, bits=TokenBits(np.full_like(score.bits.ends, 7), score.bits.bits * math.nan))}
    nothing = replace(found, models=(found.models[0], replace(found.models[1], scores=scores)))
    assert "cannot be compared" in verdict(nothing, 1)
    told = rows(nothing)
    assert told["Bits per byte"].cells == ("nothing scored",) * 2
    assert told["Difference from A"].cells == ("", "nothing scored")
    assert nothing.spans(1) == []
    for write in (page, markdown):
        assert "cannot be compared" in write(nothing)
        assert "nan" not in write(nothing)


@pytest.mark.parametrize(
    ("kind", "warned"),
    [("sentencepiece", True), ("normalizing", True), ("byte level of a GGUF", False), ("padded GGUF", False)],
)
def test_a_loss_is_marked_where_tokens_differ(tmp_path: Path, kind: str, warned: bool) -> None:
    """Not where the vocabularies' sizes do: two of one size cut differently, and a padded one cuts alike."""
    found = measured(tmp_path, ["byte level", kind])
    assert found.as_dict()["same_tokens"] is not warned
    for label in ("Loss", "Perplexity"):
        assert ("cannot be compared" in rows(found)[label].note) is warned


def test_samples_are_what_generate_gives(comparison: Comparison, folder: Path) -> None:
    model, tokenizer = load(folder / "other")
    assert tokenizer is not None
    for sample in comparison.models[1].samples:
        options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.8, "top_k": 50, "overflow": "window"}
        again = generate_text(model, tokenizer, sample.prompt, seed=sample.seed, **options)
        assert again == sample.prompt + sample.text
    asked = [(sample.prompt, sample.seed) for sample in comparison.models[0].samples]
    assert asked == [(sample.prompt, sample.seed) for sample in comparison.models[1].samples]
    assert len(set(asked)) == 4


def test_sizes_and_speeds(comparison: Comparison, folder: Path) -> None:
    first, other, _ = comparison.models
    model, _ = load(folder / "run" / "best")
    assert first.parameters == sum(p.numel() for p in model.parameters())
    assert first.untied_parameters == first.parameters + model.tok_emb.weight.numel()
    assert first.weight_bytes == 4 * first.parameters
    assert first.file_bytes == (folder / "run" / "best" / "model.safetensors").stat().st_size
    assert other.parameters < first.parameters
    assert min(first.reading_speed, first.writing_speed) > 0


def test_what_a_run_tells_ends_where_the_checkpoint_was_written(comparison: Comparison) -> None:
    history = comparison.models[0].history
    assert history is not None
    assert (history.run, history.step, history.tokens, history.seconds) == ("run", 100, 51_200, 205.5)
    assert history.validation_loss == 4.0  # at step 100, and not at the end of the run
    assert max(tokens for tokens, _ in (*history.training, *history.validation)) == 51_200
    assert comparison.models[1].history is None
    told = rows(comparison)
    assert told["Trained on"].cells[:2] == ("51,200 tokens", "not known")
    assert told["Training time"].cells[:2] == ("3 min", "not known")
    assert told["Validation loss"].cells[:2] == ("4.000", "not known")


def test_names() -> None:
    assert _names(["gpt2", "smollm2"]) == ["gpt2", "smollm2"]
    assert _names(["/a/run/best", "/a/other/best/"]) == ["run", "other"]
    assert _names(["/a/run/best", "/a/run/latest"]) == ["best", "latest"]
    assert _names(["/a/run", "/b/run"]) == ["a/run", "b/run"]
    assert _names(["/a/run", "/a/run", "m"]) == ["run", "run (2)", "m"]
    assert _names(["best", "best"]) == ["best", "best (2)"]
    assert _names(["x/run", "run"]) == ["x/run", "run"]
    assert _names(["run", "run/"]) == ["run", "run (2)"]


def test_words_for_values() -> None:
    assert [letter(i) for i in (0, 25, 26, 701, 702)] == ["A", "Z", "AA", "ZZ", "AAA"]
    assert [duration(s) for s in (5, 59.6, 3594, 5303, 200_000)] == [
        "5 s",
        "1 min",
        "1 h 0 min",
        "1 h 28 min",
        "2 d 7 h",
    ]
    assert [amount(n) for n in (777, 777_000, 14_336_000, 2e12)] == ["777", "777,000", "14.3 million", "2 trillion"]
    assert [amount(n) for n in (999_499_999, 999_600_000)] == ["999 million", "1 billion"]
    assert [signed(x) for x in (0.0354, -0.0354, -0.0001)] == ["+0.035", "−0.035", "0.000"]


def test_the_built_in_texts_are_of_a_size() -> None:
    assert len(DOMAINS) >= 6
    for content in DOMAINS.values():
        assert 600 < len(content) < 1300
        assert content.endswith("\n")
        assert content.isascii()
    compile(DOMAINS["code"], "code", "exec")


def test_own_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Guten Tag")
    assert {name: text.content for name, text in read_texts([f"german={tmp_path}/a.txt"]).items()} == {
        "german": "Guten Tag"
    }
    for given, problem in (
        (["a.txt"], "expected NAME=FILE"),
        (["=a.txt"], "expected NAME=FILE"),
        ([f"x={tmp_path}/a.txt"] * 2, "already"),
        (["x=/nowhere"], "cannot be read"),
    ):
        with pytest.raises(LoadstoneError, match=problem):
            read_texts(given)


# -- the command


def test_a_tokenizer_that_changes_a_text_is_told(tmp_path: Path) -> None:
    found = measured(tmp_path, ["byte level", "normalizing"], small="ab cd. " * 20, capitals="AB CD. " * 20)
    assert found.models[0].notes == ()
    (note,) = found.models[1].notes
    assert "drops or replaces characters of capitals:" in note
    ((_, piece), *_) = [item for item in found.spans(1) if item[0] == "capitals"]
    assert piece[:2] == (0, 140)
    for write in (page, markdown):  # the strip has it in full, tables do not
        assert write(found).count("AB CD. " * 20) == (write is page)
        assert found.texts["capitals"].content[:LONGEST] + " …" in write(found)


@pytest.fixture(scope="session")
def quick(folder: Path) -> list[str]:
    (folder / "text.txt").write_text(texts()["plain"].content)
    sources = [str(folder / "run"), str(folder / "other")]
    return [*sources, "--text", f"plain={folder}/text.txt", "--prompt", "The cat", "--seeds", "3", "-n", "4"]


def test_the_command_writes_a_page_once(run: Run, quick: list[str], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    status, out, err = run("compare", *quick, "-o", page)
    assert (status, err) == (0, "")
    assert out.splitlines()[:2] == ["A: run", "B: other"]
    assert out.splitlines()[-1] == f"written: {page}"
    before = page.read_bytes()
    assert before.startswith(b"<!DOCTYPE html>")
    status, _, err = run("compare", *quick, "-o", page)
    assert status == 2
    assert "it is there already. Replace it with --force" in err
    assert page.read_bytes() == before
    assert run("compare", *quick, "-o", page, "--force", "--temperature", "0")[0] == 0
    assert page.read_bytes() != before
    assert list(tmp_path.iterdir()) == [page]


def test_json_and_markdown_go_to_standard_output(
    run: Run, quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, _ = run("compare", *quick, "--json")
    told = json.loads(out)
    assert status == 0
    assert [model["name"] for model in told["models"]] == ["run", "other"]
    assert told["protocol"]["seeds"] == [3]
    assert told["models"][0]["texts"]["plain"]["loss"] == pytest.approx(told["models"][0]["loss"])
    assert told["models"][0]["history"]["tokens"] == 51_200
    assert [told["against_first"][0]["model"], len(told["against_first"][0]["most"])] == ["other", 10]
    status, out, _ = run("compare", *quick, "--markdown")
    assert status == 0
    assert out.startswith("# run and other, compared\n")
    assert not list(tmp_path.iterdir())
    assert run("compare", *quick)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.html"]


def test_a_place_that_cannot_be_written_is_told_before_anything_is_measured(run: Run, quick: list[str]) -> None:
    """In /proc nobody can make a file, not even root."""
    status, out, err = run("compare", *quick, "-o", "/proc/report.html", "--device", "nonsense")
    assert (status, out) == (2, "")
    assert "/proc/report.html: it cannot be written" in err


def test_what_was_assumed_and_what_is_odd_is_told(run: Run, quick: list[str], folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "other", tmp_path / "bare")
    for name in ("config.json", "loadstone.json"):
        (tmp_path / "bare" / name).unlink(missing_ok=True)
    (tmp_path / "dos.txt").write_bytes(b"One line\r\nand another\r\n")
    arguments = [quick[1], tmp_path / "bare", "--text", f"dos={tmp_path}/dos.txt", *quick[4:], "--json"]
    status, out, err = run("compare", *arguments, "-o", tmp_path / "report.html")
    told = json.loads(out)
    assert status == 0
    assert told["models"][0]["notes"] == []
    assert any(note.startswith("assumed: n_heads = ") for note in told["models"][1]["notes"])
    assert "note: bare: assumed: n_heads = " in err
    assert "note: dos.txt: 2 Windows line ends" in err
    written = (tmp_path / "report.html").read_text()
    assert "bare; assumed: n_heads = " in written
    assert "dos.txt; 2 Windows line ends" in written


def test_mistakes_are_told_before_anything_is_measured(
    run: Run, quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadstone.compare.comparison.measure", lambda *_: pytest.fail("it was measured"))
    page = tmp_path / "report.html"
    bare = saved(tmp_path / "bare")
    for path in (*bare.glob("*.txt"), *bare.glob("*token*"), *bare.glob("vocab*")):
        path.unlink()
    for arguments, problem in (
        ([quick[0], "-o", page], "at least two models"),
        ([*quick, "-o", tmp_path / "no" / "a.html"], "there is no folder"),
        ([*quick, "-o", tmp_path], f"it is a folder. Name a file in it: -o {tmp_path / 'comparison.html'}"),
        ([*quick, "-o", tmp_path, "--force"], "it is a folder"),
        ([*quick, "-o", tmp_path / ("x" * 500)], "it cannot be written: File name too long"),
        ([*quick, "-o", "/dev/null", "--force"], "it is there already"),
        ([*quick, "-o", page, "--seeds", "a"], "expected whole numbers"),
        ([*quick, "-o", page, "--seeds", "-1"], "none below 0"),
        ([*quick, "-o", page, "--temperature", "-1"], "temperature must be 0 or more"),
        ([*quick, "-o", page, "--top-k", "0"], "top_k must be 1 or more"),
        ([*quick, "-o", page, "--prompt", ""], "a prompt is empty"),
        ([*quick, "-o", page, "-n", "0"], "at least one prompt, one seed and one new token"),
        ([*quick, "-o", page, "--json", "--markdown"], "choose one"),
        ([quick[0], bare, "-o", page], "no tokenizer lies beside the weights"),
        ([quick[0], tmp_path / "nowhere", "-o", page], "nowhere"),
        ([quick[0], "x" * 5000, "-o", page], "there is no such file or folder"),
        ([*quick, "-o", page, "--device", "nonsense"], "cannot be used here"),
    ):
        status, out, err = run("compare", *arguments)
        assert (status, out) == (2, "")
        assert problem in " ".join(err.split())
        assert not page.exists()


def test_the_smallest_context_holds_for_all(folder: Path, run: Run, quick: list[str], tmp_path: Path) -> None:
    short = saved(tmp_path / "short", context_length=20)
    told = json.loads(run("compare", quick[0], short, *quick[2:], "--json")[1])
    assert (told["protocol"]["context"], told["protocol"]["stride"]) == (20, 10)
