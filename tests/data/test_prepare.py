"""Prepared data holds exactly the tokenizer's ids, whatever the pieces, in the split where they belong."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import typer
from tokenizers import Regex, pre_tokenizers
from typer.testing import CliRunner, Result

from loadstone.cli.options import spread
from loadstone.cli.prepare import prepare as command
from loadstone.data import encoding
from loadstone.data.corpus import Document
from loadstone.data.prepare import prepare
from loadstone.data.shards import Dataset
from loadstone.data.tokenizer_training import character_tokenizer, train_bpe
from loadstone.errors import ConfigError, FormatError, LoadstoneError, SourceError, TokenizerError
from loadstone.tokenizer import Tokenizer, from_folder
from loadstone.tokenizer.gguf_vocab import CUTS
from prepared_data import BPE, TEXTS, WORDS, content, documents, text_of

# -- the ids


@pytest.mark.usefixtures("small_pieces")
def test_each_document_has_the_tokenizers_own_ids_and_ends_with_the_end_token(source: Path, tmp_path: Path) -> None:
    dataset = prepare(source, tmp_path / "out", BPE, validation=0.2, shard_tokens=2000)
    expected = [[*BPE.encode(text, add_special=False), 299] for text in TEXTS]
    found = documents(dataset, "train") + documents(dataset, "validation")
    assert sorted(found) == sorted(expected)
    order = [expected.index(ids) for ids in documents(dataset, "train")]
    assert order == sorted(order)  # as the documents come
    assert sum(split.text_bytes for split in dataset.info.splits.values()) == sum(len(t.encode()) for t in TEXTS)
    assert dataset.info.max_id == max(map(max, expected))
    assert len(dataset.info.splits["train"].shards) > 2
    dataset.verify()


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("seed", range(8))
def test_a_long_text_in_pieces_has_the_ids_of_the_whole(seed: int, tmp_path: Path) -> None:
    text = text_of(seed, 3000)
    (tmp_path / "x.txt").write_text(text)
    pieces = list(encoding.pieces_of([("train", Document("x", text))], BPE))
    assert len(pieces) > 10
    dataset = prepare(tmp_path / "x.txt", tmp_path / "out", BPE, validation=0)
    assert documents(dataset, "train") == [[*BPE.encode(text, add_special=False), 299]]


@pytest.mark.parametrize("name", list(CUTS))
def test_a_text_may_be_cut_there_for_every_known_way_to_cut_words(name: str) -> None:
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in CUTS[name].patterns]
    cut = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    pieces = [*WORDS, "\n", " \r\n", "\t", "don't", "A\nB", "a\n're", "\n 1", "n\n\n\n.", "z\n  \n q", "!\n?", "  "]
    for seed in range(3):
        text = "".join(random.Random(seed).choices(pieces, k=200))
        places = [match.start() for match in encoding._SAFE.finditer(text)]
        assert len(places) > 20
        parts = [text[start:stop] for start, stop in zip([0, *places], [*places, None], strict=True)]
        words = [word for part in parts for word, _ in cut.pre_tokenize_str(part)]
        assert words == [word for word, _ in cut.pre_tokenize_str(text)]


def test_a_tokenizer_that_sees_more_than_words_gets_whole_documents() -> None:
    def pieces(tokenizer: Tokenizer) -> int:
        return len(list(encoding.pieces_of([("train", Document("x", "a\n" * 10**6))], tokenizer)))

    assert pieces(BPE) == pieces(character_tokenizer(["a\n"])) == 8
    across = train_bpe(TEXTS, 280)
    across.backend.add_tokens(["\n\n"])
    unknown = train_bpe(TEXTS, 280)
    unknown.backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("a\n"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    assert pieces(across) == pieces(unknown) == 1


def test_gpt2s_ids_of_tiny_shakespeare_are_nanogpts(shared: Path, tmp_path: Path) -> None:
    """nanoGPT, data/shakespeare: 301,966 and 36,059 tokens; data/shakespeare_char: 1,003,854 and 111,540."""
    source = shared / "data" / "tinyshakespeare.txt"
    gpt2 = from_folder(shared / "gpt2-bpe")
    assert gpt2 is not None
    dataset = prepare(source, tmp_path / "gpt2", gpt2, validation=0.1)
    ends = len(gpt2.eos_ids[:1])
    assert [len(dataset.tokens(split)) - ends for split in ("train", "validation")] == [301_966, 36_059]
    dataset = prepare(source, tmp_path / "char", character_tokenizer([source.read_text()]), validation=0.1)
    assert [len(dataset.tokens(split)) for split in ("train", "validation")] == [1_003_854, 111_540]
    assert dataset.info.vocab_size == 65


def test_the_text_of_the_end_token_is_plain_text_and_told(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one<|endoftext|>two<|endoftext|>")
    info = prepare(tmp_path / "x.txt", tmp_path / "a", BPE, validation=0).info
    assert (info.spelled_ends, info.splits["train"].documents) == (2, 1)
    plain = BPE.encode("one<|endoftext|>two<|endoftext|>")
    assert documents(Dataset.open(tmp_path / "a"), "train") == [[*plain, 299]]
    assert plain.count(299) == 0
    cut = prepare(tmp_path / "x.txt", tmp_path / "b", BPE, validation=0, separator="<|endoftext|>")
    assert (cut.info.spelled_ends, cut.info.splits["train"].documents, cut.info.empty) == (0, 2, 1)
    assert documents(cut, "train") == [[*BPE.encode(text), 299] for text in ("one", "two")]


def test_a_vocabulary_beyond_65536_needs_four_bytes(tmp_path: Path) -> None:
    every = "a" + "".join(map(chr, range(0x10000, 0x10000 + 69_999)))
    (tmp_path / "x.txt").write_text(every[-5:] + every[:5])
    dataset = prepare(tmp_path / "x.txt", tmp_path / "out", character_tokenizer([every]), validation=0)
    assert dataset.info.dtype == "uint32"
    assert dataset.tokens()[:].tolist() == [*range(69_995, 70_000), *range(5)]


def test_a_character_without_a_token_is_named_with_its_document(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "abc"}\n{"text": "abxc"}\n')
    with pytest.raises(TokenizerError, match=r"x\.jsonl:2: it holds the character 'x' \(U\+0078\).*has no token"):
        prepare(tmp_path / "x.jsonl", tmp_path / "out", character_tokenizer(["abc"]), validation=0)
    assert not (tmp_path / "out").exists()


# -- the splits


def test_a_document_keeps_its_split_when_others_come_or_the_corpus_moves(source: Path, tmp_path: Path) -> None:
    before = prepare(source, tmp_path / "a", BPE, validation=0.3)
    (tmp_path / "moved").mkdir()
    longer = tmp_path / "moved" / source.name
    longer.write_text(source.read_text() + '{"text": "one more"}\n')
    after = prepare(longer, tmp_path / "b", BPE, validation=0.3)
    for split in ("train", "validation"):
        assert {*map(tuple, documents(before, split))} <= {*map(tuple, documents(after, split))}
    assert 0.15 < before.info.splits["validation"].documents / len(TEXTS) < 0.45
    other = prepare(source, tmp_path / "c", BPE, validation=0.3, seed=1)
    assert documents(other, "validation") != documents(before, "validation")


def test_of_a_single_document_the_end_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(TEXTS[7])
    dataset = prepare(tmp_path / "x.txt", tmp_path / "out", BPE, validation=0.25)
    parts = [BPE.decode(dataset.tokens(split)[:].tolist()) for split in ("train", "validation")]
    assert "".join(parts) == TEXTS[7]
    assert len(parts[0]) == int(len(TEXTS[7]) * 0.75)


def test_sources_of_their_own_for_validation(source: Path, tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_text(TEXTS[0])
    dataset = prepare([source], tmp_path / "out", BPE, validation=[tmp_path / "v.txt"])
    assert dataset.info.splits["train"].documents == len(TEXTS)
    assert documents(dataset, "validation") == [[*BPE.encode(TEXTS[0]), 299]]


def test_a_split_without_documents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(ConfigError, match=r"of its 2 documents none fell to the validation split, at a part of 0\.01"):
        prepare(tmp_path / "x.jsonl", tmp_path / "out", BPE, validation=0.01)
    with pytest.raises(ConfigError, match="none fell to the train split"):
        prepare(tmp_path / "x.jsonl", tmp_path / "out", BPE, validation=0.999)
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(ConfigError, match="of its one document none fell to the train split"):
        prepare(tmp_path / "x.txt", tmp_path / "out", BPE)
    for part in (1, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="validation part of"):
            prepare(tmp_path / "x.txt", tmp_path / "out", BPE, validation=part)
    assert list(prepare(tmp_path / "x.txt", tmp_path / "out", BPE, validation=0).info.splits) == ["train"]


# -- what is refused


def test_an_existing_folder_is_kept_unless_told(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "out", BPE)
    before = content(tmp_path / "out")
    with pytest.raises(LoadstoneError, match="the folder is not empty"):
        prepare(source, tmp_path / "out", BPE, seed=3)
    assert content(tmp_path / "out") == before
    prepare(source, tmp_path / "out", BPE, seed=3, force=True)
    assert content(tmp_path / "out") != before


def test_force_replaces_a_prepared_data_set_and_nothing_else(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(source, out, BPE)
    for place, stranger in ((out, "notes.md"), (source.parent, "texts.jsonl")):
        (out / "notes.md").write_text("mine")
        with pytest.raises(LoadstoneError, match=f"it holds .*{stranger}.*, which no preparation wrote"):
            prepare(source, place, BPE, force=True)
        assert (out / "notes.md").read_text() == "mine"
    (out / "notes.md").unlink()
    (out / "train-00000.bin").write_bytes(b"")  # damaged: whose it is cannot be told
    with pytest.raises(LoadstoneError, match="has 0 bytes"):
        prepare(source, out, BPE, force=True)
    (tmp_path / "empty").mkdir()
    prepare(source, tmp_path / "empty", BPE, force=True)


def test_what_was_prepared_inside_a_source_folder_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(TEXTS[1])
    prepare(tmp_path, tmp_path / "a", BPE, validation=0)
    assert (tmp_path / "a" / "merges.txt").exists()
    prepare(tmp_path, tmp_path / "b", BPE, validation=0)
    assert (tmp_path / "a" / "train-00000.bin").read_bytes() == (tmp_path / "b" / "train-00000.bin").read_bytes()


def test_two_runs_to_one_place(source: Path, tmp_path: Path) -> None:
    def second(done: int, total: int) -> None:
        with pytest.raises(LoadstoneError, match="another run is preparing it right now"):
            prepare(source, tmp_path / "out", BPE)

    prepare(source, tmp_path / "out", BPE, progress=second)
    Dataset.open(tmp_path / "out").verify()


@pytest.mark.parametrize(
    ("name", "text", "kind", "message"),
    [
        ("x.txt", "", SourceError, "there is nothing to learn from"),
        ("x.jsonl", '{"text": "a"}\n{"txt": 1}\n', FormatError, r"x\.jsonl, line 2: there is no field `text`"),
    ],
)
def test_a_bad_source_leaves_nothing(tmp_path: Path, name: str, text: str, kind: type[Exception], message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(kind, match=message):
        prepare(tmp_path / name, tmp_path / "out", BPE)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_no_folder_for_the_destination(source: Path, tmp_path: Path) -> None:
    with pytest.raises(LoadstoneError, match="there is no folder"):
        prepare(source, tmp_path / "none" / "out", BPE)


# -- the command


def run(*arguments: str | Path) -> Result:
    app = typer.Typer()
    app.command()(spread(command))
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


def test_the_command_says_what_was_made_and_what_comes_next(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a one<|endoftext|>two<|endoftext|>" * 30)
    out = tmp_path / "an out"
    told = run(tmp_path / "x.txt", out, "--tokenizer", "bpe:270", "--validation", "0.5").stdout
    assert "270 tokens, each document ends with token 269" in told
    assert "--separator '<|endoftext|>'" in told
    assert f"loadstone train --run RUN --data '{out}'" in told
    told = run(
        tmp_path / "x.txt", out, "--tokenizer", "char", "--validation", "0.5", "--separator", "<|endoftext|>", "--force"
    ).stdout
    info = Dataset.open(out).info
    train = info.splits["train"]
    assert (
        f"train      {train.tokens:,} tokens in {train.documents} documents, {train.text_bytes} bytes of text" in told
    )
    assert "left out   1 empty document" in told
    assert "no end token" in told


def test_the_command_in_json_and_with_validation_sources(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("abc")
    (tmp_path / "v.jsonl").write_text('{"body": "d"}')
    result = run(
        tmp_path / "x.txt", tmp_path / "x.txt", tmp_path / "out", "--tokenizer", "char", "--field", "body",
        "--validation-source", tmp_path / "v.jsonl", "--json",
    )  # fmt: skip
    told = json.loads(result.stdout)
    assert told["path"] == str(tmp_path / "out")
    assert told["vocab_size"] == 4  # the characters of the validation text are known too
    assert told["splits"]["train"]["documents"] == 2
    with pytest.raises(ConfigError, match="--tokenizer is empty"):
        run(tmp_path / "x.txt", tmp_path / "other", "--tokenizer", "")
