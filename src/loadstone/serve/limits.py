"""What stands before every request: the key, and the size of what is sent."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException

from .page import FILES

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from .metrics import Metrics

OPEN = ("/health", *FILES)  # for whoever watches whether the server lives; the page, which then asks for the key


class Limits:
    """ASGI middleware; refuses before a body is read, and stops reading one that is too long or comes too slowly."""

    def __init__(
        self, app: ASGIApp, *, api_key: str | None, body_limit: int, body_timeout: float, metrics: Metrics
    ) -> None:
        self.app, self.body_limit, self.body_timeout, self.metrics = app, body_limit, body_timeout, metrics
        self.key = None if api_key is None else api_key.encode(errors="surrogateescape")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._serve(scope, self._limited(receive), counted)
        except _RefusedError as refused:
            await _refuse(counted, refused)
        finally:
            route = scope.get("route")
            self.metrics.requests.labels(getattr(route, "path", "other"), str(status)).inc()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        if self.key is not None and scope["path"] not in OPEN and not self._knows(headers.get(b"authorization", b"")):
            raise _RefusedError(401, "the API key is missing or wrong: Authorization: Bearer KEY.")
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > self.body_limit:
            raise self._too_long()
        await self.app(scope, receive, send)

    def _limited(self, receive: Receive) -> Receive:
        """The same, while the body comes; afterwards what is received is that the client has gone, whenever it does."""
        read, ended = 0, False
        until = time.monotonic() + self.body_timeout

        async def limited() -> Message:
            nonlocal read, ended
            if ended:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), until - time.monotonic())
            except asyncio.TimeoutError:
                raise _RefusedError(408, f"the request's body did not come within {self.body_timeout:g} s.") from None
            read += len(message.get("body", b""))
            ended = not message.get("more_body", False)
            if read > self.body_limit:
                raise self._too_long()
            return message

        return limited

    def _knows(self, given: bytes) -> bool:
        scheme, _, key = given.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self.key or b"")

    def _too_long(self) -> _RefusedError:
        return _RefusedError(413, f"the request is longer than {self.body_limit:,} bytes.")


class _RefusedError(HTTPException):
    """Of this class because FastAPI answers with 400 to whatever else comes up while it reads a body."""


async def _refuse(send: Send, refused: _RefusedError) -> None:
    kind = "authentication_error" if refused.status_code == 401 else "invalid_request_error"
    body = json.dumps({"error": {"message": refused.detail, "type": kind, "param": None, "code": None}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refused.status_code == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refused.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": body})
