"""What new rows do to the old text: the loss with each way to initialise, and whether old logits are what they were.

T tokens, C width, V old rows, K new tokens. New tokens are not in the old text, so its hidden states stay as they are;
only the sum in the softmax grows. So one pass over the text serves every candidate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import LoadstoneError
from ..model import GPT
from ..tokenizer import Tokenizer
from ..verify import ENGLISH
from .report import Logits, Loss

TOKENS = 4096  # of the old text that are scored
LENGTHS = (1, 7, 64)  # prompts at which old logits are compared
_WINDOW, _POSITIONS, _ROWS = 1024, 64, 4096  # tokens read at once, logits made at once, rows compared at once


@dataclass(frozen=True)
class OldText:
    """A text for both models, in the old tokenization: ids, and the bytes that all but the first stand for."""

    ids: list[int]
    nbytes: int
    built_in: bool

    @classmethod
    def of(cls, tokenizer: Tokenizer, text: str | None) -> OldText:
        """The built-in English if there is no text. Raises LoadstoneError if it has fewer than two tokens."""
        # The cut spares the tokenizer a whole book: no vocabulary has tokens of 32 characters on average.
        ids = tokenizer.encode((ENGLISH if text is None else text)[: 32 * TOKENS])[: TOKENS + 1]
        if len(ids) < 2:
            raise LoadstoneError(
                f"the old text has {len(ids)} tokens, and a loss needs two or more. Give a longer one."
            )
        nbytes = len(tokenizer.decode(ids).encode()) - len(tokenizer.decode(ids[:1]).encode())
        return cls(ids, nbytes, text is None)

    def as_dict(self) -> dict[str, Any]:
        name = "built-in English" if self.built_in else "the text given"
        return {"name": name, "tokens": len(self.ids) - 1, "bytes": self.nbytes}


@dataclass(frozen=True)
class Candidate:
    """Head rows that one way of initialising gives: of the K new tokens, and one that `count` padding rows share."""

    tokens: Tensor  # [K, C]
    padding: Tensor  # [C]
    count: int


@contextmanager
def in_evaluation(*models: GPT) -> Iterator[None]:
    """No dropout, no gradients; each module's mode comes back, as frozen parts may have another than the whole."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def losses(
    model: GPT, text: OldText, candidates: Mapping[str, Candidate], taken: list[int]
) -> tuple[Loss, dict[str, Loss]]:
    """The old model's loss, and that with each candidate's rows; `taken` old rows (padding) give way to new tokens."""
    before, after = 0.0, {name: _Sums() for name in candidates}
    for hidden_TC, targets_T in _hidden(model, text.ids):
        logits_TV = model.logits(hidden_TC).double()  # the changes of good rows lie below float32's rounding
        right_T = logits_TV.gather(1, targets_T[:, None])[:, 0]
        before += float((logits_TV.logsumexp(1) - right_T).sum())
        logits_TV[:, taken] = -torch.inf
        kept_T = logits_TV.logsumexp(1)
        for name, rows in candidates.items():
            new_T = F.linear(hidden_TC, rows.tokens).double().logsumexp(1)
            total_T = kept_T.logaddexp(new_T)
            if rows.count:
                padding_T = F.linear(hidden_TC, rows.padding[None]).double()[:, 0] + math.log(rows.count)
                total_T = total_T.logaddexp(padding_T)
            after[name].add(total_T - right_T, (new_T - total_T).exp())
    if not math.isfinite(before):
        raise LoadstoneError(
            "the model's loss on the old text is no number: it is broken. `loadstone verify` says how."
        )
    count = len(text.ids) - 1
    first = Loss.of(before, count, text.nbytes)
    return first, {name: sums.loss(count, text.nbytes) for name, sums in after.items()}


class _Sums:
    """Nats and probability mass over positions."""

    def __init__(self) -> None:
        self.nats = self.mass = self.most = 0.0

    def add(self, nats_T: Tensor, mass_T: Tensor) -> None:
        self.nats += float(nats_T.sum())
        self.mass += float(mass_T.sum())
        self.most = max(self.most, float(mass_T.max()))

    def loss(self, count: int, nbytes: int) -> Loss:
        return Loss.of(self.nats, count, nbytes, self.mass / count, self.most)


def _hidden(model: GPT, ids: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states and the tokens that follow, a few positions at a time; every token but the first follows once."""
    device, window = model.tok_emb.weight.device, min(model.config.context_length, _WINDOW)
    for start in range(0, len(ids) - 1, window):
        targets_T = torch.tensor(ids[start + 1 : start + window + 1], device=device)
        inputs_T = torch.tensor(ids[start : start + len(targets_T)], device=device)
        hidden_TC = model.hidden(inputs_T[None])[0]
        yield from zip(torch.split(hidden_TC, _POSITIONS), torch.split(targets_T, _POSITIONS), strict=True)


def compare_logits(before: GPT, after: GPT, ids: list[int], taken: list[int]) -> Logits:
    """Logits of the old rows, but for those that gave way, of both models at some lengths."""
    kept = _kept(before, taken)
    differences, hidden_equal = {}, True
    for length in sorted({min(n, len(ids), before.config.context_length) for n in LENGTHS}):
        prompt = torch.tensor([ids[:length]], device=kept.device)
        hidden, again = before.hidden(prompt), after.hidden(prompt)
        hidden_equal &= torch.equal(hidden, again)
        old, new = before.logits(hidden)[..., kept], after.logits(again)[..., kept]
        differences[length] = float((old.double() - new.double()).abs().max())
    return Logits(_same_rows(before, after, kept), hidden_equal, differences)


def _kept(model: GPT, taken: list[int]) -> Tensor:
    mask = torch.ones(model.config.vocab_size, dtype=torch.bool)
    mask[taken] = False
    return mask.nonzero()[:, 0].to(model.tok_emb.weight.device)


def _same_rows(before: GPT, after: GPT, kept: Tensor) -> bool:
    """Embedding and head, to the last bit."""
    pairs = [(before.tok_emb.weight, after.tok_emb.weight)]
    if before.head is not None and after.head is not None:
        pairs.append((before.head.weight, after.head.weight))
    return all(_same_bits(old[part], new[part]) for old, new in pairs for part in torch.split(kept, _ROWS))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    carrier = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(carrier), b.contiguous().view(carrier))
