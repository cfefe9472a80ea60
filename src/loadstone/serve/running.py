"""A server from its socket to its end: on SIGTERM or Ctrl-C it takes no more requests and ends those that it has."""

from __future__ import annotations

import signal
import socket
import sys

import uvicorn
from starlette.types import ASGIApp

from ..errors import LoadstoneError

BACKLOG = 1024  # connections that may wait to be taken


def listen(host: str, port: int) -> socket.socket:
    """Raises LoadstoneError if the address cannot be had."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        raise LoadstoneError(f"cannot listen at {host}, port {port}: {error}. Another --port may be free.") from None


def run(app: ASGIApp, listening: socket.socket, *, drain: int) -> None:
    """Serve until SIGTERM or Ctrl-C; answers that run then have `drain` seconds. A second Ctrl-C ends at once."""
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"serving at http://{shown}:{port} (API: /v1; end with Ctrl-C)", file=sys.stderr, flush=True)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=drain, lifespan="on")
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again once it has ended, which is no failure
        signal.signal(number, lambda *_: None)
    uvicorn.Server(config).run(sockets=[listening])
