"""Perplexity: windows as laws, a token-by-token judge, the identities between the units, and texts that are odd."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from extendable import KNOWN, gpt2_like, hostile
from loadstone.errors import FormatError, LoadstoneError
from loadstone.evaluate.intervals import accuracy, interval_of_mean
from loadstone.evaluate.perplexity import blocks, perplexities, read_text, stream, text_of, windows
from loadstone.evaluate.run import TaskResult, evaluate
from loadstone.evaluate.tasks.text import file_task
from loadstone.model import GPT
from loadstone.tokenizer import Tokenizer

WORDS = "The cat's hat; the dog's 12 bones, and the bird's nest.\nThey sing 2024 songs — über 300 more!\n" * 6


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 300), st.integers(1, 40), st.data())
def test_windows_score_each_token_once_with_the_context_that_is_promised(
    length: int, context: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, context))
    found = windows(length, context, stride)
    scored = [at for window in found for at in range(window.end - window.targets, window.end)]
    assert scored == list(range(1, length))
    assert len(found) == (0 if length < 2 else 1 + max(0, -(-(length - 1 - context) // stride)))  # and none too many
    for window in found:
        assert 0 <= window.begin < window.end <= length
        assert window.end - 1 - window.begin == min(context, window.end - 1)  # tokens read: never less than there are
        first = window.end - window.targets
        assert first - window.begin >= min(first, context - stride + 1)  # tokens before the one that has fewest


@pytest.mark.parametrize("stride", [0, -1, 9])
def test_a_stride_that_skips_or_stands_is_refused(stride: int) -> None:
    with pytest.raises(LoadstoneError, match=f"stride of {stride}"):
        windows(20, 8, stride)


def nats_one_by_one(model: GPT, tokenizer: Tokenizer, text: str, context: int) -> list[float]:
    """The judge: every token given as many before it as the context has."""
    ids = tokenizer.encode(text, add_special=False)
    if tokenizer.bos_id is not None:
        ids = [tokenizer.bos_id, *ids]
    found = []
    for at in range(1, len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor([ids[max(0, at - context) : at]]))[0, -1].double()
        found.append(-float(torch.log_softmax(logits, -1)[ids[at]]))
    return found


def run(
    model: GPT, tokenizer: Tokenizer, path: Path, context: int, stride: int, batch: int | None = None
) -> TaskResult:
    (found,) = evaluate(model, tokenizer, [file_task(path)], context=context, stride=stride, batch_size=batch)
    return found


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(WORDS, encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def no_shared_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user's own file needs none."""
    monkeypatch.setenv("LOADSTONE_SHARED", str(tmp_path / "nowhere"))


@pytest.mark.parametrize("begun", [True, False])
def test_stride_1_is_token_by_token_and_the_units_are_one_sum(text: Path, begun: bool) -> None:
    model, tokenizer = hostile(KNOWN), gpt2_like()
    if not begun:
        tokenizer = replace(tokenizer, bos_id=None)
    found = run(model, tokenizer, text, context=16, stride=1)
    nats = nats_one_by_one(model, tokenizer, WORDS, 16)
    assert found.tokens == len(nats)
    total = sum(nats)
    first = tokenizer.token_bytes(tokenizer.encode(WORDS, add_special=False)[0])
    size = len(WORDS.encode()) - (0 if begun else len(first))
    words, lines = len(WORDS.split()), WORDS.count("\n")
    for unit, value in (
        ("token_perplexity", math.exp(total / len(nats))),
        ("word_perplexity", math.exp(total / words)),
        ("bits_per_byte", total / math.log(2) / size),
        ("paper_perplexity", math.exp(total / (words + lines))),
    ):
        assert found.value(unit) == pytest.approx(value, rel=1e-4), unit
    assert found.protocol["first_token"] == ("given a begin token" if begun else "not scored")
    assert found.protocol["sha256"] == hashlib.sha256(WORDS.encode()).hexdigest()


def test_the_identities_between_the_units_are_exact(text: Path) -> None:
    found = run(hostile(KNOWN), gpt2_like(), text, context=32, stride=20)
    nats = found.tokens * math.log(found.value("token_perplexity") or 0)
    words, lines = len(WORDS.split()), WORDS.count("\n")
    assert words * math.log(found.value("word_perplexity") or 0) == pytest.approx(nats, rel=1e-12)
    assert (words + lines) * math.log(found.value("paper_perplexity") or 0) == pytest.approx(nats, rel=1e-12)
    bits = found.value("bits_per_byte") or 0
    assert bits * math.log(2) * len(WORDS.encode()) == pytest.approx(nats, rel=1e-12)
    assert [metric.name for metric in found.metrics] == [
        *("token_perplexity", "word_perplexity", "bits_per_byte", "paper_perplexity")
    ]


