"""De-tokenisers: nothing is lost, whatever the line; and what comes out is English."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loadstone.evaluate.detokenise import SPELLINGS, detokenised, retokenised
from loadstone.evaluate.perplexity import read_text, text_of

PARTS = st.sampled_from(
    ["the", "Mr.", "J.", "U.S.", "12", ",", ".", "@-@", "@,@", "@.@", '"', "'s", "n't", "'", "(", ")", "$", "%", "...",
     "<unk>", "N", ";", "--", "é", "=", "", " ", "\0", "\ue000", "a-b", "1,000", "3.5", "did", "dogs'", "ca", "?", "\t"]
)  # fmt: skip
LINES = st.one_of(st.lists(PARTS, max_size=25).map(" ".join), st.text(max_size=30)).filter(
    lambda line: "\n" not in line
)


@settings(max_examples=400, deadline=None)
@given(LINES, st.sampled_from(list(SPELLINGS)), st.booleans())
def test_every_line_comes_back(line: str, spelling: str, regular: bool) -> None:
    line = f" {line} " if regular else line
    assert SPELLINGS[spelling].decode(SPELLINGS[spelling].encode(line)) == line


@settings(max_examples=200, deadline=None)
@given(st.lists(LINES, max_size=6).map("\n".join), st.sampled_from(list(SPELLINGS)))
@example("the\n ", "ptb")
@example(" the \n the ", "ptb")
def test_every_text_comes_back(content: str, spelling: str) -> None:
    if content.strip():
        assert retokenised(detokenised(text_of(content, "x"), spelling).content, spelling) == content


@pytest.mark.parametrize(
    ("spelling", "line", "english"),
    [
        ("wikitext", " = Robert <unk> = ", "= Robert <unk> ="),
        ("wikitext", ' The 1 @,@ 000 " well @-@ known " men ( 2 @.@ 5 % ) . ', 'The 1,000 "well-known" men (2.5%).'),
        ("wikitext", " Mr. Fu 's poems , and J. Smith ; he did . ", "Mr. Fu's poems, and J. Smith; he did."),
        ("wikitext", " a ... b ", "a ... b"),
        ("ptb", " it was n't the dow 's $ N plunge ", "it wasn't the dow's $N plunge"),
        ("ptb", " the <unk> companies ' N N loss ", "the <unk> companies' N N loss"),
        ("ptb", " ", ""),
    ],
)
def test_english(spelling: str, line: str, english: str) -> None:
    assert SPELLINGS[spelling].encode(line) == english
    assert SPELLINGS[spelling].decode(english) == line


def test_what_cannot_be_undone_keeps_its_spelling_and_is_counted() -> None:
    text = text_of(" many words said F @-@ 5'd before him \nno space around\n", "x")
    found = detokenised(text, "wikitext")
    assert found.content == "many words said  F @-@ 5'd before him\n\0no space around\n"
    assert "1 places and 1 of 2 lines" in found.notes[-1]
    assert (found.words, found.originals, found.sha256) == (text.words, text.originals, text.sha256)


@pytest.mark.parametrize(
    ("name", "spelling", "words", "originals", "kept"),
    [("wikitext2.test.raw.txt", "wikitext", 241_211, 245_569, 100), ("ptb.test.txt", "ptb", 78_669, 82_430, 0)],
)
def test_the_real_texts_come_back_and_have_their_published_numbers_of_tokens(
    shared: Path, name: str, spelling: str, words: int, originals: int, kept: int
) -> None:
    text = read_text(shared / "data" / name)
    found = detokenised(text, spelling)
    assert (found.words, found.originals) == (words, originals)  # 245,569 and 82,430 in the literature
    assert found.content.count("  ") <= kept
    assert "\0" not in found.content
    assert found.content.count(" @-@ ") + found.content.count(" @,@ ") <= kept
    assert retokenised(found.content, spelling) == text.content
