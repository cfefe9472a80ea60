"""Labelled texts: tables of every form, columns and headers, classes, balance, splits without copies on two sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadstone.data.batch import collate
from loadstone.data.labelled import LabelledRows, LabelledTexts, load_labelled, rows_for, write_labelled
from loadstone.data.records import Ragged, shuffled, split
from loadstone.data.tables import read_labelled
from loadstone.errors import FormatError, LoadstoneError, SourceError
from loadstone.tokenizer import Tokenizer, load_tokenizer
from small_vocabularies import byte_level, gguf_byte_level

LOADED = load_tokenizer(None, gguf_byte_level(*byte_level()))
assert LOADED is not None
TOKENIZER: Tokenizer = LOADED


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def rows_of(path: Path, **options: Any) -> list[tuple[str, str]]:
    table = read_labelled(path, **options)
    return [(table.labels[number], text) for number, text in table.rows]


def texts_of(rows: LabelledRows) -> list[str]:
    return [TOKENIZER.decode(sample.ids) for sample in rows]


def table(tmp_path: Path, ham: int, spam: int) -> Path:
    lines = [f"ham\tmessage {i}\n" for i in range(ham)] + [f"spam\toffer {i}\n" for i in range(spam)]
    return write(tmp_path / "t.tsv", "".join(lines))


# Tables


@pytest.mark.parametrize(
    ("text", "rows", "said"),
    [
        ("ham\ta\nspam\tb, c\n", [("ham", "a"), ("spam", "b, c")], "TSV, without a header; label in column 1"),
        ("ham,a\nspam,\"b, \"\"c\"\"\nd\"\n", [("ham", "a"), ("spam", 'b, "c"\nd')], "CSV, without a header"),
        ("\ufeffText,Id,Label\r\na,1,ham\r\nb,2,spam\r\n", [("ham", "a"), ("spam", "b")],
         "CSV, with a header; label in column 3, text in column 1"),
        ("label\ttext\nham\ta\r\n\nspam\tb", [("ham", "a"), ("spam", "b")], "TSV, with a header"),
        ('{"text": "a", "label": 1}\n{"text": "b", "label": 0}', [("1", "a"), ("0", "b")],
         "JSON, label in 'label', text in 'text'"),
        ('[{"sentence": "a", "label": true}, {"sentence": "b", "label": false}]', [("true", "a"), ("false", "b")],
         "JSON, label in 'label', text in 'sentence'"),
    ],
)  # fmt: skip
def test_tables_are_recognised_and_said(text: str, rows: list[tuple[str, str]], said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "t", text)
    assert rows_of(path) == rows
    assert read_labelled(path).notes[0].startswith(f"{path}: 2 rows of {said}")


def test_quotes_in_tsv_are_characters(tmp_path: Path) -> None:
    """With CSV's rules, the first row would go on to the third line."""
    path = write(tmp_path / "t", 'ham\t"Hi there\nspam\tb\nham\tc"\n')
    assert rows_of(path) == [("ham", '"Hi there'), ("spam", "b"), ("ham", 'c"')]


def test_columns_by_name_and_number(tmp_path: Path) -> None:
    path = write(tmp_path / "t", "When,Kind,What\n1,ham,a\n2,spam,b\n")
    assert rows_of(path, label="kind", text="What") == [("ham", "a"), ("spam", "b")]
    assert rows_of(path, label="2", text="3")[1:] == [("ham", "a"), ("spam", "b")]
    path = write(tmp_path / "t", "a,ham\nb,spam\n")
    assert rows_of(path, label="2", text="1") == [("ham", "a"), ("spam", "b")]
    path = write(tmp_path / "t", "label,text\nham,a\n")
    assert len(rows_of(path, header=False)) == 2
    path = write(tmp_path / "t", '{"kind": "ham", "what": "a"}\n{"kind": "spam", "what": "b"}')
    assert rows_of(path, label="kind", text="what") == [("ham", "a"), ("spam", "b")]


