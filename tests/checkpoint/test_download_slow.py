"""Servers that ask for patience, and servers that abuse it."""

from __future__ import annotations

import email.utils
import random
import time
from pathlib import Path

import pytest

from loadstone.checkpoint import download
from loadstone.checkpoint.download import CHUNK, fetch
from loadstone.errors import SourceError
from loopback import Handler, Loopback, Reply, in_turn, served

BODY = random.Random(7).randbytes(2 * CHUNK - 123)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "model.bin"


def get(server: Loopback, target: Path, *handlers: Handler | Reply, waits: list[float] | None = None) -> bytes:
    """Serve `handlers` in turn, download without real waiting, and return what was stored."""
    server.routes["/f"] = in_turn(*handlers)
    fetch([f"{server.url}/f"], target, sleep=([] if waits is None else waits).append)
    return target.read_bytes()


@pytest.mark.parametrize(
    ("asked", "waited"),
    [("7", 7), ("0", 1), ("soon", 1), ("-3", 1), ("9" * 30, 1), ("Wed, 21 Oct 2015 07:28:00 GMT", 1), ("", 1)],
)
@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_asks_to_wait(server: Loopback, target: Path, status: int, asked: str, waited: float) -> None:
    waits: list[float] = []
    busy = Reply(status, b"slow down", {"Retry-After": asked} if asked else {})
    assert get(server, target, busy, served(BODY), waits=waits) == BODY
    assert waits == [waited]


def test_a_date_to_wait_for(server: Loopback, target: Path) -> None:
    waits: list[float] = []
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert get(server, target, Reply(503, b"", {"Retry-After": date}), served(BODY), waits=waits) == BODY
    assert 25 < waits[0] <= 30


@pytest.mark.parametrize("asked", ["121", "99999999", "Fri, 01 Jan 2100 00:00:00 GMT"])
def test_a_server_that_asks_to_wait_for_ever(server: Loopback, target: Path, asked: str) -> None:
    server.routes["/f"] = Reply(429, b"", {"Retry-After": asked})
    with pytest.raises(SourceError, match=r"the server answered 429 Too Many Requests, and asks to wait \d{3,} s"):
        fetch([f"{server.url}/f"], target, sleep=lambda _: pytest.fail("nobody waits that long"))


def test_a_server_that_drips(server: Loopback, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then keeps every timeout of silence away."""
    monkeypatch.setattr(download, "SLOWEST", (10_000, 0.3))
    dripping = Reply(200, BODY, {"ETag": '"v1"'}, drip=0.02)
    assert get(server, target, dripping, served(BODY)) == BODY
    assert 0 < int(server.seen[1].range[6:-1]) < 1000
    target.unlink()
    with pytest.raises(SourceError, match=r"the server sent only \d+ bytes in \d+ s \(5 attempts\)"):
        get(server, target, Reply(200, BODY, drip=0.02))
    assert not target.exists()
