"""The page: sound structure, nothing from outside, nobody's text as markup, colours that can be read."""

from __future__ import annotations

import itertools
import re
from importlib.resources import files

import pytest

from compared import HOSTILE, TEXTS
from loadstone.compare import Comparison
from loadstone.compare.align import Piece
from loadstone.compare.charts import Curve, bars, curves
from loadstone.compare.heat import strip, times
from loadstone.compare.markdown import markdown, plain
from loadstone.compare.markup import Html, join, tag, text
from loadstone.compare.page import page
from pages import Document, contrast

CSS = files("loadstone.compare").joinpath("page.css").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def document(comparison: Comparison) -> Document:
    return Document(page(comparison))


def test_the_page_has_a_language_a_title_and_headings_in_order(document: Document) -> None:
    assert document.all("html")[0][0] == {"lang": "en"}
    ((_, title),) = [found for found in document.all("title") if "id" not in found[0]]
    ((_, heading),) = document.all("h1")
    assert heading == title == "run and other and best, compared"
    levels = [int(name[1]) for name, _, _ in document.elements if re.fullmatch("h[1-6]", name)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert levels.count(2) == 6
    assert len(document.all("main")) == 1


def test_every_table_is_named_and_its_heads_say_what_they_head(document: Document) -> None:
    tables = document.all("table")
    assert len(tables) == len(document.all("caption")) == 3 + 1  # the third model equals the first: nothing to list
    assert {attributes.get("scope") for attributes, _ in document.all("th")} == {"col", "row", "rowgroup"}
    boxes = [attributes for attributes, _ in document.all("div") if attributes.get("class") == "scroll"]
    assert len(boxes) == len(tables)
    for box in boxes:  # who has no mouse can scroll it, and hears what it is
        assert (box["role"], box["tabindex"]) == ("region", "0")


def test_everything_that_is_referred_to_by_id_is_there_once(document: Document) -> None:
    ids = document.ids()
    assert len(ids) == len(set(ids))
    named = [a[key] for _, a, _ in document.elements for key in ("aria-labelledby", "aria-describedby") if key in a]
    assert len(named) >= 10
    assert {name for names in named for name in names.split()} <= set(ids)


def test_pictures_say_in_words_what_they_show(document: Document, comparison: Comparison) -> None:
    pictures = [attributes for attributes, _ in document.all("svg") if attributes.get("role") == "img"]
    assert [picture["class"] for picture in pictures] == ["bars", "curves"]
    told = " ".join(words for _, words in document.all("desc"))
    for values in comparison.domains.values():
        assert all(f"{value:.3f}" in told for value in values)
    assert "A (run) ends after 51,200 tokens with training loss" in told


def test_nothing_comes_from_outside(document: Document) -> None:
    for name, attributes, words in document.elements:
        assert name not in {"script", "link", "img", "iframe", "object", "base", "form", "a", "image", "use"}
        assert not {key for key in attributes if key.startswith("on") or key in {"src", "href", "xlink:href", "style"}}
        assert name != "style" or not re.search(r"url\(|@import|expression", "".join(words))
    policy = [a["content"] for a, _ in document.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy[0].startswith("default-src 'none'")


def test_texts_of_models_and_files_stay_texts(document: Document, comparison: Comparison) -> None:
    assert "script" not in {name for name, _, _ in document.elements}
    assert "b" not in {name for name, _, _ in document.elements}
    prompts = [words for _, words in document.all("h3")]
    assert prompts[1] == HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e") + " …"
    shown = [words for attributes, words in document.all("p") if attributes.get("class") == "strip"]
    assert [words.replace("↵", "") for words in shown] == list(TEXTS.values()) * 2
    assert "\x1b" not in page(comparison)


def test_markup_escapes_whatever_it_did_not_make_itself() -> None:
    assert tag("p", "<b>", class_='"x"') == '<p class="&quot;x&quot;">&lt;b&gt;</p>'
    assert tag("p", tag("q", "&"), None_="x") == '<p None="x"><q>&amp;</q></p>'
    assert tag("rect", x=1, y=None) == '<rect x="1"/>'
    assert join(["<", Html("<hr>")], " & ") == "&lt; &amp; <hr>"
    assert text("a\x00\ud800\u2066\r\n\té👍🏽") == "a\\x00\\ud800\\u2066\\r\n\té👍🏽"
    assert type(text("a")) is Html


def test_markdown_escapes_and_has_whole_tables(comparison: Comparison) -> None:
    lines = markdown(comparison).splitlines()
    for i, line in enumerate(lines):
        if line.startswith("| ---"):
            table = [lines[i - 1], *(row for row in lines[i : i + 5] if row.startswith("|"))]
            assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table}) == 1
    assert plain("a|b\n<i>*x*\x1b") == r"a\|b↵\<i\>\*x\*\\x1b"
    assert not re.search(r"(?<!\\)[<`]", markdown(comparison))


# -- charts and strip


