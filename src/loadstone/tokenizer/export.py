"""A tokenizer, written: as HuggingFace's files, as OpenAI's two, or as the key-values of a GGUF file.

What a format cannot express is refused: a vocabulary that gives other ids is worse than none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..config import GPTConfig
from ..errors import TokenizerError
from .base import Tokenizer
from .bpe import Merge
from .files import END_OF_TEXT, NAMED
from .gguf_vocab import BYTE, CONTROL, CUTS, ENDS, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, from_gguf
from .parts import Parts

# What tells ways to cut and to join apart: spaces, digits, contractions, bytes, characters of several bytes.
_PROBES = (
    "Hello world", " I'll we've don't I'D'LL  x", "1234567 3.14 ½²Ⅷ٣٤", "a  \n\n\t b\r\n ", "你好，世界！ é e\u0301 ﬁ",
    "def f(x):\n    return x**2  # c", "👍🏽 \u200d\x00\x7f\ufffd", "aaaaaaaaaaaa        ///---", "", " ", "\n",
)  # fmt: skip


def tokenizer_files(tokenizer: Tokenizer, style: str) -> dict[str, str | bytes]:
    """File name -> content.

    Args:
        tokenizer: from any source.
        style: `hf`: what AutoTokenizer reads, with the chat template; for a vocabulary of GPT-2's kind also vocab.json
            and merges.txt. `openai`: encoder.json and vocab.bpe.

    Raises TokenizerError for another style, and for `openai` if the tokenizer is not GPT-2's kind.
    """
    if style not in ("hf", "openai"):
        raise TokenizerError(f"there is no style {style!r} of tokenizer files; known: hf, openai.")
    parts = Parts.of(tokenizer)
    problem = _not_gpt2(tokenizer, parts)
    if style == "openai":
        if problem:
            raise TokenizerError(
                f"{tokenizer.source}: it cannot be written as OpenAI's encoder.json and vocab.bpe, as {problem}."
            )
        return _pair(parts, "encoder.json", "vocab.bpe")
    # transformers gives its GPT2Tokenizer <|endoftext|> as the end token, whether there is one or not.
    is_gpt2 = not problem and END_OF_TEXT in parts.vocab
    settings = _hf_settings(tokenizer, "GPT2Tokenizer" if is_gpt2 else "PreTrainedTokenizerFast")
    files: dict[str, str | bytes] = {
        "tokenizer.json": json.dumps(parts.portable(), ensure_ascii=False, indent=2),
        "tokenizer_config.json": json.dumps(settings, ensure_ascii=False, indent=2) + "\n",
    }
    return files | (_pair(parts, "vocab.json", "merges.txt") if is_gpt2 else {})


def gguf_vocabulary(tokenizer: Tokenizer, config: GPTConfig) -> dict[str, Any]:
    """The `tokenizer.ggml.*` key-values, and the chat template's, as llama.cpp's converter writes them.

    Ids up to `config.vocab_size` that have no token get an unused one of their own. The result is read back: it must
    give the same merges and the same ids.

    Raises TokenizerError if GGUF has no word for how this tokenizer works, or the model has too few rows for it.
    """
    parts = Parts.of(tokenizer)
    if tokenizer.vocab_size > config.vocab_size:
        raise _refusal(tokenizer, f"has {tokenizer.vocab_size} tokens, and the model {config.vocab_size} rows")
    if problem := parts.unusual():
        raise _refusal(tokenizer, problem)
    keys = _sentencepiece(tokenizer, parts) if parts.byte_fallback else _byte_level(tokenizer, parts)
    tokens = parts.texts(config.vocab_size)
    kinds = [_kind(tokenizer, parts, token) for token in range(config.vocab_size)]
    around = _around(tokenizer)
    if around is None:
        raise _refusal(tokenizer, "puts other tokens around a text than one that begins and one that ends it")
    own = {
        **keys,
        "tokens": [text if text is not None else f"[PAD{i}]" for i, text in enumerate(tokens)],
        "token_type": kinds,
        **_named_ids(tokenizer, config, kinds),
        "add_bos_token": around[0],
        "add_eos_token": around[1],
    }
    if "scores" in own:
        own["scores"] = [own["scores"].get(text, -float(len(parts.merges))) for text in own["tokens"]]
    metadata = {f"tokenizer.ggml.{key}": value for key, value in own.items()}
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    _check(tokenizer, parts, metadata)
    return metadata


def _refusal(tokenizer: Tokenizer, problem: str) -> TokenizerError:
    return TokenizerError(f"{tokenizer.source}: GGUF cannot express this tokenizer, which {problem}.")


def _around(tokenizer: Tokenizer) -> tuple[bool, bool] | None:
    """Whether the begin token is put before each text and the end token behind it; None if anything else is."""
    text = _encodable(tokenizer)
    plain, whole = tokenizer.encode(text, add_special=False), tokenizer.encode(text)
    for before in ([], [tokenizer.bos_id]):
        for after in ([], [*tokenizer.eos_ids[:1]]):
            if whole == [*before, *plain, *after]:
                return bool(before), bool(after)
    return None


# HuggingFace's and OpenAI's files


def _encodable(tokenizer: Tokenizer) -> str:
    """A short text: `a`, or the first token where the vocabulary is of characters that lack it."""
    try:
        tokenizer.encode("a")
    except TokenizerError:
        return tokenizer.token_text(0)
    return "a"


def _not_gpt2(tokenizer: Tokenizer, parts: Parts) -> str:
    """Why the vocabulary and its merges alone do not tell everything; empty if they do."""
    if problem := parts.unusual():
        return f"it {problem}"
    if parts.byte_fallback or parts.patterns() != CUTS["gpt-2"].patterns or parts.ignore_merges:
        return "it does not cut a text into words, or join bytes, as GPT-2's does"
    others = [token.content for token in parts.added.values() if token.content != END_OF_TEXT]
    if others:
        return f"they would lose that {', '.join(map(repr, others[:4]))} are matched whole"
    return "" if _around(tokenizer) == (False, False) else "it puts tokens around each text"


def _pair(parts: Parts, vocab: str, merges: str) -> dict[str, str | bytes]:
    lines = "".join(f"{left} {right}\n" for left, right in parts.merges)
    return {vocab: json.dumps(parts.vocab), merges: f"#version: 0.2\n{lines}"}


def _hf_settings(tokenizer: Tokenizer, class_name: str) -> dict[str, Any]:
    """tokenizer_config.json. PreTrainedTokenizerFast is the class that takes tokenizer.json as it is."""
    ids = {
        "bos_token": tokenizer.bos_id,
        "eos_token": next(iter(tokenizer.eos_ids), None),
        "pad_token": tokenizer.pad_id,
    }
    named = {name: tokenizer.backend.id_to_token(number) for name, number in ids.items() if number is not None}
    # A text that is no token would become a new one, beyond the model's rows.
    named |= {n: t for n, t in tokenizer.special.items() if n in NAMED and tokenizer.backend.token_to_id(t) is not None}
    around = _around(tokenizer)
    flags = {} if around is None else {"add_bos_token": around[0], "add_eos_token": around[1]}
    template = {} if tokenizer.chat_template is None else {"chat_template": tokenizer.chat_template}
    return {
        "tokenizer_class": class_name,
        "clean_up_tokenization_spaces": False,
        **named,
        **flags,
        **template,
    }


# GGUF


def _byte_level(tokenizer: Tokenizer, parts: Parts) -> dict[str, Any]:
    cut, patterns = None, parts.patterns()
    if patterns is not None:
        wanted = (patterns, parts.ignore_merges)
        cut = next((pre for pre, cut in CUTS.items() if (cut.patterns, cut.whole_words) == wanted), None)
    if cut is None:
        raise _refusal(tokenizer, "cuts a text into words in a way that has no name there")
    return {"model": "gpt2", "pre": cut, "merges": [f"{left} {right}" for left, right in parts.merges]}


def _sentencepiece(tokenizer: Tokenizer, parts: Parts) -> dict[str, Any]:
    prefix = parts.space_prefix()
    if prefix is None:
        raise _refusal(tokenizer, "turns spaces into something else than SentencePiece's \u2581")
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in parts.vocab]
    if missing:
        raise _refusal(tokenizer, f"has no token for byte {missing[0]} (llama.cpp needs all 256)")
    return {"model": "llama", "pre": "default", "add_space_prefix": prefix, "scores": _scores(parts.merges)}


def _scores(merges: Sequence[Merge]) -> dict[str, float]:
    """Token -> score: minus the rank of the first merge that makes it.

    SentencePiece joins what gives the token of the highest score, so only the order of the scores counts, and that is
    the order of the merges. Tokens whose merges lie between another's had equal scores, and get them again.
    """
    last = {left + right: rank for rank, (left, right) in enumerate(merges)}
    scores: dict[str, float] = {}
    first = end = 0
    for rank, (left, right) in enumerate(merges):
        if rank > end:
            first = rank
        end = max(end, last[left + right])
        scores[left + right] = -float(first)
    return scores


def _kind(tokenizer: Tokenizer, parts: Parts, token: int) -> int:
    text = parts.text_of.get(token)
    if text is None:
        return UNUSED
    if token in parts.added:
        special = CONTROL if parts.added[token].special else USER_DEFINED
        return UNKNOWN if parts.byte_fallback and text == parts.unknown else special
    if parts.byte_fallback and len(text) == 6 and text.startswith("<0x"):
        return BYTE
    return NORMAL


def _named_ids(tokenizer: Tokenizer, config: GPTConfig, kinds: Sequence[int]) -> dict[str, int]:
    ends = tuple(dict.fromkeys((*tokenizer.eos_ids, *config.eos_ids)))
    if not ends:
        # llama.cpp would take token 11 or 2 for it, whatever that is.
        raise _refusal(tokenizer, "names no token that ends a text")
    bos = config.bos_id if tokenizer.bos_id is None else tokenizer.bos_id
    # Control tokens whose text says that they end a text are found by it.
    unfound = [end for end in ends[1:] if tokenizer.backend.id_to_token(end) not in ENDS or kinds[end] != CONTROL]
    if len(unfound) > 2:
        raise _refusal(tokenizer, f"has {len(ends)} tokens that end a text, and it can name three")
    unknown = tokenizer.special.get("unk_token")
    named = {
        "bos": bos,
        "eos": ends[0],
        **dict(zip(("eot", "eom"), unfound, strict=False)),
        "unknown": None if unknown is None else tokenizer.backend.token_to_id(unknown),
        "padding": tokenizer.pad_id,
    }
    return {f"{name}_token_id": number for name, number in named.items() if number is not None}


def _check(tokenizer: Tokenizer, parts: Parts, metadata: dict[str, Any]) -> None:
    """Read it back. Raises TokenizerError if anything came out different."""
    back = from_gguf(metadata, tokenizer.source)
    if Parts.of(back).merges != parts.merges:
        raise _refusal(
            tokenizer, "joins pairs in an order that no scores of tokens give (it was not made by SentencePiece)"
        )
    whole = [token.content for token in parts.added.values() if not token.special][:50]
    for text in (*_PROBES, *(f"a{token}b {token}" for token in whole)):
        if back.encode(text) != tokenizer.encode(text):
            raise _refusal(tokenizer, f"gives other ids for {text!r} than llama.cpp would")
