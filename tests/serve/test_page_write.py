"""Writing with the page, as a person does: type, run, point, branch, stop, chat, compare; by mouse and by keys."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from browser import CHROMIUM
from paged import Page, paged

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package `chromium`")
SETTINGS = {"temperature": 0.8, "top_k": 50, "top_p": 1, "seed": 1}
COUNT = 16
CARD_WAITS = 0.4  # seconds, a little more than it takes before a card goes that nothing points at
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with paged() as found:
        yield found


def answer(page: Page, prompt: Any, *, model: str = "tiny", **asked: Any) -> Any:
    """The first choice of the same request without the page, described as the page wants it, and the prompt's ids."""
    body = {"model": model, "prompt": prompt, "max_tokens": COUNT, "details": 10, **SETTINGS, **asked}
    found = page.server.call("/v1/completions", body).json
    return found["choices"][0] | {"ids": found["prompt_token_ids"][0]}


def chat(page: Page, *contents: str) -> str:
    roles = ("user", "assistant")
    messages = [{"role": roles[at % 2], "content": content} for at, content in enumerate(contents)]
    body = {"model": "chat", "messages": messages, "max_tokens": COUNT, **SETTINGS}
    return str(page.server.call("/v1/chat/completions", body).json["choices"][0]["message"]["content"])


def opened(page: Page, **fields: Any) -> None:
    page.open(**{"max_tokens": COUNT, "prompt": PROMPT, **fields})


def spelt(token: Any) -> str:
    """As the page spells tokens that are plain words."""
    text: str = token["text"]
    return text.replace("\n", "↵").replace(" ", "␣")


def test_an_answer_streams_with_the_settings_of_the_sliders(page: Page) -> None:
    opened(page)
    page.fill("#prompt", "The king")
    for name, key, times in (("temperature", "ArrowRight", 4), ("top-k", "ArrowLeft", 3), ("top-p", "ArrowLeft", 10)):
        page.browser.value(f"document.querySelector('#{name}').focus()")
        page.browser.press(key, times)
    assert [page.text(f"#{name}-value") for name in ("temperature", "top-k", "top-p")] == ["1.00", "47", "0.90"]
    page.fill("#seed", "5")
    page.run()
    asked: dict[str, Any] = {"temperature": 1, "top_k": 47, "top_p": 0.9, "seed": 5}
    expected = answer(page, "The king", **asked)
    assert page.text(".answer") == expected["text"]
    assert page.count(".answer .token") == COUNT
    assert page.text("#announcer") == "tiny: 16 tokens, at the limit of tokens."
    page.run()
    assert page.text(".answer") == expected["text"]
    page.fill("#seed", "6")
    page.run()
    assert page.text(".answer") == answer(page, "The king", **asked | {"seed": 6})["text"] != expected["text"]
    page.browser.value("document.querySelector('#temperature').focus()")
    page.browser.press("Home")
    assert page.text("#temperature-value") == "0: always the likeliest"
    assert page.complaints() == []


def test_pointing_at_a_token_shows_what_else_could_have_come(page: Page) -> None:
    opened(page)
    page.run()
    token = answer(page, PROMPT)["details"][2]
    page.browser.hover(".answer .token:nth-child(3)")
    assert page.text("#card .headline code") == spelt(token)
    assert f"{-token['logprob'] / math.log(2):.2f} bits" in page.text("#card .headline")
    names = page.texts("#card li:not(:has(.others)) code")
    assert names[:10] == [spelt(each) for each in token["top"]]
    bars = page.styles("#card .bar", "--share")
    assert bars[:10] == pytest.approx([math.exp(each["logprob"]) for each in token["top"]], abs=1e-3)
    assert sum(bars) == pytest.approx(1, abs=2e-3)
    assert page.texts("#card .came code") == [spelt(token)]
    page.browser.hover(".answer .token:nth-child(5)")  # from one token to the next, and into the card: it stays
    time.sleep(CARD_WAITS)
    page.browser.hover("#card li:last-child")
    time.sleep(CARD_WAITS)
    assert not page.browser.value("document.querySelector('#card').hidden")
    page.browser.hover("h1")
    page.browser.until("document.querySelector('#card').hidden")
    page.browser.click(".answer .token:nth-child(3)")
    page.browser.hover(".answer .token:nth-child(5)")  # a card that was clicked stays, whatever lies on the way to it
    assert page.text("#card .headline code") == spelt(token)
    page.browser.click("h1")
    assert page.browser.value("document.querySelector('#card').hidden")


