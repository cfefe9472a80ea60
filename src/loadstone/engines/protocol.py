"""What an engine is: it reads tokens into rows of a cache and gives the scores of the next ones. No torch here.

Everything else (sampling, stop texts, windows, sessions, chat) stands above it and is the same for all engines.

*Others*: vLLM's and MAX's own interfaces pass scheduler batches and page tables; llama.cpp's a batch with a sequence id
per token. Rows with a length each are enough for one machine, and small enough to be written anew in an afternoon.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import LoadstoneError

if TYPE_CHECKING:
    from ..config import GPTConfig


class EngineMissingError(LoadstoneError):
    """The engine cannot run on this machine, which says nothing about the model."""


class Cache(Protocol):
    """What an engine remembers of each row's tokens, which stand at positions 0 .. length-1. Only lengths are public.

    Attributes:
        size: most tokens of a row.
        lengths: tokens held, per row. To forget the last ones is to lower it.
    """

    size: int
    lengths: list[int]


class Engine(ABC):
    """A model that is ready to run.

    Logits are scores of the next token, [rows, V]: a numpy array in float32, or a torch tensor of any floating type.
    The caller may write into them, and they stay what they are when the engine runs again.

    Attributes:
        config: the model's.
        device: where the logits are, as torch names it.
    """

    config: GPTConfig
    device: Any = "cpu"

    @abstractmethod
    def new_cache(self, batch: int = 1, length: int | None = None, *, allocate: int | None = None) -> Any:
        """An empty `Cache` of so many rows.

        Args:
            batch: rows.
            length: most tokens of each; the whole context if not given.
            allocate: begin with memory for so many and grow: for a conversation, whose length nobody knows.
        """

    @abstractmethod
    def prefill(self, cache: Any, prompts: Mapping[int, Sequence[int]]) -> Any:
        """Read one or more tokens into each of the named rows, after what it holds; the other rows stay as they are.

        Returns the logits after each named row's last token, in the order of `prompts`.
        Raises IndexError beyond the cache's size: rows are padded, so the longest prompt must fit behind the fullest.
        """

    @abstractmethod
    def decode(self, cache: Any, tokens: Sequence[int]) -> Any:
        """Read one more token into every row; returns the logits after it. Raises IndexError as `prefill`."""

    def reset(self, cache: Any, lengths: Sequence[int]) -> None:
        """Each row forgets all but its first tokens. Raises ValueError for a length that it has not reached."""
        if len(lengths) != len(cache.lengths) or not all(
            0 <= new <= old for new, old in zip(lengths, cache.lengths, strict=True)
        ):
            raise ValueError(f"rows that hold {cache.lengths} tokens cannot be set to {list(lengths)}")
        cache.lengths = list(lengths)
