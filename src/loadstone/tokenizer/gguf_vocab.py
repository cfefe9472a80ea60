"""The vocabulary inside a GGUF file's metadata: `tokenizer.ggml.*`, read as llama.cpp reads it (src/llama-vocab.cpp).

Two kinds: `gpt2` is byte-level BPE, whose key `pre` names how a text is cut into words; `llama` is SentencePiece's BPE.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from tokenizers import Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from ..checkpoint.wording import shown
from ..errors import TokenizerError
from .base import Tokenizer
from .bpe import Merge, add_tokens, build_bpe, surround

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # `tokenizer.ggml.token_type`
LONGEST = 256  # characters of a SentencePiece token: each is cut at every place to find its merges

# A text ends at these too if they are control tokens: older files name one end token and have several.
ENDS = frozenset(
    "<|endoftext|> <|end_of_text|> <|eot_id|> <|eom_id|> <|im_end|> <|end|> <end_of_turn> <EOT> </s>".split()
)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Cut:
    """How a `pre` cuts a text into words, and what it implies where the file is silent.

    Attributes:
        patterns: applied one after the other, each to the pieces that the ones before it left.
        whole_words: a word that is a token is that token, whatever the merges say.
        add_bos: the default of `add_bos_token`.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False


_AS_GPT2, _SINGLE_DIGITS = Cut((_GPT2,)), Cut((r"\p{N}", _GPT2))
_AS_LLAMA3, _AS_QWEN2 = Cut((_LLAMA3,), whole_words=True, add_bos=True), Cut((_QWEN2,))
CUTS: Mapping[str, Cut] = MappingProxyType(
    {"default": Cut((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))}
    | dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4"), _AS_GPT2)
    | dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b", "exaone"), _SINGLE_DIGITS)
    | dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"), _AS_LLAMA3)
    | dict.fromkeys(("dbrx", "smaug-bpe"), Cut((_LLAMA3,)))
    | dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"), _AS_QWEN2)
    | {"tekken": Cut((_TEKKEN,), whole_words=True, add_bos=True)}
)


