"""The API: /v1/models, completions, chat, embeddings; /tokenize, /detokenize."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Sequence
from random import getrandbits
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from ..errors import LoadstoneError
from .answers import Answer, Wish
from .attended import attended
from .batch import Token
from .details import token_text
from .forms import Chats, Completions
from .metrics import Metrics
from .prompts import embedding, prompt_logprobs
from .reply import Choice, Form, Reply
from .schema import Asked, ChatRequest, CompletionRequest, DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from .served import Models, Served


def routes(models: Models, metrics: Metrics, *, timeout: float) -> APIRouter:
    """All of the API for these models; an answer that takes longer than `timeout` seconds is ended."""
    router = APIRouter()

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_card(served) for served in models.all.values()]}

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return _card(models.named(name))

    @router.post("/v1/completions")
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        served = models.named(asked.model)
        texts = _prompts(asked.prompt)
        prompts = [await served.encode(text) for text in texts]
        echoed = await attended(request, _echoed(served, asked, prompts), timeout=timeout)
        form = Completions(
            served.tokenizer, asked.logprobs,
            [_echo(served, text) if asked.echo else "" for text in texts for _ in range(asked.n)],
            [tokens for tokens in echoed for _ in range(asked.n)],
        )  # fmt: skip
        most = 16 if asked.max_tokens is None else asked.max_tokens
        return await _reply(served, asked, form, prompts, most, asked.logprobs, request)

    @router.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        served = models.named(asked.model)
        prompt = await served.encode_chat([message.as_turn() for message in asked.messages])
        wanted = (asked.top_logprobs or 0) if asked.logprobs else None
        most = asked.most()
        form = Chats(served.tokenizer, wanted)
        return await _reply(served, asked, form, [prompt], served.context if most is None else most, wanted, request)

    async def _reply(
        served: Served, asked: Asked, form: Form, prompts: Sequence[Sequence[int]], most: int, logprobs: int | None,
        request: Request,
    ) -> Response:  # fmt: skip
        top = max((wanted for wanted in (logprobs, asked.details) if wanted is not None), default=None)
        seed = getrandbits(62) if asked.seed is None else asked.seed
        wishes = [
            Wish(prompt, most, asked.sampling(), asked.stops(), (seed + number) % 2**63, top, served.ends)
            for prompt in prompts
            for number in range(asked.n)
        ]
        choices = _choices(served, wishes, timeout)
        reply = Reply(served.name, form, choices, prompts, None if asked.details is None else served.tokenizer)
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            return StreamingResponse(
                metrics.watched(served, reply, reply.events(usage=usage)), media_type="text/event-stream",
                headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
            )  # fmt: skip
        try:
            return JSONResponse(await attended(request, reply.whole(), timeout=timeout))
        finally:
            reply.cancel()
            metrics.ended(served, reply)

    @router.post("/v1/embeddings")
    async def embeddings(asked: EmbeddingRequest, request: Request) -> dict[str, Any]:
        served = models.named(asked.model)
        prompts = [await served.encode(text) for text in _prompts(asked.input)]
        data = await attended(request, _embedded(served, asked, prompts), timeout=timeout)
        used = sum(map(len, prompts))
        metrics.read.labels(served.name).inc(used)
        usage = {"prompt_tokens": used, "total_tokens": used}
        return {"object": "list", "model": served.name, "data": data, "usage": usage}

    @router.post("/tokenize")
    async def tokenize(asked: TokenizeRequest) -> dict[str, Any]:
        served = models.named(asked.model)
        ids = await served.tokenize(asked.text, add_special=asked.add_special, parse_special=asked.parse_special)
        texts = await asyncio.to_thread(lambda: [token_text(served.tokenizer, token) for token in ids])
        return {"tokens": ids, "texts": texts, "count": len(ids)}

    @router.post("/detokenize")
    async def detokenize(asked: DetokenizeRequest) -> dict[str, Any]:
        tokenizer = models.named(asked.model).tokenizer
        return {"text": await asyncio.to_thread(tokenizer.decode, asked.tokens, skip_special=asked.skip_special)}

    return router


def _card(served: Served) -> dict[str, Any]:
    return {
        "id": served.name, "object": "model", "created": served.created, "owned_by": "loadstone",
        "context_length": served.context, "parameters": served.parameters,
        "chat": served.tokenizer.chat_template is not None,
    }  # fmt: skip


def _prompts(given: Any) -> list[Any]:
    """One prompt or several: a text, token ids, or a list of either."""
    if isinstance(given, str) or (isinstance(given, list) and given and isinstance(given[0], int)) or given == []:
        return [given]
    return list(given)


def _echo(served: Served, prompt: str | Sequence[int]) -> str:
    return prompt if isinstance(prompt, str) else served.tokenizer.decode(prompt, skip_special=False)


async def _echoed(served: Served, asked: CompletionRequest, prompts: Sequence[Sequence[int]]) -> list[list[Token]]:
    """The prompts' own tokens where they are to be echoed with log-probabilities; the first has none."""
    if not (asked.echo and asked.logprobs is not None):
        return [[] for _ in prompts]
    found = []
    for ids in prompts:
        served.batch.check(ids)
        found.append([Token(ids[0]), *await served.between_steps(prompt_logprobs(served.model, ids, asked.logprobs))])
    return found


async def _embedded(served: Served, asked: EmbeddingRequest, prompts: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    data = []
    for index, ids in enumerate(prompts):
        served.batch.check(ids)
        vector = await served.between_steps(embedding(served.model, ids, asked.pooling))
        value: Any = vector
        if asked.encoding_format == "base64":
            value = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        data.append({"object": "embedding", "index": index, "embedding": value})
    return data


def _choices(served: Served, wishes: Sequence[Wish], timeout: float) -> list[Choice]:
    """All of them begun, or none."""
    if len(wishes) > served.batch.most:
        raise LoadstoneError(f"{len(wishes)} answers at once, but {served.name} has room for {served.batch.most}.")
    choices: list[Choice] = []
    try:
        for index, wish in enumerate(wishes):
            choices.append(Choice(index, Answer(served.batch, served.tokenizer, wish, timeout=timeout)))
    except LoadstoneError:
        for choice in choices:
            choice.answer.cancel()
        raise
    return choices
