"""The same tables as Markdown, for a model card or an issue."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from ..checkpoint.wording import visible
from .comparison import Comparison
from .heat import shortened, times
from .tables import Row, choice, domain_rows, figures, letter, verdict

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~&])")  # what could be markup, HTML included


def markdown(found: Comparison) -> str:
    """The whole document; texts of models and files cannot become markup."""
    return "\n".join(_lines(found)) + "\n"


def _lines(found: Comparison) -> Iterator[str]:
    names = [f"{letter(i)}: {plain(model.name)}" for i, model in enumerate(found.models)]
    yield f"# {plain(' and '.join(model.name for model in found.models))}, compared"
    for other in range(1, len(found.models)):
        yield f"\n{plain(verdict(found, other))}"
    yield "\n## In figures\n"
    yield from _table(["", *names], _figures(found))
    yield "\n## By kind of text\n\nBits per byte, and in brackets the perplexity per token.\n"
    yield from _table(["", *names], map(_cells, domain_rows(found)))
    yield "\n## Same prompt, same seed\n"
    yield from _table(["prompt", "seed", *names], _samples(found))
    for other in range(1, len(found.models)):
        yield f"\n## Where {letter(0)} and {letter(other)} differ most\n"
        heads = ["piece", "text", f"bits of {letter(0)}", f"bits of {letter(other)}", "more likely for"]
        spans = list(_spans(found, other))
        yield from _table(heads, spans) if spans else ["They give every piece the same probability."]
    rule, made = found.protocol, found.made
    yield (
        f"\nContext {rule.context}, stride {rule.stride}, {choice(rule)}. "
        f"{plain(made['date'])}, {plain(made['program'])}, {plain(made['machine'])}."
    )


def plain(text: str) -> str:
    """Text as text, on one line."""
    return _SPECIAL.sub(r"\\\1", visible(text.replace("\n", "↵")))


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    for cells in (heads, ["---"] * len(heads), *rows):
        yield f"| {' | '.join(cells)} |"


def _figures(found: Comparison) -> Iterator[list[str]]:
    for group in figures(found):
        yield [f"**{plain(group.title)}**", *[""] * len(found.models)]
        yield from map(_cells, group.rows)


def _cells(row: Row) -> list[str]:
    note = f" ({plain(row.note)})" if row.note else ""
    return [
        plain(row.label) + note,
        *(f"**{plain(c)}**" if i in row.best else plain(c) for i, c in enumerate(row.cells)),
    ]


def _samples(found: Comparison) -> Iterator[list[str]]:
    for samples in zip(*(model.samples for model in found.models), strict=True):
        yield [plain(samples[0].prompt), str(samples[0].seed), *(plain(sample.text) for sample in samples)]


def _spans(found: Comparison, other: int) -> Iterator[list[str]]:
    for name, piece in found.spans(other):
        better = letter(other) if piece.difference > 0 else letter(0)
        said = plain(shortened(found.texts[name].content[piece.begin : piece.end]))
        yield [said, plain(name), *(f"{bits:.1f}" for bits in piece.bits), f"{better}, {times(piece.difference)}×"]
