"""Tasks: how records become requests, and requests figures; against formulas written down by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from extendable import KNOWN, gpt2_like, hostile
from loadstone.errors import LoadstoneError
from loadstone.evaluate.run import TaskResult, evaluate
from loadstone.evaluate.scoring import Scores
from loadstone.evaluate.tasks import task_named
from loadstone.evaluate.tasks.base import Asked
from loadstone.evaluate.tasks.choice import PreparedChoices, Question
from loadstone.evaluate.tasks.lambada import PreparedWords
from loadstone.model import GPT
from loadstone.tokenizer import Tokenizer
from records_files import Write


def loglikelihood(model: GPT, tokenizer: Tokenizer, context: str, continuation: str) -> tuple[float, bool, int]:
    """The judge, as lm-evaluation-harness defines it: (sum, whether greedy decoding would say it, tokens)."""
    before = tokenizer.encode(context, add_special=False) if context else []
    whole = tokenizer.encode(context + continuation, add_special=False)
    n = len(whole) - len(before)
    ids = whole if context else [tokenizer.bos_id or 0, *whole]
    ids = ids[-(model.config.context_length + 1) :]
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([ids[:-1]]))[0].double(), -1)[-n:]
    targets = torch.tensor(ids[-n:])
    return float(logprobs.gather(1, targets[:, None]).sum()), bool((logprobs.argmax(-1) == targets).all()), n


def run(name: str, path: str, model: GPT | None = None, **options: Any) -> TaskResult:
    model = model or hostile(KNOWN)
    return evaluate(model, gpt2_like(), [task_named(name)], data={name: path}, **options)[0]


QUESTIONS = [
    {
        "query": "The bird sang, therefore",
        "choices": ["the dog sang.", "it's 12.", "we've the cat's hat"],
        "gold": i % 3,
    }
    for i in range(3)
] + [
    {"query": f"The {word}\n", "choices": ["bones", "hat and hat"], "gold": 1}
    for word in ("cat", "dog", "nest", "bird")
]


@pytest.mark.parametrize(("name", "cue"), [("piqa", "\nAnswer:"), ("copa", ""), ("arc_easy", "\nAnswer:")])
@pytest.mark.parametrize("batch_size", [None, 1, 4])
def test_choices_against_the_formulas(write: Write, name: str, cue: str, batch_size: int | None) -> None:
    model, tokenizer = hostile(KNOWN, seed=3), gpt2_like()
    found = run(name, write(QUESTIONS), model, batch_size=batch_size)
    right = {"acc": 0, "acc_norm": 0, "acc_token": 0}
    for row in QUESTIONS:
        context = str(row["query"]).rstrip() + cue
        choices: Any = row["choices"]
        each = [loglikelihood(model, tokenizer, context, " " + choice) for choice in choices]
        right["acc"] += np.argmax([s for s, _, _ in each]) == row["gold"]
        right["acc_norm"] += np.argmax([s / len(c) for (s, _, _), c in zip(each, choices, strict=True)]) == row["gold"]
        right["acc_token"] += np.argmax([s / n for s, _, n in each]) == row["gold"]
    assert {metric.name: metric.value for metric in found.metrics} == {
        name: count / len(QUESTIONS) for name, count in right.items()
    }
    assert found.items == found.of == len(QUESTIONS)


def scores(*logprobs: float, greedy: Sequence[bool] = ()) -> Scores:
    return Scores(np.array(logprobs, dtype=np.float32), np.array(greedy or [True] * len(logprobs)))


def test_the_three_accuracies_are_three_things() -> None:
    questions = [Question([("c", " abcd"), ("c", " é"), ("c", " cc")], gold) for gold in range(3)]
    prepared = PreparedChoices(questions, [[]] * 3, {}, [], True)
    # sums -3, -1, -1.6; per character -.75, -1, -.8 (of bytes another would win); per token -3, -1, -.8
    options = [scores(-3.0), scores(-1.0), scores(-0.8, -0.8)]
    values = [[m.value for m in prepared.metrics({item: options})] for item in range(3)]
    assert values == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]


def test_a_word_is_right_if_all_its_tokens_are() -> None:
    prepared = PreparedWords([[]] * 3, {}, [])
    words = [scores(-1.0, -2.0, greedy=marks) for marks in ((True, True), (True, False), (False, True))]
    found = {each.name: each.value for each in prepared.metrics({item: [word] for item, word in enumerate(words)})}
    assert (found["acc"], found["last_token_acc"]) == (1 / 3, 2 / 3)
    assert found["perplexity"] == pytest.approx(math.exp(3))
    assert found["last_token_perplexity"] == pytest.approx(math.exp(2))


def test_winogrande_scores_what_follows(write: Write) -> None:
    model, tokenizer = hostile(KNOWN, seed=5), gpt2_like()
    plain = [
        {"context_options": [f"The cat and {n} dogs, so the cat", f"The cat and {n} dogs, so the {n} dogs"],
         "continuation": "sing songs", "gold": n % 2} for n in range(6)
    ]  # fmt: skip
    original = [
        {"sentence": f"The cat and {n} dogs, so _ sing songs", "option1": "the cat", "option2": f"the {n} dogs",
         "answer": str(n % 2 + 1)} for n in range(6)
    ]  # fmt: skip
    right = 0
    for row in plain:
        contexts: Any = row["context_options"]
        sums = [loglikelihood(model, tokenizer, context, " sing songs")[0] for context in contexts]
        right += np.argmax(sums) == row["gold"]
    for rows in (plain, original):
        found = run("winogrande", write(rows), model)
        assert [(metric.name, metric.value) for metric in found.metrics] == [("acc", right / 6)]


def test_blimp_by_phenomenon(tmp_path: Path) -> None:
    model, tokenizer = hostile(KNOWN, seed=1), gpt2_like()
    right: dict[str, list[bool]] = {"island": [], "binding": []}
    for uid, found in right.items():
        rows = []
        for n in range(5):
            good, bad = f"The {n} dogs sing {uid}.", f"The {n} dogs sings the {uid}."
            rows.append({"sentence_good": good, "sentence_bad": bad, "UID": uid})
            found.append(loglikelihood(model, tokenizer, "", good)[0] > loglikelihood(model, tokenizer, "", bad)[0])
        (tmp_path / f"{uid}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = run("blimp", str(tmp_path), model)
    assert {name: metrics[0].value for name, metrics in result.groups.items()} == {
        uid: sum(found) / 5 for uid, found in right.items()
    }
    assert result.value("acc") == sum(map(sum, right.values())) / 10


def test_lambada_against_the_formulas(write: Write) -> None:
    model, tokenizer = hostile(KNOWN, seed=2), gpt2_like()
    passages = [
        f"The cat's {n} bones, and the bird's nest of the 12 {word}" for n in range(4) for word in ("hats", "dogs")
    ]
    found = run("lambada", write([{"text": text} for text in passages]), model)
    judged = [loglikelihood(model, tokenizer, *_split(text)) for text in passages]
    assert found.value("acc") == sum(greedy for _, greedy, _ in judged) / len(judged)
    mean = sum(total for total, _, _ in judged) / len(judged)
    assert found.value("perplexity") == pytest.approx(math.exp(-mean), rel=1e-4)
    last = [loglikelihood(model, tokenizer, *_last_token(tokenizer, text)) for text in passages]
    assert found.value("last_token_perplexity") == pytest.approx(math.exp(-sum(s for s, _, _ in last) / 8), rel=1e-4)


def _split(text: str) -> tuple[str, str]:
    context, _, word = text.rpartition(" ")
    return context, " " + word


def _last_token(tokenizer: Tokenizer, text: str) -> tuple[str, str]:
    *_, last = tokenizer.encode(text, add_special=False)
    word = tokenizer.token_text(last)
    return text.removesuffix(word), word


def test_an_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(LoadstoneError, match=r"--task piqua: .*piqa"):
        task_named("piqua")


# -- contexts and continuations


def test_white_space_belongs_to_the_continuation() -> None:
    tokenizer = gpt2_like()
    asked = Asked(tokenizer, 64)
    assert asked.request("The cat ", "sang").targets == asked.request("The cat", " sang").targets
    assert list(asked.request("The cat ", "sang").ids) == list(asked.request("The cat", " sang").ids)


def test_a_long_request_loses_its_beginning_and_is_counted() -> None:
    tokenizer = gpt2_like()
    asked = Asked(tokenizer, 8)
    ids = tokenizer.encode("The cat and the dog and the bird and the nest sing songs", add_special=False)
    request = asked.request("The cat and the dog and the bird and the nest sing", " songs")
    assert list(request.ids) == ids[-9:]
    assert "1 requests are longer" in asked.notes()[0]
    assert asked.request("The", " bones" * 30).targets == 8


def test_begin_tokens() -> None:
    tokenizer = gpt2_like()  # does not put its begin token before a text by itself
    assert Asked(tokenizer, 64).request("", "The cat").ids[0] == tokenizer.bos_id
    assert Asked(tokenizer, 64).request("The", " cat").ids[0] != tokenizer.bos_id
    without = Asked(replace(tokenizer, bos_id=None), 64)
    ids = tokenizer.encode("The cat", add_special=False)
    request = without.request("", "The cat")
    assert (list(request.ids), request.targets) == (ids, len(ids) - 1)
    assert "not scored" in without.notes()[0]
