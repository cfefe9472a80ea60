"""The fast encoder: the ids of `tokenizers`, id for id, or none at all."""

from __future__ import annotations

import hashlib
import sys
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadstone.data.corpus import Document
from loadstone.data.encoding import encoded, pieces_of
from loadstone.errors import TokenizerError
from loadstone.tokenizer import Tokenizer, fast
from loadstone.tokenizer.base import BYTE_OF
from loadstone.tokenizer.bpe import add_tokens
from loadstone.tokenizer.fast import FastEncoder, UnfitError, fast_encoder
from loadstone.tokenizer.gguf_vocab import CUTS, from_gguf
from small_vocabularies import NASTY, byte_level

tiktoken = pytest.importorskip("tiktoken")
PRES = ["gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "tekken"]
CHARACTERS = st.one_of(
    st.characters(exclude_categories=["Cs"]),
    st.sampled_from(" \n\r\t\u00a0\u3000\u200b\x85\x1c'sSdDlLtTrReEvVmM109²Ⅷ٣éßǅʰ字👍🏽\u0301\ufeff\x00_-.!<|>"),
)
TEXTS = st.one_of(
    st.text(CHARACTERS, max_size=80),
    st.lists(st.sampled_from([*NASTY, "'s", "'LL", " ", "  ", "\n", "<|endoftext|>", "7", "the"])).map("".join),
)


def vocabulary(pre: str, **changes: Any) -> dict[str, Any]:
    vocab, merges = byte_level()
    joined = [" ".join(merge) for merge in merges]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": list(vocab),
        "tokenizer.ggml.token_type": [1] * (len(vocab) - 1) + [3], "tokenizer.ggml.merges": joined,
        "tokenizer.ggml.eos_token_id": len(vocab) - 1, "tokenizer.ggml.add_bos_token": False,
    } | changes  # fmt: skip


@cache
def both(pre: str) -> tuple[Tokenizer, FastEncoder]:
    tokenizer = from_gguf(vocabulary(pre), "a test")
    return tokenizer, FastEncoder(tokenizer)


@pytest.mark.parametrize("pre", PRES)
@settings(max_examples=100, deadline=None)
@given(texts=st.lists(TEXTS, max_size=3))
def test_the_ids_are_those_of_tokenizers(pre: str, texts: list[str]) -> None:
    tokenizer, encoder = both(pre)
    assert [ids.tolist() for ids in encoder(texts)] == [tokenizer.encode(text, add_special=False) for text in texts]


@pytest.mark.parametrize("pre", ["gpt-2", "tekken"])  # all classes of characters that the patterns name
def test_every_code_point_is_cut_alike(pre: str) -> None:
    """Two libraries, two tables of Unicode: a character that one knows as a letter and the other does not differs."""
    tokenizer, encoder = both(pre)
    points = [*range(0, 0xD800, 5), *range(0xE000, 0x32000, 5), *range(0x32000, 0x110000, 257)]
    text = "".join(f"a{c}'s {c}1{c}\n" for c in map(chr, points))
    assert next(encoder([text])).tolist() == tokenizer.encode(text, add_special=False)


