"""Opened shards are one long array, and what does not agree with the sidecar is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadstone.data.prepare import prepare
from loadstone.data.shards import Dataset, Tokens
from loadstone.data.tokenizer_training import train_bpe
from loadstone.errors import FormatError

WORDS = "the cat sat on the mat and the dog ran after it"
BPE = train_bpe([WORDS * 9], 280)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lines = (json.dumps({"text": f"{WORDS} {i}"}) for i in range(40))
    (folder / "x.jsonl").write_text("\n".join(lines))
    prepare(folder / "x.jsonl", folder / "out", BPE, validation=0.3, shard_tokens=300)
    return folder / "out"


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def rewrite(folder: Path, change: Any) -> None:
    values = json.loads((folder / "dataset.json").read_text())
    change(values)
    (folder / "dataset.json").write_text(json.dumps(values))


# -- reading


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(-30, 30), st.integers(-30, 30))
@settings(max_examples=300, deadline=None)
def test_a_slice_over_shards_is_that_of_the_whole(sizes: list[int], start: int, stop: int) -> None:
    whole = np.arange(sum(sizes), dtype=np.uint16)
    tokens = Tokens(
        np.split(whole, np.cumsum(sizes)[:-1]), np.zeros(1, np.uint64), nbytes_of_text=1, max_id=99, identity="",
        where="x",
    )  # fmt: skip
    assert len(tokens) == len(whole)
    found = tokens[start:stop]
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, whole[start:stop])
    np.testing.assert_array_equal(tokens[:], whole)


def test_several_shards_with_whole_documents(original: Path) -> None:
    dataset = Dataset.open(original)
    split = dataset.info.splits["train"]
    assert len(split.shards) > 1
    tokens = dataset.tokens("train")
    assert (len(tokens), len(tokens.documents), tokens.nbytes_of_text) == (
        split.tokens, split.documents, split.text_bytes,
    )  # fmt: skip
    ends = np.cumsum([shard.tokens for shard in split.shards])
    assert set(ends[:-1].tolist()) <= set(tokens.documents.tolist())  # a shard begins with a document
    assert tokens.documents[0] == 0
    assert set(tokens[:][tokens.documents[1:] - 1].tolist()) == {BPE.eos_ids[0]}
    assert not tokens[0:4].flags.owndata  # the mapped file itself, no copy
    raw = np.fromfile(original / "train-00000.bin", "<u2")  # as anybody's program reads it
    np.testing.assert_array_equal(raw, tokens[: len(raw)])
    assert tokens.identity != dataset.tokens("validation").identity
    dataset.verify()


def test_an_intact_copy_is_the_same_data_wherever_it_came_from(original: Path, folder: Path) -> None:
    rewrite(folder, lambda values: values.update(made_from={"sources": ["elsewhere"]}))
    assert Dataset.open(folder).identity == Dataset.open(original).identity
    rewrite(folder, lambda values: values["splits"]["train"].update(starts_sha256="0"))
    assert Dataset.open(folder).identity != Dataset.open(original).identity


def test_its_tokenizer_is_the_one_that_made_the_ids(folder: Path) -> None:
    dataset = Dataset.open(folder)
    text = dataset.tokenizer().decode(dataset.tokens()[:20].tolist())
    assert text.startswith("the cat sat")
    values = json.loads((folder / "tokenizer.json").read_text())
    ids = values["model"]["vocab"]
    ids["x"], ids["y"] = ids["y"], ids["x"]
    (folder / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(FormatError, match="not those that made the ids"):
        dataset.tokenizer()
    for name in ("tokenizer.json", "vocab.json"):
        (folder / name).unlink()
    with pytest.raises(FormatError, match="tokenizer files are missing"):
        dataset.tokenizer()


# -- what is refused


def test_no_data_set_there(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no dataset\.json lies there.*loadstone prepare"):
        Dataset.open(tmp_path)


@pytest.mark.parametrize("name", ["train-00000.bin", "train-documents.bin", "validation-00000.bin"])
def test_a_file_that_is_missing_cut_short_or_too_long(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    for changed in (data[:-1], data + b"\0\0"):
        (folder / name).write_bytes(changed)
        with pytest.raises(FormatError, match=rf"{name}: it has {len(changed):,} bytes, and dataset\.json speaks of"):
            Dataset.open(folder)
    (folder / name).unlink()
    with pytest.raises(FormatError, match=f"{name}: it is missing"):
        Dataset.open(folder)


@pytest.mark.parametrize("name", ["train-00001.bin", "validation-documents.bin"])
def test_a_flipped_bit_is_found_when_everything_is_read(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    calls: list[tuple[int, int]] = []
    with pytest.raises(FormatError, match=f"{name}: its content is not what was written"):
        Dataset.open(folder).verify(lambda done, total: calls.append((done, total)))
    assert calls


def test_ids_beyond_the_vocabulary(folder: Path) -> None:
    dataset = Dataset.open(folder)
    dataset.require_fits(280)
    with pytest.raises(
        FormatError, match=r"highest id is 279, and the model has 200 rows \(ids 0 to 199\).*at least 280"
    ):
        dataset.require_fits(200)
    with pytest.raises(FormatError, match="no split 'test', only train, validation"):
        dataset.tokens("test")
    ids = np.memmap(folder / "train-00000.bin", "<u2", "r+")
    ids[50] = 280
    ids.flush()
    tokens = Dataset.open(folder).tokens()
    tokens[:50]
    with pytest.raises(FormatError, match="a shard holds id 280, and the highest should be 279"):
        tokens[40:60]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(version=2), "its version is 2, and this program reads 1"),
        (lambda v: v.update(dtype="float64"), "dtype 'float64'; known: uint16, uint32"),
        (lambda v: v.update(max_id=300), "max_id 300 is beyond the vocabulary of 280"),
        (lambda v: v.update(splits={}), "no split"),
        (lambda v: v["splits"]["train"]["shards"][0].update(file="../../etc/passwd"), "is no name"),
        (lambda v: v["splits"]["train"]["shards"][0].update(file="other.bin"), "are not train-00000.bin and so on"),
        (lambda v: v["splits"]["train"].update(tokens=5), "do not add up to its 5 tokens"),
        (lambda v: v["splits"]["train"].update(documents=2**70), "is no count"),
    ],
)
def test_a_sidecar_that_makes_no_sense(folder: Path, change: Any, message: str) -> None:
    rewrite(folder, change)
    with pytest.raises(FormatError, match=message):
        Dataset.open(folder)


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(*path, key) for key, _ in items] + [p for key, child in items for p in paths_in(child, (*path, key))]


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_mutated_sidecar_opens_or_raises_our_error(original: Path, data: st.DataObject) -> None:
    values = json.loads((original / "dataset.json").read_text())
    *parents, key = data.draw(st.sampled_from(paths_in(values)))
    place = values
    for step in parents:
        place = place[step]
    junk: st.SearchStrategy[Any] = st.sampled_from(
        [None, -1, 2**80, "x", "", [], {}, 1.5, True, [[]], {"a": 1}, "\ud800"]
    )
    if data.draw(st.booleans()):
        del place[key]
    else:
        place[key] = data.draw(junk)
    copy = original.parent / "mutated"
    if not copy.exists():
        shutil.copytree(original, copy)
    (copy / "dataset.json").write_text(json.dumps(values))
    try:
        dataset = Dataset.open(copy)
        for split in dataset.info.splits:
            dataset.tokens(split)[:]
    except FormatError:
        pass


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"version": 1}', '"x"', "\xff"])
def test_a_sidecar_that_is_no_json_of_ours(folder: Path, text: str) -> None:
    (folder / "dataset.json").write_bytes(text.encode("latin1"))
    with pytest.raises(FormatError, match=r"dataset\.json"):
        Dataset.open(folder)
