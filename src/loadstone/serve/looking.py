"""Looking inside, for the page: surprisal of a text, attention of a head, and what loading the model proved."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field

from .attended import attended
from .batch import Token
from .details import details, named
from .prompts import attention, prompt_logprobs
from .schema import MOST_TOP, Strict, Text, TokenIds
from .served import Models

MOST_TOKENS = 256  # of an attention picture


class TextRequest(Strict):
    model: str | None = None
    text: Text | TokenIds


class SurprisalRequest(TextRequest):
    top: Annotated[int, Field(ge=0, le=MOST_TOP)] = 10


class AttentionRequest(TextRequest):
    layer: Annotated[int, Field(ge=0)]
    head: Annotated[int, Field(ge=0)]


def looking(models: Models, *, timeout: float) -> APIRouter:
    router = APIRouter(prefix="/inspect")

    @router.get("/models")
    async def shapes() -> dict[str, Any]:
        return {
            name: {
                "layers": served.model.config.n_layers, "heads": served.model.config.n_heads,
                "context": served.context, "chat": served.tokenizer.chat_template is not None,
                "parameters": served.parameters, "architecture": served.model.config.architecture,
                "ends": sorted(served.ends),
            }
            for name, served in models.all.items()
        }  # fmt: skip

    @router.get("/report/{name:path}")
    async def report(name: str) -> dict[str, Any]:
        return models.named(name).report

    @router.post("/surprisal")
    async def surprisal(asked: SurprisalRequest, request: Request) -> dict[str, Any]:
        """Each token with its log-probability given those before it, beside the likeliest at its place."""
        served = models.named(asked.model)
        ids = await served.encode(asked.text)
        served.batch.check(ids)
        work = served.between_steps(prompt_logprobs(served.model, ids, asked.top))
        tokens = [Token(ids[0]), *await attended(request, work, timeout=timeout)]
        return {"model": served.name, "tokens": details(served.tokenizer, tokens)}

    @router.post("/attention")
    async def weights(asked: AttentionRequest, request: Request) -> dict[str, Any]:
        """Row t: how much token t takes from tokens 0 .. t, in one head; the first MOST_TOKENS tokens of the text."""
        served = models.named(asked.model)
        ids = (await served.encode(asked.text))[:MOST_TOKENS]
        served.batch.check(ids)
        work = served.between_steps(attention(served.model, ids, asked.layer, asked.head))
        rows = await attended(request, work, timeout=timeout)
        return {
            "model": served.name, "layer": asked.layer, "head": asked.head,
            "tokens": [named(served.tokenizer, token) for token in ids], "weights": rows,
        }  # fmt: skip

    return router
