"""One self-contained page: no script, no request, nothing that is not in the file. Light and dark, phone and desk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.resources import files

from .charts import Curve, bars, curves, mark
from .comparison import Comparison
from .heat import in_context, legend, strip, times
from .markup import Html, join, tag
from .tables import Group, Row, choice, domain_rows, figures, letter, verdict

# Nothing may be fetched or run, even if a model's text got through the escaping.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(found: Comparison) -> str:
    """The whole document."""
    title = " and ".join(model.name for model in found.models) + ", compared"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(files(__package__).joinpath("page.css").read_text(encoding="utf-8"))),
    )
    sections = (_figures, _domains, _samples, _curves, _differences, _protocol)
    body = tag("body", tag("main", _header(found, title), *(section(found) for section in sections)))
    return "<!DOCTYPE html>\n" + tag("html", head, "\n", body, lang="en") + "\n"


def _header(found: Comparison, title: str) -> Html:
    names = [
        tag("li", _key(index), " ", tag("strong", model.name), f" {model.architecture}")
        for index, model in enumerate(found.models)
    ]
    verdicts = [tag("p", verdict(found, index), class_="verdict") for index in range(1, len(found.models))]
    return tag("header", tag("h1", title), tag("ul", *names, class_="models"), *verdicts)


def _section(name: str, title: str, *content: str) -> Html:
    return tag("section", tag("h2", title, id=name), *content, "\n", aria_labelledby=name)


def _key(index: int) -> Html:
    """A model's letter on its colour."""
    return tag("span", letter(index), class_=f"key {mark(index)}")


# -- tables


def _table(name: str, caption: str, heads: Sequence[str], bodies: Sequence[Html]) -> Html:
    """A table that scrolls in its own box where it is too wide, with the keyboard too."""
    columns = tag("thead", tag("tr", *(tag("th", head, scope="col") for head in heads)))
    table = tag("table", tag("caption", caption, id=f"{name}-caption"), columns, *bodies)
    return tag("div", table, class_="scroll", role="region", tabindex=0, aria_labelledby=f"{name}-caption")


def _heads(found: Comparison, first: str) -> list[str]:
    return [first, *(join([_key(i), " ", model.name]) for i, model in enumerate(found.models))]


def _row(row: Row) -> Html:
    note = tag("span", row.note, class_="note") if row.note else ""
    cells = [
        tag("td", tag("strong", cell), tag("span", " (best)", class_="unseen")) if i in row.best else tag("td", cell)
        for i, cell in enumerate(row.cells)
    ]
    return tag("tr", tag("th", row.label, note, scope="row"), *cells)


def _group(group: Group) -> Html:
    title = tag(
        "tr",
        tag("th", tag("span", group.title), scope="rowgroup", colspan=1 + len(group.rows[0].cells)),
        class_="group",
    )
    return tag("tbody", title, *map(_row, group.rows))


def _figures(found: Comparison) -> Html:
    caption = "What each model is, and what it does under the same protocol. The best figure is bold."
    return _section(
        "figures", "In figures", _table("figures", caption, _heads(found, "Figure"), [*map(_group, figures(found))])
    )


def _domains(found: Comparison) -> Html:
    chart = bars("Bits per byte of each text", found.domains)
    caption = tag("figcaption", "Bits per byte: how much a model must be told of each text. Shorter bars are better.")
    note = "Bits per byte of each text, and in brackets the perplexity per token of the model's own vocabulary."
    table = _table("domains", note, _heads(found, "Text"), [tag("tbody", *map(_row, domain_rows(found)))])
    return _section("domains", "By kind of text", tag("figure", caption, chart), table)


# -- samples


def _samples(found: Comparison) -> Html:
    rule = found.protocol
    how = (
        f"Every model continues the same prompts from the same random seeds: {choice(rule)}, at most "
        f"{rule.max_new_tokens} tokens."
    )
    return _section("samples", "Same prompt, same seed", tag("p", how), *_prompts(found))


def _prompts(found: Comparison) -> Iterator[Html]:
    """All samples of one prompt under a heading, those of one seed beside each other."""
    for prompt in dict.fromkeys(found.protocol.prompts):
        yield tag("h3", f"{prompt} …")
        for seed in found.protocol.seeds:
            rows = [[s for s in model.samples if (s.prompt, s.seed) == (prompt, seed)] for model in found.models]
            cards = [_card(found, index, samples[0].text) for index, samples in enumerate(rows)]
            yield tag("p", f"Seed {seed}", class_="seed")
            yield tag("div", *cards, class_="cards")


