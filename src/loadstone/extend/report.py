"""`Report`: what an extension changed, and what it cost the old text, as data and as lines of text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..checkpoint.wording import few, shown


@dataclass(frozen=True)
class Loss:
    """Of the old text.

    Attributes:
        nats: mean cross-entropy per token.
        bits_per_byte: the same over the text's UTF-8 bytes.
        mass, most: probability that the new tokens take together, mean and maximum over positions.
    """

    nats: float
    bits_per_byte: float
    mass: float = 0.0
    most: float = 0.0

    @classmethod
    def of(cls, nats: float, count: int, nbytes: int, mass: float = 0.0, most: float = 0.0) -> Loss:
        """From a sum of nats over `count` tokens."""
        return cls(nats / count, nats / math.log(2) / max(nbytes, 1), mass, most)


@dataclass(frozen=True)
class Logits:
    """Of the old rows, before and after.

    Attributes:
        rows_equal: the stored rows are the same to the last bit.
        hidden_equal: so are the hidden states that they are multiplied with. With both, a difference of logits can only
            be rounding: a product of another size, or with a matrix elsewhere in memory, may add in another order.
        difference: prompt length -> largest absolute difference of logits; 0 means equal to the last bit.
    """

    rows_equal: bool
    hidden_equal: bool
    difference: Mapping[int, float]

    @property
    def equal(self) -> bool:
        return self.rows_equal and self.hidden_equal and not any(self.difference.values())


@dataclass(frozen=True)
class Norms:
    """Euclidean lengths of rows: mean of the trained ones; least, mean and greatest of the new tokens'."""

    old: float
    least: float
    new: float
    greatest: float


@dataclass(frozen=True)
class Added:
    """A new token. `was` is what its row was before: `padding`, or `none` if the matrix grew for it."""

    text: str
    id: int
    was: str


@dataclass(frozen=True)
class Report:
    """What an extension did.

    Attributes:
        tokens: the new ones.
        special: they are found only where special text is parsed.
        init, seed: the way to initialise that was chosen.
        tied: head and embedding are one matrix; else both were extended, each from its own rows.
        rows: of the matrix, before and after.
        padding: rows without a token, before and after.
        logits: whether the old ones are what they were.
        text: the old text: name, tokens that were scored, bytes.
        before: its loss before.
        after: the way to initialise -> its loss with it.
        norms: `embedding`, and `head` where it is a matrix of its own.
        remarks: what the user should know, one sentence each.
    """

    tokens: tuple[Added, ...]
    special: bool
    init: str
    seed: int
    tied: bool
    rows: tuple[int, int]
    padding: tuple[int, int]
    logits: Logits
    text: Mapping[str, Any]
    before: Loss
    after: Mapping[str, Loss]
    norms: Mapping[str, Norms]
    remarks: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"logits": asdict(self.logits) | {"equal": self.logits.equal}}

    def lines(self) -> Iterator[tuple[str, str]]:
        """(label, text); labels may repeat or be empty."""
        yield "tokens", few((f"{shown(token.text)} is {token.id}" for token in self.tokens), 8)
        yield "rows", self._rows()
        yield "old rows", self._logits()
        for name, norms in self.norms.items():
            yield (
                "",
                f"{name} row length: old {norms.old:.3g} on average, new {norms.least:.3g} to {norms.greatest:.3g}",
            )
        yield "old text", f"{self.text['name']}: {self.text['tokens']} tokens, {self.text['bytes']} bytes"
        yield (
            "",
            f"{'':10} {'nats/token':>10} {'change':>10} {'bits/byte':>10}   new tokens' probability, mean and most",
        )
        yield "", f"{'before':10} {self.before.nats:10.4f} {'':>10} {self.before.bits_per_byte:10.4f}"
        for name, loss in self.after.items():
            change, chosen = loss.nats - self.before.nats, "   <- written" if name == self.init else ""
            numbers = f"{loss.nats:10.4f} {change:+10.2g} {loss.bits_per_byte:10.4f}   {loss.mass:.1e} {loss.most:.1e}"
            yield "", f"{name:10} {numbers}{chosen}"
        for remark in self.remarks:
            yield "note", remark

    def _rows(self) -> str:
        took = sum(token.was == "padding" for token in self.tokens)
        text = (
            f"{self.rows[0]:,} -> {self.rows[1]:,}" if self.rows[1] != self.rows[0] else f"{self.rows[0]:,}, as before"
        )
        text += f"; {took} of the new tokens took over padding rows, initialised anew" if took else ""
        text += f"; {self.padding[1]:,} rows of padding are left" if self.padding[1] else ""
        return text + ("; head tied to the embedding" if self.tied else "; embedding and head each from their own rows")

    def _logits(self) -> str:
        if not (self.logits.rows_equal and self.logits.hidden_equal):
            return "NOT what they were"
        lengths = ", ".join(map(str, self.logits.difference))
        if self.logits.equal:
            return f"equal to the last bit, as are hidden states and logits at lengths {lengths}"
        worst = max(self.logits.difference.values())
        return (
            f"equal to the last bit, as are hidden states; logits at lengths {lengths} differ by up to {worst:.1e}: "
            "rounding, as the matrix product is taken in other pieces"
        )
