"""A model that is served: weights, tokenizer, its batch, and what loading it proved."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..errors import LoadstoneError
from ..generate import check_prompt
from ..model import GPT
from ..tokenizer import Tokenizer
from .engine import Engine

Result = TypeVar("Result")


class Unknown(LoadstoneError):
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
    engine: Engine
    created: int
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def context(self) -> int:
        return self.engine.slots.length

    @property
    def ends(self) -> frozenset[int]:
        return frozenset({*self.tokenizer.eos_ids, *self.model.config.eos_ids})

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt. Raises LoadstoneError if it has none, or ids that the model lacks."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids and self.tokenizer.bos_id is not None:
            ids = [self.tokenizer.bos_id]  # an empty prompt asks for any text at all
        return ids

    def check(self, ids: Sequence[int]) -> None:
        """Raises LoadstoneError for token ids that the model cannot read at once."""
        check_prompt(ids, self.model.config)
        if len(ids) > self.context:
            raise LoadstoneError(f"the text has {len(ids)} tokens, but the context is {self.context}.")

    def encode_chat(self, turns: Sequence[dict[str, str]]) -> list[int]:
        if self.tokenizer.chat_template is None:
            raise LoadstoneError(
                f"{self.name} has no chat template, so it does not know messages. Ask it for a completion instead "
                "(/v1/completions), or fine-tune it on chats (loadstone finetune --sft)."
            )
        text = self.tokenizer.apply_chat(turns, add_generation_prompt=True)
        return self.tokenizer.encode(text, add_special=False, parse_special=True)

    async def between_steps(self, function: Callable[[GPT], Result]) -> Result:
        """What `function` gives for the model, run in the thread that computes."""
        loop, future = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

        def settle(result: Result | None, error: BaseException | None) -> None:
            if not future.done():
                future.set_result(result) if error is None else future.set_exception(error)

        def call() -> None:
            if future.done():  # the client is gone
                return
            try:
                result, error = function(self.model), None
            except Exception as caught:  # noqa: BLE001  it belongs to the one who asked
                result, error = None, caught
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, result, error)

        self.engine.call(call)
        return await future


class Models:
    """Everything that is served, by name."""

    def __init__(self, served: Sequence[Served]) -> None:
        self.all = {each.name: each for each in served}

    def named(self, name: str | None) -> Served:
        """Raises Unknown; without a name, if there is more than one."""
        if name is None and len(self.all) == 1:
            return next(iter(self.all.values()))
        if name is None:
            raise Unknown(f"say which model: {', '.join(self.all)}.")
        if name not in self.all:
            raise Unknown(f"there is no model {name[:200]!r} here; there is {', '.join(self.all)}.")
        return self.all[name]
