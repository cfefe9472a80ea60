"""The server's page in a browser, with small models behind it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlencode

from browser import Browser
from loadstone.load import load_model, load_tokenizer_for, open_source
from loadstone.serve.opening import open_served
from loadstone.serve.served import Served
from serving import Serving, serving, small

CHECKS: list[dict[str, Any]] = [
    {"name": "all values finite", "ok": False, "detail": "blocks.0.norm1.weight: 3 NaN"},
    {"name": "rotary layout", "ok": None, "detail": "it has none"},
]
DETAILS = [check["detail"] for check in CHECKS]


@dataclass
class Page:
    """One tab of a browser and the server that it looks at."""

    browser: Browser
    server: Serving
    _visits: Iterator[int] = field(default_factory=itertools.count)

    def open(self, tab: str = "write", *, width: int = 1200, scheme: str = "light", **fields: Any) -> None:
        """Load the page afresh with these fields filled in, on one of its tabs."""
        given = {name.replace("_", "-"): value for name, value in fields.items()} | {"tab": f"tab-{tab}"}
        self.browser.open(f"{self.server.url}/?{next(self._visits)}#{urlencode(given)}", width, scheme)
        self.browser.until("!document.querySelector('#whole').hidden || document.querySelector('#key-dialog').open")

    def fill(self, selector: str, text: str) -> None:
        """Replace what a field holds by typing."""
        self.browser.value(f"document.querySelector('{selector}').select()")
        self.browser.type(text)

    def text(self, selector: str) -> Any:
        return self.browser.value(f"document.querySelector('{selector}').textContent")

    def texts(self, selector: str) -> Any:
        return self.browser.value(f"[...document.querySelectorAll('{selector}')].map(e => e.textContent)")

    def count(self, selector: str) -> Any:
        return self.browser.value(f"document.querySelectorAll('{selector}').length")

    def styles(self, selector: str, name: str) -> Any:
        """A style property of each element, as a number."""
        each = f"e => Number(e.style.getPropertyValue('{name}'))"
        return self.browser.value(f"[...document.querySelectorAll('{selector}')].map({each})")

    def run(self) -> None:
        """Press Run, and wait until every answer has ended."""
        self.browser.click("#run")
        self.ended()

    def ended(self) -> None:
        self.browser.until("document.querySelector('#stop').disabled && document.querySelector('.status') !== null")

    def complaints(self) -> list[Any]:
        """What the browser complained of: errors, refused resources, lines in the console."""
        kinds = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return [complaint for kind in kinds for complaint in self.browser.happened(kind)]


@contextmanager
def paged() -> Iterator[Page]:
    """`tiny`, verified; and `chat`, a random model with a chat template and a made-up report."""
    identity = open_source("tiny")
    tiny = open_served("tiny", identity, load_model(identity), load_tokenizer_for(identity))
    report: Any = tiny.report
    plan = [row | {"dtype": "Q4_1"} for row in report["plan"]]
    made_up = {
        **report,
        "plan": plan,
        "verify": {**report["verify"], "checks": CHECKS, "explanation": ["The file is broken."]},
    }
    with serving(tiny, chatting(made_up)) as server, Browser() as browser:
        yield Page(browser, server)


def chatting(report: Any = None) -> Served:
    return replace(small("chat", chat=True, seed=1), report=report or {})