def test_what_overflows_tiktoken_is_encoded_all_the_same(capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer, encoder = both("gpt-2")
    texts = ["a", " " * 70_000 + "a", "\n \n" * 20_000, "!" * 50_000, "x" * 999 + " " * 999]
    assert [ids.tolist() for ids in encoder(texts)] == [tokenizer.encode(text, add_special=False) for text in texts]
    assert "panicked" not in capfd.readouterr().err


def test_a_panic_is_made_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else tiktoken does not manage."""
    tokenizer, encoder = both("gpt-2")
    monkeypatch.setattr(fast, "_is_easy", lambda text: True)
    text = " " * 1_000_100 + "a"
    assert next(encoder([text])).tolist() == tokenizer.encode(text, add_special=False)


def test_half_a_surrogate_pair_is_refused_and_not_replaced() -> None:
    with pytest.raises(TokenizerError, match="lone surrogate"):
        list(both("gpt-2")[1](["a", "b\ud800c"]))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"pre": "default"}, "the way it cuts words is not known"),
        ({"merges": lambda merges: [merges[1], merges[0], *merges[2:]]}, "not in the order of its merges"),
    ],
)  # fmt: skip
def test_a_vocabulary_that_could_differ_is_refused(changes: dict[str, Any], match: str) -> None:
    values = vocabulary(changes.get("pre", "gpt-2"))
    if "merges" in changes:
        values["tokenizer.ggml.merges"] = changes["merges"](values["tokenizer.ggml.merges"])
    tokenizer = from_gguf(values, "a test")
    assert fast_encoder(tokenizer) is None
    with pytest.raises(UnfitError, match=match):
        FastEncoder(tokenizer)


def odd(tokens: list[str], merges: list[str]) -> Tokenizer:
    """All bytes, then these."""
    values = {
        "tokenizer.ggml.tokens": [*BYTE_OF, *tokens], "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [1] * (256 + len(tokens)), "tokenizer.ggml.eos_token_id": 0,
    }  # fmt: skip
    return from_gguf(vocabulary("gpt-2") | values, "a test")


def test_a_token_that_the_merges_never_make_is_found() -> None:
    """'bc' comes before 'ab', so 'abc' is never 'ab' + 'c'; tiktoken would make it of 'a' + 'bc'."""
    tokenizer = odd(["bc", "ab", "abc"], ["b c", "a b", "ab c"])
    assert tokenizer.encode("abc", add_special=False) == [*tokenizer.encode("a", add_special=False), 256]
    with pytest.raises(UnfitError, match="its merges never make 'abc'"):
        FastEncoder(tokenizer)
    assert FastEncoder(odd(["ab", "abc", "bc"], ["a b", "ab c", "b c"]))


def test_a_token_that_two_merges_make_is_refused() -> None:
    with pytest.raises(UnfitError, match="not in the order of its merges"):
        FastEncoder(odd(["ab", "bc", "abc"], ["a b", "b c", "ab c", "a bc"]))


def test_a_token_of_a_character_that_is_no_byte_is_refused() -> None:
    with pytest.raises(UnfitError, match="'\u4e00', which stands for no byte"):
        FastEncoder(odd(["\u4e00", "\u4e00a"], ["\u4e00 a"]))


def test_a_tiktoken_that_fails_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: object, text: str) -> list[int]:
        raise RuntimeError("no such thing")

    monkeypatch.setattr("tiktoken.Encoding.encode_ordinary", failing)
    with pytest.raises(UnfitError, match="could not encode a probe"):
        FastEncoder(from_gguf(vocabulary("gpt-2"), "a test"))


def test_an_added_token_that_is_matched_in_plain_text_is_refused() -> None:
    tokenizer = from_gguf(vocabulary("gpt-2"), "a test")
    add_tokens(tokenizer.backend, ["the"], special=False)
    with pytest.raises(UnfitError, match="'the' is matched whole"):
        FastEncoder(tokenizer)


def test_a_probe_that_differs_is_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pattern of ours that is wrong, or a library whose Unicode is another."""
    patterns = {**fast._PATTERNS} | {CUTS["gpt-2"].patterns: CUTS["gpt-2"].patterns[0].replace(r" ?\p{N}+", r"\p{N}+")}
    monkeypatch.setattr(fast, "_PATTERNS", patterns)
    with pytest.raises(UnfitError, match="a probe gets other ids"):
        FastEncoder(from_gguf(vocabulary("gpt-2"), "a test"))


def test_without_tiktoken_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(UnfitError, match="not installed"):
        FastEncoder(from_gguf(vocabulary("gpt-2"), "a test"))


def digest(tokenizer: Tokenizer, text: str, dtype: Any = np.uint16) -> tuple[int, str]:
    count, sha = 0, hashlib.sha256()
    for group in encoded(pieces_of([("train", Document("book", text))], tokenizer), tokenizer, np.dtype(dtype)):
        for _, ids in group:
            count += len(ids)
            sha.update(ids.tobytes())
    return count, sha.hexdigest()


def test_prepared_text_has_the_same_ids_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, used = both("gpt-2")[0], list[int]()
    text = ("".join(NASTY) + "\nplain words and 12 numbers\n") * 300
    monkeypatch.setattr("loadstone.data.encoding.WORTH", 0)
    real = tiktoken.Encoding.encode_ordinary

    def watched(self: Any, text: str) -> list[int]:
        used.append(len(text))
        return real(self, text)

    monkeypatch.setattr(tiktoken.Encoding, "encode_ordinary", watched)
    with_it = digest(tokenizer, text)
    assert len(used) > 1  # more than the probe
    monkeypatch.setattr("loadstone.data.encoding.fast_encoder", lambda tokenizer: None)
    assert with_it == digest(tokenizer, text)


@pytest.mark.shared
def test_real_english_has_the_same_ids(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The beginning of a book; `benchmarks/tokenizing.py` compares 50."""
    from loadstone.tokenizer.gpt2 import gpt2_tokenizer

    tokenizer = gpt2_tokenizer(shared / "gpt2-bpe")
    with tarfile.open(shared / "data" / "books.tar.xz") as archive:
        book = next(member for member in archive if member.isfile() and member.name.endswith(".txt"))
        file = archive.extractfile(book)
        assert file is not None
        text = file.read(500_000).decode(errors="replace")
    assert next(FastEncoder(tokenizer)([text])).tolist() == tokenizer.encode(text, add_special=False)
