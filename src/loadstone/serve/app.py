"""The server: routes, limits around them, errors in OpenAI's form."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from .._version import __version__
from ..errors import LoadstoneError
from .answers import FailedError, LateError
from .attended import GoneError
from .batch import FullError, Worker
from .limits import Limits
from .looking import looking
from .metrics import Metrics
from .page import page
from .routes import routes
from .served import Models, Served, UnknownModelError


@dataclass(frozen=True)
class Settings:
    """How to serve.

    Attributes:
        api_key: asked for on every path but /health; None asks for nothing.
        timeout: seconds that an answer may take.
        body_limit: bytes of a request; it must come within `body_timeout` seconds.
        origins: web pages of other servers that may call (CORS).
    """

    api_key: str | None = None
    timeout: float = 600.0
    body_limit: int = 4 << 20
    body_timeout: float = 60.0
    origins: Sequence[str] = ()


def create_app(served: Sequence[Served], settings: Settings | None = None) -> FastAPI:
    """The application; its thread that computes runs from start to end of the application's life."""
    settings = settings or Settings()
    models, metrics = Models(served), Metrics(served)
    worker = Worker([each.batch for each in served])

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.close, 30)

    app = FastAPI(title="Loadstone", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    app.state.end = partial(worker.close, 0)  # ends what runs, with an error
    app.include_router(routes(models, metrics, timeout=settings.timeout))
    app.include_router(looking(models, timeout=settings.timeout))
    app.include_router(page())

    @app.get("/health")
    async def health() -> JSONResponse:
        alive = worker.is_alive()
        return JSONResponse({"status": "ok" if alive else "error"}, 200 if alive else 503)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    _errors(app, models)
    app.add_middleware(
        Limits, api_key=settings.api_key, body_limit=settings.body_limit, body_timeout=settings.body_timeout,
        metrics=metrics,
    )  # fmt: skip
    if settings.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return app


def _errors(app: FastAPI, models: Models) -> None:
    """Every error is OpenAI's object, and none shows a traceback."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        wrong = _telling(error.errors())
        kind = request.headers.get("content-type", "none")
        if wrong["type"] == "model_attributes_type" and "json" not in kind:
            return failure(400, f"the body is read as JSON with Content-Type: application/json only, found {kind}.")
        if wrong["type"] == "json_invalid":
            return failure(400, f"the body is not JSON: {wrong['ctx']['error']}, at character {wrong['loc'][-1]}.")
        where = ".".join(str(part) for part in wrong["loc"][1:] if _named(part)) or None
        said = wrong["msg"].removeprefix("Value error, ")
        return failure(400, f"{where}: {said}" if where else said, param=where)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return failure(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(LoadstoneError)
    async def refused(_: Request, error: LoadstoneError) -> JSONResponse:
        said = models.worded(error)
        if isinstance(error, FullError):
            return failure(429, said, kind="rate_limit_exceeded", headers={"Retry-After": "1"})
        if isinstance(error, UnknownModelError):
            return failure(404, said, code="model_not_found")
        if isinstance(error, GoneError):
            return failure(499, said)  # read by nobody but the metrics; nginx has this number for it
        if isinstance(error, FailedError):
            return failure(504 if isinstance(error, LateError) else 500, said, kind="server_error")
        return failure(400, said)

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> JSONResponse:
        return failure(500, f"the server failed: {type(error).__name__}.", kind="server_error")


def _telling(errors: Sequence[Any]) -> Any:
    """The first error; if the value could be this or that (a text, ids), that of the reading that came furthest."""
    place = tuple(takewhile(_named, errors[0]["loc"]))
    same = [error for error in errors if error["loc"][: len(place)] == place]
    return max(same, key=lambda e: (e["type"] == "too_long", [part for part in e["loc"] if isinstance(part, int)]))


def _named(part: str | int) -> bool:
    """A field or an index, and not pydantic's name for one of several types (`list[constrained-str]`)."""
    return isinstance(part, int) or part.isidentifier()


def failure(
    status: int, message: str, *, kind: str = "invalid_request_error", param: str | None = None,
    code: str | None = None, headers: Any = None,
) -> JSONResponse:  # fmt: skip
    """OpenAI's error object."""
    error = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status, headers=headers)
