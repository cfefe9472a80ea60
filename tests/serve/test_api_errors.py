"""What goes wrong, as OpenAI's own client meets it: its error classes, and what the message says."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI

from serving import Serving, serving, small

MESSAGES: Any = [{"role": "user", "content": "The cat"}]
KEY = "s3cret-ключ"  # a key may hold any character that a file can


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(small("chat", chat=True), small("plain", rows=2, waiting=1)) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Serving) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as found:
        yield found


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": -1}, "max_tokens: .*greater than or equal to 0"),
        ({"max_tokens": "5"}, "max_tokens: .*integer"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"n": 0}, "n: "),
        ({"n": 17}, "n: "),
        ({"logprobs": 21}, "logprobs"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"stop": [1]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"prompt": 7}, "prompt: .*string"),
        ({"prompt": ["a", 7]}, "prompt.1: .*string"),
        ({"prompt": [-1]}, "prompt.0: .*greater than or equal to 0"),
        ({"prompt": [401]}, "outside the model's vocabulary"),
        ({"prompt": [401], "echo": True}, "401"),
        ({"prompt": []}, None),
        ({"prompt": ["a"] * 129}, "prompt: .*at most 128 items"),
        ({"prompt": [5] * 193}, "193 tokens, but the context is 192"),
        ({"prompt": "the cat's hat " * 99}, "but the context is 192"),
        ({"logit_bias": {"5": 100}}, "logit_bias: not supported"),
        ({"suffix": "the end"}, "suffix: not supported"),
        ({"best_of": 3}, "best_of"),
        ({"extra_body": {"tempurature": 1}}, "tempurature"),
        ({"extra_body": {"details": 99}}, "details"),
        ({"extra_body": {"top_k": 0}}, "top_k"),
    ],
)
def test_a_bad_request_is_named(client: OpenAI, fields: dict[str, Any], message: str | None) -> None:
    asked: dict[str, Any] = {"model": "plain", "prompt": "The cat", "max_tokens": 2} | fields
    if message is None:
        assert client.completions.create(**asked).choices
        return
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.completions.create(**asked)
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match=message):  # at once, not in the middle of a stream
        client.completions.create(**asked, stream=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "user"}]}, "messages.0.content: .*required"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
         "messages.0.content"),
        ({"messages": [*MESSAGES, {"role": "system", "content": "late"}]}, "system comes first"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"model": "plain"}, "plain has no chat template"),
    ],
)  # fmt: skip
def test_a_bad_chat_is_named(client: OpenAI, fields: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {"model": "chat", "messages": MESSAGES, "max_tokens": 2} | fields
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.chat.completions.create(**asked)
    assert "/" not in str(caught.value.message).replace("/v1/completions", "")  # no path of this machine


@pytest.mark.parametrize(
    "name", ["other", "../plain", "/etc/passwd", "http://127.0.0.1:1/x", "file:///etc/passwd", "", "x" * 9999]
)
def test_an_unknown_model_is_not_found_and_nothing_is_opened(client: OpenAI, name: str) -> None:
    with pytest.raises(openai.NotFoundError, match="there is chat, plain") as caught:
        client.completions.create(model=name, prompt="The cat")
    assert caught.value.code == "model_not_found"
    assert len(str(caught.value)) < 999
    if name:
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(name)


PATHS = (
    "/page.cs /static/page.css /page.css/../../app.py /%2e%2e/app.py //etc/passwd /..%2f..%2fapp.py /docs /v1 "
    "/inspect/report/..%2f..%2fetc%2fpasswd /v1/models/..%2f..%2fetc%2fpasswd"
)


@pytest.mark.parametrize("path", PATHS.split())
def test_no_path_opens_a_file(server: Serving, path: str) -> None:
    found = server.call(path)
    assert (found.status, found.json["error"]["type"]) == (404, "invalid_request_error")


def test_a_wrong_method_and_a_wrong_type_are_refused(server: Serving) -> None:
    assert server.call("/v1/completions").status == 405
    assert server.call("/health", {}).json["error"]["message"]
    asked = {"model": "plain", "prompt": "a", "max_tokens": 1}
    for kind in ("text/plain", "application/x-www-form-urlencoded"):  # what a web page may send, and curl by itself
        found = server.call("/v1/completions", asked, content_type=kind)
        assert (found.status, kind in found.json["error"]["message"]) == (400, True)
        assert "Content-Type: application/json" in found.json["error"]["message"]
    assert server.call("/v1/completions", asked, content_type="application/json; charset=utf-8").status == 200


def test_with_a_key_only_those_who_know_it_are_answered() -> None:
    with serving(small("plain"), api_key="sesame") as server:
        for key in ("wrong", "sesame2", "sesam", "Sesame"):
            with OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
                with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong") as caught:
                    client.models.list()
                assert caught.value.response.headers["www-authenticate"] == "Bearer"
        with OpenAI(base_url=f"{server.url}/v1", api_key="sesame", max_retries=0) as client:
            assert client.completions.create(model="plain", prompt="The cat", max_tokens=1).choices
        for given in ("sesame", "Basic sesame", "Bearer", "Bearer  ", "Token sesame", ""):
            assert server.call("/metrics", authorization=given).status == 401, given
        assert server.call("/metrics", authorization="bearer sesame").status == 200
        shown = {
            path: server.call(path).status
            for path in ("/health", "/", "/page.css", "/openapi.json", "/nowhere", "/v1/models")
        }
        assert shown == {
            "/health": 200,
            "/": 200,
            "/page.css": 200,
            "/openapi.json": 401,
            "/nowhere": 401,
            "/v1/models": 401,
        }
        assert b"plain" not in server.call("/health").body  # whoever has no key learns no names


def test_a_key_may_hold_any_character() -> None:
    with serving(small("plain"), api_key=KEY) as server:
        sent = f"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {KEY}\r\n\r\n"
        for raw, status in ((sent.encode(), b"200"), (sent.replace("ю", "я").encode(), b"401")):
            with server.raw(raw) as connection:
                assert connection.recv(12).endswith(status)


def test_a_full_server_says_so_and_the_client_tries_again(server: Serving, client: OpenAI) -> None:
    asked: Any = {"model": "plain", "prompt": "The cat", "max_tokens": 60, "temperature": 0}
    with server.pace(0.02):
        streams = [client.completions.create(**asked, stream=True) for _ in range(3)]  # two rows, one that waits
        with pytest.raises(openai.RateLimitError, match="waiting") as caught:
            client.completions.create(**asked)
        assert caught.value.response.headers["retry-after"] == "1"
        began = time.monotonic()
        for stream in streams:
            threading.Timer(0.3, stream.close).start()
        assert client.with_options(max_retries=2).completions.create(**asked | {"max_tokens": 1}).choices
        assert 1 <= time.monotonic() - began < 5
    server.until(server.idle)
    assert server.metric("loadstone_requests_total", path="/v1/completions", status="429") == 2


def test_more_answers_than_there_is_room_for_are_no_matter_of_waiting(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="room for 3"):
        client.completions.create(model="plain", prompt=["a"] * 4, max_tokens=1)


def test_a_model_with_broken_weights_fails_with_words() -> None:
    served = small("broken")
    with torch.no_grad():
        served.model.tok_emb.weight[:, 0] = torch.nan
    with serving(served) as server, OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        for more in ({}, {"echo": True, "logprobs": 1}):
            with pytest.raises(openai.InternalServerError, match="loadstone verify"):
                client.completions.create(model="broken", prompt="The cat", **more)  # type: ignore[call-overload]
        with pytest.raises(openai.APIError, match="loadstone verify"):
            list(client.completions.create(model="broken", prompt="The cat", stream=True))
        with pytest.raises(openai.InternalServerError, match="loadstone verify"):
            client.embeddings.create(model="broken", input="The cat")
        assert server.call("/health").status == 200
