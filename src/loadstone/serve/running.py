"""A server from its socket to its end: on SIGTERM or Ctrl-C it takes no more requests and ends those that it has."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from ..errors import LoadstoneError

BACKLOG = 1024  # connections that may wait to be taken
TAKEN = 0.5  # seconds for requests on connections that were taken just before: uvicorn hangs up where none has begun
CUT = 2  # seconds after the drain in which errors go out


class _Server(uvicorn.Server):
    """uvicorn's; an answer that takes longer than the drain ends with an error that says so, before it is cut off."""

    def __init__(self, config: uvicorn.Config, drain: int, end: Callable[[], None]) -> None:
        super().__init__(config)
        self._drain, self._end = drain, end

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()  # no new connections
        await asyncio.sleep(TAKEN)
        asyncio.get_running_loop().call_later(self._drain, self._end)
        await super().shutdown(sockets)


def bind(host: str, port: int) -> socket.socket:
    """Take an address; connections are refused until `run`. Raises LoadstoneError if it cannot be had."""
    with _refusing(host, port):
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
        return bound


def run(app: FastAPI, bound: socket.socket, *, drain: int) -> None:
    """Serve until SIGTERM or Ctrl-C; answers that run then have `drain` seconds. A second Ctrl-C ends at once."""
    host, port = bound.getsockname()[:2]
    with _refusing(host, port):
        bound.listen(BACKLOG)
    shown = f"[{host}]" if ":" in host else host
    print(f"serving at http://{shown}:{port} (API: /v1; end with Ctrl-C)", file=sys.stderr, flush=True)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=drain + CUT, lifespan="on"
    )
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again once it has ended, which is no failure
        signal.signal(number, lambda *_: None)
    _Server(config, drain, app.state.end).run(sockets=[bound])


@contextmanager
def _refusing(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LoadstoneError(f"cannot listen at {host}, port {port}: {error}. Another --port may be free.") from None
