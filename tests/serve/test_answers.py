"""Answers as text: what a request gets through the server's loop is what `generate_texts` gives."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from extendable import KNOWN, gpt2_like, hostile
from loadstone.generate import generate_texts
from loadstone.sampling import Sampling
from loadstone.serve.answers import Answer, FailedError, Piece, Wish
from loadstone.serve.batch import Batch, Worker

PROMPT = "The cat's hat; the dog's 12 bones"


@pytest.fixture
def batch() -> Iterator[Batch]:
    batch = Batch(hostile(KNOWN), rows=3)
    worker = Worker([batch])
    worker.start()
    yield batch
    worker.close(30)
    assert not worker.is_alive()


def wish(**options: object) -> Wish:
    fields = {"ids": gpt2_like().encode(PROMPT), "max_new_tokens": 30, "sampling": Sampling()} | options
    return Wish(**fields)  # type: ignore[arg-type]


def ask(batch: Batch, *wishes: Wish, timeout: float = 60) -> list[list[Piece]]:
    async def one(each: Wish) -> list[Piece]:
        return [piece async for piece in Answer(batch, gpt2_like(), each, timeout=timeout)]

    async def together() -> list[list[Piece]]:
        return list(await asyncio.gather(*map(one, wishes)))

    return asyncio.run(together())


def expected(**options: object) -> str:
    model = engine_model()
    (found,) = generate_texts(model, gpt2_like(), [PROMPT], max_new_tokens=30, **options)  # type: ignore[arg-type]
    return found.text


def engine_model() -> object:
    return hostile(KNOWN)


def test_pieces_add_up_to_the_text(batch: Batch) -> None:
    found = ask(batch, *[wish()] * 5)
    for pieces in found:
        assert "".join(piece.text for piece in pieces) == expected()
        assert [piece.finish for piece in pieces[:-1]] == [""] * (len(pieces) - 1)
        assert pieces[-1].finish in ("length", "stop")
        assert sum(len(piece.tokens) for piece in pieces) <= 30


def test_a_stop_text_ends_it_and_is_not_shown(batch: Batch) -> None:
    whole = expected()
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    (pieces,) = ask(batch, wish(stop=[stop]))
    assert "".join(piece.text for piece in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish == "stop"


def test_an_answer_that_nobody_reads_on_is_cancelled(batch: Batch) -> None:
    async def leave() -> None:
        answer = Answer(batch, gpt2_like(), wish(), timeout=60)
        pieces = answer.__aiter__()
        await anext(pieces)
        await pieces.aclose()  # type: ignore[attr-defined]
        assert answer.job.cancelled

    asyncio.run(leave())


def test_time_is_over(batch: Batch) -> None:
    with pytest.raises(FailedError, match="time for this request"):
        ask(batch, wish(), timeout=0)
