"""Small vocabularies made on the spot, and judges of tokenization: slow, obvious, and independent of the library."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

Merges = list[tuple[str, str]]

NASTY = (
    "Hello world", "I'll we've don't he's I'D THEY'RE 'tis x's'll'VE", "1234567890 3.14 1,000,000 x2y3 ½ ² Ⅷ ٣٤٥ १२३",
    "  \n\n\t tabs  \r\n\r\n end   ", " lead", "trail ", "a\u00a0b\u2003c\u3000d\u200bz\u2028q\u0085w",
    "👍🏽 👨‍👩‍👧‍👦 🇩🇪 emoji😀😀", "مرحبا بالعالم، كيف حالك؟ ١٢٣", "你好，世界！こんにちは 안녕하세요", "हिन्दी தமிழ் ไทย",
    "def f(x):\n    return x**2  # comment\n\n\nclass A:\n\tpass", "<|endoftext|><|im_start|>user\nhi<|im_end|>\n",
    "é e\u0301 Å ﬁ ǅ ß ẞ İ ı ſ 'ſ", "\x00\x01\x7f\x1b[0m\x1c\x1d", "!!!???...---___ $$$ ^^^ `` ~~", "", " ", "\n" * 50,
    "https://example.com/a?b=c&d=%20#frag", "a" * 300, " " * 100, "𝔘𝔫𝔦 𐍈 🂡", "\ufeffbom", " \n a", "\t\t\tx",
    "\ufffd \ufffd",
)  # fmt: skip

# Characters that every Unicode version since 3.2 knows: newer ones have other classes in older tables.
_KNOWN = st.characters(exclude_categories=["Cs", "Cn"]).filter(lambda c: unicodedata.ucd_3_2_0.category(c) != "Cn")
TEXTS = st.one_of(
    st.text(_KNOWN, max_size=60),
    st.lists(st.sampled_from(["'s", "'ll", " ", "  ", "\n", "the", "2024", "Ä", "!?", "👍🏽", "\u3000", "\r\n"])).map(
        "".join
    ),
    st.sampled_from(NASTY),
)

_CORPUS = "The cat's hat; the dog's 12 bones, the bird's nest. They'll sing 2024 songs, and we've 300 more!\n\n  " * 20
_CHARACTER_OF = {  # OpenAI's map of bytes to printable characters, written down another way than in the library
    byte: chr(byte) if chr(byte).isprintable() and byte not in (0x20, 0xAD) else "" for byte in range(256)
}
for _rank, _byte in enumerate(byte for byte in range(256) if not _CHARACTER_OF[byte]):
    _CHARACTER_OF[_byte] = chr(256 + _rank)
_WHITE = {9, 10, 11, 12, 13, 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000}
_CONTRACTION = re.compile("'s|'t|'re|'ve|'m|'ll|'d")
_WORD = re.compile(r" ?L+| ?N+| ?O+|[ W]+(?![LNO])|[ W]+")


def byte_level() -> tuple[dict[str, int], Merges]:
    """A byte-level BPE of 400 tokens with <|endoftext|> behind them, as GPT-2's."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([_CORPUS, *NASTY], trainer)
    model = json.loads(trained.to_str())["model"]
    return model["vocab"] | {"<|endoftext|>": len(model["vocab"])}, [tuple(merge) for merge in model["merges"]]


def write_pair(
    folder: Path, vocab: dict[str, int], merges: Merges, names: Sequence[str] = ("vocab.json", "merges.txt")
) -> None:
    (folder / names[0]).write_text(json.dumps(vocab))
    (folder / names[1]).write_text("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges), "utf-8")


def words(text: str) -> list[str]:
    """GPT-2's words, by classes of characters: letter, number, white, other."""
    kinds = "".join(
        " "
        if char == " "
        else "W"
        if ord(char) in _WHITE
        else kind
        if (kind := unicodedata.category(char)[0]) in "LN"
        else "O"
        for char in text
    )
    found, start = [], 0
    while start < len(text):
        match = _CONTRACTION.match(text, start) or _WORD.match(kinds, start)
        assert match
        found.append(text[start : match.end()])
        start = match.end()
    return found


def gpt2_ids(text: str, vocab: dict[str, int], merges: Merges) -> list[int]:
    """Join the neighbours of the lowest rank until none is left, word by word (Sennrich et al. 2016, algorithm 1)."""
    rank = {pair: i for i, pair in enumerate(merges)}
    ids = []
    for word in words(text):
        parts = [_CHARACTER_OF[byte] for byte in word.encode()]
        while pairs := [pair for pair in pairwise(parts) if pair in rank]:
            best, joined, i = min(pairs, key=rank.__getitem__), [], 0
            while i < len(parts):
                width = 2 if tuple(parts[i : i + 2]) == best else 1
                joined.append("".join(parts[i : i + width]))
                i += width
            parts = joined
        ids += [vocab[part] for part in parts]
    return ids


def gguf_byte_level(vocab: dict[str, int], merges: Merges, **keys: Any) -> dict[str, Any]:
    """GGUF metadata of a byte-level vocabulary whose last token is <|endoftext|>."""
    tokens = sorted(vocab, key=vocab.__getitem__)
    own = {
        "model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": [1] * (len(tokens) - 1) + [3],
        "merges": [" ".join(merge) for merge in merges],
        "bos_token_id": len(tokens) - 1, "eos_token_id": len(tokens) - 1,
    }  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in (own | keys).items() if value is not None}


PIECES = (
    "▁t",
    "he",
    "▁the",
    "aa",
    "▁a",
    "aaa",
    "at",
    "▁▁",
    "▁▁▁▁",
    "ca",
    "▁cat",
    "th",
    "é",
    "你",
    "▁th",
    "aab",
    "s>",
    "<s",
)
LETTERS = ("▁", "t", "h", "e", "a", "c", "b", "s", "<", ">", "/", "好")


def gguf_sentencepiece(**keys: Any) -> dict[str, Any]:
    """GGUF metadata of a SentencePiece vocabulary with byte fallback; <|user|> is user-defined."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<|user|>"]
    tokens = [*special, *PIECES, *LETTERS]
    own = {
        "model": "llama", "tokens": tokens, "token_type": [2, 3, 3, *[6] * 256, 4, *[1] * len(PIECES + LETTERS)],
        "scores": [*[0.0] * 259, -1000.0, *(-float(i) for i in range(len(PIECES + LETTERS)))],
        "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
    }  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in (own | keys).items() if value is not None}


def sentencepiece_ids(text: str, metadata: dict[str, Any]) -> list[int]:
    """Join the neighbours whose token scores highest, leftmost first; what is no token then falls apart into bytes."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    types = metadata["tokenizer.ggml.token_type"]
    score = {token: value for token, value, kind in zip(tokens, scores, types, strict=True) if kind in (1, 4)}
    ids: list[int] = []
    for fragment in re.split(r"(<\|user\|>)", text):
        if fragment == "<|user|>":
            ids.append(tokens.index(fragment))
            continue
        parts = list(("▁" + fragment if fragment else "").replace(" ", "▁"))
        while True:
            pairs = [(score[a + b], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in score]
            if not pairs:
                break
            i = -max(pairs)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        for part in parts:
            ids += (
                [tokens.index(part)] if part in score else [tokens.index(f"<0x{byte:02X}>") for byte in part.encode()]
            )
    return ids
