"""Limits: sizes, times, clients that vanish or send at their leisure, other origins; and what is counted meanwhile."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from serving import Serving, serving, small

LIMIT = 40_000  # bytes of a body
ASKED: dict[str, Any] = {"model": "small", "prompt": "The cat's hat", "max_tokens": 100, "temperature": 0}
ORIGIN = "https://here.example"


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(small(rows=2, waiting=8), body_limit=LIMIT, body_timeout=0.7) as found:
        yield found


def head(*fields: str, path: str = "/v1/completions") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *fields]
    return "\r\n".join([*lines, "", ""]).encode()


def status(connection: socket.socket) -> int:
    """Of the answer, however it comes; 0 if there is none."""
    with connection, connection.makefile("rb") as file:
        return int((file.readline().split() or [b"", b"0"])[1])


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)


def test_a_body_that_is_too_long_is_refused_however_it_comes(server: Serving) -> None:
    body = json.dumps(ASKED | {"prompt": "x" * LIMIT}).encode()
    found = server.call("/v1/completions", body)
    assert (found.status, found.json["error"]["message"]) == (413, f"the request is longer than {LIMIT:,} bytes.")
    assert status(server.raw(head(f"Content-Length: {10**30}"))) in (400, 413)  # h11 reads no such numbers
    assert status(server.raw(head("Content-Length: " + "9" * 19) + b"{")) == 413
    assert status(server.raw(head("Transfer-Encoding: chunked") + chunked(*[b" " * 9000] * 5, b""))) == 413
    small_chunks = chunked(*[b" " * 10] * (LIMIT // 10 + 1))
    assert status(server.raw(head("Transfer-Encoding: chunked") + small_chunks)) == 413
    asked = json.dumps(ASKED | {"max_tokens": 1}).encode()
    padded = asked + b" " * (LIMIT - len(asked))
    assert server.call("/v1/completions", padded).status == 200
    assert server.call("/v1/completions", padded + b" ").status == 413


def test_a_client_that_sends_all_before_it_reads_still_learns_why(server: Serving) -> None:
    for _ in range(5):
        with OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            with pytest.raises(openai.APIStatusError) as caught:
                client.completions.create(model="small", prompt="x" * 3_000_000)
            assert caught.value.status_code == 413


def test_a_length_that_is_not_true(server: Serving) -> None:
    body = json.dumps(ASKED | {"max_tokens": 1}).encode()
    began = time.monotonic()
    assert status(server.raw(head(f"Content-Length: {len(body) + 9}") + body)) == 408  # the rest never comes
    assert time.monotonic() - began < 5
    assert status(server.raw(head(f"Content-Length: {len(body) - 9}") + body)) == 400
    for wrong in ("Content-Length: -5", "Content-Length: five", "Transfer-Encoding: gzip"):
        assert status(server.raw(head(wrong) + body)) in (400, 501)
    both = head(f"Content-Length: {len(body)}", "Transfer-Encoding: chunked")
    assert status(server.raw(both + chunked(body, b""))) in (200, 400)


def test_a_body_must_come_in_time(server: Serving) -> None:
    body = json.dumps(ASKED).encode()
    with server.raw(head(f"Content-Length: {len(body)}")) as connection:
        began = time.monotonic()
        connection.settimeout(0.05)
        answer = b""
        for at in range(len(body)):  # 5 s for all of it, and a byte at least every 0.1 s
            try:
                connection.sendall(body[at : at + 1])
                answer = connection.recv(99)
            except TimeoutError:
                continue
            break
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert 0.5 < time.monotonic() - began < 4


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_leave_at_once_leave_nothing_behind(server: Serving, stream: bool) -> None:
    body = json.dumps(ASKED | {"stream": stream, "max_tokens": 180}).encode()
    with server.pace(0.05):
        for _ in range(12):
            server.raw(head(f"Content-Length: {len(body)}") + body).close()
        time.sleep(0.3)
        server.until(server.idle, 2)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_is_gone_frees_its_row_at_once(server: Serving, stream: bool) -> None:
    body = json.dumps(ASKED | {"stream": stream}).encode()
    with server.pace(0.05):  # the answers would take 5 s and more
        sent = head(f"Content-Length: {len(body)}") + body
        connections = [server.raw(sent) for _ in range(2)]
        server.until(lambda: server.metric("loadstone_running") == 2)
        waiting = [server.raw(sent) for _ in range(3)]
        server.until(lambda: server.metric("loadstone_waiting") == 3)
        began = time.monotonic()
        for connection in waiting:  # those that wait hold a place in the queue, which is free at once too
            connection.close()
        server.until(lambda: server.metric("loadstone_waiting") == 0, 2)
        assert server.metric("loadstone_running") == 2
        for connection in connections:
            connection.close()
        server.until(server.idle, 2)
        assert time.monotonic() - began < 2


def test_a_client_that_leaves_during_other_work_ends_it(server: Serving) -> None:
    body = json.dumps({"model": "small", "input": ["The cat's hat"] * 2000}).encode()
    with server.pace(0.02):
        connection = server.raw(head(f"Content-Length: {len(body)}", path="/v1/embeddings") + body)
        server.until(lambda: server.models["small"].batch.busy)
        connection.close()
        time.sleep(0.3)
        server.until(lambda: not server.models["small"].batch.busy, 2)
        time.sleep(0.1)
        assert not server.models["small"].batch.busy


def test_a_stream_that_the_client_ends(server: Serving) -> None:
    async def leave() -> str:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            stream = await client.completions.create(**ASKED, stream=True)
            async for event in stream:
                await stream.close()
                return event.choices[0].text
        return ""

    made = server.metric("loadstone_generated_tokens_total")
    with server.pace(0.03):
        assert asyncio.run(leave())
        server.until(server.idle, 2)
    assert 1 <= server.metric("loadstone_generated_tokens_total") - made < 60


def test_a_client_that_does_not_read_holds_nobody_up(server: Serving) -> None:
    body = json.dumps(ASKED | {"stream": True, "details": 20}).encode()
    deaf = server.raw(head(f"Content-Length: {len(body)}") + body)
    began = time.monotonic()
    assert server.call("/v1/completions", ASKED | {"max_tokens": 3}).status == 200
    assert time.monotonic() - began < 5
    server.until(server.idle)
    deaf.close()


def test_an_answer_has_its_time() -> None:
    with serving(small(rows=1), timeout=0.4) as server, server.pace(0.02):
        with OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            with pytest.raises(openai.InternalServerError, match="time for this request is over") as caught:
                client.completions.create(**ASKED)
            assert caught.value.status_code == 504
            with pytest.raises(openai.APIError, match="time for this request is over"):
                list(client.completions.create(**ASKED, stream=True))
            with pytest.raises(openai.InternalServerError, match="time for this request is over"):
                client.embeddings.create(model="small", input=["The cat"] * 200)
        server.until(server.idle, 2)


def preflight(server: Serving, origin: str) -> Any:
    asked = {"Origin": origin, "Access_Control_Request_Method": "POST",
             "Access_Control_Request_Headers": "authorization,content-type"}  # fmt: skip
    return server.call("/v1/completions", method="OPTIONS", **asked)


def test_pages_of_other_servers_may_not_call(server: Serving) -> None:
    found = preflight(server, ORIGIN)
    assert found.status == 405
    assert not [name for name in found.headers if name.startswith("access-control")]
    answered = server.call("/v1/completions", ASKED | {"max_tokens": 1}, Origin=ORIGIN)
    assert not [name for name in answered.headers if name.startswith("access-control")]


def test_a_named_origin_may_call_and_still_needs_the_key() -> None:
    with serving(small(), origins=(ORIGIN,), api_key="sesame") as server:
        found = preflight(server, ORIGIN)
        assert (found.status, found.headers["access-control-allow-origin"]) == (200, ORIGIN)
        assert "authorization" in found.headers["access-control-allow-headers"].lower()
        for wrong in ("https://other.example", "http://here.example", "null", f"{ORIGIN}.evil.example"):
            refused = preflight(server, wrong)
            assert refused.status == 400
            assert "access-control-allow-origin" not in refused.headers
        asked = ASKED | {"max_tokens": 1}
        assert server.call("/v1/completions", asked, Origin=ORIGIN).status == 401
        answered = server.call("/v1/completions", asked, Origin=ORIGIN, Authorization="Bearer sesame")
        assert (answered.status, answered.headers["access-control-allow-origin"]) == (200, ORIGIN)
        assert "access-control-allow-credentials" not in answered.headers


def test_what_is_counted_is_what_was() -> None:
    with serving(small(), small("other", seed=1)) as server:
        total: dict[str, int] = {"prompt_tokens": 0, "completion_tokens": 0, "cached_tokens": 0}
        with OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            for n in (1, 2, 2):
                usage = client.completions.create(**ASKED | {"prompt": "The cat's hat; " * 4, "n": n}).usage
                assert usage
                assert usage.prompt_tokens_details
                total["prompt_tokens"] += usage.prompt_tokens
                total["completion_tokens"] += usage.completion_tokens
                total["cached_tokens"] += usage.prompt_tokens_details.cached_tokens or 0
            with server.pace(0.2):
                list(
                    client.completions.create(**ASKED | {"model": "other", "max_tokens": 2, "echo": True}, stream=True)
                )
            with pytest.raises(openai.NotFoundError):
                client.completions.create(model="none", prompt="x")
        assert total["cached_tokens"]
        assert server.metric("loadstone_prompt_tokens_total", model="small") == total["prompt_tokens"]
        assert server.metric("loadstone_generated_tokens_total", model="small") == total["completion_tokens"]
        assert server.metric("loadstone_prompt_tokens_known_total", model="small") == total["cached_tokens"]
        assert server.metric("loadstone_generated_tokens_total", model="other") == 2
        paths = {"path": "/v1/completions"}
        assert server.metric("loadstone_requests_total", **paths, status="200") == 4
        assert server.metric("loadstone_requests_total", **paths, status="404") == 1
        assert server.metric("loadstone_first_token_seconds_count", model="other") == 1
        assert server.metric("loadstone_first_token_seconds_sum", model="other") >= 0.2  # not the echo, the token
        assert server.call("/metrics").headers["content-type"].startswith("text/plain; version=0.0.4")
        server.call("/nowhere/" + "x" * 99)
        assert server.metric("loadstone_requests_total", path="other") == 1  # no label that a client chooses


@pytest.mark.parametrize("field", ["temperature", "repetition_penalty", "top_p", "min_p"])
def test_settings_at_the_edge_of_what_numbers_there_are_harm_nobody_else(server: Serving, field: str) -> None:
    with OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client, server.pace(0.01):
        stream = client.completions.create(**ASKED | {"max_tokens": 40}, stream=True)
        next(stream)
        for value in (5e-324, 1e-300, 1e-44, 1e-40, 0.99):
            settings = {"temperature": 1.0, "extra_body": {field: value}}
            assert client.completions.create(**ASKED | {"max_tokens": 3} | settings).choices
        assert [event.choices[0].finish_reason for event in stream][-1] in ("length", "stop")
