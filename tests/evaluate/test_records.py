"""What the tasks read: files in two forms, the hub, the shared folder; and what is wrong with a record."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from extendable import KNOWN, gpt2_like, hostile
from loadstone.errors import FormatError, SourceError
from loadstone.evaluate.run import TaskResult, evaluate
from loadstone.evaluate.tasks import TASKS, task_named
from loadstone.evaluate.tasks.base import Settings
from loadstone.evaluate.tasks.choice import ChoiceTask
from records_files import Rows, Write


def run(name: str, path: str, **options: Any) -> TaskResult:
    return evaluate(hostile(KNOWN), gpt2_like(), [task_named(name)], data={name: path}, **options)[0]


HUB_FORMS: dict[str, tuple[dict[str, Any], list[tuple[str, str]], int]] = {
    "piqa": (
        {"goal": "dry a hat", "sol1": "the sun", "sol2": "a nest", "label": 1},
        [("Question: dry a hat\nAnswer:", " the sun"), ("Question: dry a hat\nAnswer:", " a nest")], 1,
    ),
    "copa": (
        {"premise": "The cat sang.", "choice1": "The dog left.", "choice2": "It rained.", "question": "effect",
         "label": 0},
        [("The cat sang therefore", " the dog left."), ("The cat sang therefore", " it rained.")], 0,
    ),
    "arc_challenge": (
        {"question": "Who sings?", "choices": {"text": ["cats", "birds"], "label": ["A", "B"]}, "answerKey": "B"},
        [("Question: Who sings?\nAnswer:", " cats"), ("Question: Who sings?\nAnswer:", " birds")], 1,
    ),
    "winogrande": (
        {"sentence": "The cat saw the dog, so _ ran.", "option1": "the cat", "option2": "the dog", "answer": "2"},
        [("The cat saw the dog, so the cat", " ran."), ("The cat saw the dog, so the dog", " ran.")], 1,
    ),
    "hellaswag": (
        {"ctx": "A cat sits. It", "endings": ["sings.", "flies.", "naps.", "is 12."], "label": "2"},
        [("A cat sits. It", f" {ending}") for ending in ("sings.", "flies.", "naps.", "is 12.")], 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB_FORMS)
def test_the_data_sets_own_records_are_read(name: str) -> None:
    row, options, gold = HUB_FORMS[name]
    task = task_named(name)
    assert isinstance(task, ChoiceTask)
    question = task.read(row, "file", "line 1")
    assert (list(question.options), question.gold) == (options, gold)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("piqa", {"text": "x"}, r"line 1: expected fields .*goal.* or \{choices, gold, query\}.*, found text"),
        ("piqa", {"query": "x", "choices": ["a"], "gold": 0}, "1 options, and number 0"),
        ("piqa", {"query": "x", "choices": ["a", "b"], "gold": 2}, "2 options, and number 2"),
        ("piqa", {"query": "x", "choices": ["a", " "], "gold": 0}, "an option is empty"),
        ("piqa", {"query": 7, "choices": ["a", "b"], "gold": 0}, "not as in piqa"),
        ("piqa", {"query": "x", "choices": 3, "gold": 0}, "not as in piqa"),
        ("piqa", {"query": "x", "choices": ["a", "b"], "gold": None}, "not as in piqa"),
        ("piqa", {"query": "x", "choices": ["a", "b"], "gold": math.inf}, "not as in piqa"),
        ("piqa", {"query": "x", "choices": ["a", None], "gold": 0}, "not as in piqa"),
        ("piqa", {"query": "x", "choices": "yes", "gold": 0}, "not as in piqa .*expected a list, found 'yes'"),
        ("piqa", {"goal": None, "sol1": "a", "sol2": "b", "label": 0}, "not as in piqa"),
        ("piqa", {"goal": "x", "sol1": "a", "sol2": None, "label": 0}, "not as in piqa"),
        ("winogrande", {"context_options": "ab", "continuation": "c", "gold": 0}, "expected a list, found 'ab'"),
        ("hellaswag", {"ctx": "x", "endings": "ab", "label": "0"}, "expected a list, found 'ab'"),
        ("arc_easy", {"question": "x", "choices": {"text": "ab", "label": "AB"}, "answerKey": "A"}, "expected a list"),
        ("piqa", {"query": "x\ud800", "choices": ["a", "b"], "gold": 0}, "U\\+D800"),
        (
            "arc_easy",
            {"question": "x", "choices": {"text": ["a", "b"], "label": ["A"]}, "answerKey": "C"},
            "not as in arc",
        ),
        ("lambada", {"text": 3}, "`text` should be a text"),
        ("lambada", {"text": "word"}, "single word"),
        ("blimp", {"sentence_good": "a"}, "expected fields"),
        ("blimp", {"sentence_good": "a", "sentence_bad": "b", "UID": ["c"]}, "the group should be a text"),
    ],
)
def test_malformed_records_are_errors_with_file_and_line(write: Write, name: str, row: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        run(name, write([row]))


def test_a_folder_without_records_and_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no \.jsonl file"):
        run("blimp", str(tmp_path))
    for wrong, message in (("none", "No such file"), ("x" * 5000, "name too long")):
        with pytest.raises(SourceError, match=f"--data blimp=.*{message}"):
            run("blimp", str(tmp_path / wrong))
    with pytest.raises(SourceError, match="Is a directory"):
        run("ptb", str(tmp_path))


@pytest.mark.parametrize("name", ["lambada", "blimp"])
def test_a_file_without_records_gives_no_figure(tmp_path: Path, name: str) -> None:
    (tmp_path / "none.json").write_text("[]")
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(FormatError, match="there is no record"):
            run(name, str(path))


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> Iterator[Path]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(SourceError, match=r"cannot be read .*Permission denied"):
        run("blimp", str(tmp_path))


# -- the hub


def offer(monkeypatch: pytest.MonkeyPatch, rows: Rows) -> None:
    """A library `datasets` that has these rows, whatever the name."""
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: iter(rows)))


def test_wikitext_of_the_hub_is_the_published_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub has an empty row for each line of a single space."""
    published = " \n = The cat = \n \n The dog 's 12 bones , and the bird 's nest . \n \n"
    (tmp_path / "text.txt").write_text(published)
    offer(monkeypatch, [{"text": line if line.strip() else ""} for line in published.splitlines(keepends=True)])
    for name in ("wikitext2", "wikitext2_paper"):
        hub, file = run(name, "hub:a/b"), run(name, str(tmp_path / "text.txt"))
        assert hub.metrics == file.metrics
        assert hub.protocol["sha256"] == file.protocol["sha256"]
    offer(monkeypatch, [{"sentence": "x"}])
    with pytest.raises(FormatError, match="hub:a/b: row 1: `text` should be a text, found None"):
        run("wikitext2", "hub:a/b")


