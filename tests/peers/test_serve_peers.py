"""lm-evaluation-harness through our API (`local-completions`): its numbers are those of `loadstone eval`.

What works offline: our folder as its tokenizer, and requests as token ids.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from extendable import KNOWN, gpt2_like, hostile
from loadstone.evaluate.run import evaluate
from loadstone.evaluate.tasks import task_named
from loadstone.evaluate.tasks.text import file_task
from loadstone.save import save_model
from loadstone.serve.batch import Batch
from loadstone.serve.served import Served
from peers.test_harness import PASSAGES, QUESTIONS, TEXT, metric, task
from serving import serving

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("tenacity")  # lm-eval[api]
pytestmark = pytest.mark.filterwarnings("default")
SHORT = TEXT[:90]  # one window: of longer texts the harness's windows are a token shorter, to leave room for an answer


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_harness_gives_our_numbers_through_the_api(
    tmp_path: Path, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = hostile(KNOWN, seed=4)
    save_model(model, tmp_path / "model", gpt2_like())
    choice = {"output_type": "multiple_choice", "doc_to_target": "{{gold}}", "doc_to_choice": "{{choices}}"}
    texts = [{"context": passage.rpartition(" ")[0], "word": " " + passage.rpartition(" ")[2]} for passage in PASSAGES]
    tasks = [
        task(tmp_path, "copa_here", QUESTIONS, doc_to_text="{{query}}", **choice, **metric("acc", "acc_norm")),
        task(tmp_path, "words_here", texts, output_type="loglikelihood", doc_to_text="{{context}}",
             doc_to_target="{{word}}", target_delimiter="", **metric("acc", "perplexity")),
        task(tmp_path, "text_here", [{"page": SHORT}], output_type="loglikelihood_rolling", doc_to_text="",
             doc_to_target="{{page}}", **metric("bits_per_byte")),
    ]  # fmt: skip
    served = Served("small", model, gpt2_like(), Batch(model, rows=4, n_tokens=KNOWN), 1)
    with serving(served) as server:
        arguments = {
            "model": "small", "base_url": f"{server.url}/v1/completions", "tokenizer": str(tmp_path / "model"),
            "tokenizer_backend": "huggingface", "tokenized_requests": True, "max_length": 73, "max_retries": 1,
            "num_concurrent": 4, "batch_size": batch_size,
        }  # fmt: skip
        theirs = lm_eval.simple_evaluate(
            model="local-completions", model_args=arguments, tasks=tasks, bootstrap_iters=0
        )["results"]

    data = {name: str(tmp_path / f"{name}.jsonl") for name in ("copa", "lambada")}
    Path(data["copa"]).write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    Path(data["lambada"]).write_text("".join(json.dumps({"text": text}) + "\n" for text in PASSAGES))
    (tmp_path / "text.txt").write_text(SHORT)
    ours = evaluate(model, gpt2_like(), [*map(task_named, data), file_task(tmp_path / "text.txt")], data=data)
    for name, result, figures in (
        ("copa_here", ours[0], ("acc", "acc_norm")),
        ("words_here", ours[1], ("acc", "perplexity")),
        ("text_here", ours[2], ("bits_per_byte",)),
    ):
        for figure in figures:
            assert theirs[name][f"{figure},none"] == pytest.approx(result.value(figure), rel=1e-4), (name, figure)
