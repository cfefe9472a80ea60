"""The tables of a comparison as rows of text, for the page and for Markdown alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..checkpoint.wording import size_text
from ..train.losses import perplexity
from .comparison import NGRAMS, Comparison, Difference, loss_of
from .measure import Measured, Protocol
from .repetition import REPEATED, distinct, repetition

UNKNOWN = "not known"


@dataclass(frozen=True)
class Row:
    """One figure of every model. `best`: who has the best one; empty where nobody has, or it says nothing."""

    label: str
    cells: tuple[str, ...]
    note: str = ""
    best: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Group:
    title: str
    rows: tuple[Row, ...]


def letter(index: int) -> str:
    """A, B, ... Z, AA: what a model is called where its name is too long."""
    high, low = divmod(index, 26)
    return (letter(high - 1) if high else "") + chr(ord("A") + low)


def figures(found: Comparison) -> list[Group]:
    """Document 000's table, your model against the pretrained one, with what else can be measured."""
    samples = f"{len(found.models[0].samples)} samples of up to {found.protocol.max_new_tokens} tokens"
    return [
        Group("The model", tuple(_model_rows(found))),
        Group("Training", tuple(_training_rows(found))),
        Group(f"Prediction of the same {len(found.texts)} texts", tuple(_prediction_rows(found))),
        Group(f"Coherence, as far as it can be counted: {samples}", tuple(_writing_rows(found))),
        Group("Size and speed", tuple(_cost_rows(found))),
    ]


def domain_rows(found: Comparison) -> list[Row]:
    """Bits per byte and perplexity of each text."""
    rows = []
    for name, values in found.domains.items():
        scores = [model.scores[name] for model in found.models]
        cells = [
            f"{bits(value)} ({_large(perplexity(score.nats / score.tokens))})"
            for value, score in zip(values, scores, strict=True)
        ]
        rows.append(Row(name, tuple(cells), best=_lowest(values, bits)))
    return rows


def _model_rows(found: Comparison) -> Iterator[Row]:
    yield _row(found, "Architecture", lambda model: model.architecture)
    yield _row(found, "Parameters", lambda model: f"{model.parameters:,}", "each counted once, a tied head too")
    yield _row(found, "Parameters, untied", lambda model: f"{model.untied_parameters:,}", "with a head of its own")
    yield _row(found, "Vocabulary", lambda model: f"{model.vocabulary:,} tokens")
    yield _row(found, "Context", lambda model: f"{model.context:,} tokens")


def _training_rows(found: Comparison) -> Iterator[Row]:
    histories = [model.history for model in found.models]
    yield Row("Trained on", tuple(_known(h and h.tokens, lambda n: f"{amount(n)} tokens") for h in histories))
    yield Row("Training time", tuple(_known(h and h.seconds, duration) for h in histories))
    note = "the last one before this checkpoint, on its own run's data, so it cannot be compared"
    yield Row("Validation loss", tuple(_known(h and h.validation_loss, "{:.3f}".format) for h in histories), note)


def _prediction_rows(found: Comparison) -> Iterator[Row]:
    losses = [loss_of(model) for model in found.models]
    warning = "" if found.same_tokens else "; the models' tokens differ, so this cannot be compared"
    alone, power = "nats per token of its own vocabulary", "per token: e to the power of the loss"
    yield Row("Loss", tuple(f"{loss:.3f}" for loss in losses), alone + warning)
    yield Row("Perplexity", tuple(_large(perplexity(loss)) for loss in losses), power + warning)
    best = _lowest(found.bits_per_byte, bits)
    yield Row("Bits per byte", tuple(map(bits, found.bits_per_byte)), "for any tokenizer; lower is better", best)
    others = [interval(found.difference(index)) for index in range(1, len(found.models))]
    yield Row("Difference from A", ("", *others), "bits per byte, with its 95% interval over these texts")
    characters = sum(len(text.content) for text in found.texts.values())
    tokens = [sum(score.tokens for score in model.scores.values()) for model in found.models]
    yield Row("Characters per token", tuple(f"{characters / n:.2f}" for n in tokens), "of these texts")