@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 5), (72, 72)])
def test_no_batch_changes_the_figure(text: Path, context: int, stride: int) -> None:
    model, tokenizer = hostile(KNOWN), gpt2_like()
    values = [run(model, tokenizer, text, context, stride, batch).value("bits_per_byte") for batch in (None, 1, 3, 64)]
    assert max(values) - min(values) < 1e-5  # type: ignore[operator, type-var]


def test_more_context_is_another_figure_so_the_stride_matters(text: Path) -> None:
    model, tokenizer = hostile(KNOWN), gpt2_like()
    assert run(model, tokenizer, text, 16, 16).value("bits_per_byte") != pytest.approx(
        run(model, tokenizer, text, 16, 1).value("bits_per_byte"), rel=1e-4
    )


# -- odd texts


def test_a_text_shorter_than_the_context_is_one_window_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("The cat's hat")
    model, tokenizer = hostile(KNOWN), gpt2_like()
    found = run(model, tokenizer, path, 72, 9)
    assert found.items == 1
    assert any("fewer than the context of 72" in note for note in found.notes)
    nats = nats_one_by_one(model, tokenizer, "The cat's hat", 72)
    assert found.value("token_perplexity") == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-4)
    assert found.metrics[0].low is None  # one block: no interval


@pytest.mark.parametrize("content", [b"", b"  \n\n ", b"\xef\xbb\xbf"])
def test_an_empty_text_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "empty.txt"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"empty|no text"):
        read_text(path)


def test_a_text_in_latin_1_is_refused_with_line_and_way_out(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("plain\nüber\n".encode("latin-1"))
    with pytest.raises(FormatError, match=r"line 2.*0xFC.*iconv"):
        read_text(path)


def test_windows_line_ends_are_scored_and_a_note_says_so(tmp_path: Path) -> None:
    path = tmp_path / "dos.txt"
    path.write_bytes(b"\xef\xbb\xbfone two\r\nthree\r\n")
    found = read_text(path)
    assert found.content == "one two\r\nthree\r\n"
    assert (found.words, found.originals) == (3, 5)
    assert "byte order mark" in found.notes[0]
    assert "2 Windows line ends" in found.notes[1]


def test_a_single_token_without_a_begin_token_is_refused() -> None:
    tokenizer = replace(gpt2_like(), bos_id=None)
    with pytest.raises(LoadstoneError, match="single token"):
        stream(text_of("a", "a.txt"), tokenizer, 8, 8)
    assert len(stream(text_of("a", "a.txt"), gpt2_like(), 8, 8).windows) == 1


def test_special_text_in_a_file_is_text(tmp_path: Path) -> None:
    tokenizer = gpt2_like()
    ids = stream(text_of("a<|endoftext|>b", "x"), tokenizer, 8, 8).ids
    assert list(ids).count(tokenizer.bos_id) == 1


# -- intervals


def test_blocks_hold_all_nats() -> None:
    nats = np.arange(1000, dtype=np.float64)
    sums, sizes = blocks(nats)
    assert list(sizes) == [256, 256, 488]
    assert sums.sum() == nats.sum()
    assert list(blocks(nats[:100])[1]) == [100]


def test_95_of_100_intervals_hold_the_truth() -> None:
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        nats = 3 + random.standard_exponential(256 * 60) * 2  # mean 5
        _, low, high = interval_of_mean(blocks(nats))
        inside += low is not None and high is not None and low < 5 < high
    assert 0.91 < inside / 400 < 0.98


def test_the_interval_goes_through_every_unit() -> None:
    tokenizer = gpt2_like()
    cut = stream(text_of(WORDS * 20, "x"), tokenizer, 8, 8)
    nats = np.random.default_rng(1).standard_exponential(len(cut.ids) - 1)
    token, word, bits, _ = perplexities(nats, cut)
    for metric in (token, word, bits):
        assert metric.low is not None
        assert metric.value is not None
        assert metric.high is not None
        assert metric.low < metric.value < metric.high
    assert math.log(word.low or 0) / math.log(token.low or 0) == pytest.approx(len(nats) / cut.text.words)


def test_wilsons_interval() -> None:
    found = accuracy("acc", [True] * 8 + [False] * 2, "")
    assert found.value == 0.8
    assert found.low == pytest.approx(0.4902, abs=1e-4)
    assert found.high == pytest.approx(0.9433, abs=1e-4)
    assert accuracy("acc", [True] * 5, "").high == 1.0
    assert accuracy("acc", [], "").value is None