def test_several_files(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a", "ham\ta\n"), write(tmp_path / "b", '{"label": "spam", "text": "b"}')]
    assert read_labelled(paths).rows == [(0, "a"), (1, "b")]


def test_classes_are_sorted_and_numbers_by_value(tmp_path: Path) -> None:
    path = write(tmp_path / "t", "10\ta\n9\tb\n-1\tc\n")
    assert read_labelled(path).labels == ("-1", "10", "9")
    path = write(tmp_path / "t", "10\ta\n9\tb\n10\tc\n")
    found = read_labelled(path)
    assert found.labels == ("9", "10")
    assert found.rows == [(1, "a"), (0, "b"), (1, "c")]
    assert found.notes[1] == "classes: 9 (1), 10 (2)"


@pytest.mark.parametrize(
    ("text", "options", "problem"),
    [
        ("", {}, "it is empty"),
        ("\ufeff", {}, "it holds no row"),
        ("\x1c\t\x1f", {}, "it holds no row"),
        ("ham\ta\nspam\n", {}, r"line 2: it has 1 columns, and those before have 2: \['spam'\]"),
        ("ham,a\nspam,b,c\n", {}, "line 2: it has 3 columns.*must be quoted in CSV"),
        ("ham\ta\nham\tb\n", {}, "the one class 'ham', and to classify takes two"),
        ("ham\ta\n\tb\n", {}, "row 2 of the data has no label"),
        ("label,text\n", {}, "it holds no row"),
        ("a,b,c\nd,e,f\n", {}, "line 1: of its columns, 3 in number, which hold label and text cannot be told"),
        ("a,b,c\nd,e,f\n", {"label": "1", "text": "4"}, "cannot be told"),
        ("a,b\nd,e\n", {"header": True}, "its columns are 'a', 'b'; none is a label"),
        ("a,b\nd,e\n", {"label": "kind", "text": "what"}, "cannot be told"),
        ('ham,"a\nspam,b\n', {}, "line 1: it is no CSV"),
        ('ham,"a"b\nspam,b\n', {}, "line 1: it is no CSV"),
        ("ham,a\nspam," + "b" * 200_000, {}, "line 2: it is no CSV"),
        ('{"label": "a", "text": "b"}\n{"label": "c"}', {}, "line 2: the field 'text' is missing"),
        ('{"label": null, "text": "b"}', {}, "line 1: the label should be a text, found None"),
        ('{"label": 1, "text": ["b"]}', {}, "line 1: text should be a text"),
        ('{"a": 1, "b": 2}', {}, "line 1: its fields are 'a', 'b'; none is a label"),
        ("".join(f"{i},ham\n" for i in range(30)), {}, "30 different labels in 30 rows .*Are label and text exchanged"),
        ("Kind,What\n" + "ham,a\nspam,b\n" * 12, {}, "label of the first row, 'Kind', .* looks like a header"),
    ],
)  # fmt: skip
def test_what_is_no_table_is_refused(text: str, options: dict[str, Any], problem: str, tmp_path: Path) -> None:
    path = write(tmp_path / "t", text)
    with pytest.raises(FormatError, match=problem) as caught:
        read_labelled(path, **options)
    assert str(caught.value).startswith(str(path))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be read"):
        read_labelled(tmp_path / "none")
    (tmp_path / "l").write_bytes(b"ham\ta\nspam\t\xe9\n")
    with pytest.raises(FormatError, match=r"line 2: it is no UTF-8 text \(byte 0xE9\)"):
        read_labelled(tmp_path / "l")


PIECES = st.sampled_from(["ham", "spam", "\t", ",", '"', "\n", "\r", "{", "[", "a", "label", "text", "\0", "\ud800"])


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.lists(PIECES, max_size=20).map(lambda p: "".join(p).encode(errors="surrogatepass")))
def test_hostile_tables_raise_only_our_errors(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "hostile"
    path.write_bytes(raw)
    with suppress(LoadstoneError):
        load_labelled(path, TOKENIZER, 20, label="1", text="2", validation=0.5, test=0)


# Splits


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("abcdefghijklmnop"), max_size=60), st.integers(0, 5), st.floats(0, 1))
def test_a_split_is_a_partition_that_keeps_copies_together(keys: Sequence[str], seed: int, share: float) -> None:
    parts = split(keys, (share, 1 - share), seed)
    assert sorted(parts[0] + parts[1]) == list(range(len(keys)))
    assert parts == [sorted(part) for part in parts]
    assert not {keys[i] for i in parts[0]} & {keys[i] for i in parts[1]}
    largest = max(Counter(keys).values(), default=0)
    assert abs(len(parts[0]) - share * len(keys)) <= largest / 2 + 1e-6
    turned = split(keys[::-1], (share, 1 - share), seed)  # the order of the file does not matter
    assert {keys[::-1][i] for i in turned[0]} == {keys[i] for i in parts[0]}