def _writing_rows(found: Comparison) -> Iterator[Row]:
    texts = [[sample.text for sample in model.samples] for model in found.models]
    note = f"sequences of {REPEATED} words that the sample had before"
    yield Row("Repetition", tuple(_known(repetition(each), "{:.1%}".format) for each in texts), note)
    for n in NGRAMS:
        what = "different words / all words" if n == 1 else f"the same for sequences of {n} words"
        yield Row(f"Distinct-{n}", tuple(_known(distinct(each, n), "{:.3f}".format) for each in texts), what)


def _cost_rows(found: Comparison) -> Iterator[Row]:
    yield _row(found, "File size", lambda model: f"{size_text(model.file_bytes, tenths_below=1000)} ({model.stored})")
    yield _row(
        found, "Memory of weights", lambda model: f"{size_text(model.weight_bytes, tenths_below=1000)} ({model.dtype})"
    )
    for label, note, speed in (
        ("Reading speed", "tokens per second, texts in a batch", [model.reading_speed for model in found.models]),
        ("Writing speed", "tokens per second, one text", [model.writing_speed for model in found.models]),
    ):
        yield Row(label, tuple(map(_large, speed)), note)


def _row(found: Comparison, label: str, cell: Callable[[Measured], str], note: str = "") -> Row:
    return Row(label, tuple(map(cell, found.models)), note)


def _lowest(values: Sequence[float], shown: Callable[[float], str]) -> frozenset[int]:
    """Who has the lowest value, as far as can be seen; nobody where all look the same."""
    texts = [shown(value) for value in values]
    winner = texts[min(range(len(values)), key=values.__getitem__)]
    return frozenset(i for i, each in enumerate(texts) if each == winner) if len(set(texts)) > 1 else frozenset()


# -- one value as text


def _known(value: Any, shown: Callable[[Any], str]) -> str:
    return UNKNOWN if value is None else shown(value)


def bits(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "nothing scored"


def _large(value: float) -> str:
    """Three digits at least: 5.38, 61.4, 217, 1,288."""
    if not math.isfinite(value):
        return "infinite"
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f}" if value < 1e9 else f"{value:.2g}"


def amount(value: float) -> str:
    """14.3 million."""
    rounded = float(f"{value:.3g}")  # first, as 999.9 million is 1 billion
    for size, unit in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if rounded >= size:
            return f"{rounded / size:.3g} {unit}"
    return f"{value:,.0f}"


def choice(rule: Protocol) -> str:
    """How the tokens of the samples are chosen."""
    return f"temperature {rule.temperature:g}, {'no top-k' if rule.top_k is None else f'top-k {rule.top_k}'}"


def duration(seconds: float) -> str:
    """5303 -> 1 h 28 min."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def interval(found: Difference) -> str:
    if math.isnan(found.value):
        return bits(found.value)
    if found.low is None or found.high is None:
        return f"{signed(found.value)} (too short a text for an interval)"
    return f"{signed(found.value)} ({signed(found.low)} to {signed(found.high)})"


def signed(value: float, digits: int = 3) -> str:
    """With a true minus sign, which screen readers say; zero has none."""
    shown = f"{value:+.{digits}f}"
    return shown.replace("-", "−") if float(shown) else f"{0:.{digits}f}"


def verdict(found: Comparison, other: int) -> str:
    """One sentence: which of two models predicts the texts better, and whether that is more than chance."""
    first, second = letter(0), letter(other)
    difference = found.difference(other)
    if math.isnan(difference.value):
        return f"{first} and {second} cannot be compared: in none of these texts are there characters that all scored."
    better, worse = (first, second) if difference.value > 0 else (second, first)
    values = {name: bits(found.bits_per_byte[index]) for name, index in ((first, 0), (second, other))}
    if float(f"{difference.value:.3f}") == 0:
        return f"{first} and {second} predict these texts equally well: {values[first]} bits per byte."
    figure = f"{values[better]} bits per byte against {values[worse]}"
    if difference.low is None or difference.high is None:
        return f"{better} predicts these texts better than {worse} ({figure}); they are too short to rule out chance."
    if difference.low <= 0 <= difference.high:
        return f"{better} predicts these texts a little better than {worse} ({figure}), but no more than chance allows."
    return f"{better} predicts these texts better than {worse}: {figure}, where less is better."
