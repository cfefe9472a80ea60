"""Generation: against a loop without a cache, in batches as alone, past the context, stops, streams, sessions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loadstone.config import GPTConfig, Rope
from loadstone.errors import LoadstoneError
from loadstone.generate import Session, Stream, Text, generate, generate_text, generate_texts, stream_text
from loadstone.model import GPT
from loadstone.sampling import Sampling, candidates, choose, penalise

CONTEXT = 24


@pytest.fixture(params=["learned", "rope"], scope="module")
def model(request: pytest.FixtureRequest) -> GPT:
    torch.manual_seed(3)
    rope = Rope() if request.param == "rope" else None
    model = GPT(GPTConfig(97, CONTEXT, 32, 2, 4, n_kv_heads=2, rope=rope)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def naive(model: GPT, prompt: list[int], n: int) -> list[int]:
    """Greedy, the whole text read again for every token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


PROMPTS = [[1, 2, 3], [5], [7, 8, 9, 10, 11, 12, 13]]
SAMPLED = Sampling(temperature=1.0, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2)


def test_greedy_in_a_ragged_batch_equals_the_loop_without_a_cache(model: GPT) -> None:
    results = generate(model, PROMPTS, max_new_tokens=12)
    assert [result.ids for result in results] == [naive(model, prompt, 12) for prompt in PROMPTS]
    assert {result.finish for result in results} == {"length"}


@pytest.mark.parametrize("overflow", ["refuse", "window"])
def test_sampling_in_a_batch_equals_alone(model: GPT, overflow: str) -> None:
    options: dict[str, Any] = {"max_new_tokens": 40, "seed": 7, "sampling": SAMPLED, "overflow": overflow}
    together = [result.ids for result in generate(model, PROMPTS, **options)]
    assert together == [generate(model, [prompt], **options)[0].ids for prompt in PROMPTS]
    assert together != [result.ids for result in generate(model, PROMPTS, **(options | {"seed": 8}))]


def test_rows_end_one_by_one_and_do_not_disturb_the_others(model: GPT) -> None:
    free = [naive(model, prompt, 15) for prompt in PROMPTS]
    stop = free[0][4]
    stream = Stream(model, PROMPTS, max_new_tokens=15, stop_ids=[stop])
    for _ in stream:
        pass
    results = stream.results
    # the last token of a row is never fed, and a row that has ended does not grow
    fed = [len(prompt) + len(r.ids) - (r.finish == "length") for prompt, r in zip(PROMPTS, results, strict=True)]
    assert stream.cache.lengths == fed
    for result, whole in zip(results, free, strict=True):
        cut = whole.index(stop) if stop in whole else len(whole)
        assert result.ids == whole[:cut]
        assert result.finish == ("stop" if stop in whole else "length")


def test_the_context_is_a_limit_not_a_crash(model: GPT) -> None:
    results = generate(model, PROMPTS, max_new_tokens=60)
    assert [(len(r.ids) + len(p), r.finish) for r, p in zip(results, PROMPTS, strict=True)] == [
        (CONTEXT + 1, "context")
    ] * 3
    exact = generate(model, [list(range(CONTEXT))], max_new_tokens=5)[0]
    assert (len(exact.ids), exact.finish) == (1, "context")
    with pytest.raises(LoadstoneError, match=r"the prompt has 25 tokens, but the context is 24.*--overflow window"):
        generate(model, [[1] * 25], max_new_tokens=1)


def test_a_window_goes_on_from_its_last_half_context(model: GPT) -> None:
    long = [i % 97 for i in range(3, 43)]
    (result,) = generate(model, [long], max_new_tokens=30, overflow="window")
    assert len(result.ids) == 30
    ids, held = list(long), CONTEXT
    for token in result.ids:
        assert token == naive(model, ids[-held:], 1)[0]
        ids.append(token)
        held = CONTEXT // 2 if held == CONTEXT else held + 1


def test_a_session_reads_only_what_is_new_and_answers_the_same(model: GPT) -> None:
    session = Session(model.new_cache(1))
    prompt = [7, 8, 9]
    for _ in range(3):
        fresh = generate(model, [prompt], max_new_tokens=4)[0].ids
        assert generate(model, [prompt], max_new_tokens=4, session=session)[0].ids == fresh
        assert session.ids == (prompt + fresh)[: len(session.ids)]
        assert session.cache.lengths == [len(session.ids)]
        prompt = prompt + fresh[:3] + [33]
    assert generate(model, [[7, 50]], max_new_tokens=4, session=session)[0].ids == naive(model, [7, 50], 4)
    sliding: dict[str, Any] = {"max_new_tokens": 50, "overflow": "window"}
    assert generate(model, [prompt], session=session, **sliding)[0].ids == generate(model, [prompt], **sliding)[0].ids
    assert generate(model, [prompt], max_new_tokens=4, session=session)[0].ids == naive(model, prompt, 4)
    with pytest.raises(LoadstoneError, match="not with a batch"):
        generate(model, PROMPTS, max_new_tokens=1, session=session)