def test_bars_are_as_long_as_their_values() -> None:
    document = Document(bars("t", {"x": [1.0, 2.0], "y": [4.0, float("nan")]}))
    widths = [float(attributes["width"].rstrip("%")) for attributes, _ in document.all("rect")]
    assert widths == pytest.approx([19.5, 39, 78, 0])
    assert [words for _, words in document.all("text")] == [
        "x",
        "A 1.000",
        "B 2.000",
        "y",
        "A 4.000",
        "B nothing scored",
    ]


def test_curves_run_from_left_to_right_and_down() -> None:
    falling = tuple((10.0**k, 8.0 - k) for k in range(3, 7))
    document = Document(curves("t", [Curve(0, "a", falling, ()), Curve(1, "b", (), ((1000.0, 2.01),))]))
    points = [[float(n) for n in re.split("[ ,]", a["points"]) if n] for a, _ in document.all("polyline")]
    assert [len(each) for each in points] == [8, 0, 0, 2]
    across, down = points[0][::2], points[0][1::2]
    assert across == sorted(across)
    assert across[0] == 0
    assert across[2] - across[1] == pytest.approx(across[1] - across[0], abs=0.02)  # logarithmic
    assert down == sorted(down)
    assert all(0 <= value <= 100 for each in points for value in each)
    letters = [(w, float(a["y"])) for a, w in document.all("text") if a["class"] == "letter"]
    assert [name for name, _ in letters] == ["B", "A"]
    assert letters[1][1] - letters[0][1] >= 14  # one below the other where they would overlap


@pytest.mark.parametrize(
    ("least", "most"), [(20_480, 20_480_000), (20_480, 30_000), (512, 8e6), (4096, 1e10), (7.2e4, 7.3e4)]
)
@pytest.mark.parametrize(("low", "high"), [(2, 9), (2, 3e5), (4, 1e30), (3.001, 3.002), (4, 4)])
def test_the_axes_have_round_figures_whatever_the_run(least: float, most: float, low: float, high: float) -> None:
    markup = curves("t", [Curve(0, "a", ((least, high), (most, low)), ())])
    assert not re.search(r'"-?(nan|inf)', markup)
    ticks = [(a["x"], a["class"], words) for a, words in Document(markup).all("text") if "tick" in a["class"]]
    across = [(float(x.rstrip("%")), style, words) for x, style, words in ticks if x.endswith("%")]
    assert 2 <= len(across) <= 5
    assert 2 <= len(ticks) - len(across) <= 8
    assert len({words for _, _, words in ticks}) == len(ticks)
    for x, style, _ in across:
        assert style == ("tick" if x < 8 else "tick end" if x > 92 else "tick middle")
    assert all(after - before > 14 for (before, *_), (after, *_) in itertools.pairwise(across))


def test_the_strip_marks_who_foresaw_a_piece_and_how_much() -> None:
    content = "abcdefg\n"
    bits = [(1, 1.5), (1, 2), (1, 3.5), (9, 1), (float("nan"), 9), (2, 2), (2.9, 2), (1, 5)]
    found = [Piece(i, i + 1, pair) for i, pair in enumerate(bits)]
    document = Document(strip(content, found, ("A", "C")))
    marked = [(attributes["class"], attributes["title"], words) for attributes, words in document.all("span")]
    assert marked == [
        ("first1", "A 1.0 bits, C 2.0 bits", "b"),
        ("first2", "A 1.0 bits, C 3.5 bits", "c"),
        ("other3", "A 9.0 bits, C 1.0 bits", "d"),
        ("first3", "A 1.0 bits, C 5.0 bits", "↵\n"),
    ]
    assert document.all("p")[0][1] == "abcdefg↵\n"
    assert [times(d) for d in (1, -4, 10.3, 2000)] == ["2.0", "16", "1,261", "over a million"]


# -- colours


def palette(scheme: str) -> dict[str, str]:
    blocks = re.findall(r":root \{(.*?)\}", CSS, re.S)
    found: dict[str, str] = {}
    for block in blocks[: 1 if scheme == "light" else 2]:
        found |= dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_and_marks_can_be_seen(scheme: str) -> None:
    colour = palette(scheme)
    tints = [f"{side}{level}" for side in ("first", "other") for level in (1, 2, 3)]
    texts = [("text", "ground"), ("text", "panel"), ("soft", "ground"), ("soft", "panel")]
    texts += [("text", tint) for tint in tints] + [("on-mark", f"m{i}") for i in range(6)]
    marks = [(f"m{i}", "ground") for i in range(6)] + [("focus", "ground"), ("focus", "panel")]
    marks += [(f"{side}-line", f"{side}{level}") for side in ("first", "other") for level in (1, 2, 3)]
    poor = {pair: ratio for pair in texts if (ratio := contrast(*(colour[name] for name in pair))) < 4.5}
    poor |= {pair: ratio for pair in marks if (ratio := contrast(*(colour[name] for name in pair))) < 3}
    assert not poor
    assert contrast("#000000", "#ffffff") == 21


def test_every_class_of_the_page_has_its_style(document: Document) -> None:
    used = {name for _, attributes, _ in document.elements for name in attributes.get("class", "").split()}
    styled = set(re.findall(r"\.([a-z][\w-]*)", re.sub(r"\.\d", "", CSS)))
    assert used - styled <= {"d0", "curves", "name"}
    assert ":focus-visible" in CSS
