"""Servers as real processes, and clients of them: what benchmarks/serve.py, serve_soak.py and tests/serve share.

The client speaks HTTP over asyncio's sockets and knows nothing of Loadstone, so that a fault of a client library is not
taken for the server's, and a request can be broken off wherever the test wants it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

SRC = Path(__file__).parents[1] / "src"
START = 180.0  # seconds that a server may take until it answers


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


def loadstone(*arguments: str) -> list[str]:
    """The command that serves with this checkout."""
    return [sys.executable, "-W", "ignore", "-m", "loadstone", "serve", *arguments]


class Server:
    """A server's process on 127.0.0.1, from the first answer until the end of the `with` block.

    Args:
        command: what runs it, but for the port.
        name: of the program.
        ready: a path that answers with 200 once it serves.
        threads: of its computation.
        port: 0 for a free one.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        name: str = "loadstone",
        ready: str = "/health",
        threads: int = 1,
        port: int = 0,
    ) -> None:
        self.port, self.name, self._ready = port or free_port(), name, ready
        paths = os.pathsep.join(filter(None, (str(SRC), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths}
        command = [*command, "--port", str(self.port)]
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (as long as the process, and a pipe would run full)
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=self._said)

    def __enter__(self) -> Server:
        until = time.monotonic() + START
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > until:
                self.end()
                raise RuntimeError(f"{self.process.args!r} does not serve:\n{self.errors}")
            time.sleep(0.05)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, unless it has ended, and wait; its exit status."""
        self.process.send_signal(number)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
        status = self.process.wait()
        if not self._said.closed:
            self._last = self.errors
            self._said.close()
        return status

    @property
    def errors(self) -> str:
        """What it wrote on standard error so far."""
        if self._said.closed:
            return self._last
        return os.pread(self._said.fileno(), 1 << 20, 0).decode(errors="replace")

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            text: str = answer.read().decode()
        return text

    def _answers(self) -> bool:
        with suppress(OSError):
            return bool(self.get(self._ready))
        return False

    @property
    def cpu_seconds(self) -> float:
        """Processor time of the process so far, of all its threads."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def resident(self) -> int:
        """Bytes of memory."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    @property
    def descriptors(self) -> list[str]:
        """What its open descriptors point to."""
        return sorted(str(each.readlink()) for each in Path(f"/proc/{self.process.pid}/fd").iterdir())

    @property
    def threads(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))


@dataclass
class Answer:
    """What came back.

    Attributes:
        status: of HTTP; 0 if the connection ended before one came.
        first: seconds until the first piece of text; None if none came.
        finish: why the answer ended, as the server has it; "" if it did not say so.
        error: the server's message, or how the connection ended; "" for none.
        pieces: events with text.
        tokens: made, as the server counts them; None if it does not.
    """

    status: int = 0
    text: str = ""
    first: float | None = None
    finish: str = ""
    error: str = ""
    pieces: int = 0
    tokens: int | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        return self.status == 200 and not self.error and bool(self.finish)

    def add(self, content: dict[str, Any], seconds: float) -> None:
        """A JSON answer, or one event of a stream."""
        if "error" in content:
            self.error = content["error"]["message"]
        for choice in content.get("choices", ()):
            said = choice.get("text")
            if said is None:
                said = (choice.get("delta") or choice.get("message") or {}).get("content")
            if said:
                self.first = seconds if self.first is None else self.first
                self.pieces += 1
                self.text += said
            self.finish = choice.get("finish_reason") or self.finish
        if content.get("usage"):
            self.tokens = content["usage"].get("completion_tokens")


def request(path: str, body: bytes, headers: str = "", method: str = "POST") -> bytes:
    """A request as it goes over the wire; the connection is not used again."""
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n{headers}"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def ask(port: int, path: str, content: Any, *, timeout: float = 120) -> Answer:
    """Post, and take the answer to its end, whole or a stream of events. Raises TimeoutError; never for an end."""
    answer, began = Answer(), time.perf_counter()

    async def take() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(request(path, json.dumps(content).encode()))
            await read(reader, answer, began)
        finally:
            writer.transport.abort()  # what was not sent by now, as a long body that was refused, will not be

    try:
        await asyncio.wait_for(take(), timeout)
    except asyncio.TimeoutError:
        raise TimeoutError(f"{path}: no end within {timeout:g} s; so far {answer}") from None
    except (OSError, EOFError) as error:
        answer.error = answer.error or f"{type(error).__name__}: {error}"
    return answer


async def read(reader: asyncio.StreamReader, answer: Answer, began: float) -> None:
    """An answer from the wire. Raises EOFError where it is cut off."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    answer.status = int(lines[0].split()[1])
    answer.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    streams, rest, done = "event-stream" in answer.headers.get("content-type", ""), b"", False
    async for block in _blocks(reader, answer.headers):
        rest += block
        while streams and (end := (rest := rest.replace(b"\r\n", b"\n")).find(b"\n\n")) >= 0:
            event, rest = rest[:end], rest[end + 2 :]
            if event == b"data: [DONE]":
                done = True
            elif event.startswith(b"data: "):
                answer.add(json.loads(event[6:]), time.perf_counter() - began)
    if streams and not done and not answer.error:
        raise EOFError("the stream ended without [DONE]")
    if not streams:
        _take_whole(answer, rest, time.perf_counter() - began)


def _take_whole(answer: Answer, body: bytes, seconds: float) -> None:
    try:
        answer.add(json.loads(body), seconds)
    except ValueError:  # a page of text, as a proxy's errors are
        answer.error = body.decode(errors="replace")


async def _blocks(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """The body, in chunks or by length."""
    if headers.get("transfer-encoding") != "chunked":
        yield await reader.readexactly(int(headers.get("content-length", 0)))
        return
    while line := await reader.readline():
        if not (size := int(line, 16)):
            return
        yield (await reader.readexactly(size + 2))[:-2]
    raise EOFError("the connection ended within the answer")
