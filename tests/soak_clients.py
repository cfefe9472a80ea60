"""Clients of the soak: those that behave, whose answers are known beforehand, and those that do not.

Each is a coroutine that returns what became of it in one or two words, and raises Wrong where the server failed it.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from server_load import Answer, ask, read, request

PATIENCE = 180.0  # seconds within which every request has its answer
BODY_LIMIT = 1 << 16


class Wrong(Exception):  # noqa: N818
    """The server did what it must not do."""


@dataclass(frozen=True)
class Known:
    """A request and the text that `generate` gave for it alone."""

    model: str
    path: str
    content: dict[str, Any]
    text: str


@dataclass
class World:
    """What the clients share."""

    port: int
    known: list[Known]
    source: random.Random

    def pick(self) -> Known:
        return self.source.choice(self.known)


async def behaves(world: World, **more: Any) -> str:
    """Asks for an answer that is known, until there is room for it."""
    known = world.pick()
    content = known.content | {"stream": world.source.random() < 0.7} | more
    answer = await until_taken(world, known.path, content)
    if not answer.whole:
        raise Wrong(f"no whole answer to {content}: {answer}")
    if answer.text != known.text:
        raise Wrong(f"another answer to {content}:\n  {answer.text!r}\n  {known.text!r}")
    return "right"


async def until_taken(world: World, path: str, content: dict[str, Any]) -> Answer:
    until = time.monotonic() + PATIENCE
    while True:
        answer = await ask(world.port, path, content, timeout=PATIENCE)
        if answer.status != 429:
            return answer
        if "retry-after" not in answer.headers:
            raise Wrong(f"429 without Retry-After: {answer}")
        if time.monotonic() > until:
            raise Wrong("429 for too long")
        await asyncio.sleep(float(answer.headers["retry-after"]) * world.source.random())


async def samples(world: World) -> str:
    """Something that cannot be known: any whole answer will do."""
    known = world.pick()
    more = {"temperature": 1.5, "seed": world.source.randrange(2**40), "n": world.source.randint(1, 3), "top_p": 0.9}
    answer = await until_taken(world, known.path, known.content | more | {"stream": True, "stop": ["e"]})
    if not answer.whole:
        raise Wrong(f"no whole answer: {answer}")
    return "sampled"


async def vanishes(world: World) -> str:
    """Leaves at any moment: before, while or after the answer comes, with a FIN or a RST."""
    known, stream = world.pick(), world.source.random() < 0.7
    body = json.dumps(known.content | {"stream": stream, "max_tokens": 200, "n": world.source.randint(1, 2)}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    writer.write(request(known.path, body))
    for _ in range(world.source.randrange(6)):
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(reader.read(200), 5)
    if world.source.random() < 0.5:
        writer.transport.abort()
    else:
        writer.close()
    return "vanished"


async def half_opens(world: World) -> str:
    """Sends a part of a request, waits, and leaves."""
    known = world.pick()
    whole = request(known.path, json.dumps(known.content).encode())
    _, writer = await asyncio.open_connection("127.0.0.1", world.port)
    writer.write(whole[: world.source.randrange(len(whole))])
    await asyncio.sleep(world.source.uniform(0, 8))
    writer.close()
    return "half-open"


async def reads_slowly(world: World) -> str:
    """Takes the answer in small sips, through a small window; it must still be whole and right."""
    known, answer = world.pick(), Answer()
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    slow.setblocking(False)
    await asyncio.get_running_loop().sock_connect(slow, ("127.0.0.1", world.port))
    reader, writer = await asyncio.open_connection(sock=slow, limit=256)
    sips = asyncio.StreamReader()
    writer.write(request(known.path, json.dumps(known.content | {"stream": True, "details": 20}).encode()))
    while sip := await asyncio.wait_for(reader.read(512), PATIENCE):
        sips.feed_data(sip)
        await asyncio.sleep(0.005)
    sips.feed_eof()
    writer.close()
    await read(sips, answer, time.perf_counter())
    if answer.status == 429:
        return "full"
    if not answer.whole or answer.text != known.text:
        raise Wrong(f"a slow reader got {answer} for {known}")
    return "slow, right"


def _completion(**content: Any) -> bytes:
    return json.dumps({"model": "tiny", "prompt": "x"} | content).encode()


# (path, body, the status that is due, headers, method)
REFUSED: list[tuple[str, bytes, int, str, str]] = [
    ("/v1/completions", b"\x00\xff garbage", 400, "", "POST"),
    ("/v1/completions", b"", 400, "", "POST"),
    ("/v1/completions", b'{"prompt": "x", "model": ', 400, "", "POST"),
    ("/v1/completions", b"[" * 20_000, 400, "", "POST"),
    ("/v1/completions", b'{"prompt":' * 9_000, 413, "", "POST"),
    ("/v1/completions", b"null", 400, "", "POST"),
    ("/v1/completions", _completion(model="no-such-model"), 404, "", "POST"),
    ("/v1/completions", _completion(model="../../etc/passwd"), 404, "", "POST"),
    ("/v1/completions", _completion(prompt=7), 400, "", "POST"),
    ("/v1/completions", _completion(prompt={"a": []}), 400, "", "POST"),
    ("/v1/completions", _completion(prompt=[-1, -2]), 400, "", "POST"),
    ("/v1/completions", _completion(prompt=[10**9]), 400, "", "POST"),
    ("/v1/completions", _completion(prompt=[[], "x"]), 400, "", "POST"),
    ("/v1/completions", _completion(prompt="\ud800"), 400, "", "POST"),
    ("/v1/completions", _completion(prompt="too long " * 3_000), 400, "", "POST"),
    ("/v1/completions", _completion(prompt="x" * 2 * BODY_LIMIT), 413, "", "POST"),
    ("/v1/completions", _completion(max_tokens=-1), 400, "", "POST"),
    ("/v1/completions", _completion(max_tokens="many"), 400, "", "POST"),
    ("/v1/completions", _completion(temperature=-0.5), 400, "", "POST"),
    ("/v1/completions", _completion(temperature=float("nan")), 400, "", "POST"),
    ("/v1/completions", _completion(temperature=float("inf")), 400, "", "POST"),
    ("/v1/completions", _completion(top_p=-1), 400, "", "POST"),
    ("/v1/completions", _completion(n=-3), 400, "", "POST"),
    ("/v1/completions", _completion(n=10**12), 400, "", "POST"),
    ("/v1/completions", _completion(seed=-(10**30)), 400, "", "POST"),
    ("/v1/completions", _completion(stream="yes"), 400, "", "POST"),
    ("/v1/completions", _completion(no_such_field=1), 400, "", "POST"),
    ("/v1/completions", b"x", 405, "", "DELETE"),
    ("/v1/chat/completions", _completion(), 400, "", "POST"),
    ("/v1/chat/completions", b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}]}', 400, "", "POST"),
    ("/v1/chat/completions", b'{"messages": [{"role": "nobody", "content": 1}]}', 400, "", "POST"),
    ("/v1/embeddings", b'{"model": "tiny", "input": [-5]}', 400, "", "POST"),
    ("/detokenize", b'{"model": "tiny", "tokens": [-1]}', 400, "", "POST"),
    ("/inspect/attention", b'{"model": "tiny", "text": "a b", "layer": 99, "head": -1}', 400, "", "POST"),
    ("/%2e%2e/%2e%2e/etc/passwd", b"", 404, "", "GET"),
    ("/no/such/path", b"{}", 404, "", "POST"),
    ("/v1/completions", b"{}", 400, "Content-Length: minus\r\n", "POST"),
    ("/v1/completions", b"{}", 400, "Transfer-Encoding: gzip, chunked\r\n", "POST"),
    ("/v1/completions", b"\r\n\r\n", 400, "\x01: \x02\r\n", "POST"),
]


async def is_refused(world: World) -> str:
    path, body, status, headers, method = world.source.choice(REFUSED)
    answer = await send(world, request(path, body, headers, method))
    if answer.status != status:
        raise Wrong(f"{method} {path} {body[:200]!r} {headers!r}: {status} is due, found {answer}")
    return str(status)


async def send(world: World, raw: bytes) -> Answer:
    answer = Answer()
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    try:
        writer.write(raw)
        await asyncio.wait_for(read(reader, answer, time.perf_counter()), PATIENCE)
    except (ConnectionError, EOFError) as error:  # it may hang up on a body that it does not want to read
        answer.error = f"{type(error).__name__}: {error}"
    except asyncio.TimeoutError:
        raise Wrong(f"no answer to {raw[:200]!r}") from None
    finally:
        writer.close()
    return answer


async def floods(world: World) -> str:
    """A body in chunks that would never end: the server must hang up, or say that it is too long."""
    head = request("/v1/completions", b"", "Transfer-Encoding: chunked\r\n").replace(b"Content-Length: 0\r\n", b"")
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    answer = Answer()
    try:
        writer.write(head)
        for _ in range(64):
            writer.write(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")
            await asyncio.wait_for(writer.drain(), PATIENCE)
        await asyncio.wait_for(read(reader, answer, time.perf_counter()), PATIENCE)
    except (ConnectionError, EOFError):
        return "hung up"
    finally:
        writer.close()
    if answer.status != 413:
        raise Wrong(f"a body without an end: {answer}")
    return "413"


async def looks(world: World) -> str:
    """The other paths, between all that."""
    text = world.pick().model
    path, content = world.source.choice(
        [
            ("/v1/embeddings", {"model": text, "input": ["a text", "another"]}),
            ("/tokenize", {"model": text, "text": "some words"}),
            ("/inspect/surprisal", {"model": text, "text": "some words here", "top": 3}),
            ("/inspect/attention", {"model": text, "text": "some words here", "layer": 0, "head": 1}),
        ]
    )
    answer = await ask(world.port, path, content, timeout=PATIENCE)
    if answer.status not in (200, 429):
        raise Wrong(f"{path}: {answer}")
    return f"looked, {answer.status}"


Client = Callable[[World], Awaitable[str]]
SHARES: list[tuple[Client, int]] = [
    (behaves, 10), (samples, 2), (vanishes, 4), (half_opens, 1), (reads_slowly, 1), (is_refused, 8), (floods, 1),
    (looks, 2),
]  # fmt: skip
