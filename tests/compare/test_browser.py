"""The page in a real browser: phone and desk, light and dark, no request, no complaint, a sound accessibility tree."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from browser import CHROMIUM, Browser
from compared import TEXTS
from loadstone.compare import Comparison
from loadstone.compare.page import page
from pages import contrast

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package `chromium`")
GROUND = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}
# Elements that stick out to the right and lie in no box that scrolls.
STICKING_OUT = """[...document.querySelectorAll("body *")]
  .filter(e => !e.closest(".scroll, .unseen"))
  .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5)
  .map(e => e.outerHTML.slice(0, 80))"""
# What is said of a whole table must not be cut off by the edge of its box.
CUT_OFF = """[...document.querySelectorAll("caption, .group span")]
  .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth).map(e => e.textContent)"""
# Each element with text of its own: the text's colour, and that of the first ground behind it that is not clear.
COLOURS = """[...document.querySelectorAll("main :not(title, desc)")]
  .filter(e => [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()))
  .map(e => {
    const style = getComputedStyle(e);
    let ground = e;
    while (getComputedStyle(ground).backgroundColor == "rgba(0, 0, 0, 0)") ground = ground.parentElement;
    return [e.outerHTML.slice(0, 80), e.closest("svg") ? style.fill : style.color,
      getComputedStyle(ground).backgroundColor]
  })"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as found:
        yield found


@pytest.fixture(scope="module")
def report(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("browser") / "report.html"
    path.write_text(page(comparison), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_fetches_nothing(browser: Browser, report: Path, width: int, scheme: str) -> None:
    browser.open(report, width, scheme)
    assert browser.value("window.innerWidth") == width
    assert browser.value("document.documentElement.scrollWidth") == width
    assert browser.value(STICKING_OUT) == []
    assert browser.value(CUT_OFF) == []
    assert browser.value("getComputedStyle(document.body).backgroundColor") == GROUND[scheme]
    assert [asked["request"]["url"] for asked in browser.happened("Network.requestWillBeSent")] == [report.as_uri()]
    for complaint in (
        "Log.entryAdded",
        "Runtime.consoleAPICalled",
        "Runtime.exceptionThrown",
        "Page.javascriptDialogOpening",
    ):
        assert browser.happened(complaint) == []


def test_figures_at_the_end_of_an_axis_stay_on_a_phone(
    browser: Browser, comparison: Comparison, tmp_path: Path
) -> None:
    first, *others = comparison.models
    assert first.history is not None
    history = replace(first.history, training=((1000, 5.0), (8e6, 3.0)))  # 10 million lies at 99%
    path = tmp_path / "report.html"
    path.write_text(page(replace(comparison, models=(replace(first, history=history), *others))), encoding="utf-8")
    browser.open(path, 360, "light")
    assert "10 million" in browser.value('document.querySelector(".curves").textContent')
    assert browser.value("document.documentElement.scrollWidth") == 360
    assert browser.value(STICKING_OUT) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_its_text_can_be_read(browser: Browser, report: Path, scheme: str) -> None:
    browser.open(report, 1280, scheme)
    found = browser.value(COLOURS)
    assert len(found) > 200
    assert not [case for case in found if contrast(_hex(case[1]), _hex(case[2])) < 4.5]


def test_its_charts_have_their_shape(browser: Browser, report: Path, comparison: Comparison) -> None:
    browser.open(report, 360, "light")
    widths = browser.value('[...document.querySelectorAll(".bars > rect")].map(r => r.getBoundingClientRect().width)')
    values = [value for values in comparison.domains.values() for value in values]
    assert [w / max(widths) for w in widths] == pytest.approx([v / max(values) for v in values], abs=0.01)
    curve = browser.value(
        '(r => [r.width, r.height])(document.querySelector(".curves polyline").getBoundingClientRect())'
    )
    assert min(curve) > 100
    assert browser.value('getComputedStyle(document.querySelector(".curves .tick")).fontSize') == "12px"


def test_the_keyboard_reaches_what_scrolls_and_opens(browser: Browser, report: Path) -> None:
    browser.open(report, 360, "light")
    reached = []
    for _ in range(8):
        for kind in ("keyDown", "keyUp"):
            browser.ask("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
        at = "(e => [e.className || e.localName, getComputedStyle(e).outlineStyle, getComputedStyle(e).outlineWidth])"
        reached.append(browser.value(f"{at}(document.activeElement)"))
    assert [name for name, _, _ in reached] == ["scroll"] * 3 + ["summary"] * 4 + ["scroll"]
    assert all(focus == ["solid", "3px"] for _, *focus in reached)


def test_a_screen_reader_finds_names_for_everything(browser: Browser, report: Path) -> None:
    browser.open(report, 1280, "light")
    browser.ask("Accessibility.enable")
    nodes = browser.ask("Accessibility.getFullAXTree")["nodes"]
    roles: dict[str, list[str]] = {}
    for node in nodes:
        if not node.get("ignored"):
            roles.setdefault(_value(node, "role"), []).append(_value(node, "name"))
    assert roles["RootWebArea"] == ["run and other and best, compared"]
    assert len(roles["main"]) == 1
    for role in ("heading", "table", "region", "columnheader", "rowheader"):
        assert roles[role]
        assert all(roles[role]), role
    pictures = roles.get("image", []) + roles.get("img", [])
    assert pictures == ["Bits per byte of each text", "Loss while training"]
    assert any("(best)" in name for name in roles["cell"] + roles.get("gridcell", []))


def test_hostile_text_is_shown_and_not_run(browser: Browser, report: Path) -> None:
    browser.open(report, 1280, "light")
    assert browser.value("document.scripts.length") == 0
    assert TEXTS["hard"] in browser.value('document.querySelectorAll(".strip")[1].textContent').replace("↵", "")


def _value(node: dict[str, Any], key: str) -> str:
    return str(node.get(key, {}).get("value", "")).strip()


def _hex(colour: str) -> str:
    parts = re.findall(r"[\d.]+", colour)
    assert len(parts) == 3, colour
    return "#" + "".join(f"{int(part):02x}" for part in parts)