def test_records_of_the_hub_have_the_files_digest(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"query": "The cat sang", "choices": ["it's 12.", "the dog"], "gold": 1}] * 3
    offer(monkeypatch, rows)
    hub, file = run("copa", "hub:a/b"), run("copa", write(rows))
    assert (hub.metrics, hub.protocol["sha256"]) == (file.metrics, file.protocol["sha256"])
    assert hub.protocol["data"] == "hub:a/b"


@pytest.mark.parametrize("name", ["lambada", "copa"])
def test_other_records_have_another_digest(write: Write, name: str) -> None:
    rows = [{"text": "The cat sang", "query": "The cat", "choices": ["sang", "ran"], "gold": 0}] * 2
    first = run(name, write(rows)).protocol
    assert first["data"] == "rows.jsonl"
    changed = [rows[0], {**rows[1], "text": "The cat ran", "gold": 1}]
    assert run(name, write(changed)).protocol["sha256"] != first["sha256"]


def test_without_data_the_error_says_how_to_give_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOADSTONE_SHARED", str(tmp_path))
    with pytest.raises(SourceError, match="--data ptb=PATH"):
        task_named("ptb").prepare(None, gpt2_like(), Settings(8, 8))


# -- the shared files


@pytest.mark.parametrize(
    ("name", "items"),
    [
        ("lambada", 5153),
        ("piqa", 1838),
        ("winogrande", 1267),
        ("copa", 100),
        ("arc_easy", 2376),
        ("arc_challenge", 1172),
    ],
)
def test_the_shared_files_are_read(shared: Path, name: str, items: int) -> None:
    found = evaluate(hostile(KNOWN), gpt2_like(), [TASKS[name]], limit=3)[0]
    assert (found.of, found.items) == (items, 3)


def test_blimp_of_the_shared_folder(shared: Path, tmp_path: Path) -> None:
    files = sorted((shared / "data" / "blimp").iterdir())
    assert len(files) == 34
    for file in files[:3]:
        (tmp_path / file.name).symlink_to(file)
    found = run("blimp", str(tmp_path), limit=12)
    assert (found.of, found.items) == (3000, 12)
    assert list(found.groups) == [file.stem for file in files[:3]]  # evenly spread over all phenomena
