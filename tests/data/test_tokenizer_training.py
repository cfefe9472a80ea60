"""Tokenizers of our own: any text comes back, the files load again with the same ids, the same text gives the same."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadstone.data.shards import fingerprint
from loadstone.data.tokenizer_training import character_tokenizer, sampled, tokenizer_from, train_bpe
from loadstone.errors import TokenizerError
from loadstone.tokenizer import Tokenizer, load_tokenizer
from loadstone.tokenizer.export import tokenizer_files

TEXTS = ["the cat sat on the mat; the dog's cat didn't.\n\n" * 40, "Äpfel und Öl, 1234 €\t你好 " * 30]
BPE = train_bpe(TEXTS, 290)


def reloaded(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    for name, content in tokenizer_files(tokenizer, "hf").items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    found = load_tokenizer(folder)
    assert found is not None
    return found


@given(st.text(st.characters(codec="utf-8")))
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back(text: str) -> None:
    assert BPE.decode(BPE.encode(text), skip_special=False) == text
    stream = BPE.decode_stream(skip_special=False)
    assert "".join(stream.push(token) for token in BPE.encode(text)) + stream.flush() == text


def test_gpt2s_kind_with_the_end_token_last() -> None:
    assert BPE.vocab_size == 290
    assert (BPE.bos_id, BPE.eos_ids, BPE.pad_id) == (289, (289,), 289)
    assert BPE.is_special(289)
    assert BPE.encode("<|endoftext|>", parse_special=True) == [289]
    assert 289 not in BPE.encode("<|endoftext|>")
    assert BPE.encode("cat") != BPE.encode(" cat")  # no prefix space
    assert [BPE.token_text(token) for token in BPE.encode(" the cat")] == [" the", " cat"]


@pytest.mark.parametrize("tokenizer", [BPE, character_tokenizer(TEXTS)], ids=["bpe", "char"])
def test_the_files_load_again_with_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    again = reloaded(tokenizer, tmp_path)
    text = "".join(TEXTS)
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(again.encode(text)) == text
    assert (again.bos_id, again.eos_ids, again.pad_id) == (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id)
    assert fingerprint(again) == fingerprint(tokenizer)


def test_fingerprints_tell_tokenizers_apart() -> None:
    others = [BPE, train_bpe(TEXTS, 289), train_bpe(TEXTS, 290, ("<|end|>",)), train_bpe(TEXTS, 290, ())]
    assert len({fingerprint(tokenizer) for tokenizer in others}) == 4


def test_training_is_the_same_in_every_process() -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[1].split(';'); import test_tokenizer_training as t; "
        "from loadstone.data.shards import fingerprint; print(fingerprint(t.BPE))"
    )
    paths = ";".join([str(Path(__file__).parent), *sys.path])
    for seed in ("1", "2"):
        found = subprocess.run(
            [sys.executable, "-c", code, paths],
            capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed},
        )  # fmt: skip
        assert found.stdout.strip() == fingerprint(BPE)


def test_too_little_room_and_too_little_text() -> None:
    with pytest.raises(TokenizerError, match="256 tokens has no room for the 256 bytes and 1 special"):
        train_bpe(TEXTS, 256)
    assert train_bpe(TEXTS, 257).vocab_size == 257
    assert train_bpe(["ab"], 8192).vocab_size == 257  # there is nothing to merge


@given(st.lists(st.text("ab", max_size=400_000 // 50), max_size=20), st.integers(1, 30_000))
@settings(max_examples=30, deadline=None)
def test_a_sample_is_at_most_so_large_in_order_and_the_same_every_time(texts: list[str], most: int) -> None:
    found = sampled(texts, most)
    assert found == sampled(texts, most)
    assert sum(map(len, found)) <= most or len(found) == 1
    if sum(map(len, texts)) <= most:
        assert "".join(found) == "".join(texts)


def test_a_sample_is_drawn_from_everywhere() -> None:
    texts = [f"{i:05d}" for i in range(10_000)]
    numbers = [int(text) for text in sampled(texts, 5_000)]
    assert len(numbers) == 1_000
    assert numbers == sorted(numbers)
    counts = [sum(low <= number < low + 1000 for number in numbers) for low in range(0, 10_000, 1000)]
    assert min(counts) > 60
    assert max(counts) < 140


def test_characters_are_tokens_in_order_and_others_are_refused() -> None:
    tokenizer = character_tokenizer(["hello", "wörld\n€"])
    assert [tokenizer.token_text(i) for i in range(tokenizer.vocab_size)] == list("\ndehlorwö€")
    assert tokenizer.encode("ö\n") == [8, 0]
    assert tokenizer.eos_ids == ()
    with pytest.raises(TokenizerError, match=r"could not be encoded: it holds 'x' \(U\+0078\)"):
        tokenizer.encode("hex")
    with pytest.raises(TokenizerError, match="needs a text to find them in"):
        character_tokenizer([])


@given(st.text(st.characters(codec="utf-8"), min_size=1))
@settings(max_examples=100, deadline=None)
def test_any_characters_come_back(text: str) -> None:
    tokenizer = character_tokenizer([text])
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    stream = tokenizer.decode_stream()  # in which no other token may be needed, of an "a" say
    assert "".join(stream.push(token) for token in ids) + stream.flush() == text


def test_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tokenizer_from("char", lambda: TEXTS).vocab_size == len(set("".join(TEXTS)))
    assert fingerprint(tokenizer_from("bpe:290", lambda: TEXTS)) == fingerprint(BPE)
    reloaded(BPE, tmp_path)
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        assert fingerprint(tokenizer_from(str(place), list)) == fingerprint(BPE)
    for spec in ("bpe:", "bpe:many", "bpe:-1", "bpe:99999999"):
        with pytest.raises(TokenizerError, match="expected bpe: and a number of tokens"):
            tokenizer_from(spec, list)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(TokenizerError, match=r"A tokenizer is gpt2, char, bpe:8192, or a place that has one"):
        tokenizer_from(str(tmp_path / "nowhere"), list)


def test_a_models_own_tokenizer(shared: Path) -> None:
    """A folder without tokenizer files of its own: GPT-2's, known by the model's size; and a GGUF's vocabulary."""
    found = tokenizer_from(str(shared / "gpt2-bpe"), list)
    assert found.vocab_size == 50257
    assert (
        hashlib.sha256(str(found.encode("Every effort moves you")).encode()).hexdigest()[:8]
        == hashlib.sha256(b"[6109, 3626, 6100, 345]").hexdigest()[:8]
    )
