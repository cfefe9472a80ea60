"""Work for a request: only while its client is there, and no longer than it may take."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

from ..errors import LoadstoneError
from .answers import LateError

Result = TypeVar("Result")


class GoneError(LoadstoneError):
    """Nobody waits for the answer any more."""


async def attended(request: Request, work: Coroutine[Any, Any, Result], *, timeout: float) -> Result:
    """What the work gives. It is cancelled if the client leaves (GoneError), or after `timeout` seconds (LateError)."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.create_task(work), asyncio.create_task(watch())
    try:
        await asyncio.wait((working, watching), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if watching.done():
            raise GoneError("the client has left.")
        raise LateError("the time for this request is over.")
    finally:
        working.cancel()
        watching.cancel()
