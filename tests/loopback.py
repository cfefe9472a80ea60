"""A small threaded HTTP server on 127.0.0.1 whose behaviour each test scripts; it remembers every request."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import TypeVar
from urllib.parse import unquote, urlsplit

Running = TypeVar("Running", bound="Loopback")


@dataclass(frozen=True)
class Seen:
    """A request as it arrived; header names in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    query: str = ""

    @property
    def range(self) -> str:
        return self.headers.get("range", "")


@dataclass
class Reply:
    """An answer. `length` is the Content-Length that is claimed: None for the true one, -1 for none at all.

    `drop_after` closes the connection after so many bytes of the body; with `hold`, only once that event is set.
    With `drip` the body comes byte by byte, so many seconds apart.
    """

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None
    drop_after: int | None = None
    hold: threading.Event | None = None
    drip: float = 0


Handler = Callable[[Seen], Reply]


def served(body: bytes, *, etag: str = '"v1"', drop_after: int | None = None, **headers: str) -> Handler:
    """A well-behaved server of one file: Range and If-Range (RFC 9110), 416 past the end."""
    named = {key.replace("_", "-"): value for key, value in headers.items()} | ({"ETag": etag} if etag else {})

    def handle(seen: Seen) -> Reply:
        wanted = re.fullmatch(r"bytes=(\d+)-", seen.range)
        if not wanted or seen.headers.get("if-range", etag) != etag:
            return Reply(200, body, dict(named), drop_after=drop_after)
        start = int(wanted[1])
        if start >= len(body):
            return Reply(416, b"", named | {"Content-Range": f"bytes */{len(body)}"})
        content_range = f"bytes {start}-{len(body) - 1}/{len(body)}"
        return Reply(206, body[start:], named | {"Content-Range": content_range}, drop_after=drop_after)

    return handle


def piece(body: bytes, count: int | None = None, ETag: str = '"v1"', **headers: str) -> Handler:
    """A server that answers any Range, whatever If-Range says, with at most `count` bytes of what was asked."""
    named = {key.replace("_", "-"): value for key, value in {"ETag": ETag, **headers}.items() if value}

    def handle(seen: Seen) -> Reply:
        start = int(seen.range.removeprefix("bytes=").removesuffix("-"))
        sent = body[start:][:count]
        return Reply(206, sent, named | {"Content-Range": f"bytes {start}-{start + len(sent) - 1}/{len(body)}"})

    return handle


def in_turn(*handlers: Handler | Reply) -> Handler:
    """One handler for each request; the last one stays."""
    left = list(handlers)

    def handle(seen: Seen) -> Reply:
        handler = left.pop(0) if len(left) > 1 else left[0]
        return handler if isinstance(handler, Reply) else handler(seen)

    return handle


class Loopback:
    """A running server: `routes` maps paths to handlers, the rest goes to `fallback`; `seen` lists the requests."""

    def __init__(self) -> None:
        self.routes: dict[str, Handler | Reply] = {}
        self.fallback: Handler | Reply = Reply(404, b"no such thing")
        self.seen: list[Seen] = []
        loopback = self

        class Answer(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                parts = urlsplit(self.path)
                headers = {key.lower(): value for key, value in self.headers.items()}
                seen = Seen(self.command, unquote(parts.path), headers, parts.query)
                loopback.seen.append(seen)
                route = loopback.routes.get(seen.path, loopback.fallback)
                self.send(route if isinstance(route, Reply) else route(seen))

            def send(self, reply: Reply) -> None:
                self.send_response(reply.status)
                for key, value in reply.headers.items():
                    self.send_header(key, value)
                claimed = len(reply.body) if reply.length is None else reply.length
                if claimed >= 0:
                    self.send_header("Content-Length", str(claimed))
                self.send_header("Connection", "close")
                self.end_headers()
                self.close_connection = True
                if self.command != "HEAD":
                    with suppress(OSError):  # the client has had enough
                        body = reply.body[: reply.drop_after]
                        for piece in [body[i : i + 1] for i in range(len(body))] if reply.drip else [body]:
                            self.wfile.write(piece)  # unbuffered
                            time.sleep(reply.drip)
                    if reply.hold:
                        self.wfile.flush()
                        reply.hold.wait(20)

            do_GET = do_HEAD = answer  # noqa: N815  (names that http.server looks for)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)

    def __enter__(self: Running) -> Running:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