def from_gguf(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """The tokenizer that a GGUF file's key-values describe; `where` names the file in errors.

    Raises TokenizerError if its kind or its `pre` is unknown, or its lists are damaged or contradict each other.
    """
    vocab = _Vocab(metadata, where)
    build = _BUILDERS.get(vocab.kind)
    if build is None:
        raise vocab.error(f"is of kind {shown(vocab.kind)}; known are {', '.join(_BUILDERS)}")
    backend, adds_bos = build(vocab)
    bos, eos = vocab.id("bos"), vocab.id("eos")
    before, after = vocab.flag("add_bos_token", adds_bos), vocab.flag("add_eos_token", False)
    if (before and bos is None) or (after and eos is None):
        raise vocab.error("wants a begin or end token around each text and does not name it")
    surround(backend, bos if before else None, eos if after else None)
    by_text = [i for i, token in enumerate(vocab.tokens) if token in ENDS and vocab.types[i] == CONTROL]
    ends = [end for end in (eos, vocab.id("eot"), vocab.id("eom"), *by_text) if end is not None]
    named = {"bos_token": bos, "eos_token": eos, "unk_token": vocab.id("unknown"), "pad_token": vocab.id("padding")}
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise vocab.error("comes with a tokenizer.chat_template that is no text")
    return Tokenizer(
        backend,
        where,
        bos_id=bos,
        eos_ids=tuple(dict.fromkeys(ends)),
        pad_id=vocab.id("padding"),
        chat_template=template,
        special={name: vocab.tokens[number] for name, number in named.items() if number is not None},
    )


class _Vocab:
    """The lists and keys of `tokenizer.ggml.*`, checked."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self._metadata, self._where = metadata, where
        self.kind = str(self._get("model"))
        self.tokens: list[str] = [text or f"[EMPTY_{i}]" for i, text in enumerate(self.items("tokens", _text))]
        self.types: list[int] = self.items("token_type", operator.index) or [NORMAL] * len(self.tokens)
        self.ids = {text: number for number, text in enumerate(self.tokens)}
        if not self.tokens:
            raise self.error("has no tokens")
        if len(self.types) != len(self.tokens):
            raise self.error(f"has {len(self.tokens)} tokens and {len(self.types)} token types")
        if len(self.ids) != len(self.tokens):
            first, text = next((i, text) for i, text in enumerate(self.tokens) if self.ids[text] != i)
            raise self.error(f"has the token {shown(text)} twice, with ids {first} and {self.ids[text]}")

    def error(self, problem: str) -> TokenizerError:
        return TokenizerError(f"{self._where}: the vocabulary {problem}. Put the model's own tokenizer.json beside it.")

    def items(self, key: str, kind: Callable[[Any], Any]) -> list[Any]:
        """A list of values of one kind; empty if the file has none."""
        values = self._get(key)
        try:
            if isinstance(values, str):
                raise TypeError
            if kind is _text and isinstance(values, list) and {*map(type, values)} == {str}:
                return values  # one by one takes as long as to read them
            return [kind(value) for value in (() if values is None else values)]
        except (TypeError, ValueError, OverflowError):
            raise self.error(f"has a damaged list tokenizer.ggml.{key}") from None

    def id(self, name: str) -> int | None:
        """A named token, if the file names one that there is."""
        number = self._get(f"{name}_token_id")
        if number is None:
            number = _DEFAULT_IDS.get(self.kind, {}).get(name)
        return number if isinstance(number, int) and 0 <= number < len(self.tokens) else None

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key)
        if not isinstance(value, bool | None):
            raise self.error(f"has {shown(value)} as tokenizer.ggml.{key}, which is true or false")
        return default if value is None else value

    def of_type(self, *types: int) -> list[str]:
        return [text for text, kind in zip(self.tokens, self.types, strict=True) if kind in types]

    def cut(self) -> Cut:
        """How `pre` cuts words. A file without `pre` is an old one, which llama.cpp reads by its default."""
        pre = str(self._get("pre") or "default")
        if pre not in CUTS:
            raise self.error(f"cuts words in a way that is not known here, {shown(pre)}; known are {', '.join(CUTS)}")
        return CUTS[pre]

    def build(self, merges: Sequence[Merge], **options: Any) -> Backend:
        backend = build_bpe(f"{self._where}: tokenizer.ggml", self.ids, merges, **options)
        add_tokens(backend, self.of_type(CONTROL, UNKNOWN), special=True)
        add_tokens(backend, self.of_type(USER_DEFINED), special=False)
        return backend

    def _get(self, key: str) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}")


def _byte_level(vocab: _Vocab) -> tuple[Backend, bool]:
    cut = vocab.cut()
    merges = []
    for rank, merge in enumerate(vocab.items("merges", _text)):
        left, space, right = merge[1:].partition(" ")  # a token may begin with a space
        if not space:
            raise vocab.error(f"has {shown(merge)} as merge {rank}, and a merge is two tokens")
        merges.append((merge[:1] + left, right))
    if not merges:
        raise vocab.error("has no merges")
    backend = vocab.build(merges, ignore_merges=cut.whole_words)
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in cut.patterns]
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, as_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend, cut.add_bos


def _sentencepiece(vocab: _Vocab) -> tuple[Backend, bool]:
    unknown = vocab.id("unknown")
    backend = vocab.build(
        _merges_from_scores(vocab),
        unk_token=None if unknown is None else vocab.tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    space, prefix = "\u2581", vocab.flag("add_space_prefix", True)
    backend.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(space)] if prefix else []), normalizers.Replace(" ", space)]
    )
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend, True


def _merges_from_scores(vocab: _Vocab) -> list[Merge]:
    """SentencePiece joins the neighbours whose joint token scores highest: each way to cut a token, best token first.

    Control and byte tokens are never made of text.
    """
    scores = vocab.items("scores", float)
    if len(scores) != len(vocab.tokens) or not all(map(math.isfinite, scores)):
        raise vocab.error(
            f"needs a finite score for each of its {len(vocab.tokens)} tokens and has {len(scores)} scores"
        )
    ids = {text: vocab.ids[text] for text in vocab.of_type(NORMAL, USER_DEFINED, UNUSED)}
    if max(map(len, ids), default=0) > LONGEST:
        raise vocab.error(f"has a token of more than {LONGEST} characters")
    merges = []
    for text, number in ids.items():
        cuts = [(text[:i], text[i:]) for i in range(1, len(text)) if text[:i] in ids and text[i:] in ids]
        merges += [(-scores[number], ids[left], ids[right], left, right) for left, right in cuts]
    return [(left, right) for *_, left, right in sorted(merges)]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}
_DEFAULT_IDS: Mapping[str, Mapping[str, int]] = {"llama": {"bos": 1, "eos": 2, "unknown": 0}}