def test_wrong_shares() -> None:
    for shares in ((0.5, 0.6), (1.5, -0.5), (), (float("nan"), 0.5)):
        with pytest.raises(LoadstoneError, match="numbers from 0 to 1 that add up to 1"):
            split(["a"], shares, 0)


def test_who_is_chosen_and_who_is_tested_have_nothing_to_do_with_each_other(tmp_path: Path) -> None:
    """One order for both would put all chosen of the frequent class on one side."""
    data = load_labelled(table(tmp_path, 3000, 300), TOKENIZER, 100, balance=True)
    for part, wanted in ((data.train, 210), (data.validation, 30), (data.test, 60)):
        counts = np.bincount(part.classes, minlength=2)
        assert abs(counts.sum() - 2 * wanted) <= 2
        assert abs(counts[0] - counts[1]) < 0.4 * wanted + 10
    assert shuffled("split", 0, "a") != shuffled("balance", 0, "a")


def test_rows_carry_their_own_label(tmp_path: Path) -> None:
    data = load_labelled(table(tmp_path, 60, 40), TOKENIZER, 100)
    assert data.labels == ("ham", "spam")
    for part in (data.train, data.validation, data.test):
        for text, sample in zip(texts_of(part), part, strict=True):
            assert data.labels[sample.targets[0]] == ("spam" if text.startswith("offer") else "ham")
    batch = collate([data.train[0], data.train[1]])
    assert batch.targets.shape == (2, 1)
    assert batch.targets.tolist() == [[data.train.classes[0]], [data.train.classes[1]]]


def test_copies_never_are_on_two_sides(tmp_path: Path) -> None:
    path = write(tmp_path / "t", "".join(f"{'ham' if i % 2 else 'spam'}\ttext {i // 4}\n" for i in range(400)))
    data = load_labelled(path, TOKENIZER, 100, test=0.3)
    sides = [set(texts_of(part)) for part in (data.train, data.validation, data.test)]
    assert not sides[0] & sides[2]
    assert not sides[0] & sides[1]
    assert [len(part) for part in (data.train, data.validation, data.test)] == [240, 40, 120]


def sizes(data: LabelledTexts) -> list[list[int]]:
    return [[len(sample.ids) for sample in part] for part in (data.train, data.validation, data.test)]


def test_texts_are_cut_to_the_longest_of_training_and_to_the_context(tmp_path: Path) -> None:
    lines = "".join(f"{'ham' if i % 2 else 'spam'}\t{'x' * (i + 1)}\n" for i in range(100))
    path = write(tmp_path / "t", lines)
    found = [load_labelled(path, TOKENIZER, 1000, seed=seed) for seed in range(8)]
    longest = [max(sizes(data)[0]) for data in found]
    assert [max(map(max, sizes(data))) for data in found] == longest
    assert min(longest) < max(longest) == len(TOKENIZER.encode("x" * 100))
    data = found[0]
    assert data.notes[-1].startswith(f"at most {longest[0]} tokens each")
    data = load_labelled(path, TOKENIZER, 12)
    assert max(map(max, sizes(data))) == 12
    assert "longer texts were cut at the end" in data.notes[-1]
    assert max(map(max, sizes(load_labelled(path, TOKENIZER, 12, max_length=5)))) == 5
    assert TOKENIZER.decode(data.train[len(data.train) - 1].ids).startswith("x")


