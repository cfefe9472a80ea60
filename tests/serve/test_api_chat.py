"""Chats and embeddings, as OpenAI's own client asks for them; models, tokens."""

from __future__ import annotations

import base64
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI

from loadstone.generate import generate
from serving import Serving, serving, small

MESSAGES: Any = [{"role": "system", "content": "The dog sings."}, {"role": "user", "content": "What's the cat's hat?"}]
TEXTS = ["The cat's hat; the dog's 12 bones", "The bird's nest", "naïve ’ 🦜"]


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(small("chat", chat=True), small("plain", seed=1)) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Serving) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as found:
        yield found


def alone(server: Serving, messages: Any, new: int) -> str:
    served = server.models["chat"]
    text = served.tokenizer.apply_chat(messages, add_generation_prompt=True)
    ids = served.tokenizer.encode(text, add_special=False, parse_special=True)
    (found,) = generate(served.model, [ids], max_new_tokens=new, stop_ids=served.ends)
    return served.tokenizer.decode(found.ids)


def test_models_are_listed_and_found(client: OpenAI) -> None:
    found = client.models.list().data
    assert [model.id for model in found] == ["chat", "plain"]
    assert [model.chat for model in found] == [True, False]  # type: ignore[attr-defined]
    assert client.models.retrieve("plain").id == "plain"
    assert client.models.retrieve("plain").context_length == 192  # type: ignore[attr-defined]


def test_the_messages_go_through_the_models_template(server: Serving, client: OpenAI) -> None:
    found = client.chat.completions.create(model="chat", messages=MESSAGES, max_completion_tokens=15, temperature=0)
    assert found.object == "chat.completion"
    assert found.choices[0].message.role == "assistant"
    assert found.choices[0].message.content == alone(server, MESSAGES, 15)
    assert found.usage
    assert found.usage.completion_tokens <= 15
    same = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES]
    again = client.chat.completions.create(model="chat", messages=same, max_tokens=15, temperature=0)  # type: ignore[arg-type]
    assert again.choices[0].message.content == found.choices[0].message.content


def test_a_conversation_goes_on_with_the_message_that_came(server: Serving, client: OpenAI) -> None:
    first = client.chat.completions.create(model="chat", messages=MESSAGES, max_tokens=9, temperature=0)
    said = first.choices[0].message
    asked = [*MESSAGES, said, {"role": "user", "content": "And the dog's?"}]
    found = client.chat.completions.create(model="chat", messages=asked, max_tokens=9, temperature=0)
    plain = [*MESSAGES, {"role": "assistant", "content": said.content}, asked[-1]]
    assert found.choices[0].message.content == alone(server, plain, 9)


def test_a_chat_streams(server: Serving, client: OpenAI) -> None:
    asked: Any = {"model": "chat", "messages": MESSAGES, "max_tokens": 15, "temperature": 0, "n": 2}
    texts, ends, roles = ["", ""], ["", ""], ["", ""]
    *events, last = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    for event in events:
        for choice in event.choices:
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] += choice.delta.role or ""
            ends[choice.index] += choice.finish_reason or ""
    assert texts == [alone(server, MESSAGES, 15)] * 2
    assert roles == ["assistant"] * 2
    assert all(end in ("length", "stop") for end in ends)
    assert last.usage == client.chat.completions.create(**asked).usage.model_copy(
        update={"prompt_tokens_details": last.usage.prompt_tokens_details}
    )


def test_the_clients_own_stream_helper_understands_the_events(server: Serving, client: OpenAI) -> None:
    whole = alone(server, MESSAGES, 15)
    stop = whole[6:8]  # the helper takes an end by length for a failure
    with client.chat.completions.stream(model="chat", messages=MESSAGES, temperature=0, stop=stop) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        assert text == whole[: whole.index(stop)] == stream.get_final_completion().choices[0].message.content


