"""Runs: resumed by item, kept apart by model and protocol, repaired after a torn line; anchors; the command."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Run
from extendable import KNOWN, gpt2_like, hostile
from loadstone.cli.eval import TASKS as NAMED
from loadstone.config import PRESETS, GPTConfig
from loadstone.errors import FormatError, LoadstoneError
from loadstone.evaluate import run as module
from loadstone.evaluate.anchors import ANCHORS, anchors_for, size_of
from loadstone.evaluate.data import given_data, shared_folder
from loadstone.evaluate.run import TaskResult, evaluate
from loadstone.evaluate.scoring import Request, Scores, score
from loadstone.evaluate.store import model_hash
from loadstone.evaluate.table import figure, lines
from loadstone.evaluate.tasks import TASKS, task_named
from loadstone.evaluate.tasks.text import file_task
from loadstone.model import GPT
from loadstone.save import save_model

TEXT = "The cat's hat; the dog's 12 bones, and the bird's nest. They sing 2024 songs, and 300 more!\n" * 12


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [
        {"sentence_good": f"The {n} dogs sing.", "sentence_bad": f"The {n} dog sing.", "UID": "x"} for n in range(20)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Counted:
    """`score`, counting the requests that it is asked for; dies after so many."""

    def __init__(self, dies_after: int = 10**9) -> None:
        self.asked = 0
        self.left = dies_after

    def __call__(
        self, model: GPT, requests: Sequence[Request], *, batch_size: int | None = None
    ) -> Iterator[tuple[int, Scores]]:
        self.asked += len(requests)
        for found in score(model, requests, batch_size=batch_size):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            yield found


def results(
    text: Path, pairs: Path, out: Path | None = None, model: GPT | None = None, **options: Any
) -> list[TaskResult]:
    tasks = [file_task(text), task_named("blimp")]
    arguments: dict[str, Any] = {
        "context": 32,
        "stride": 16,
        "data": {"blimp": str(pairs)},
        "out": out,
        "batch_size": 2,
    } | options
    return evaluate(model or hostile(KNOWN), gpt2_like(), tasks, **arguments)


def figures(results: list[TaskResult]) -> list[Any]:
    return [(each.task, each.metrics, each.groups, each.items, each.tokens) for each in results]


@pytest.mark.parametrize("dies_after", [0, 3, 25, 33])
def test_a_run_that_was_stopped_goes_on_and_ends_the_same(
    text: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_after: int
) -> None:
    monkeypatch.setattr(module, "PORTION", 4)
    whole, out = results(text, pairs), tmp_path / "out"
    total = sum(each.of for each in whole) + 20  # a request a window, two a pair
    monkeypatch.setattr(module, "score", Counted(dies_after))
    with pytest.raises(KeyboardInterrupt):
        results(text, pairs, out)
    for file in out.iterdir():  # a machine that was lost in the middle of a line
        with file.open("a") as torn:
            torn.write('{"item": 3, "logpr')
    rest = Counted()
    monkeypatch.setattr(module, "score", rest)
    seen: list[tuple[int, int]] = []
    resumed = results(text, pairs, out, progress=lambda done, of: seen.append((done, of)))
    assert figures(resumed) == figures(whole)
    assert total - dies_after <= rest.asked <= total - dies_after + 3  # half a portion may be asked again
    assert seen[-1][0] == seen[-1][1]
    again = Counted()
    monkeypatch.setattr(module, "score", again)
    assert figures(results(text, pairs, out)) == figures(whole)
    assert again.asked == 0


def test_a_limit_is_part_of_the_whole(text: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, spy = tmp_path / "out", Counted()
    monkeypatch.setattr(module, "score", spy)
    limited = results(text, pairs, out, limit=5)
    assert [each.items for each in limited] == [5, 5]
    assert all("5 of" in each.notes[-1] for each in limited)
    before = spy.asked
    whole = results(text, pairs, out)
    assert spy.asked == before + sum(each.of for each in whole) + 20 - 15
    assert figures(whole) == figures(results(text, pairs))


@pytest.mark.parametrize("change", ["model", "dtype", "context", "stride", "text"])
def test_scores_of_something_else_are_never_used(
    text: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    out = tmp_path / "out"
    results(text, pairs, out)
    options: dict[str, Any] = {"context": {"context": 31}, "stride": {"stride": 15}}.get(change, {})
    model = hostile(KNOWN, seed=int(change == "model"))
    if change == "dtype":
        model.to(torch.bfloat16)
    if change == "text":
        text.write_text(TEXT.replace("12", "13", 1))
    fresh = results(text, pairs, model=model, **options)
    spy = Counted()
    monkeypatch.setattr(module, "score", spy)
    assert figures(results(text, pairs, out, model=model, **options)) == figures(fresh)
    assert spy.asked >= fresh[0].of  # of pairs, the stride is no part


def test_the_same_weights_have_the_same_hash_and_others_not() -> None:
    model = hostile(KNOWN)
    assert model_hash(model) == model_hash(hostile(KNOWN))
    with torch.no_grad():
        model.blocks[1].mlp.down.bias[3] += 1e-6  # type: ignore[union-attr, index, operator]
    assert model_hash(model) != model_hash(hostile(KNOWN))


FOUR = '{"item": 1, "logprobs": [[%s, -1, -1, -1]], "greedy": ["1111"]}\n'


@pytest.mark.parametrize(
    "damage",
    ["[1]\n", '{"item": "x"}\n', '{"item": 1, "logprobs": [[1]], "greedy": []}\n', "\xff\n", "\0" * 9 + "\n",
     FOUR % "NaN", FOUR % "-Infinity", FOUR % ("9" * 400), FOUR % "-1, -1", FOUR.replace("1111", "1") % "-1",
     FOUR.replace(": 1", ": 999", 1) % "-1", '{"item": 1, "logprobs": [], "greedy": []}\n'],
)  # fmt: skip
def test_a_damaged_store_is_an_error_and_no_figure(text: Path, pairs: Path, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    results(text, pairs, out, stride=4)
    file = next(out.glob("text*"))
    kept = file.read_text()
    file.write_text(kept + FOUR % "-1")
    results(text, pairs, out, stride=4)
    file.write_text(kept + damage, encoding="latin-1")
    with pytest.raises(FormatError, match=r"line \d+ is not what an evaluation writes.*Remove the file"):
        results(text, pairs, out, stride=4)


def test_a_folder_that_cannot_be_written(text: Path, pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LoadstoneError, match="the scores cannot be kept"):
        results(text, pairs, tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 73}, "--context 73: this model reads from 1 to 72"),
        ({"context": 8, "stride": 9}, "--stride 9: .* skip tokens"),
        ({"limit": 0}, "limit of 0"),
    ],
)
def test_what_cannot_be(text: Path, pairs: Path, options: Any, message: str) -> None:
    with pytest.raises(LoadstoneError, match=message):
        results(text, pairs, **options)


# -- anchors


def test_anchors_are_for_gpt2_alone_and_name_figures_that_exist() -> None:
    assert size_of(PRESETS["gpt2-xl"]) == "gpt2-xl"
    assert size_of(GPTConfig(50257, 1024, 768, 2, 12)) is None
    assert [anchor.value for anchor in anchors_for(PRESETS["gpt2"], "wikitext2_paper")] == [29.41, 37.37]
    assert not anchors_for(hostile(KNOWN).config, "wikitext2")
    known = {"token_perplexity", "word_perplexity", "paper_perplexity", "acc", "acc_token", "perplexity"}
    assert {anchor.metric for anchor in ANCHORS} == known | {"last_token_acc", "last_token_perplexity"}
    assert {anchor.task for anchor in ANCHORS} <= set(TASKS)
    assert all(anchor.protocol and anchor.source and anchor.of in PRESETS for anchor in ANCHORS)


def test_an_anchor_stands_below_the_figure_that_it_belongs_to(text: Path, pairs: Path) -> None:
    result = results(text, pairs)[0]
    shown = list(lines(TaskResult(**{**vars(result), "anchors": anchors_for(PRESETS["gpt2"], "wikitext2")})))
    at = next(number for number, line in enumerate(shown) if "token_perplexity" in line)
    assert "29.94  published for gpt2: token level, stride 1024" in shown[at + 1]


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [("acc", 0.46, "46.00%"), ("bits_per_byte", 1.23456, "1.2346"), ("perplexity", 29.944, "29.94"), ("acc", None, "-"),
     ("perplexity", 1234.5, "1,234.50"), ("perplexity", float("inf"), "inf"), ("perplexity", 4.6e9, "4.6e+09")],
)  # fmt: skip
def test_figures(name: str, value: float | None, shown: str) -> None:
    assert figure(name, value) == shown


def test_a_hostile_file_name_cannot_steer_the_terminal(text: Path, pairs: Path) -> None:
    (shown, *_) = lines(replace(results(text, pairs)[0], task="\x1b[2Jmine\udce9.txt"))
    assert shown.startswith(r"\x1b[2Jmine\udce9.txt: ")


# -- where data are


def test_given_data_must_be_a_tasks() -> None:
    assert given_data(["ptb=a=b"], ["ptb"]) == {"ptb": "a=b"}
    for wrong in ("ptb", "pdb=a", "ptb="):
        with pytest.raises(LoadstoneError, match=f"--data {wrong}: expected NAME=PATH"):
            given_data([wrong], ["ptb"])
    with pytest.raises(LoadstoneError, match="--data ptb=b: expected NAME=PATH, once"):
        given_data(["ptb=a", "ptb=b"], ["ptb"])


def test_the_shared_folder_is_named_or_beside_the_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOADSTONE_SHARED", str(tmp_path))
    assert shared_folder() is None
    (tmp_path / "data").mkdir()
    assert shared_folder() == tmp_path / "data"


# -- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model"
    save_model(hostile(KNOWN), path, gpt2_like())
    return path


def test_the_command_prints_a_table_and_json_with_the_same_figures(
    run: Run, folder: Path, text: Path, pairs: Path, tmp_path: Path
) -> None:
    arguments = ("eval", folder, "--text", text, "--task", "blimp", "--data", f"blimp={pairs}", "--context", 32)
    status, shown, _ = run(*arguments, "--out", tmp_path / "out")
    assert status == 0
    status, output, error = run(*arguments, "--json", "--out", tmp_path / "out")
    assert status == 0, error
    second, first = json.loads(output)["results"]
    assert first["tokens_per_second"] is None  # all was there
    assert first["protocol"]["stride"] == first["protocol"]["context"] == 32
    assert len(first["protocol"]["sha256"]) == len(first["protocol"]["model_sha256"]) == 64
    for result in (first, second):
        for metric in result["metrics"]:
            row = next(line for line in shown.splitlines() if line.split()[:1] == [metric["name"]])
            assert figure(metric["name"], metric["value"]) in row.split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --task NAME or --text FILE"),
        (("--task", "nonsense"), "there is no such task"),
        (("--text", "nowhere.txt"), "nowhere.txt"),
        (("--task", "blimp", "--data", "piqa=x"), "--data piqa=x: expected"),
        (("--task", "blimp", "--context", "1000"), "--context 1000"),
        (("--text", "mine.txt", "--data", "mine.txt=x"), "one of the tasks that are run: none"),
    ],
)
def test_mistakes_are_one_paragraph(run: Run, folder: Path, arguments: tuple[str, ...], message: str) -> None:
    status, output, error = run("eval", folder, *arguments)
    assert (status, output) == (2, "")
    assert message in error
    assert "Traceback" not in error


def test_the_help_names_every_task() -> None:
    assert NAMED.split(", ") == list(TASKS)
