"""What stands before every request: the key, and the size of what is sent."""

from __future__ import annotations

import hmac
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from .metrics import Metrics

OPEN = ("/health",)  # for whoever watches whether the server lives


class Limits:
    """ASGI middleware; refuses before a body is read, and stops reading where it grows too long."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, body_limit: int, metrics: Metrics) -> None:
        self.app, self.body_limit, self.metrics = app, body_limit, metrics
        self.key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, read, begun = 500, 0, False

        async def counted(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
            await send(message)

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.body_limit:
                raise _TooLong
            return message

        headers = dict(scope["headers"])
        try:
            if self.key is not None and scope["path"] not in OPEN and not self._knows(headers.get(b"authorization", b"")):
                await _refuse(counted, 401, "the API key is missing or wrong: Authorization: Bearer KEY.")
            elif int(headers.get(b"content-length", b"0") or 0) > self.body_limit:
                raise _TooLong
            else:
                await self.app(scope, limited, counted)
        except (_TooLong, ValueError) as error:
            if begun or not isinstance(error, _TooLong):
                raise
            await _refuse(counted, 413, f"the request is longer than {self.body_limit:,} bytes.")
        finally:
            route = scope.get("route")
            self.metrics.requests.labels(getattr(route, "path", "other"), str(status)).inc()

    def _knows(self, given: bytes) -> bool:
        scheme, _, key = given.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self.key or b"")


class _TooLong(Exception):
    pass


async def _refuse(send: Send, status: int, message: str) -> None:
    kind = "authentication_error" if status == 401 else "invalid_request_error"
    body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": None}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
