"""The API: /v1/models, completions, chat, embeddings; /tokenize, /detokenize, /health, /metrics."""

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
from .engine import Token
from .metrics import Metrics
from .openai import Chats, Choice, Completions, Form, Reply, token_text
from .prompts import embedding, prompt_logprobs
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
        prompts = [served.encode(text) for text in texts]
        echoed = await _echoed(served, asked, prompts)
        form = Completions(
            served.tokenizer, asked.logprobs is not None,
            [_echo(served, text) if asked.echo else "" for text in texts for _ in range(asked.n)],
            [tokens for tokens in echoed for _ in range(asked.n)],
        )  # fmt: skip
        most = 16 if asked.max_tokens is None else asked.max_tokens
        return await _reply(served, asked, form, prompts, most, asked.logprobs, request)

    @router.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        served = models.named(asked.model)
        prompt = served.encode_chat([message.as_turn() for message in asked.messages])
        form = Chats(served.tokenizer, bool(asked.logprobs))
        most = asked.most()
        wanted = (asked.top_logprobs or 0) if asked.logprobs else None
        return await _reply(served, asked, form, [prompt], served.context if most is None else most, wanted, request)

    async def _reply(
        served: Served, asked: Asked, form: Form, prompts: Sequence[Sequence[int]], most: int, logprobs: int | None,
        request: Request,
    ) -> Response:  # fmt: skip
        reply = Reply(served.name, form, [], sum(map(len, prompts)))
        seed = getrandbits(62) if asked.seed is None else asked.seed
        choices: list[Choice] = []
        try:
            for prompt in prompts:
                for number in range(asked.n):
                    wish = Wish(
                        prompt, most, asked.sampling(), asked.stops(), (seed + number) % 2**63, logprobs, served.ends
                    )
                    choices.append(Choice(len(choices), Answer(served.engine, served.tokenizer, wish, timeout=timeout)))
        except LoadstoneError:
            for choice in choices:
                choice.answer.cancel()
            raise
        reply.choices = choices
        metrics.began(served, reply)
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            return StreamingResponse(
                metrics.watched(served, reply, reply.events(usage=usage)), media_type="text/event-stream",
                headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
            )  # fmt: skip
        return JSONResponse(await _unless_gone(request, reply))

    @router.post("/v1/embeddings")
    async def embeddings(asked: EmbeddingRequest) -> dict[str, Any]:
        served = models.named(asked.model)
        prompts = [served.encode(text) for text in _prompts(asked.input)]
        data = []
        for index, ids in enumerate(prompts):
            served.check(ids)
            vector = await served.between_steps(embedding(ids, asked.pooling))
            value: Any = vector
            if asked.encoding_format == "base64":
                value = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
            data.append({"object": "embedding", "index": index, "embedding": value})
        used = sum(map(len, prompts))
        usage = {"prompt_tokens": used, "total_tokens": used}
        return {"object": "list", "model": served.name, "data": data, "usage": usage}

    @router.post("/tokenize")
    async def tokenize(asked: TokenizeRequest) -> dict[str, Any]:
        tokenizer = models.named(asked.model).tokenizer
        ids = tokenizer.encode(asked.text, add_special=asked.add_special, parse_special=asked.parse_special)
        return {"tokens": ids, "texts": [token_text(tokenizer, token) for token in ids], "count": len(ids)}

    @router.post("/detokenize")
    async def detokenize(asked: DetokenizeRequest) -> dict[str, Any]:
        tokenizer = models.named(asked.model).tokenizer
        return {"text": tokenizer.decode(asked.tokens, skip_special=asked.skip_special)}

    return router


def _card(served: Served) -> dict[str, Any]:
    return {
        "id": served.name, "object": "model", "created": served.created, "owned_by": "loadstone",
        "context_length": served.context, "parameters": sum(p.numel() for p in served.model.parameters()),
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
        served.check(ids)
        found.append([Token(ids[0]), *await served.between_steps(prompt_logprobs(ids, asked.logprobs))])
    return found


async def _unless_gone(request: Request, reply: Reply) -> dict[str, Any]:
    """The whole answer; if the client leaves before it is there, its rows are free at the next step."""

    async def watch() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.1)

    answering, watching = asyncio.create_task(reply.whole()), asyncio.create_task(watch())
    try:
        await asyncio.wait((answering, watching), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            reply.cancel()
        return await answering
    finally:
        reply.cancel()
        watching.cancel()
