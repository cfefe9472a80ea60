"""Every kind of source gives the same documents, and what is no text is refused with its place."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import sys
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadstone.data import corpus as module
from loadstone.data.corpus import Corpus
from loadstone.errors import FormatError, LoadstoneError, SourceError

TEXTS = {"b/two.md": "Zwei: äöü €", "b/three.txt": "three\r\n", "a.txt": "one\n"}
ORDERED = ["one\n", "three\r\n", "Zwei: äöü €"]


def write_folder(folder: Path) -> Path:
    for name, text in TEXTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return folder


def tar_bytes(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def encoded(texts: dict[str, str]) -> dict[str, bytes]:
    return {name: text.encode() for name, text in texts.items()}


def texts(*sources: Path | str, **options: Any) -> list[str]:
    return [document.text for document in Corpus([*sources], **options)]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# -- kinds of sources


def test_a_folder_is_read_in_the_order_of_names_and_hidden_or_other_files_are_not(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "notes")
    for name in ("._a.txt", "picture.png", ".git/x.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\xff")
    documents = list(Corpus([folder]))
    assert [document.text for document in documents] == ORDERED
    assert [document.id for document in documents] == ["a.txt", "b/three.txt", "b/two.md"]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_archives_in_any_compression_whatever_their_name(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    path = write(
        tmp_path / "data.download", pack(tar_bytes(encoded(TEXTS) | {"cover.jpg": b"\xff", "._a.txt": b"\xff"}))
    )
    assert sorted(texts(path)) == sorted(ORDERED)
    assert [document.id for document in Corpus([path])] == [f"data.download:{name}" for name in TEXTS]


def test_packed_members_and_lines_inside_an_archive(tmp_path: Path) -> None:
    lines = b'{"text": "x"}\n\n{"text": "y"}'
    path = write(tmp_path / "a.tar", tar_bytes({"p.jsonl.gz": gzip.compress(lines), "q.jsonl": lines}))
    assert [tuple(document) for document in Corpus([path])] == [
        ("a.tar:p.jsonl.gz:1", "x"),
        ("a.tar:p.jsonl.gz:3", "y"),
        ("a.tar:q.jsonl:1", "x"),
        ("a.tar:q.jsonl:3", "y"),
    ]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_one_text_file_packed_or_not(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    assert texts(write(tmp_path / "t.txt.xyz", pack(b"\xef\xbb\xbfhello"))) == ["hello"]  # without its byte order mark


def test_another_field(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", json.dumps({"text": 3, "body": "é\u2028"}).encode() + b"\r\n")
    assert texts(path, field="body") == ["é\u2028"]


def test_ids_do_not_depend_on_the_place_and_differ_for_equal_names(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "data.txt", name.encode())
    first = [document.id for document in Corpus([tmp_path / "here"])]
    assert first == [document.id for document in Corpus([tmp_path / "there" / "data.txt"])]
    both = [document.id for document in Corpus([tmp_path / "here" / "data.txt", tmp_path / "there" / "data.txt"])]
    assert both == ["data.txt", "data.txt(2)"]


def test_progress_ends_at_the_total_and_a_second_iteration_is_the_same(tmp_path: Path) -> None:
    packed = write(tmp_path / "x.tar.xz", lzma.compress(tar_bytes(encoded(TEXTS))))
    corpus = Corpus([packed, write_folder(tmp_path / "f")])
    first = list(corpus)
    assert corpus.done == corpus.total > 0
    assert list(corpus) == first


@given(st.lists(st.text("ab|\n", max_size=12), min_size=1, max_size=6), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_parts_between_separators_are_the_text_cut_there(parts: list[str], block: int) -> None:
    class Trickle(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(block)

    text = "<|>".join(parts)
    found = [bytes(part).decode() for part in module._split(Path("x"), Trickle(text.encode()), b"<|>")]
    assert found == text.split("<|>")


def test_a_separator_makes_documents_of_a_text_file_and_empty_ones_are_counted(tmp_path: Path) -> None:
    corpus = Corpus([write(tmp_path / "t.txt", b"one<|end|>\n<|end|>two<|end|>")], separator="<|end|>")
    assert [tuple(document) for document in corpus] == [("t.txt:1", "one"), ("t.txt:3", "two")]
    assert corpus.empty == 2


# -- what is refused


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", "schön".encode("latin1"), r"a\.txt: it is no UTF-8 text: byte 3 \(0xf6\) is not UTF-8.*iconv"),
        ("a.txt", "hi".encode("utf-16-le"), r"character 1 is NUL, as in UTF-16"),
        ("a.json", b"[]", r"a \.json file is data.*\.jsonl"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "', r"a\.jsonl, line 2: the line is no JSON"),
        ("a.jsonl", b"[" * 100_000, r"line 1: the line is no JSON"),
        ("a.jsonl", b'{"n": ' + b"9" * 10_000 + b"}", r"line 1: the line is no JSON"),
        ("a.jsonl", b'{"text": "\xff"}', r"line 1: the line is no JSON"),
        ("a.jsonl", b'["x"]', r"line 1: the line is \['x'\], and an object with `text` was expected"),
        ("a.jsonl", b'{"body": "x", "id": 1}', r"no field `text`, only 'body', 'id'\. Name the right one with --field"),
        ("a.jsonl", b'{"text": null}', r"`text` holds None, and a text was expected"),
        ("a.jsonl", b'{"text": "a\\ud800"}', r"half a surrogate pair at character 1"),
        ("a.txt.gz", gzip.compress(b"hello" * 99, mtime=0)[:-9], r"damaged or cut short"),
        ("a.txt.xz", lzma.compress(b"hello" * 99)[:-9], r"damaged or cut short"),
        ("a.txt.bz2", bz2.compress(b"hello" * 99)[:-9], r"damaged or cut short"),
        ("a.txt.gz", gzip.compress(b"hello", mtime=0) + b"x", r"damaged or cut short"),
        ("a.tar", tar_bytes({"x.txt": b"\xff"}), r"a\.tar:x\.txt: it is no UTF-8 text"),
        ("a.tar", tar_bytes({"x.png": b"x"}), r"the archive holds no \.txt, \.md, \.jsonl, \.ndjson file"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_refused_with_its_place(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        texts(write(tmp_path / name, data))


def test_a_tar_archive_that_is_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    whole = tar_bytes(encoded(TEXTS))
    used = 2 * len(TEXTS) * 512  # a header and a block of text for each file; then zeros
    for size in range(512, used + 1, 512):  # between members too, where tarfile itself says nothing
        with pytest.raises(FormatError, match="cut short"):
            texts(write(tmp_path / "x.tar", whole[:size]))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_mutated_archive_raises_nothing_but_our_errors(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = bytearray(tar_bytes(encoded(TEXTS))[:4096])
    for position in data.draw(st.lists(st.integers(0, 1200), max_size=8)):
        whole[position] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):  # with a checksum that is right again, so that the other fields are read
        whole[148:156] = b" " * 8
        whole[148:156] = b"%06o\0 " % sum(whole[:512])
    path = write(tmp_path_factory.mktemp("tar") / "x.tar", bytes(whole))
    with suppress(LoadstoneError):
        texts(path)


def test_sources_that_are_not_there_or_no_files(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nowhere: there is no such file or folder\..*hub:owner/name"):
        Corpus([tmp_path / "nowhere"])
    with pytest.raises(SourceError, match=r"the folder holds no \.txt"):
        Corpus([tmp_path])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match="no regular file"):
        Corpus([tmp_path / "pipe"])
    with pytest.raises(LoadstoneError, match="separator of documents is empty"):
        Corpus([write(tmp_path / "x.txt", b"x")], separator="")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [("a.txt", b"", "every document is empty"), ("a.jsonl", b"\n\n", "there is no document"),
     ("a.jsonl", b'{"text": ""}\n{"text": " \\n"}', "every document is empty")],
)  # fmt: skip
def test_an_empty_corpus_is_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(SourceError, match=rf"{message}, so there is nothing to learn from"):
        texts(write(tmp_path / name, data))


@pytest.mark.parametrize(
    ("name", "separator"), [("a.txt", None), ("a.txt", "|"), ("a.jsonl", None), ("a.txt.gz", None)]
)
def test_a_document_too_large_for_the_memory_says_how_to_cut_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, separator: str | None
) -> None:
    monkeypatch.setattr(module, "LARGEST", 1000)
    data = b"x" * 1001
    path = write(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(FormatError, match=r"one document is larger than .*--separator"):
        texts(path, separator=separator)
    assert texts(write(tmp_path / "b.txt", b"x" * 900 + b"|" + b"y" * 900), separator="|") == ["x" * 900, "y" * 900]


# -- the hub


def test_hub_data_sets_need_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SourceError, match=r'hub:a/b: .*pip install "loadstone\[data\]"'):
        texts("hub:a/b")


def test_hub_rows_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(name: str, config: str | None, **options: Any) -> list[dict[str, Any]]:
        asked.append((name, config, options))
        return [{"body": "x"}, {"body": None}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    documents = iter(Corpus(["hub:a/b/c:test"], field="body"))
    assert tuple(next(documents)) == ("hub:a/b/c:test:0", "x")
    assert asked == [("a/b", "c", {"split": "test", "streaming": True})]
    with pytest.raises(FormatError, match=r"hub:a/b/c:test, row 1: `body` holds None"):
        next(documents)
    with pytest.raises(SourceError, match="is written hub:owner"):
        texts("hub:alone")


@pytest.mark.parametrize("early", [True, False])
def test_what_the_library_raises_becomes_a_paragraph(monkeypatch: pytest.MonkeyPatch, early: bool) -> None:
    def load_dataset(*_: Any, **__: Any) -> Any:
        if early:
            raise FileNotFoundError("no such repository")
        return (1 // 0 for _ in range(1))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(SourceError, match="cannot be opened .no such repository" if early else "row 0 cannot be read"):
        texts("hub:a/b")
