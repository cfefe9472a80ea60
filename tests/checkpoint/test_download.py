"""The downloader against a real server on loopback that drops, lies, changes its mind and serves web pages."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from loadstone.checkpoint import download
from loadstone.checkpoint.download import ATTEMPTS, CHUNK, fetch, locked
from loadstone.errors import SourceError
from loopback import Handler, Loopback, Reply, Seen, in_turn, piece, served

BODY = random.Random(7).randbytes(5 * CHUNK - 123)
OTHER = random.Random(8).randbytes(5 * CHUNK - 123)
HALF = 2 * CHUNK + 1000


def md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data).digest()).decode()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "model.bin"


def get(
    server: Loopback, target: Path, *handlers: Handler | Reply, sha256: str = "", waits: list[float] | None = None
) -> bytes:
    """Serve `handlers` in turn at /f, download it without real waiting, and return what was stored."""
    server.routes["/f"] = in_turn(*handlers)
    record = [] if waits is None else waits
    assert fetch([f"{server.url}/f"], target, sha256=sha256, sleep=record.append) == target
    assert sorted(path.name for path in target.parent.iterdir()) == [target.name]  # no part file is left behind
    return target.read_bytes()


def test_whole_file(server: Loopback, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    waits: list[float] = []
    good = served(BODY, Content_MD5=md5(BODY))
    assert get(server, target, good, sha256=hashlib.sha256(BODY).hexdigest(), waits=waits) == BODY
    assert (waits, len(server.seen)) == ([], 1)
    assert server.seen[0].headers["accept-encoding"] == "identity"
    assert capsys.readouterr().err == ""


def test_resumes_after_a_drop_with_range_and_if_range(server: Loopback, target: Path) -> None:
    waits: list[float] = []
    dropping = served(BODY, drop_after=HALF, Content_MD5=md5(BODY))
    assert get(server, target, dropping, served(BODY), waits=waits) == BODY
    first, second = server.seen
    assert first.range == ""
    start = int(second.range.removeprefix("bytes=").removesuffix("-"))
    assert HALF - CHUNK <= start <= HALF
    assert start > 0
    assert second.headers["if-range"] == '"v1"'
    assert waits == [1.0]


def test_many_drops_are_bounded_and_the_next_call_goes_on(server: Loopback, target: Path) -> None:
    waits: list[float] = []
    with pytest.raises(
        SourceError, match=rf"model\.bin: could not be downloaded.*ended|\({ATTEMPTS} attempts\).*resumes"
    ):
        get(server, target, Reply(200, BODY, {"ETag": '"v1"'}, drop_after=HALF), Reply(503), waits=waits)
    assert (waits, len(server.seen)) == ([1.0, 2.0, 4.0, 8.0], ATTEMPTS)
    assert not target.exists()
    assert get(server, target, served(BODY)) == BODY
    assert server.seen[-1].range.startswith("bytes=")


def test_last_modified_stands_in_for_a_weak_etag(server: Loopback, target: Path) -> None:
    date = "Wed, 21 Oct 2015 07:28:00 GMT"
    head = Reply(200, BODY, {"ETag": 'W/"x"', "Last-Modified": date}, drop_after=HALF)

    rest = piece(BODY, ETag="", Last_Modified=date)
    assert get(server, target, head, rest) == BODY
    assert server.seen[1].headers["if-range"] == date


@pytest.mark.parametrize(("etag", "asks"), [('"v1"', True), ("", False)], ids=["Range is ignored", "no validator"])
def test_starts_over(server: Loopback, target: Path, etag: str, asks: bool) -> None:
    assert get(server, target, served(BODY, etag=etag, drop_after=HALF), Reply(200, BODY)) == BODY
    assert [bool(seen.range) for seen in server.seen] == [False, asks]


def test_server_that_refuses_every_range(server: Loopback, target: Path) -> None:
    def no_ranges(seen: Seen) -> Reply:
        return Reply(416) if seen.range else Reply(200, BODY)

    assert get(server, target, served(BODY, drop_after=HALF), no_ranges) == BODY


def test_range_that_is_answered_in_pieces(server: Loopback, target: Path) -> None:
    assert get(server, target, served(BODY, drop_after=HALF), piece(BODY, 999), piece(BODY, 999), served(BODY)) == BODY
    starts = [int(seen.range[6:-1]) for seen in server.seen[1:]]
    assert [starts[1] - starts[0], starts[2] - starts[1]] == [999, 999]


@pytest.mark.parametrize("polite", [True, False], ids=["answers 200", "answers 206 of the new file"])
def test_file_that_changes_midway_is_never_glued(server: Loopback, target: Path, polite: bool) -> None:
    rude = [] if polite else [piece(OTHER, ETag='"v2"')]
    assert get(server, target, served(BODY, drop_after=HALF), *rude, served(OTHER, etag='"v2"')) == OTHER


@pytest.mark.parametrize(
    "content_range",
    [
        "bytes 0-{end}/{size}",
        "bytes {start}-{end}/9{size}",
        "bytes {start}-{end}/" + "9" * 5000,
        "bytes 5-9/10",
        "junk",
        "",
    ],
)
def test_answer_to_range_that_is_another_range(server: Loopback, target: Path, content_range: str) -> None:
    def wrong(seen: Seen) -> Reply:
        start = int(seen.range[6:-1])
        text = content_range.format(start=start, end=len(BODY) - 1, size=len(BODY))
        return Reply(206, BODY[: len(BODY) - start], {"ETag": '"v1"', "Content-Range": text})

    assert get(server, target, served(BODY, drop_after=HALF), wrong, served(BODY)) == BODY


def test_glued_halves_are_caught_by_the_checksum_and_fetched_again(server: Loopback, target: Path) -> None:
    """A server that changes the file under the same ETag: only the digest can tell."""
    good = served(OTHER, Content_MD5=md5(OTHER))
    first = served(BODY, drop_after=HALF, Content_MD5=md5(BODY))
    assert get(server, target, first, served(OTHER), good) == OTHER
    assert [bool(seen.range) for seen in server.seen] == [False, True, False]


def test_length_promised_too_long(server: Loopback, target: Path) -> None:
    """The rest of a file that has none: 416 and the true size end it; without Range it never ends well."""
    headers = {"ETag": '"v1"', "Content-MD5": md5(BODY)}
    liar = Reply(200, BODY, headers, length=len(BODY) + 5000)
    assert get(server, target, liar, served(BODY)) == BODY
    target.unlink()
    with pytest.raises(SourceError, match=rf"\({ATTEMPTS} attempts\)\.$"):  # and nothing that could be resumed
        get(server, target, Reply(200, BODY, length=len(BODY) + 5000))
    assert not target.exists()


def test_length_promised_too_short(server: Loopback, target: Path) -> None:
    """HTTP gives no way to see it, a known digest does."""
    liar = Reply(200, BODY, length=len(BODY) - 5000)
    with pytest.raises(SourceError, match=r"its SHA-256 is .* and not the known"):
        get(server, target, liar, sha256=hashlib.sha256(BODY).hexdigest())
    assert not target.parent.exists() or list(target.parent.iterdir()) == []
    assert len(server.seen) == 1  # the same whole file again would be as wrong


def test_missing_content_length_then_resumed(server: Loopback, target: Path) -> None:
    """A chunked body that breaks says so; its rest comes with the total that was missing before."""
    chunked = b"20000\r\n" + BODY[:0x20000] + b"\r\n20000\r\n" + BODY[0x20000:][:7]
    first = Reply(200, chunked, {"ETag": '"v1"', "Transfer-Encoding": "chunked"}, length=-1)
    assert get(server, target, first, served(BODY)) == BODY
    assert [seen.range for seen in server.seen] == ["", f"bytes={0x20000 + 7}-"]


@pytest.mark.parametrize("headers", [{}, {"Content-Length": "junk"}, {"Content-Length": "-5"}])
def test_missing_content_length(server: Loopback, target: Path, headers: dict[str, str]) -> None:
    assert get(server, target, Reply(200, BODY, headers, length=-1)) == BODY


@pytest.mark.parametrize("length", ["9" * 18, "9" * 30, "12, 13"])
def test_absurd_content_length(server: Loopback, target: Path, length: str) -> None:
    with pytest.raises(SourceError, match=r"could not be downloaded|are to be downloaded"):
        get(server, target, Reply(200, BODY, {"Content-Length": length}, length=-1), Reply(404))
    assert not target.exists()


def test_wrong_content_md5(server: Loopback, target: Path) -> None:
    with pytest.raises(SourceError, match=r"Content-MD5 is .*, and the server had promised"):
        get(server, target, served(BODY, Content_MD5=md5(OTHER)))
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"\n <!DOCTYPE html><html><body>Log in</body></html>", "a web page"),
        (b"\xef\xbb\xbf<HTML><head>", "a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML message"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "a Git LFS pointer"),
        (b"", "an empty file"),
    ],
)
def test_what_is_no_weight_file_is_never_stored(server: Loopback, target: Path, body: bytes, what: str) -> None:
    with pytest.raises(SourceError, match=f"the server sent {what}"):
        get(server, target, Reply(200, body, {"Content-Type": "application/octet-stream"}))
    assert (list(target.parent.iterdir()), len(server.seen)) == ([], 1)


@pytest.mark.parametrize("status", [403, 404, 410, 500, 503])
def test_next_mirror(server: Loopback, target: Path, status: int) -> None:
    server.routes |= {"/bad/f": Reply(status), "/good/f": served(BODY)}
    dead = "http://127.0.0.1:9/f"  # the discard port: nothing listens there
    urls = [dead, f"{server.url}/bad/f", f"{server.url}/good/f"]
    fetch(urls, target, sleep=lambda _: pytest.fail("waits although another mirror is left"))
    assert target.read_bytes() == BODY


def test_mirror_that_makes_progress_is_kept(server: Loopback, target: Path) -> None:
    server.routes["/a"] = in_turn(served(BODY, drop_after=HALF), served(BODY))
    fetch([f"{server.url}/a", f"{server.url}/b"], target, sleep=lambda _: None)
    assert [seen.path for seen in server.seen] == ["/a", "/a"]


def test_part_of_one_mirror_is_not_continued_from_another(server: Loopback, target: Path) -> None:
    server.routes["/a"] = in_turn(served(BODY, drop_after=HALF), Reply(404))
    server.routes["/b"] = served(OTHER)  # the same ETag, as a sloppy mirror may have
    fetch([f"{server.url}/a", f"{server.url}/b"], target, sleep=lambda _: None)
    assert target.read_bytes() == OTHER


def test_error_lists_each_mirror_without_secrets(server: Loopback, target: Path) -> None:
    server.routes["/page"] = Reply(200, b"<html>")
    host = server.url.removeprefix("http://")
    urls = [f"http://user:hunter2@{host}/gone?sig=hunter2", f"{server.url}/page", "http://127.0.0.1:9/f?sig=hunter2"]
    with pytest.raises(SourceError) as error:
        fetch(urls, target, sleep=lambda _: None)
    text = str(error.value)
    assert f"{server.url}/gone: the server answered 404 Not Found" in text
    assert f"{server.url}/page: the server sent a web page" in text
    assert "http://127.0.0.1:9/f: " in text
    assert "refused" in text
    assert "hunter2" not in text
    assert "\n" not in text


def test_redirects(server: Loopback, target: Path) -> None:
    server.routes |= {"/old": Reply(302, b"", {"Location": "/new"}), "/new": served(BODY)}
    assert fetch([f"{server.url}/old"], target).read_bytes() == BODY
    target.unlink()
    for location in ("/loop", "file:///etc/passwd"):
        server.routes["/loop"] = Reply(302, b"", {"Location": location})
        with pytest.raises(SourceError, match=r"redirects|connection adapters"):
            fetch([f"{server.url}/loop"], target, sleep=lambda _: pytest.fail("no second try can help"))
    assert not target.exists()


def test_compressed_answer_is_refused(server: Loopback, target: Path) -> None:
    zipped = piece(BODY, Content_Encoding="gzip")
    with pytest.raises(SourceError, match="insists on gzip"):
        get(server, target, served(BODY, drop_after=HALF), zipped)
    with pytest.raises(SourceError, match="insists on gzip"):
        get(server, target, Reply(200, BODY, {"Content-Encoding": "gzip"}))


def test_disk_too_small(server: Loopback, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=len(BODY) - 1))
    with pytest.raises(SourceError, match=r"328 KB are to be downloaded and the disk has 328 KB free.*LOADSTONE_CACHE"):
        get(server, target, served(BODY))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=len(BODY)))
    assert get(server, target, served(BODY)) == BODY


def test_big_download_is_announced(
    server: Loopback, target: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=41_000_000_000))
    with pytest.raises(SourceError):
        get(server, target, Reply(200, BODY, length=523_000_000))
    assert f"will download 523 MB (1 file) to {target.parent}; 41 GB free\n" in capsys.readouterr().err


def test_folder_that_cannot_be_made(tmp_path: Path, server: Loopback) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SourceError, match=r"cannot be written.*LOADSTONE_CACHE"):
        fetch([f"{server.url}/f"], tmp_path / "file" / "model.bin")


@pytest.mark.parametrize("description", ["", "{", "[1]", "{}", '{"mirror": "x", "validator": "y", "length": 1}'])
def test_damaged_description_of_a_part(server: Loopback, target: Path, description: str) -> None:
    target.parent.mkdir()
    target.with_name("model.bin.part").write_bytes(OTHER[:5000])
    target.with_name("model.bin.part.json").write_text(description)
    assert get(server, target, served(BODY)) == BODY
    assert server.seen[0].range == ""


@pytest.mark.parametrize("junk", [b"", b"junk"])
def test_complete_part_of_a_process_that_died_before_renaming(server: Loopback, target: Path, junk: bytes) -> None:
    with pytest.raises(SourceError):
        get(server, target, served(BODY, drop_after=HALF), Reply(404))
    target.with_name("model.bin.part").write_bytes(BODY + junk)
    assert get(server, target, served(BODY)) == BODY
    assert [seen.range for seen in server.seen[2:]] == [f"bytes={len(BODY + junk)}-"] + ([""] if junk else [])


def test_more_bytes_than_promised(server: Loopback, target: Path) -> None:
    def more(seen: Seen) -> Reply:
        reply = piece(BODY)(seen)
        return Reply(206, reply.body + b"junk", reply.headers)

    assert get(server, target, served(BODY, drop_after=HALF), more, served(BODY)) == BODY


def test_killed_process_leaves_a_part_and_the_next_one_resumes(server: Loopback, target: Path) -> None:
    hold = threading.Event()
    server.routes["/f"] = in_turn(Reply(200, BODY, {"ETag": '"v1"'}, drop_after=HALF, hold=hold), served(BODY))
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); target = Path(sys.argv[2])\n"
        "from loadstone.checkpoint.download import fetch, locked\nwith locked(target): fetch([sys.argv[3]], target)"
    )
    source = Path(download.__file__).parents[2]
    child = subprocess.Popen([sys.executable, "-c", code, str(source), str(target), f"{server.url}/f"])
    part = target.with_name("model.bin.part")
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline and not (part.exists() and part.stat().st_size >= CHUNK):
        time.sleep(0.01)
    child.kill()
    child.wait(10)
    hold.set()
    assert not target.exists()
    assert json.loads(part.with_suffix(".part.json").read_text())["length"] == len(BODY)
    with locked(target):  # the dead process holds it no more
        fetch([f"{server.url}/f"], target)
    assert target.read_bytes() == BODY
    assert int(server.seen[1].range[6:-1]) >= CHUNK


def test_silent_server(server: Loopback, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT", (5, 0.2))
    hold = threading.Event()
    silent = Reply(200, BODY, {"ETag": '"v1"'}, drop_after=HALF, hold=hold)
    assert get(server, target, silent, served(BODY)) == BODY
    assert server.seen[1].range
    hold.set()
