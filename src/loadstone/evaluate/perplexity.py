"""Perplexity of a text: windows over its tokens, and one sum of nats that is divided by four different counts.

A figure without its protocol cannot be compared: GPT-2 124M has 29.94 on WikiText-2 per token with disjoint windows,
37.37 per word, and 29.41 in the paper. Here one pass gives all units, and each is labelled.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..data.records import decoded, read_bytes
from ..errors import FormatError, LoadstoneError
from ..tokenizer import Tokenizer
from ..train.losses import perplexity
from .intervals import Interval, Metric, interval_of_mean
from .scoring import Request

BLOCK = 256  # targets whose sum is one observation of the interval: neighbours are alike, blocks hardly


class Window(NamedTuple):
    """Tokens begin..end of the stream, the last `targets` of which are scored."""

    begin: int
    end: int
    targets: int


def windows(length: int, context: int, stride: int) -> list[Window]:
    """Windows over a stream of `length` tokens that score each but the first exactly once.

    Each reads at most `context` tokens. The first scores all it reads, every further one the next `stride`, so that
    each of these is given at least context - stride + 1 tokens. The last ends with the stream and still reads a whole
    context. Stride = context is the fastest and the worst for the model (llm.c, lm-evaluation-harness), stride 1 gives
    every token all the context that there is.
    """
    if not 0 < stride <= context:
        raise LoadstoneError(
            f"a stride of {stride} and a context of {context}: the stride must be from 1 to the context."
        )
    found: list[Window] = []
    scored = 1  # tokens dealt with; the first is only read
    while scored < length:
        end = min(length, scored + (stride if found else context))
        found.append(Window(max(0, end - 1 - context), end, end - scored))
        scored = end
    return found


@dataclass(frozen=True)
class Text:
    """A text and where it comes from.

    Attributes:
        content: what is scored.
        sha256: of the file, or of the text where there is no file.
        words, originals: counted in the text as published, whatever was de-tokenised: what whitespace separates, and
            these plus line ends, which are the tokens of WikiText's and Penn Treebank's own vocabularies (`<eos>`).
        notes: what a reader of the figures should know.
    """

    content: str
    source: str
    sha256: str
    words: int
    originals: int
    form: str = "as it is"
    notes: tuple[str, ...] = ()


def read_text(path: Path) -> Text:
    """A file as one text: UTF-8, line ends as they are. Raises SourceError or FormatError, also if it is empty."""
    raw = read_bytes(path)
    content = decoded(path, raw)
    notes = []
    if len(content.encode()) < len(raw):
        notes.append("the byte order mark at its beginning is left out")
    if ends := content.count("\r\n"):
        notes.append(
            f"{ends:,} Windows line ends are scored as they are, and cost the model more than plain ones; to compare "
            "with a file without, remove them: sed 's/\\r$//'"
        )
    return text_of(content, path.name, hashlib.sha256(raw).hexdigest(), tuple(notes))


def text_of(content: str, source: str, sha256: str | None = None, notes: tuple[str, ...] = ()) -> Text:
    if not content.strip():
        raise FormatError(source, "there is no text in it.", "Name a file with text.")
    words = len(content.split())
    sha256 = sha256 or hashlib.sha256(content.encode()).hexdigest()
    return Text(content, source, sha256, words, words + content.count("\n"), notes=notes)


@dataclass(frozen=True)
class Stream:
    """The tokens of a text, with a begin token if the vocabulary has one, cut into windows.

    Attributes:
        ids: all tokens; the first is only read.
        begun: whether the first is a begin token. If not, the text's own first token is not scored, and its bytes are
            not counted.
        bytes: UTF-8 bytes of what is scored.
    """

    text: Text
    ids: NDArray[np.int64]
    begun: bool
    bytes: int
    context: int
    stride: int
    windows: Sequence[Window] = field(repr=False)

    def requests(self) -> list[Request]:
        return [Request(self.ids[window.begin : window.end], window.targets) for window in self.windows]

    def protocol(self) -> dict[str, str | int]:
        return {
            "text": self.text.source, "form": self.text.form, "sha256": self.text.sha256, "context": self.context,
            "stride": self.stride, "first_token": "given a begin token" if self.begun else "not scored",
        }  # fmt: skip


def stream(text: Text, tokenizer: Tokenizer, context: int, stride: int) -> Stream:
    """Raises LoadstoneError if there is nothing to score."""
    ids = tokenizer.encode(text.content, add_special=False)
    size = len(text.content.encode())
    begun = tokenizer.bos_id is not None
    if tokenizer.bos_id is not None:
        ids = [tokenizer.bos_id, *ids]
    elif ids:
        size -= len(tokenizer.token_bytes(ids[0]))
    if len(ids) < 2:
        raise LoadstoneError(
            f"{text.source}: the text is a single token and the vocabulary has no begin token to come before it, so "
            "there is nothing to score. Take a longer text."
        )
    return Stream(text, np.array(ids), begun, size, context, stride, windows(len(ids), context, stride))


def perplexities(nats: NDArray[np.float64], stream: Stream) -> list[Metric]:
    """All units from the nats of the scored tokens, in order; fewer tokens than the stream has if it was limited.

    Interval: 95%, from the standard error of the mean over blocks of BLOCK neighbouring tokens. It says how far another
    text of this kind might be, not how exactly this one was measured (that is float32's business).
    """
    share = len(nats) / (len(stream.ids) - 1)
    counts = {
        "token_perplexity": (float(len(nats)), "exp(nats / tokens of the model's vocabulary)"),
        "word_perplexity": (stream.text.words * share, "exp(nats / words between white space)"),
        "bits_per_byte": (stream.bytes * share, "nats / ln 2 / UTF-8 bytes scored"),
        "paper_perplexity": (
            stream.text.originals * share,
            "exp(nats / (words + line ends)), as the GPT-2 paper scales",
        ),
    }
    interval = interval_of_mean(blocks(nats))
    return [metric_of(unit, interval, len(nats) / count, meaning) for unit, (count, meaning) in counts.items()]


def blocks(nats: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(sums, sizes) of neighbouring tokens; a rest of less than a whole block joins the last one."""
    starts = np.arange(0, max(1, len(nats) - BLOCK + 1), BLOCK)
    return np.add.reduceat(nats, starts), np.diff(np.append(starts, len(nats))).astype(np.float64)


def metric_of(name: str, interval: Interval, tokens_each: float, meaning: str) -> Metric:
    """Mean nats per token, with their interval, as a figure of a unit that has so many tokens."""
    mean, low, high = (None if nats is None else _in_unit(name, nats * tokens_each) for nats in interval)
    return Metric(name, mean, low, high, meaning)


def _in_unit(unit: str, nats: float) -> float:
    """Mean nats of what a unit counts -> perplexity, or bits."""
    if unit == "bits_per_byte":
        return nats / math.log(2)
    return perplexity(nats)
