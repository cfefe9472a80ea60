"""Tokens added to a tokenizer: one id each, old ids as before, and what cannot be added is refused in a paragraph."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models

from extendable import TOKENIZERS, VOCAB, gpt2_like, lowercase, padded_gguf
from loadstone.data.tokenizer_training import character_tokenizer
from loadstone.errors import TokenizerError
from loadstone.extend import extend_tokenizer, unused_by_template, with_chat_template
from loadstone.extend.tokens import tokens_of
from loadstone.tokenizer import Tokenizer
from small_vocabularies import NASTY, TEXTS

NEW = ["<|ask|>", "<|用户|>", "<|as", " zebra x"]
CHATML = "{% for m in messages %}<|ask|>{{ m['content'] }}<|as{% endfor %}"
PLAIN = {name: extend_tokenizer(make(), NEW, special=False) for name, make in TOKENIZERS.items()}


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_new_token_is_one_id(name: str, special: bool) -> None:
    tokenizer = TOKENIZERS[name]()
    first = max(tokens_of(tokenizer)) + 1
    extended, ids = extend_tokenizer(tokenizer, NEW, special=special)
    assert ids == [first, first + 1, first + 2, first + 3]
    assert extended.vocab_size == first + 4
    for text, number in zip(NEW, ids, strict=True):
        assert extended.is_special(number) is special
        assert extended.encode(text, add_special=False, parse_special=True) == [number]
        inside = extended.encode(f"at{text}at", add_special=False, parse_special=True)
        assert inside.count(number) == 1
        assert text in extended.decode(inside, skip_special=False)
        assert extended.token_bytes(number) == text.encode()
        assert (number in extended.encode(f"at{text}at")) is not special
        assert (text in extended.decode(inside)) is not special
    assert tokenizer.vocab_size <= 416  # the one given stays as it is
    assert tokenizer.backend.token_to_id(NEW[0]) is None


@pytest.mark.parametrize("name", TOKENIZERS)
def test_old_ids_stay(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    extended, _ = extend_tokenizer(tokenizer, NEW, special=True)
    for text in (*NASTY, *NEW):
        for around in (True, False):
            assert extended.encode(text, add_special=around) == tokenizer.encode(text, add_special=around)
    for text in NASTY:
        assert extended.encode(text, parse_special=True) == tokenizer.encode(text, parse_special=True)
        assert extended.decode(extended.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert {**tokens_of(extended), **tokens_of(tokenizer)} == tokens_of(extended)
    same = ("bos_id", "eos_ids", "pad_id", "chat_template", "special", "source")
    assert [getattr(extended, field) for field in same] == [getattr(tokenizer, field) for field in same]


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(list(TOKENIZERS)), text=TEXTS)
def test_plain_tokens_change_only_the_texts_that_hold_them(name: str, text: str) -> None:
    tokenizer, (extended, ids) = TOKENIZERS[name](), PLAIN[name]
    found = extended.encode(text)
    if not any(new in text for new in NEW):
        assert found == tokenizer.encode(text)
    with_new = extended.encode(f"{text}<|ask|>{text}", add_special=False)
    assert ids[0] in with_new


def test_the_padding_that_a_gguf_lists_gives_way() -> None:
    tokenizer = padded_gguf()
    assert tokenizer.vocab_size == 416
    assert max(tokens_of(tokenizer)) == 400
    extended, ids = extend_tokenizer(tokenizer, ["<|ask|>"], special=True)
    assert ids == [401]
    assert "[PAD402]" not in extended.backend.get_vocab()


def test_gaps_are_used_and_never_doubled() -> None:
    def gappy() -> Tokenizer:
        return Tokenizer(Backend(models.BPE(vocab={"a": 0, "b": 1, "c": 6}, merges=[])), "gappy")

    _, ids = extend_tokenizer(gappy(), ["<x>", "<y>", "<z>"], special=True)
    assert ids == [3, 4, 5]
    with pytest.raises(TokenizerError, match=r"gappy: its ids have gaps, .* the id of an old one"):
        extend_tokenizer(gappy(), ["<w>", "<x>", "<y>", "<z>"], special=True)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "there is no token to add"),
        (["<a>", ""], "number 2 of the 2 to add is empty"),
        (["<a>", "<b>", "<a>"], "'<a>' is to be added twice"),
        (["<|endoftext|>"], r"made: '<\|endoftext\|>' is a token already, with id 400\. Leave it out"),
        (["hat"], f"'hat' is a token already, with id {VOCAB['hat']}"),
        ([" the"], f"' the' is a token already, with id {VOCAB['Ġthe']}"),
        (["<\ud800>"], "lone surrogate"),
        (["<für>"], "'<für>' comes back as '<f\ufffdr>' when it is decoded: .* ASCII"),
    ],
)
def test_refusals(texts: list[str], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        extend_tokenizer(gpt2_like(), texts, special=True)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["<A>", "<a>"], "'<a>' and '<A>' are one text to this tokenizer, .* '<A>' is to be added too"),
        (["HAT"], "'HAT' and 'hat' are one text .* 'hat' is a token already"),
        (["<|EndOfText|>"], r"'<\|EndOfText\|>' and '<\|endoftext\|>' are one text .* is a token already"),
        (["e\u0301x", "éx"], "are one text"),
    ],
)
def test_texts_that_normalize_to_another(texts: list[str], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        extend_tokenizer(lowercase(), texts, special=False)


def test_sentencepiece_words_without_their_space_are_new() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]()
    assert tokenizer.backend.token_to_id("▁cat") is not None
    extended, ids = extend_tokenizer(tokenizer, ["cat"], special=False)
    assert extended.encode("cat", add_special=False) == ids
    with pytest.raises(TokenizerError, match="comes back as 'a b' when it is decoded"):
        extend_tokenizer(tokenizer, ["a▁b"], special=False)


def test_chat_template() -> None:
    extended, ids = extend_tokenizer(gpt2_like(), NEW, special=True)
    chatty = with_chat_template(extended, CHATML, "t.jinja")
    assert not unused_by_template(chatty, ids)
    assert unused_by_template(chatty, ids[1:2])
    assert unused_by_template(replace(chatty, chat_template="{{ messages[0]['content'] }}"), ids)
    with pytest.raises(TokenizerError, match=r"t\.jinja: its chat template refuses or fails"):
        with_chat_template(extended, "{% for %}", "t.jinja")


def test_a_token_of_characters_that_a_tokenizer_of_characters_lacks() -> None:
    extended, ids = extend_tokenizer(character_tokenizer(["hello"]), ["<|ask|>"], special=True)
    assert extended.encode("he<|ask|>", parse_special=True) == [1, 0, *ids]
    assert extended.decode([1, 0, *ids], skip_special=False) == "he<|ask|>"