def _card(found: Comparison, index: int, words: str) -> Html:
    caption = tag("figcaption", _key(index), " ", found.models[index].name)
    shown = tag("blockquote", words.strip()) if words.strip() else tag("p", "It ends the text here.", class_="note")
    return tag("figure", caption, shown)


# -- curves


def _curves(found: Comparison) -> Html:
    curved = [
        Curve(i, model.name, model.history.training, model.history.validation)
        for i, model in enumerate(found.models)
        if model.history and any(x > 0 for x, _ in (*model.history.training, *model.history.validation))
    ]
    without = [letter(i) for i in range(len(found.models)) if i not in {curve.index for curve in curved}]
    missing = [tag("p", f"No training log lies with {_listed(without)}.", class_="note")] if without else []
    if not curved:
        return _section("curves", "Loss while training", *missing)
    keys = [tag("li", _key(curve.index), " ", curve.name) for curve in curved]
    caption = tag(
        "figcaption",
        "Loss in nats per token against tokens seen (logarithmic). Thin: training; thick with points: validation. Each "
        "run has its own data and perhaps its own tokenizer: compare heights only where these are the same.",
    )
    chart = curves("Loss while training", curved)
    return _section(
        "curves", "Loss while training", tag("figure", caption, chart, tag("ul", *keys, class_="models")), *missing
    )


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


# -- where they differ


def _differences(found: Comparison) -> Html:
    how = (
        "Each text, cut where the tokens of both models end. A bit of difference means that one model held this piece "
        "for twice as likely as the other, given all that comes before it. A text that a tokenizer changes is one "
        "piece. Point at a marked piece to see its bits."
    )
    parts = [part for other in range(1, len(found.models)) for part in _pair(found, other)]
    return _section("differences", "Where they differ, token by token", tag("p", how), *parts)


def _pair(found: Comparison, other: int) -> Iterator[Html]:
    letters = letter(0), letter(other)
    yield tag("h3", f"{letters[0]} and {letters[1]}: {found.models[0].name} and {found.models[other].name}")
    rows = [
        tag(
            "tr",
            tag("th", in_context(found.texts[name].content, piece), scope="row"),
            tag("td", f"{letters[piece.difference > 0]}, {times(piece.difference)}×"),
            *(tag("td", f"{bits:.1f}") for bits in piece.bits),
            tag("td", name),
        )
        for name, piece in found.spans(other)
    ]
    if rows:
        heads = ["Piece", "More likely for", f"Bits of {letters[0]}", f"Bits of {letters[1]}", "Text"]
        caption = f"The {len(rows)} pieces in which {letters[0]} and {letters[1]} differ most."
        yield _table(f"spans{other}", caption, heads, [tag("tbody", *rows)])
    else:
        yield tag("p", "They give every piece the same probability.")
    yield legend(letters)
    for place, (name, text) in enumerate(found.texts.items()):
        shown = strip(text.content, found.pieces(other, name), letters)
        yield tag("details", tag("summary", name), shown, **({} if place else {"open": "open"}))


# -- protocol


def _protocol(found: Comparison) -> Html:
    rule = found.protocol
    facts = {
        "Scoring": f"Each text in windows of at most {rule.context:,} tokens of context (the smallest of the models'), "
        f"moved on by {rule.stride:,}; every token is scored once, behind a begin token if the vocabulary has one.",
        "Bits per byte": "Over the characters that every model scored, divided by their UTF-8 bytes.",
        "Intervals": "95%, from blocks of neighbouring pieces of these texts; other texts may well differ more.",
        "Samples": f"Seeds {', '.join(map(str, rule.seeds))}; at most {rule.max_new_tokens} tokens or to an end token.",
        "Speeds": "The best of two to five timings, on a machine that may have been busy.",
        "Computed in": f"{', '.join(dict.fromkeys(model.dtype for model in found.models))} on {rule.device}",
        "Made": f"{found.made['date']} by {found.made['program']} on {found.made['machine']}",
    }
    for index, model in enumerate(found.models):
        facts[f"Model {letter(index)}"] = "; ".join([model.source, *model.notes])
    pairs = [part for name, fact in facts.items() for part in (tag("dt", name), tag("dd", fact))]
    rows = [
        tag("tr", tag("th", name, scope="row"), tag("td", "; ".join([text.source, *text.notes])),
            tag("td", f"{len(text.content):,}"), tag("td", tag("code", text.sha256[:16])))
        for name, text in found.texts.items()
    ]  # fmt: skip
    heads = ["Text", "Source", "Characters", "SHA-256 begins"]
    table = _table("texts", "The texts that were scored.", heads, [tag("tbody", *rows)])
    return _section("protocol", "How this was measured", tag("dl", *pairs), table)
