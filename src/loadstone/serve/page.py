"""The page: plain files, read once at the start. No request names a file.

Why not as others do it: no framework and no build step, so what the browser runs is what lies in `static`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import APIRouter, Response

MODULES = (
    "page", "api", "attention", "card", "column", "dom", "heatmap", "report", "strip", "surprisal", "tokens", "write",
)  # fmt: skip
FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
} | {f"/{name}.js": (f"{name}.js", "text/javascript") for name in MODULES}
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def page() -> APIRouter:
    router = APIRouter(include_in_schema=False)
    folder = files(__package__) / "static"
    for path, (name, kind) in FILES.items():
        router.add_api_route(path, _answer((folder / name).read_text(encoding="utf-8"), kind), methods=["GET"])
    return router


def _answer(content: str, kind: str) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return answer