def test_the_test_part_as_a_file_of_its_own(tmp_path: Path) -> None:
    rows = [f'{"ham" if i % 2 else "spam"},"text {i}, \u2028 or\nso"\n' for i in range(50)]
    data = load_labelled(write(tmp_path / "t", "".join(rows)), TOKENIZER, 5)
    write_labelled(tmp_path / "test.jsonl", data.test_texts)
    again = read_labelled(tmp_path / "test.jsonl")
    assert [number for number, _ in again.rows] == data.test.classes.tolist()
    assert [TOKENIZER.encode(text)[:5] for _, text in again.rows] == [sample.ids.tolist() for sample in data.test]


def test_rows_for_a_classifier_that_there_is(tmp_path: Path) -> None:
    path = write(tmp_path / "t", "spam\tb b b b b b\nham\ta\n")
    rows = rows_for(path, TOKENIZER, ("eggs", "ham", "spam"), 3)
    assert [sample.targets.tolist() for sample in rows] == [[2], [1]]
    assert rows[0].ids.tolist() == TOKENIZER.encode("b b b b b b")[:3]
    with pytest.raises(FormatError, match=r"the label 'spam' is unknown to the classifier; it has 'eggs', 'ham'\."):
        rows_for(path, TOKENIZER, ("eggs", "ham"), 3)
    with pytest.raises(FormatError, match="the text of row 2 is empty"):
        rows_for(write(path, "spam\ta\nham\t\n"), TOKENIZER, ("ham", "spam"), 3)


def test_empty_texts_are_left_out_and_classes_without_texts_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t", "ham\ta\nspam\tb\nham\t\nspam\tc\nham\td\n")
    data = load_labelled(path, TOKENIZER, 9, validation=0, test=0)
    assert "1 texts are empty and were left out" in data.notes
    assert len(data.train) == 4
    with pytest.raises(LoadstoneError, match=r"no training text is left of the class .*too few rows"):
        load_labelled(path, TOKENIZER, 9, validation=0.5, test=0.5)


def test_rows_as_samples() -> None:
    rows = LabelledRows(Ragged.of([[1, 2], [3]]), np.array([1, 0]))
    assert [sample.ids.tolist() for sample in rows] == [[1, 2], [3]]
    assert rows[-1].targets.tolist() == [0]
    with pytest.raises(IndexError):
        rows[2]
    other = LabelledRows(Ragged.of([[1, 2], [3]]), np.array([0, 1]))
    assert rows.identity != other.identity
    assert Ragged.of([[1], [2, 3]]).digest() != Ragged.of([[1, 2], [3]]).digest()
    assert len(Ragged.of([])) == 0


@pytest.mark.shared
def test_the_sms_messages(shared: Path) -> None:
    path = shared / "data" / "sms.tsv"
    found = read_labelled(path)
    assert len(found.rows) == 5574
    assert found.notes[1] == "classes: ham (4,827), spam (747)"
    data = load_labelled(path, TOKENIZER, 512, balance=True)
    assert data.notes[2] == "balanced: 747 rows of each class"
    assert sum(len(part) for part in (data.train, data.validation, data.test)) == 1494
    again = load_labelled(path, TOKENIZER, 512, balance=True)
    assert again.test.identity == data.test.identity
    assert load_labelled(path, TOKENIZER, 512, balance=True, seed=1).test.identity != data.test.identity
    with pytest.raises(FormatError, match="these are no classes"):
        read_labelled(path, label="2", text="1")
