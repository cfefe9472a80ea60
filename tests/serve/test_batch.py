"""The running batch: every answer is the one that the request gets alone, whoever joins and leaves meanwhile."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from loadstone.errors import LoadstoneError
from loadstone.generate import generate
from loadstone.load import open_source
from loadstone.model import GPT
from loadstone.native import missing, open_native
from loadstone.sampling import Sampling
from loadstone.serve import batch as batch_file
from loadstone.serve.batch import Batch, End, FullError, Job, Token, Work, Worker
from small_gpt import small_gpt, small_llama, small_neox

MODELS = {"gpt2": small_gpt, "llama": small_llama, "neox": small_neox}


class Answer:
    """What a job was told."""

    def __init__(self, ids: list[int], new: int = 8, **options: Any) -> None:
        self.told: list[Token | End] = []
        self.job = Job(ids, self.told.append, new, **options)

    @property
    def tokens(self) -> list[int]:
        return [each.id for each in self.told if isinstance(each, Token)]

    @property
    def end(self) -> End | None:
        ends = [each for each in self.told if isinstance(each, End)]
        assert len(ends) < 2
        assert not ends or isinstance(self.told[-1], End)
        return ends[0] if ends else None


def prompts(n: int, seed: int = 0) -> list[list[int]]:
    source = random.Random(seed)
    shared = [source.randrange(61) for _ in range(17)]
    made = [[source.randrange(61) for _ in range(source.randrange(1, 12))] for _ in range(n)]
    return [shared[: source.choice((0, 17))] + ids[:6] for ids in made]


def run(batch: Batch) -> int:
    steps = 0
    while batch.busy:
        batch.step()
        steps += 1
    return steps


def alone(model: GPT, answer: Answer) -> tuple[list[int], str]:
    job = answer.job
    (found,) = generate(
        model, [list(job.ids)], max_new_tokens=job.max_new_tokens, sampling=job.sampling, seed=job.seed,
        stop_ids=job.stop_ids,
    )  # fmt: skip
    return found.ids, found.finish


@pytest.mark.parametrize("engine", ["torch", "native"])
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("piece", [1, 5, 256])
def test_each_answer_is_the_one_it_would_be_alone(
    family: str, piece: int, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_file, "PIECE", piece)
    model = MODELS[family]()
    if engine == "native" and (reason := missing()):
        pytest.skip(reason)
    batch = Batch(model if engine == "torch" else open_native(open_source(model)), rows=4, waiting=99)
    source = random.Random(1)
    answers = []
    for number, ids in enumerate(prompts(30)):
        sampling = Sampling(temperature=1.2, top_k=30) if number % 3 == 0 else Sampling()
        stop = frozenset(source.sample(range(61), 4))
        answers.append(Answer(ids, source.randrange(1, 12), sampling=sampling, seed=number, stop_ids=stop))
        batch.submit(answers[-1].job)
        for _ in range(source.randrange(4)):
            batch.step()
    run(batch)
    assert batch.slots.busy == 0
    for answer in answers:
        assert answer.end
        assert (answer.tokens, answer.end.reason) == alone(model, answer)
    assert {answer.end.reason for answer in answers if answer.end} == {"stop", "length", "context"}
    assert any(answer.job.known for answer in answers)


def test_a_long_prompt_does_not_keep_the_others_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_file, "PIECE", 4)
    model = small_gpt()
    batch = Batch(model, rows=2)
    first, second = Answer([1, 2], 10), Answer(list(range(20)), 2)
    batch.submit(first.job)
    batch.step()
    batch.submit(second.job)
    batch.step()
    batch.step()
    assert (len(first.tokens), len(second.tokens)) == (3, 0)
    run(batch)
    assert second.tokens == alone(model, second)[0]


def test_log_probabilities_are_the_models_own() -> None:
    model = small_gpt()
    batch = Batch(model)
    answer = Answer([3, 4, 5], 3, logprobs=2, sampling=Sampling(temperature=2.0, top_k=1))
    batch.submit(answer.job)
    run(batch)
    ids = [3, 4, 5]
    for token in answer.told[:-1]:
        assert isinstance(token, Token)
        with torch.no_grad():
            expected = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        assert token.logprob == pytest.approx(float(expected[token.id]), abs=1e-5)
        assert [i for i, _ in token.top] == expected.topk(2).indices.tolist()
        ids.append(token.id)


def test_a_client_that_left_frees_its_row_at_the_next_step() -> None:
    batch = Batch(small_gpt(), rows=1)
    gone, waits, never = Answer([1], 20), Answer([2], 2), Answer([3], 2)
    for answer in (gone, waits, never):
        batch.submit(answer.job)
    batch.step()
    never.job.cancelled = gone.job.cancelled = True
    batch.step()
    assert gone.end == End("cancelled")
    assert waits.tokens
    run(batch)
    assert never.end == End("cancelled")
    assert not never.tokens


def test_time_is_over_while_it_waits_and_while_it_runs() -> None:
    batch = Batch(small_gpt(), rows=1)
    runs, waits = Answer([1], 20, deadline=time.monotonic() + 0.05), Answer([2], 2, deadline=time.monotonic() + 0.05)
    batch.submit(runs.job)
    batch.submit(waits.job)
    batch.step()
    time.sleep(0.06)
    run(batch)
    for answer in (runs, waits):
        assert answer.end
        assert answer.end.reason == "timeout"
        assert "time" in answer.end.error


@pytest.mark.parametrize("waiting", [0, 2])
def test_more_than_rows_and_queue_hold_is_refused(waiting: int) -> None:
    batch = Batch(small_gpt(), rows=1, waiting=waiting)
    for _ in range(1 + waiting):
        batch.submit(Answer([1], 2).job)
    for _ in range(2):
        with pytest.raises(FullError):
            batch.submit(Answer([1]).job)
        batch.step()
    batch.submit(Answer([1]).job)


@pytest.mark.parametrize(("ids", "message"), [([], "no tokens"), ([61], "outside"), ([1] * 25, "the context is 24")])
def test_prompts_that_cannot_be_answered_are_refused_at_once(ids: list[int], message: str) -> None:
    with pytest.raises(LoadstoneError, match=message):
        Batch(small_gpt()).submit(Answer(ids).job)


def test_a_failed_step_ends_its_requests_and_nothing_of_it_is_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_gpt()
    batch = Batch(model, rows=2)
    before = Answer([5] * 18, 1)
    batch.submit(before.job)

    def fail(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "hidden", fail)
    batch.step()
    assert before.end == End("error", "RuntimeError: out of memory")
    monkeypatch.undo()
    after = Answer([5] * 18, 3)
    batch.submit(after.job)
    run(batch)
    assert after.job.known == 0
    assert after.tokens == alone(model, after)[0]


def test_one_thread_for_several_models_ends_everything_when_it_closes() -> None:
    models = [small_gpt(), small_llama()]
    batches = [Batch(model, rows=2) for model in models]
    worker = Worker(batches)
    worker.start()
    answers = [Answer(ids, 4) for ids in prompts(8)]
    for number, answer in enumerate(answers):
        batches[number % 2].submit(answer.job)
    until = time.monotonic() + 30
    while not all(answer.end for answer in answers) and time.monotonic() < until:
        time.sleep(0.01)
    for number, answer in enumerate(answers):
        assert answer.tokens == alone(models[number % 2], answer)[0]
    worker.close(30)
    assert not worker.is_alive()


def test_scores_that_are_not_finite_end_only_their_own_request(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_gpt()
    batch = Batch(model)
    answers = [Answer([number, 7, 9], 4) for number in range(3)]
    for answer in answers:
        batch.submit(answer.job)
    batch.step()
    whole = model.logits

    def damaged(x: torch.Tensor) -> torch.Tensor:
        logits_BV = whole(x)
        logits_BV[1] = float("nan")
        return logits_BV

    monkeypatch.setattr(model, "logits", damaged)
    batch.step()
    monkeypatch.undo()
    run(batch)
    assert [answer.end and answer.end.reason for answer in answers] == ["length", "error", "length"]
    assert [answers[at].tokens for at in (0, 2)] == [alone(model, answers[at])[0] for at in (0, 2)]


def test_other_work_takes_turns_and_is_told_when_it_will_not_end() -> None:
    batch, done, told = Batch(small_gpt(), waiting=1), [], list[str]()

    def steps(name: str, n: int) -> Iterator[None]:
        for number in range(n):
            done.append(f"{name}{number}")
            yield

    batch.add(Work(steps("a", 9), told.append))
    batch.add(Work(steps("b", 1), told.append))
    with pytest.raises(FullError):
        batch.add(Work(steps("c", 1), told.append))
    for _ in range(5):
        batch.step()
    assert done == ["a0", "b0", "a1", "a2"]  # the step in which b has ended is nobody else's
    batch.close("it is over")
    assert told == ["it is over"]
    assert not batch.busy
