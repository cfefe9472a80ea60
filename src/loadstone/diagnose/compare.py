"""Logits of a model against those of a trace: how far apart, and whether that is more than their types explain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import Check
from ..errors import LoadstoneError
from ..model import GPT
from .precision import precision
from .trace import Prompt, Trace

Logits = Callable[[Tensor, Tensor], Tensor]  # ids [T], positions [P] -> logits [P, V]


@dataclass(frozen=True)
class Parity:
    """How the logits of one prompt compare.

    Attributes:
        length: tokens of the prompt.
        max_abs: the largest difference of two logits.
        relative: the same, as a part of the scale of the reference's logits (the largest, at least 1).
        allowed: the largest `relative` that passes.
        kl: mean divergence of the model's next-token distribution from the reference's, in nats.
        top1: part of the positions where both put the same token first.
        padded: rows that only one of the two vocabularies has; they are not compared.
    """

    length: int
    max_abs: float
    relative: float
    allowed: float
    kl: float
    top1: float
    padded: int

    @property
    def ok(self) -> bool:
        return self.relative <= self.allowed  # NaN is not

    def check(self) -> Check:
        detail = (
            f"max difference {self.max_abs:.1e}, relative {self.relative:.1e} (allowed {self.allowed:.2g}), "
            f"KL {self.kl:.1e} nats, same top token {self.top1:.1%}"
        )
        detail += f"; {self.padded} padded rows of the vocabulary left out" if self.padded else ""
        return Check(f"logits at length {self.length}", self.ok, detail)


def compare(logits: Logits, trace: Trace, *, dtype: str, limit: int) -> list[Parity]:
    """Run a trace's prompts through a model, one Parity per length.

    Length 1 alone hides faults of rotary embedding and mask: attention over one token does not look at q and k.

    Args:
        logits: the model.
        trace: the reference.
        dtype: the loosest element type on either side; its tolerance applies.
        limit: prompts of more tokens are left out.
    """
    allowed = precision(dtype).allowed
    with torch.inference_mode():
        return [
            _compare(logits(prompt.ids, prompt.positions), prompt, allowed)
            for prompt in trace.prompts
            if len(prompt.ids) <= limit
        ]


def _compare(ours: Tensor, prompt: Prompt, allowed: float) -> Parity:
    ours, theirs = ours.float().cpu(), prompt.logits
    common = min(ours.shape[-1], theirs.shape[-1])
    padded = max(ours.shape[-1], theirs.shape[-1]) - common
    ours, theirs = ours[:, :common], theirs[:, :common]
    max_abs = float((ours - theirs).abs().max())
    scale = max(1.0, float(theirs.abs().max()))
    p, q = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean().clamp_min(0))  # below 0 only by rounding
    top1 = float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
    return Parity(len(prompt.ids), max_abs, max_abs / scale, allowed, kl, top1, padded)


def model_logits(model: GPT) -> Logits:
    """A model as `compare` takes it; the head runs only where logits are wanted."""

    def logits(ids: Tensor, positions: Tensor) -> Tensor:
        device = model.tok_emb.weight.device
        return model.logits(model.hidden(ids[None].to(device))[0, positions.to(device)])

    return logits


def usual_text(dtype: str) -> str:
    low, high = precision(dtype).usual
    return f"between two right implementations, {dtype} usually gives a relative difference of {low:.0e} to {high:.0e}"


def require_comparable(trace: Trace, model: GPT) -> None:
    """Raise LoadstoneError unless the trace is of a model of the same build; layouts and settings may differ."""
    ours, theirs = model.config, trace.config
    names = ("n_layers", "d_model", "d_ff", "gated_mlp")
    pairs = [(name, getattr(ours, name), getattr(theirs, name)) for name in names]
    different = [(name, a, b) for name, a, b in pairs if a != b]
    queries = [c.n_heads * c.head_dim for c in (ours, theirs)]
    if queries[0] != queries[1]:
        different.append(("width of the queries", queries[0], queries[1]))
    keys = [c.n_kv_heads * c.head_dim for c in (ours, theirs)]
    if keys[0] % keys[1]:  # a multiple: heads that were copied for every query head
        different.append(("width of the keys", keys[0], keys[1]))
    largest = max(int(prompt.ids.max()) for prompt in trace.prompts)
    if largest >= ours.vocab_size:
        different.append(("vocabulary", ours.vocab_size, theirs.vocab_size))
    if different:
        lacking = {name for name, _, _ in different} <= {"n_layers", "vocabulary"}
        raise LoadstoneError(
            f"{trace.origin}: this reference is of another model, so their logits cannot be compared: "
            + ", ".join(f"{name} is {b} there and {a} here" for name, a, b in different)
            + (". One of the two lacks some of them, or they are" if lacking else ". They are")
            + " different models: choose a reference of the same one."
        )


def failed(parities: Sequence[Parity]) -> bool:
    return not all(parity.ok for parity in parities)
