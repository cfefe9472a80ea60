"""lm-evaluation-harness as judge: its own tasks with our model give our own numbers on the same items."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from extendable import KNOWN, gpt2_like, hostile
from loadstone.evaluate.run import evaluate
from loadstone.evaluate.tasks import task_named
from loadstone.evaluate.tasks.text import file_task
from loadstone.save import save_model

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("default")

PAIRS = [(f"The {n} dogs sing.", f"The {n} dog sing songs.") for n in range(12)]
QUESTIONS = [
    {"query": f"The {n} cats sang, therefore", "choices": ["the dog sang.", "it's 12.", "we've the hat"], "gold": n % 3}
    for n in range(12)
]
PASSAGES = [f"The cat's {n} bones, and the bird's nest of the 12 {word}" for n in range(4) for word in ("hats", "dogs")]
TEXT = "The cat's hat; the dog's 12 bones, and the bird's nest. They sing 2024 songs, and 300 more! " * 9


def task(folder: Path, name: str, rows: list[dict[str, Any]], **config: Any) -> dict[str, Any]:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
    return {"task": name, **files, "metadata": {"version": 1}, **config}


def metric(*names: str) -> dict[str, Any]:
    return {"metric_list": [{"metric": name} for name in names]}


@pytest.mark.parametrize("batch_size", ["auto", 3])
def test_the_same_numbers_on_the_same_items(
    tmp_path: Path, batch_size: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loadstone.evaluate import harness  # noqa: F401  registers the model

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    save_model(hostile(KNOWN, seed=4), tmp_path / "model", gpt2_like())
    choice = {"output_type": "multiple_choice", "doc_to_target": "{{gold}}", "doc_to_choice": "{{choices}}"}
    pairs = [{"good": good, "bad": bad} for good, bad in PAIRS]
    texts = [{"context": passage.rpartition(" ")[0], "word": " " + passage.rpartition(" ")[2]} for passage in PASSAGES]
    tasks = [
        task(tmp_path, "copa_here", QUESTIONS, doc_to_text="{{query}}", **choice, **metric("acc", "acc_norm")),
        task(tmp_path, "pairs_here", pairs, output_type="multiple_choice", doc_to_text="", doc_to_target=0,
             doc_to_choice="{{[good, bad]}}", **metric("acc")),
        task(tmp_path, "words_here", texts, output_type="loglikelihood", doc_to_text="{{context}}",
             doc_to_target="{{word}}", target_delimiter="", **metric("acc", "perplexity")),
        task(tmp_path, "text_here", [{"page": TEXT}], output_type="loglikelihood_rolling", doc_to_text="",
             doc_to_target="{{page}}", **metric("word_perplexity", "bits_per_byte")),
    ]  # fmt: skip
    arguments = f"source={tmp_path / 'model'},batch_size={batch_size}"
    theirs = lm_eval.simple_evaluate(model="loadstone", model_args=arguments, tasks=tasks, bootstrap_iters=0)["results"]

    (tmp_path / "copa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    blimp = [{"sentence_good": good, "sentence_bad": bad, "UID": "x"} for good, bad in PAIRS]
    (tmp_path / "blimp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in blimp))
    (tmp_path / "lambada.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PASSAGES))
    (tmp_path / "text.txt").write_text(TEXT)
    names = ("copa", "blimp", "lambada")
    data = {name: str(tmp_path / f"{name}.jsonl") for name in names}
    ours = evaluate(
        hostile(KNOWN, seed=4), gpt2_like(), [*map(task_named, names), file_task(tmp_path / "text.txt")], data=data
    )
    for name, result, figures in (
        ("copa_here", ours[0], ("acc", "acc_norm")),
        ("pairs_here", ours[1], ("acc",)),
        ("words_here", ours[2], ("acc", "perplexity")),
        ("text_here", ours[3], ("bits_per_byte",)),
    ):
        for figure in figures:
            assert theirs[name][f"{figure},none"] == pytest.approx(result.value(figure), rel=1e-4), (name, figure)


def test_the_models_of_the_harness_stay_known_beside_ours() -> None:
    # A process of its own: the order of imports is the point.
    names = "import loadstone.evaluate.harness, lm_eval.api.registry as r; r.get_model('local-completions')"
    done = subprocess.run([sys.executable, "-c", names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
