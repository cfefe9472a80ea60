"""Completions, as OpenAI's own client asks for them: the text and the numbers that the model gives alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from openai import AsyncOpenAI, OpenAI

from loadstone.generate import generate_texts
from loadstone.sampling import Sampling
from serving import Serving, serving, small

PROMPTS = [f"The cat's hat; the dog's {n} bones, and the bird's nest" for n in range(12)]


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(small()) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Serving) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as found:
        yield found


def alone(server: Serving, prompt: str, new: int = 20, **options: Any) -> tuple[str, str]:
    served = server.models["small"]
    (found,) = generate_texts(served.model, served.tokenizer, [prompt], max_new_tokens=new, **options)
    return found.text, {"context": "length"}.get(found.finish, found.finish)


def own_logprobs(server: Serving, ids: list[int]) -> torch.Tensor:
    """[T, V]: of what comes after each token."""
    with torch.no_grad():
        return server.models["small"].model(torch.tensor([ids]))[0].log_softmax(-1)


def test_the_text_is_the_one_that_generate_gives(server: Serving, client: OpenAI) -> None:
    found = client.completions.create(model="small", prompt=PROMPTS[0], max_tokens=20, temperature=0)
    assert (found.choices[0].text, found.choices[0].finish_reason) == alone(server, PROMPTS[0])
    assert (found.object, found.model) == ("text_completion", "small")
    assert found.usage
    assert found.usage.prompt_tokens == len(server.models["small"].tokenizer.encode(PROMPTS[0]))
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


def test_answers_of_many_clients_at_once_are_those_they_would_get_alone(server: Serving) -> None:
    async def one(client: AsyncOpenAI, number: int) -> str:
        asked: Any = {"model": "small", "prompt": PROMPTS[number % 12], "max_tokens": 4 + number, "temperature": 0}
        if number % 2:
            return (await client.completions.create(**asked)).choices[0].text
        events = await client.completions.create(**asked, stream=True)
        return "".join([event.choices[0].text async for event in events])

    async def together() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            return await asyncio.gather(*[one(client, number) for number in range(36)])

    found = asyncio.run(together())
    assert found == [alone(server, PROMPTS[number % 12], 4 + number)[0] for number in range(36)]


def test_a_stream_ends_with_its_reason_and_its_usage(server: Serving, client: OpenAI) -> None:
    asked: Any = {"model": "small", "prompt": PROMPTS[1], "max_tokens": 20, "temperature": 0}
    whole = client.completions.create(**asked)
    *events, last = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert "".join(event.choices[0].text for event in events) == whole.choices[0].text
    assert [event.choices[0].finish_reason for event in events][-1] == whole.choices[0].finish_reason
    assert all(event.usage is None for event in events)
    assert last.choices == []
    assert last.usage
    assert whole.usage
    assert last.usage.completion_tokens == whole.usage.completion_tokens == 20


def test_log_probabilities_are_the_models_own(server: Serving, client: OpenAI) -> None:
    ids = server.models["small"].tokenizer.encode(PROMPTS[2])
    asked: Any = {"model": "small", "prompt": ids, "max_tokens": 8, "temperature": 0, "logprobs": 3}
    found = client.completions.create(**asked, extra_body={"details": 3}).choices[0]
    made = [entry["id"] for entry in found.details]
    expected = own_logprobs(server, ids + made)[len(ids) - 1 : -1]
    assert found.logprobs
    assert found.logprobs.token_logprobs == pytest.approx(expected[range(8), made].tolist(), abs=1e-4)
    assert [entry["logprob"] for entry in found.details] == found.logprobs.token_logprobs
    for row, entry in zip(expected, found.details, strict=True):
        assert [top["id"] for top in entry["top"]] == row.topk(3).indices.tolist()
    assert found.logprobs.top_logprobs
    assert all(len(top) == 3 for top in found.logprobs.top_logprobs)
    streamed = list(client.completions.create(**asked, stream=True))
    again = [
        p for event in streamed if event.choices[0].logprobs for p in event.choices[0].logprobs.token_logprobs or ()
    ]
    assert again == pytest.approx(found.logprobs.token_logprobs, abs=1e-4)


@pytest.mark.parametrize("new", [0, 3])
def test_an_echo_scores_the_prompt(server: Serving, client: OpenAI, new: int) -> None:
    ids = server.models["small"].tokenizer.encode(PROMPTS[3])
    asked: Any = {"model": "small", "prompt": PROMPTS[3], "max_tokens": new, "temperature": 0, "echo": True}
    found = client.completions.create(**asked, logprobs=1).choices[0]
    assert found.text == PROMPTS[3] + alone(server, PROMPTS[3], new)[0]
    assert found.logprobs
    assert found.logprobs.token_logprobs
    expected = own_logprobs(server, ids)[:-1][range(len(ids) - 1), ids[1:]].tolist()
    assert found.logprobs.token_logprobs[0] is None
    assert found.logprobs.token_logprobs[1 : len(ids)] == pytest.approx(expected, abs=1e-4)
    assert len(found.logprobs.token_logprobs) == len(ids) + new
    streamed = list(client.completions.create(**asked, stream=True))
    assert "".join(event.choices[0].text for event in streamed) == found.text


def test_text_offsets_say_where_each_token_begins(client: OpenAI) -> None:
    prompt = "The cat’s hat — naïve 🦜 bones, ещё 12"  # characters of several tokens
    asked: Any = {"model": "small", "prompt": prompt, "max_tokens": 12, "temperature": 0, "echo": True, "logprobs": 0}
    found = client.completions.create(**asked).choices[0]
    assert found.logprobs
    assert found.logprobs.tokens
    assert found.logprobs.text_offset
    assert found.logprobs.text_offset == sorted(found.logprobs.text_offset)
    for token, at in zip(found.logprobs.tokens, found.logprobs.text_offset, strict=True):
        if not token.startswith("bytes:"):
            assert found.text[at : at + len(token)] == token


def test_several_prompts_with_several_answers_each_come_in_order(server: Serving, client: OpenAI) -> None:
    prompts = PROMPTS[:3]
    found = client.completions.create(model="small", prompt=prompts, n=2, max_tokens=9, temperature=0)
    assert [choice.index for choice in found.choices] == list(range(6))
    assert [choice.text for choice in found.choices] == [alone(server, prompts[i // 2], 9)[0] for i in range(6)]
    ids = [server.models["small"].tokenizer.encode(prompt) for prompt in prompts]
    same = client.completions.create(model="small", prompt=ids, max_tokens=9, temperature=0)
    assert [choice.text for choice in same.choices] == [alone(server, prompt, 9)[0] for prompt in prompts]
    assert found.usage
    assert found.usage.prompt_tokens == sum(map(len, ids))
    assert found.usage.completion_tokens == 6 * 9
    texts = [""] * 6
    for event in client.completions.create(
        model="small", prompt=prompts, n=2, max_tokens=9, temperature=0, stream=True
    ):
        texts[event.choices[0].index] += event.choices[0].text
    assert texts == [choice.text for choice in found.choices]


def test_a_stop_text_ends_the_answer(server: Serving, client: OpenAI) -> None:
    whole = alone(server, PROMPTS[4], 30)[0]
    stop = whole[9:11]
    asked: Any = {"model": "small", "prompt": PROMPTS[4], "max_tokens": 30, "temperature": 0}
    for given in (stop, [stop, "never there"]):
        found = client.completions.create(**asked, stop=given).choices[0]
        assert (found.text, found.finish_reason) == (whole[: whole.index(stop)], "stop")
    events = client.completions.create(**asked, stop=stop, stream=True)
    assert "".join(event.choices[0].text for event in events) == whole[: whole.index(stop)]


def test_sampling_is_the_models_with_the_same_seed(server: Serving, client: OpenAI) -> None:
    fields: Any = {"temperature": 1.3, "top_p": 0.8, "seed": 7}
    own: Any = {"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1}
    asked: Any = {"model": "small", "prompt": PROMPTS[5], "max_tokens": 20, **fields}
    first = client.completions.create(**asked, extra_body=own).choices[0].text
    assert first == alone(server, PROMPTS[5], 20, **fields, **own)[0]
    assert first != client.completions.create(**asked | {"seed": 8}, extra_body=own).choices[0].text
    several = client.completions.create(**asked, n=3, extra_body=own).choices
    assert several[0].text == first
    assert len({choice.text for choice in several}) == 3
    assert Sampling().temperature == 0  # greedy is ours; OpenAI's default is 1
    free = {client.completions.create(model="small", prompt=PROMPTS[5], max_tokens=9).choices[0].text for _ in range(4)}
    assert len(free) > 1


def test_defaults_are_those_of_the_api(server: Serving, client: OpenAI) -> None:
    found = client.completions.create(model="small", prompt=PROMPTS[0])
    assert found.usage
    assert found.usage.completion_tokens <= 16
    nothing: Any = dict.fromkeys(
        ("max_tokens", "temperature", "top_p", "n", "stop", "echo", "logprobs", "stream", "seed")
    )
    same = client.completions.create(model="small", prompt=PROMPTS[0], **nothing | {"temperature": 0, "max_tokens": 5})
    assert same.choices[0].text == alone(server, PROMPTS[0], 5)[0]
    assert client.completions.create(model="small", prompt=PROMPTS[0], **nothing).usage


def test_an_answer_ends_where_the_context_does(server: Serving, client: OpenAI) -> None:
    found = client.completions.create(model="small", prompt=[5] * 185, max_tokens=10**9, temperature=0)
    assert found.choices[0].finish_reason in ("length", "stop")
    assert found.usage
    assert found.usage.total_tokens <= 193
    assert client.completions.create(model="small", prompt="", max_tokens=3).usage


def test_a_known_beginning_is_not_read_again(client: OpenAI) -> None:
    prompt = "A prefix that all of the questions share: 0123456789, and 300 songs. "
    client.completions.create(model="small", prompt=prompt + "first", max_tokens=2)
    found = client.completions.create(model="small", prompt=prompt + "second", max_tokens=2)
    assert found.usage
    assert found.usage.prompt_tokens_details
    assert found.usage.prompt_tokens_details.cached_tokens
    assert 16 <= found.usage.prompt_tokens_details.cached_tokens < found.usage.prompt_tokens


def test_an_end_token_is_scored_too_where_scores_are_asked_for() -> None:
    # lm-eval leaves the last score out, as it asks for one token after the text that it scores.
    served = small("ends")
    ids = served.tokenizer.encode(PROMPTS[0])
    with torch.no_grad():
        row = served.model(torch.tensor([ids]))[0, -1].log_softmax(-1)
    served.tokenizer = replace(served.tokenizer, eos_ids=(int(row.argmax()),))
    asked: Any = {"model": "ends", "prompt": PROMPTS[0], "max_tokens": 1, "temperature": 0, "echo": True}
    with serving(served) as server, OpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
        (found,) = client.completions.create(**asked, logprobs=1).choices
        streamed = list(client.completions.create(**asked, logprobs=1, stream=True))
    assert (found.text, found.finish_reason) == (PROMPTS[0], "stop")
    assert found.logprobs
    assert found.logprobs.token_logprobs
    assert len(found.logprobs.token_logprobs) == len(ids) + 1
    assert found.logprobs.token_logprobs[-1] == pytest.approx(float(row.max()), abs=1e-4)
    assert streamed[-1].choices[0].logprobs
    assert streamed[-1].choices[0].logprobs.token_logprobs == [found.logprobs.token_logprobs[-1]]
