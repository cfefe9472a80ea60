"""The page as a whole, and what it shows of a text and of a model, in a real browser."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest

from browser import CHROMIUM, Browser
from loadstone.serve.page import FILES
from paged import DETAILS, Page, chatting, paged
from pages import contrast
from serving import serving

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package `chromium`")
TABS = ("write", "surprisal", "attention", "report")
HOSTILE = '<img src=x onerror="document.title=1"> a\n\n b\t🦄é end'
STICKING_OUT = """[...document.querySelectorAll("body *")]
  .filter(e => e.checkVisibility() && !e.closest(".unseen, thead"))
  .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5)
  .map(e => e.outerHTML.slice(0, 80))"""
# Each visible element with text of its own: its colour, and that of the first ground behind it that is not clear.
COLOURS = """[...document.querySelectorAll("body *")]
  .filter(e => e.checkVisibility() && !e.matches("option, :disabled, .unseen"))
  .filter(e => [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()))
  .map(e => {
    let ground = e;
    while (/^rgba\\(.* 0\\)$|\\/ 0\\)$/.test(getComputedStyle(ground).backgroundColor)) ground = ground.parentElement;
    return [e.outerHTML.slice(0, 80), getComputedStyle(e).color, getComputedStyle(ground).backgroundColor]
  })"""

# How red the middle of each cell is: 245 for the ground, 8 for the strongest.
REDS = """(() => {
  const canvas = document.querySelector("#heatmap"), cell = (canvas.width - 88) / %d;
  const pen = canvas.getContext("2d"), middle = at => 88 + (at + 0.5) * cell;
  const red = (row, column) => pen.getImageData(middle(column), middle(row), 1, 1).data[0];
  return [...Array(%d).keys()].map(row => [...Array(row + 1).keys()].map(column => red(row, column)));
})()"""


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with paged() as found:
        yield found


def show_everything(page: Page) -> None:
    """All four tabs filled; the last one is open."""
    page.run()
    for tab in ("surprisal", "attention"):
        page.browser.click(f"#tab-{tab}")
        page.browser.click(f"#{tab}-form .main")
        page.browser.until(f"!document.querySelector('#{tab}-result').hidden")
    page.browser.click("#tab-report")
    page.browser.until("!document.querySelector('#report-result').hidden")


def test_every_file_of_the_page_is_served_under_its_policy(page: Page) -> None:
    there = {each.name for each in (files("loadstone.serve") / "static").iterdir()}
    assert {name for name, _ in FILES.values()} == there
    for path, (_, kind) in FILES.items():
        found = page.server.call(path)
        assert found.headers["content-type"].startswith(kind)
        assert found.headers["content-security-policy"].startswith("default-src 'self';")
    markup = page.server.call("/").body.decode()
    assert not re.search(r'style="|\son[a-z]+=|<script>|<style|https?:', markup)


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (360, "dark"), (1200, "light"), (1200, "dark")])
def test_it_fits_and_can_be_read_and_asks_nobody_else(page: Page, width: int, scheme: str) -> None:
    page.open(width=width, scheme=scheme, beside="chat", max_tokens=12)
    show_everything(page)
    assert {
        request["request"]["url"].split("/")[2] for request in page.browser.happened("Network.requestWillBeSent")
    } == {page.server.url.split("/")[2]}
    assert page.complaints() == []
    for tab in TABS:
        page.browser.click(f"#tab-{tab}")
        if tab in ("write", "surprisal"):
            page.browser.hover(f"#panel-{tab} .token:nth-child(3)")
        assert page.browser.value("document.documentElement.scrollWidth") == width, tab
        assert page.browser.value(STICKING_OUT) == [], tab
        found = [case for case in page.browser.value(COLOURS) if not case[1].startswith("color(")]
        assert len(found) > 15
        assert not [case for case in found if "srgb" not in case[2] and contrast(_hex(case[1]), _hex(case[2])) < 4.5]


def test_tabs_go_by_the_arrow_keys_and_stay_in_the_address(page: Page) -> None:
    page.open()
    page.browser.value("document.querySelector('#tab-write').focus()")
    reached = []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "End", "ArrowRight", "ArrowLeft"):
        page.browser.press(key)
        reached.append(page.browser.value("document.querySelector('[aria-selected=true]').id"))
        shown = page.browser.value("[...document.querySelectorAll('[role=tabpanel]:not([hidden])')].map(e => e.id)")
        assert shown == [reached[-1].replace("tab-", "panel-")]
    assert reached == [f"tab-{name}" for name in ("surprisal", "attention", "surprisal", "report", "write", "report")]
    assert "tab=tab-report" in page.browser.value("location.hash")
    assert page.browser.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.browser.press("Tab")
    assert page.browser.value("document.activeElement.id") == "filter"


def test_surprisal_is_the_servers_and_its_text_is_only_text(page: Page) -> None:
    page.open("surprisal")
    page.fill("#surprisal-text", HOSTILE)
    page.browser.click("#surprisal-form .main")
    page.browser.until("!document.querySelector('#surprisal-result').hidden")
    asked = {"model": "tiny", "text": HOSTILE, "top": 10}
    tokens = page.server.call("/inspect/surprisal", asked).json["tokens"]
    assert page.text("#surprisal-strip") == HOSTILE
    assert page.count("#surprisal-strip .token") == len(tokens)
    assert page.count("img") == 0
    assert page.browser.value("document.title") != "1"
    logprobs = [token["logprob"] for token in tokens[1:]]
    figures = dict(zip(page.texts("#surprisal-totals dt"), page.texts("#surprisal-totals dd"), strict=True))
    assert figures["total"] == f"{-sum(logprobs) / math.log(2):.1f} bits = {-sum(logprobs):.1f} nats"
    assert float(figures["perplexity"]) == pytest.approx(math.exp(-sum(logprobs) / len(logprobs)), rel=1e-3)
    levels = [sum(-p / math.log(2) >= least for least in (1, 2, 4, 7, 10)) for p in logprobs]
    found = page.browser.value("[...document.querySelectorAll('#surprisal-strip .token')].map(e => e.className)")
    assert [int(name.split("shade")[1][0]) for name in found[1:]] == levels
    assert "perplexity" in page.text("#announcer")
    page.browser.hover("#surprisal-strip .token")
    assert page.text("#card").endswith(f"the first token: nothing stands before it · id {tokens[0]['id']}")


def test_a_character_of_several_tokens_is_shown_once_and_each_token_explained(page: Page) -> None:
    page.open("surprisal", surprisal_text="a 🦄")
    page.browser.click("#surprisal-form .main")
    page.browser.until("!document.querySelector('#surprisal-result').hidden")
    pieces = page.count("#surprisal-strip .piece")
    assert pieces >= 1
    assert page.text("#surprisal-strip") == "a 🦄"
    page.browser.hover("#surprisal-strip .piece")
    assert page.text("#card .headline code").startswith(("\\x", "␣\\x"))
    page.browser.hover("#surprisal-strip .token:last-child")
    assert page.text("#card .headline code").endswith(" = 🦄")


def attention(page: Page, layer: int, head: int) -> Any:
    text = page.browser.value("document.querySelector('#attention-text').value")
    body = {"model": "tiny", "text": text, "layer": layer, "head": head}
    return page.server.call("/inspect/attention", body).json["weights"]


def test_attention_is_the_servers_by_mouse_and_keys(page: Page) -> None:
    page.open("attention", layer=1, head=2)
    page.browser.click("#attention-form .main")
    page.browser.until("!document.querySelector('#attention-result').hidden")
    rows = attention(page, 1, 2)
    page.browser.hover("#attention-strip .token:nth-child(6)")
    shown = page.styles("#attention-strip .token", "--weight")
    assert shown[:6] == pytest.approx([weight / max(rows[5]) for weight in rows[5]], abs=1e-3)
    assert not any(shown[6:])
    assert f"takes {_percent(max(rows[5]))} from" in page.text("#attention-words")
    page.browser.value("document.querySelector('#heatmap').focus()")
    page.browser.press("ArrowDown")
    page.browser.press("ArrowLeft", 3)
    words = page.text("#attention-words")
    assert "(token 7)" in words
    assert f"takes {_percent(rows[6][3])} from" in words
    assert words.endswith("(token 4).")
    page.browser.value("document.querySelector('#head').focus()")
    page.browser.press("ArrowRight")
    other = f"{_percent(attention(page, 1, 3)[6][3])} from"
    page.browser.until(f"document.querySelector('#attention-words').textContent.includes('{other}')")
    page.browser.click("#no-first")
    assert page.styles("#attention-strip .token", "--weight")[0] == 0
    assert page.complaints() == []


def test_the_matrix_is_drawn_as_the_weights_are(page: Page) -> None:
    page.open("attention")
    page.browser.click("#attention-form .main")
    page.browser.until("!document.querySelector('#attention-result').hidden")
    page.browser.value("document.querySelector('#head').focus()")
    for head in (0, 1):
        rows = attention(page, 0, head)
        most = max(weight for row in rows[1:] for weight in row)
        page.browser.until(f"document.querySelector('#strongest').textContent === '{_percent(most)}'")
        reds = page.browser.value(REDS % (len(rows), len(rows)))
        for drawn, weights in zip(reds[1:-1], rows[1:-1], strict=True):  # the last row has the cursor around it
            assert drawn == pytest.approx([245 + (8 - 245) * weight / most for weight in weights], abs=2)
        page.browser.press("ArrowRight")


def test_the_report_is_the_servers_and_can_be_searched(page: Page) -> None:
    page.open("report")
    page.browser.until("!document.querySelector('#report-result').hidden")
    report = page.server.call("/inspect/report/tiny").json
    assert page.texts("#checks tbody td:first-child") == ["✓ ok"] * len(report["verify"]["checks"])
    assert page.texts("#plan tbody td:first-child") == [row["source"] for row in report["plan"]]
    split = next(row for row in report["plan"] if len(row["targets"]) == 3)
    page.fill("#filter", split["source"].upper())
    assert page.texts("#plan tbody td") == [
        split["source"], "".join(split["targets"]), ", ".join(split["ops"]), " × ".join(map(str, split["shape"])),
        split["dtype"],
    ]  # fmt: skip
    assert page.text("#plan-count") == f"1 of {len(report['plan'])} tensors"
    page.browser.value("document.querySelector('#model').focus()")
    page.browser.press("ArrowDown")
    page.browser.until("document.querySelector('#checks').textContent.includes('FAIL')")
    assert page.texts("#checks tbody td:first-child") == ["✗ FAIL", "– skipped"]
    assert page.texts("#checks tbody td:last-child") == DETAILS
    assert page.text("#explanation") == "The file is broken."
    page.fill("#filter", "q4_1")
    assert page.text("#plan-count") == f"{len(report['plan'])} of {len(report['plan'])} tensors"


def test_it_asks_for_the_key_and_keeps_it_in_the_tab() -> None:
    with serving(chatting(), api_key="open sesame") as server, Browser() as browser:
        page = Page(browser, server)
        page.open(max_tokens=4)
        assert page.browser.value("document.querySelector('#key-dialog').open")
        assert page.text("#key-error") == ""
        page.fill("#key", "wrong")
        page.browser.press("Enter")
        page.browser.until("document.querySelector('#key-error').textContent")
        assert page.text("#key-error") == "the API key is missing or wrong: Authorization: Bearer KEY."
        page.fill("#key", "open sesame")
        page.browser.press("Enter")
        page.browser.until("!document.querySelector('#whole').hidden")
        page.run()
        assert page.count(".answer .token") > 0
        assert "sesame" not in page.browser.value("location.href + JSON.stringify(localStorage) + document.cookie")
        page.open()
        assert not page.browser.value("document.querySelector('#key-dialog').open")
        assert json.loads(page.browser.value("JSON.stringify(sessionStorage)")) == {"loadstone-api-key": "open sesame"}


def _percent(probability: float) -> str:
    value = 100 * probability
    return f"{value:.1f}%" if value >= 10 else f"{value:.2f}%"


def _hex(colour: str) -> str:
    parts = re.findall(r"[\d.]+", colour)
    return "#" + "".join(f"{int(float(part)):02x}" for part in parts[:3])
