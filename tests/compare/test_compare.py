"""`loadstone compare`: the measurement, what a run tells, and the command."""

from __future__ import annotations

import json
import math
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
from loadstone.compare.history import POINTS, read_history
from loadstone.compare.tables import Row, amount, duration, figures, letter, signed, verdict
from loadstone.errors import LoadstoneError


def rows(found: Comparison) -> dict[str, Row]:
    return {row.label: row for group in figures(found) for row in group.rows}


def test_a_model_against_itself_differs_nowhere(comparison: Comparison) -> None:
    """The run and its best checkpoint, which is the same file."""
    for name in comparison.texts:
        assert all(piece.difference == 0 for piece in comparison.pieces(2, name))
    assert comparison.difference(2) == (0, 0, 0)
    assert "equally well" in verdict(comparison, 2)
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
    score = second.scores["hard"]
    bits = score.bits.bits.copy()
    bits[:2] = math.nan  # bytes of the same character
    without = replace(second, scores={"hard": replace(score, bits=TokenBits(score.bits.ends, bits))})
    values = replace(found, models=(first, without)).domains["hard"]
    rest = np.nansum(bits) / len("té là".encode())
    assert values == pytest.approx([rest, rest])
    assert values != pytest.approx(found.domains["hard"])


def test_a_loss_is_marked_where_vocabularies_differ(tmp_path: Path, comparison: Comparison) -> None:
    other = measured(tmp_path, ["byte level", "sentencepiece"])
    assert "cannot be compared" in rows(other)["Loss"].note
    assert "cannot be compared" not in rows(comparison)["Loss"].note


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
    assert told["Last loss of its run"].cells[:2] == ("4.000", "not known")


def test_a_log_beside_the_weights_tells_all_it_has(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "run" / "metrics.jsonl", tmp_path)
    history = read_history(tmp_path)
    assert history is not None
    assert (history.step, history.tokens, history.seconds, history.validation_loss) == (200, 102_400, 400.0, 3.0)
    lines = [json.dumps({"step": i, "loss": 5.0 + i % 2, "tokens": i}) for i in range(1, 1001)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    history = read_history(tmp_path)
    assert history is not None
    assert len(history.training) <= POINTS
    assert np.mean([loss for _, loss in history.training]) == pytest.approx(5.5)
    assert (history.seconds, history.validation_loss) == (None, None)
    assert read_history(None) is None


@pytest.mark.parametrize("damage", ["{", "[]", '{"progress": {"step": "x"}}', '{"progress": 3}', "[" * 100_000])
def test_a_damaged_counter_is_named(tmp_path: Path, damage: str) -> None:
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "state.json").write_text(damage)
    with pytest.raises(LoadstoneError, match=r"state\.json.*cannot be read.*Move it away"):
        read_history(tmp_path)


def test_names() -> None:
    assert _names(["gpt2", "smollm2"]) == ["gpt2", "smollm2"]
    assert _names(["/a/run/best", "/a/other/best/"]) == ["run", "other"]
    assert _names(["/a/run/best", "/a/run/latest"]) == ["best", "latest"]
    assert _names(["/a/run", "/b/run"]) == ["a/run", "b/run"]
    assert _names(["/a/run", "/a/run", "m"]) == ["run", "run (2)", "m"]
    assert _names(["best", "best"]) == ["best", "best (2)"]
    assert _names(["x/run", "run"]) == ["x/run", "run"]


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


def test_mistakes_are_told_before_anything_is_measured(run: Run, quick: list[str], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    bare = saved(tmp_path / "bare")
    for path in (*bare.glob("*.txt"), *bare.glob("*token*"), *bare.glob("vocab*")):
        path.unlink()
    for arguments, problem in (
        ([quick[0], "-o", page], "at least two models"),
        ([*quick, "-o", tmp_path / "no" / "a.html"], "there is no folder"),
        ([*quick, "-o", tmp_path, "--force"], "it is there already"),
        ([*quick, "-o", page, "--seeds", "a"], "expected whole numbers"),
        ([*quick, "-o", page, "-n", "0"], "at least one prompt, one seed and one new token"),
        ([*quick, "-o", page, "--json", "--markdown"], "choose one"),
        ([quick[0], bare, "-o", page], "no tokenizer lies beside the weights"),
        ([quick[0], tmp_path / "nowhere", "-o", page], "nowhere"),
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