def test_chat_log_probabilities_are_objects(server: Serving, client: OpenAI) -> None:
    asked: Any = {"model": "chat", "messages": MESSAGES, "max_tokens": 6, "temperature": 0, "logprobs": True}
    found = client.chat.completions.create(**asked, top_logprobs=4, extra_body={"details": 0})
    (choice,) = found.choices
    ids = [*found.prompt_token_ids[0], *(entry["id"] for entry in choice.details)]
    with torch.no_grad():
        rows = server.models["chat"].model(torch.tensor([ids]))[0].log_softmax(-1)[-7:-1]
    assert choice.logprobs
    assert choice.logprobs.content
    for entry, row, token in zip(choice.logprobs.content, rows, ids[-6:], strict=True):
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)
        assert entry.bytes
        assert bytes(entry.bytes) == server.models["chat"].tokenizer.token_bytes(token)
    streamed = [
        entry
        for event in client.chat.completions.create(**asked, stream=True)
        if event.choices[0].logprobs
        for entry in event.choices[0].logprobs.content or ()
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in choice.logprobs.content]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_the_last_hidden_states(server: Serving, client: OpenAI, pooling: str) -> None:
    served = server.models["plain"]
    found = client.embeddings.create(model="plain", input=TEXTS, extra_body={"pooling": pooling})
    assert [entry.index for entry in found.data] == [0, 1, 2]
    for text, entry in zip(TEXTS, found.data, strict=True):
        with torch.no_grad():
            hidden_TC = served.model.hidden(torch.tensor([served.tokenizer.encode(text)]))[0]
        expected = hidden_TC.mean(0) if pooling == "mean" else hidden_TC[-1]
        torch.testing.assert_close(torch.tensor(entry.embedding), expected, atol=1e-5, rtol=1e-5)
    assert found.usage.prompt_tokens == sum(len(served.tokenizer.encode(text)) for text in TEXTS)


def test_embeddings_in_base64_are_the_same_numbers(server: Serving, client: OpenAI) -> None:
    # The client asks for base64 of itself and turns it into floats; both must be what we send.
    as_floats = client.embeddings.create(model="plain", input=TEXTS[0], encoding_format="float").data[0].embedding
    assert client.embeddings.create(model="plain", input=TEXTS[0]).data[0].embedding == pytest.approx(as_floats)
    raw = server.call("/v1/embeddings", {"model": "plain", "input": TEXTS[0], "encoding_format": "base64"}).json
    sent = base64.b64decode(raw["data"][0]["embedding"])
    assert list(struct.unpack(f"<{len(as_floats)}f", sent)) == pytest.approx(as_floats)
    ids = server.models["plain"].tokenizer.encode(TEXTS[0])
    for given in (ids, [ids, ids]):
        assert client.embeddings.create(model="plain", input=given).data[-1].embedding == pytest.approx(as_floats)


def test_tokens_and_back(server: Serving) -> None:
    tokenizer = server.models["plain"].tokenizer
    found = server.call("/tokenize", {"model": "plain", "text": TEXTS[2]}).json
    assert found["tokens"] == tokenizer.encode(TEXTS[2])
    assert found["count"] == len(found["tokens"]) == len(found["texts"])
    assert server.call("/detokenize", {"model": "plain", "tokens": found["tokens"]}).json == {"text": TEXTS[2]}
    special = {"model": "plain", "text": "<|endoftext|>"}
    assert server.call("/tokenize", special).json["count"] > 1
    assert server.call("/tokenize", special | {"parse_special": True}).json["tokens"] == [400]


def test_characters_that_end_lines_elsewhere_do_not_break_events(server: Serving) -> None:
    # JSON may hold U+2028 and U+0085 as they are, but many clients split a stream where str.splitlines does.
    prompt = "a\u2028b\u0085c\u2029d"
    asked = {"model": "plain", "prompt": prompt, "echo": True, "stream": True, "max_tokens": 1}
    lines = server.call("/v1/completions", asked).body.decode().splitlines()
    assert all(line.startswith("data: ") for line in lines if line)


def test_the_example_runs(server: Serving) -> None:
    script = Path(__file__).parents[2] / "examples" / "serve_client.py"
    found = subprocess.run(
        [sys.executable, "-W", "error", script, server.url], capture_output=True, text=True, check=True
    ).stdout
    assert "model: chat" in found
    assert len(found.split("\nchat: ")[1]) > 9
    assert "A cat is asleep. " in found
