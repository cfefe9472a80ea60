"""A model that is served: weights, tokenizer, its batch, and what loading it proved."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..checkpoint.wording import size_text
from ..errors import LoadstoneError
from ..model import GPT
from ..tokenizer import Tokenizer
from .answers import FailedError
from .batch import Batch, Result, Task, Work


class UnknownModelError(LoadstoneError):
    """No model of this name is served."""


@dataclass
class Served:
    """One model.

    Attributes:
        name: as requests say it.
        report: what `inspect`, `plan` and `verify` found, for the page.
    """

    name: str
    model: GPT
    tokenizer: Tokenizer
    batch: Batch
    created: int
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def context(self) -> int:
        return self.batch.slots.length

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def summary(self) -> str:
        """One line: what is served, and the memory of its cache, which never grows."""
        slots, config = self.batch.slots, self.model.config
        proof = self.report.get("verify")
        return (
            f"{self.name}: {config.architecture}, {self.parameters:,} parameters, "
            f"{'verified' if proof else 'NOT verified'}; engine {slots.engine}, {slots.rows} rows of "
            f"{slots.length:,} tokens, {size_text(slots.nbytes)} of cache"
        )

    @property
    def ends(self) -> frozenset[int]:
        return frozenset({*self.tokenizer.eos_ids, *self.model.config.eos_ids})

    async def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt. In a thread: a long text takes a while, and others stream meanwhile."""
        ids = await self.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids and self.tokenizer.bos_id is not None:
            ids = [self.tokenizer.bos_id]  # an empty prompt asks for any text at all
        return ids

    async def tokenize(self, text: str, **options: bool) -> list[int]:
        return await asyncio.to_thread(self.tokenizer.encode, text, yielding=True, **options)

    async def encode_chat(self, turns: Sequence[dict[str, str]]) -> list[int]:
        if self.tokenizer.chat_template is None:
            raise LoadstoneError(
                f"{self.name} has no chat template, so it does not know messages. Ask it for a completion instead "
                "(/v1/completions), or fine-tune it on chats (loadstone finetune --sft)."
            )
        text = await asyncio.to_thread(self.tokenizer.apply_chat, turns, add_generation_prompt=True)
        return await self.tokenize(text, add_special=False, parse_special=True)

    async def between_steps(self, task: Task[Result]) -> Result:
        """What the task returns; it runs in the thread that computes, and ends where the client is gone."""
        loop, future = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

        def settle(result: Result | None, error: BaseException | None) -> None:
            if not future.done():
                future.set_result(result) if error is None else future.set_exception(error)

        def steps() -> Iterator[None]:
            result, error = None, None
            try:
                while not future.done():
                    next(task)
                    yield
            except StopIteration as end:
                result = end.value
            except Exception as caught:
                error = caught
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, result, error)

        def fail(reason: str) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, None, FailedError(reason))

        self.batch.add(Work(steps(), fail))
        return await future


class Models:
    """Everything that is served, by name."""

    def __init__(self, served: Sequence[Served]) -> None:
        self.all = {each.name: each for each in served}

    def worded(self, error: Exception) -> str:
        """What it says, with a model's name in the place of its tokenizer's path here."""
        text = str(error)
        for name, served in self.all.items():
            text = text.replace(str(served.tokenizer.source), name)
        return text

    def named(self, name: str | None) -> Served:
        """Raises UnknownModelError; without a name, if there is more than one."""
        if name is None and len(self.all) == 1:
            return next(iter(self.all.values()))
        if name is None:
            raise UnknownModelError(f"say which model: {', '.join(self.all)}.")
        if name not in self.all:
            raise UnknownModelError(f"there is no model {name[:200]!r} here; there is {', '.join(self.all)}.")
        return self.all[name]