def test_an_interrupted_prompt_leaves_no_false_memory(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(model.new_cache(1))
    generate(model, [[1, 2, 3, 4, 5]], max_new_tokens=1, session=session)
    block = type(model.blocks[1])
    whole = block.forward

    def interrupted(self: Any, *arguments: Any) -> Any:
        if arguments[-1] == 1:  # the second layer: the first has written to the cache
            raise KeyboardInterrupt
        return whole(self, *arguments)

    monkeypatch.setattr(block, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(model, [[1, 2, 9, 9, 9]], max_new_tokens=1, session=session)
    monkeypatch.undo()
    assert session.ids == [1, 2]
    answer = generate(model, [[1, 2, 3, 4, 5, 6]], max_new_tokens=5, session=session)[0].ids
    assert answer == naive(model, [1, 2, 3, 4, 5, 6], 5)


def test_a_session_smaller_than_the_context_ends_where_it_is_full(model: GPT) -> None:
    (result,) = generate(model, [[1, 2, 3]], max_new_tokens=8, session=Session(model.new_cache(1, 6)))
    assert (result.ids, result.finish) == (naive(model, [1, 2, 3], 4), "context")


def test_a_growing_cache_gives_the_same(model: GPT) -> None:
    cache = model.new_cache(1, allocate=2)
    new = generate(model, [[1, 2, 3]], max_new_tokens=15, session=Session(cache))[0].ids
    assert new == naive(model, [1, 2, 3], 15)
    assert 17 <= cache.kv.shape[4] <= CONTEXT
    assert model.new_cache(1, 0).size == 0


def test_a_tiny_temperature_is_greedy_and_broken_scores_are_told(model: GPT) -> None:
    cold = generate(model, PROMPTS, max_new_tokens=5, sampling=Sampling(temperature=1e-39), seed=0)
    assert [result.ids for result in cold] == [naive(model, prompt, 5) for prompt in PROMPTS]
    for broken in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(LoadstoneError, match="no finite score"):
            choose(torch.full((1, 5), broken), [[]], Sampling(), [np.random.default_rng()])


def test_padding_of_the_vocabulary_is_never_chosen(model: GPT) -> None:
    options: dict[str, Any] = {"max_new_tokens": 15, "sampling": Sampling(temperature=5.0), "seed": 1}
    assert max(max(r.ids) for r in generate(model, PROMPTS, **options)) >= 60
    assert max(max(r.ids) for r in generate(model, PROMPTS, n_tokens=60, **options)) < 60


@pytest.mark.parametrize(
    ("prompts", "options", "text"),
    [
        ([[]], {}, "the prompt has no tokens"),
        ([], {}, "the prompt has no tokens"),
        ([[97]], {}, "token 97 is outside the model's vocabulary of 97"),
        ([[-1]], {}, "token -1 is outside"),
        ([[1]], {"overflow": "wrap"}, "overflow must be refuse or window, found 'wrap'"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens must be 0 or more"),
        ([[1]], {"n_tokens": 0}, "n_tokens must be 1 or more"),
        ([[1]], {"seed": -1}, "the seed must be from 0"),
        ([[1]], {"seed": 2**64}, "the seed must be from 0"),
    ],
)
def test_bad_requests_are_refused_clearly(model: GPT, prompts: Any, options: Any, text: str) -> None:
    with pytest.raises(LoadstoneError, match=text):
        generate(model, prompts, **({"max_new_tokens": 1} | options))


def test_nothing_is_asked_for_and_nothing_is_computed(model: GPT) -> None:
    assert generate(model, [[1]], max_new_tokens=0)[0].finish == "length"


def test_the_global_random_state_is_left_alone(model: GPT) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    generate(model, [[1]], max_new_tokens=3, sampling=Sampling(temperature=1.0))
    assert torch.equal(before, torch.get_rng_state())


# --- sampling


def test_filters_by_hand() -> None:
    scores = np.log(np.array([0.125, 0.5, 0.125, 0.25], np.float32))

    def kept(**options: Any) -> list[int]:
        ids, likely = candidates(scores, [], Sampling(temperature=1.0, **options))
        weights = np.array([1, 4, 1, 2])[ids]
        np.testing.assert_allclose(likely, weights / weights.sum(), rtol=1e-6)
        return ids.tolist()

    assert kept() == [0, 1, 2, 3]
    assert kept(top_k=1) == [1]
    assert kept(top_k=2) == [1, 3]
    assert kept(top_k=3) == [0, 1, 2, 3]  # two are equally likely: both stay
    assert kept(top_k=99) == [0, 1, 2, 3]
    assert kept(top_p=0.499) == [1]
    assert kept(top_p=0.51) == [1, 3]
    assert kept(top_p=5e-324) == [1]
    assert kept(min_p=0.499) == [1, 3]
    assert kept(min_p=1.0) == [1]
    assert kept(top_k=2, top_p=0.66) == [1]  # a filter sees what the one before left over: 2/3 and 1/3
    assert kept(top_k=3, min_p=0.4) == [1, 3]


def test_repetition_penalty_by_hand() -> None:
    scores = np.array([2, -2, 1], np.float32)
    assert penalise(scores, [0, 1, 1], 2.0).tolist() == [1, -4, 1]
    assert scores.tolist() == [2, -2, 1]
    penalised = Sampling(repetition_penalty=2.0)
    assert choose(np.array([[1.0, 3, 2]]), [[1]], penalised, [np.random.default_rng(0)]) == [2]


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=8), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
@example([0.0, 0.0, 1.898996544192614e-44], 0)
def test_the_likeliest_token_survives_every_filter(scores: list[float], seed: int) -> None:
    row = np.array(scores, np.float32)
    sampling = Sampling(temperature=0.7, top_k=2, top_p=0.3, min_p=0.9)
    assert row[candidates(row, [], sampling)[0]].max() > row.max() - 1e-6  # closer ones may have become equal
    assert row[choose(row[None], [[]], sampling, [np.random.default_rng(seed)])[0]] > np.sort(row)[-2] - 1e-6


def test_sampled_frequencies_follow_the_probabilities() -> None:
    probabilities, generator = np.array([0.6, 0, 0.3, 0.1]), np.random.default_rng(0)
    with np.errstate(divide="ignore"):
        scores = torch.from_numpy(np.log(probabilities))[None].bfloat16()
    draws = [choose(scores, [[]], Sampling(temperature=1.0), [generator])[0] for _ in range(3000)]
    np.testing.assert_allclose(np.bincount(draws, minlength=4) / 3000, probabilities, atol=0.03)


@pytest.mark.parametrize(
    "odd", [Sampling(temperature=5e-324), Sampling(1.0, top_p=5e-324), Sampling(1.0, repetition_penalty=5e-324)]
)
def test_settings_that_float32_takes_for_nothing(odd: Sampling) -> None:
    assert choose(np.array([[1.0, 3, 2]], np.float32), [[1]], odd, [np.random.default_rng(0)]) == [1]


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": -0.1}, {"repetition_penalty": 0.0}],
    ids=str,
)
def test_settings_without_a_meaning_are_refused(options: Any) -> None:
    with pytest.raises(LoadstoneError, match=f"{next(iter(options))} must be"):
        Sampling(**options)


# --- text


class Letters:
    """A tokenizer of one character a token: 0 ends."""

    vocab_size, eos_ids = 97, (0,)
    chat_template: str | None = None

    def encode(self, text: str, **_: Any) -> list[int]:
        return [ord(c) - 31 for c in text]

    def decode_stream(self) -> Letters:
        return self

    def push(self, token: int) -> str:
        return chr(token + 31)

    def flush(self) -> str:
        return ""


LETTERS: Any = Letters()


def test_stop_texts_are_cut_out_and_never_shown_in_part() -> None:
    text = Text(LETTERS, ["END", "EN!"])
    shown = [text.push(ord(c) - 31) for c in "xxEEN ENDyy"]
    assert shown == ["x", "x", "", "E", "", "EN ", "", "", "", "", ""]
    assert text.stopped
    assert text.flush() == ""
    unfinished = Text(LETTERS, ["END"])
    assert [unfinished.push(ord(c) - 31) for c in "aEN"] == ["a", "", ""]
    assert unfinished.flush() == "EN"


def test_streamed_pieces_add_up_to_the_text_and_stops_end_it(model: GPT) -> None:
    whole = generate_text(model, LETTERS, "ab", max_new_tokens=15, repetition_penalty=1.5)
    assert whole.startswith("ab")
    assert "ab" + "".join(stream_text(model, LETTERS, "ab", max_new_tokens=15, repetition_penalty=1.5)) == whole
    stop = whole[8:10]
    cut = generate_text(model, LETTERS, "ab", max_new_tokens=15, stop=[stop], repetition_penalty=1.5)
    assert cut == "ab" + whole[2 : whole.index(stop, 2)]
    (completion,) = generate_texts(model, LETTERS, ["ab"], max_new_tokens=15, stop=[stop], repetition_penalty=1.5)
    assert (completion.text, completion.finish) == (cut[2:], "stop")


def test_the_configs_end_tokens_stop_as_well_as_the_tokenizers(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = naive(model, LETTERS.encode("ab"), 10)
    monkeypatch.setattr(model, "config", model.config.with_overrides({"eos_ids": (whole[0],)}))
    (completion,) = generate_texts(model, LETTERS, ["ab"], max_new_tokens=10)
    assert (completion.text, completion.finish) == ("", "stop")


def test_texts_in_a_batch_equal_texts_alone(model: GPT) -> None:
    options: dict[str, Any] = {"max_new_tokens": 10, "temperature": 1.0, "seed": 2}
    together = generate_texts(model, LETTERS, ["a", "hello", "xyz"], **options)
    assert [c.text for c in together] == [
        generate_texts(model, LETTERS, [prompt], **options)[0].text for prompt in ("a", "hello", "xyz")
    ]


def test_a_stream_shows_tokens_as_they_come(model: GPT) -> None:
    stream = iter(Stream(model, [[1], [2]], max_new_tokens=3))
    first = next(stream)
    assert first == [naive(model, [1], 1)[0], naive(model, [2], 1)[0]]
    assert len(list(stream)) == 2