def test_by_keys_alone_from_the_prompt_to_a_branch_and_back(page: Page) -> None:
    opened(page)
    press = page.browser.press
    page.browser.value("document.querySelector('#prompt').focus()")
    press("Enter", modifiers=2)
    page.ended()
    first = answer(page, PROMPT)
    reached: list[str] = []
    while not reached or "token" not in reached[-1].split():
        press("Tab")
        reached.append(page.browser.value("document.activeElement.id || document.activeElement.className"))
        assert len(reached) < 20, reached
    assert {"run", "temperature", "top-k", "top-p", "max-tokens", "seed"} <= set(reached)
    press("ArrowRight", 2)
    came = first["details"][2]
    assert page.browser.value("document.activeElement.ariaLabel").startswith(spelt(came))
    press("Enter")
    others = [each for each in came["top"] if each["id"] != came["id"]]
    press("ArrowDown")
    assert page.browser.value("document.activeElement.querySelector('code').textContent") == spelt(others[1])
    press("Enter")
    page.ended()
    kept = [each["id"] for each in first["details"][:2]]
    rest = answer(page, [*first["ids"], *kept, others[1]["id"]], max_tokens=COUNT - 3)
    assert rest["text"] != answer(page, [*kept, others[1]["id"]], max_tokens=COUNT - 3)["text"]
    begun = "".join(each["text"] for each in first["details"][:2])
    assert page.text(".answer") == begun + others[1]["text"] + rest["text"]
    assert page.texts(".answer .kept") == [each["text"] for each in first["details"][:2]]
    assert page.texts(".answer .chosen") == [others[1]["text"]]
    assert page.browser.value("document.activeElement.className").startswith("token chosen")
    assert (
        page.texts(".versions button")[1] == f"2 · from 1 at token 3: “{spelt(others[1])}” instead of “{spelt(came)}”"
    )
    press("Tab", modifiers=8)
    press("Tab", modifiers=8)
    press("Enter")
    assert page.text(".answer") == first["text"]
    assert page.text(".versions [aria-current]") == "1 · first answer"
    press("Tab", 2)
    press("Enter")
    press("Escape")
    assert page.browser.value("document.querySelector('#card').hidden")
    assert "token" in page.browser.value("document.activeElement.className")


def test_choosing_an_end_token_ends_the_answer(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = answer(page, PROMPT)["details"]
    came = {token["id"] for token in tokens}
    alternative = next(each for each in tokens[4]["top"] if each["id"] not in came)
    served = page.server.models["tiny"]
    monkeypatch.setattr(served, "tokenizer", replace(served.tokenizer, eos_ids=(alternative["id"],)))
    opened(page)
    page.run()
    page.browser.hover(".answer .token:nth-child(5)")
    place = [each["id"] for each in tokens[4]["top"]].index(alternative["id"])
    page.browser.click(f"#card li:nth-child({place + 1}) button")
    assert page.count(".answer .token") == 5
    assert page.text(".status").endswith("you chose its end")


def test_stop_frees_the_row_and_keeps_what_came(page: Page) -> None:
    opened(page, max_tokens=200)
    with page.server.pace(0.05):
        page.browser.click("#run")
        page.browser.until("document.querySelectorAll('.answer .token').length > 3")
        assert page.server.metric("loadstone_running", model="tiny") == 1
        assert page.browser.value("document.querySelector('.column').ariaBusy") == "true"
        page.browser.click("#stop")
        page.ended()
        page.server.until(page.server.idle)
    assert 3 < page.count(".answer .token") < 100
    assert page.text(".status").endswith("stopped by you")
    assert page.text(".error[role=alert]") == ""
    assert page.browser.value("document.activeElement.id") == "run"


def test_a_chat_goes_on_from_the_answer_that_is_shown(page: Page) -> None:
    opened(page)
    assert page.browser.value("document.querySelector('#mode-chat').disabled")
    opened(page, model="chat", prompt="The dog's")
    page.browser.click("#mode-chat")
    page.run()
    first = chat(page, "The dog's")
    assert page.text(".answer") == first
    assert page.browser.value("document.querySelector('#prompt').value") == ""
    page.fill("#prompt", "the cat")
    page.run()
    assert page.texts(".turns .turn") == ["The dog's", first, "the cat"]
    assert page.text(".answer") == chat(page, "The dog's", first, "the cat")
    page.browser.click("#new-chat")
    assert page.count(".turn") == 0


def test_two_models_answer_side_by_side(page: Page) -> None:
    opened(page)
    page.browser.value("document.querySelector('#beside').focus()")
    page.browser.press("ArrowDown")
    page.run()
    assert page.texts(".column h3") == ["tiny", "chat"]
    assert page.texts(".answer") == [answer(page, PROMPT, model=name)["text"] for name in ("tiny", "chat")]
    left, right = page.browser.value("[...document.querySelectorAll('.column')].map(e => [e.offsetLeft, e.offsetTop])")
    assert left[0] < right[0]
    assert left[1] == right[1]
    page.browser.hover(".column:nth-child(2) .token:nth-child(2)")
    page.browser.click("#card button")
    page.ended()
    assert page.count(".column:nth-child(1) .versions button") == 1
    assert page.count(".column:nth-child(2) .versions button") == 2


def test_errors_are_in_the_servers_words(page: Page) -> None:
    long = "the king " * 200
    opened(page, prompt=long)
    page.browser.click("#run")
    page.browser.until("document.querySelector('.column .error').textContent")
    found = page.server.call("/v1/completions", {"model": "tiny", "prompt": long})
    assert found.status == 400
    assert page.text(".column .error") == found.json["error"]["message"]
    assert page.text(".status").endswith("broken off")
