"""`loadstone serve` as a user runs it: a process, its signals, its refusals in one paragraph."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from conftest import Run
from extendable import KNOWN, gpt2_like, hostile
from loadstone.save import save_model
from loadstone.serve.running import bind

SOURCES = str(Path(__file__).parents[2] / "src")
LONG: dict[str, Any] = {"prompt": "The cat's hat", "max_tokens": 2900, "temperature": 0, "stream": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers take seconds."""
    place = tmp_path_factory.mktemp("models") / "hostile"
    save_model(hostile(KNOWN, context_length=3000, eos_ids=()), place, gpt2_like())
    return place


class Process:
    """The command; `port` once it listens."""

    def __init__(self, *arguments: Any, **environment: str) -> None:
        command = [sys.executable, "-W", "error", "-m", "loadstone", "serve", "--port", "0", "--no-verify"]
        environment = {"PYTHONPATH": SOURCES, "OMP_NUM_THREADS": "1", **environment}
        self.process = subprocess.Popen(
            [*command, *map(str, arguments)], stderr=subprocess.PIPE, text=True, env=os.environ | environment
        )  # fmt: skip
        self.said = ""
        assert self.process.stderr
        for line in self.process.stderr:
            self.said += line
            if found := re.search(r"serving at http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                return
        raise AssertionError(self.said)

    def post(self, asked: dict[str, Any], key: str = "") -> requests.Response:
        headers = {"Authorization": f"Bearer {key}"}
        return requests.post(
            f"http://127.0.0.1:{self.port}/v1/completions", json=asked, headers=headers, stream=True, timeout=60
        )

    def end(self, seconds: float) -> tuple[int, str]:
        """Exit status, and what was said after the start."""
        _, said = self.process.communicate(timeout=seconds)
        return self.process.returncode, said


@contextmanager
def running(*arguments: Any, **environment: str) -> Iterator[Process]:
    found = Process(*arguments, **environment)
    try:
        yield found
    finally:
        found.process.kill()
        found.process.communicate()


def refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 2).close()
    except ConnectionError:
        return True
    return False


def test_sigterm_ends_it_when_the_running_answer_is_whole(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("  sesame \nnot this\n")
    options = ("--api-key-file", tmp_path / "key", "--rows", 3)
    with running(f"mine={folder}", *options, LOADSTONE_API_KEY="other") as server:
        assert re.search(r"mine: gpt2, [\d,]+ parameters, NOT verified; engine \w+, 3 rows of 3,000 tok", server.said)
        with server.post(LONG, "other") as wrong:
            assert wrong.status_code == 401
        with requests.Session() as idle, server.post(LONG, "sesame") as answer:
            assert idle.get(f"http://127.0.0.1:{server.port}/health", timeout=9).ok
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            until = time.monotonic() + 5
            while not refused(server.port):
                assert time.monotonic() < until
                time.sleep(0.02)
            assert server.process.poll() is None
            *_, last, done = [line.decode() for line in lines if line]
        assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert done == "data: [DONE]"
        assert server.end(10) == (0, "")


def test_a_second_ctrl_c_ends_it_at_once(folder: Path) -> None:
    with running(folder, "--drain", 60, LOADSTONE_API_KEY=" sesame\n") as server:
        with server.post(LONG | {"stream": False}) as wrong:
            assert wrong.status_code == 401
        with server.post(LONG | {"n": 12}, "sesame") as answer:
            lines = answer.iter_lines()  # kept: the connection ends with it
            next(lines)
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.5)
            assert server.process.poll() is None
            began = time.monotonic()
            server.process.send_signal(signal.SIGINT)
            assert server.end(10)[0] == 0
            assert time.monotonic() - began < 20  # the drain is 60


def test_an_answer_that_is_not_whole_in_time_ends_with_an_error(folder: Path) -> None:
    with running(folder, "--drain", 1) as server, server.post(LONG | {"n": 12}) as answer:
        lines = answer.iter_lines()
        next(lines)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        *_, last = [line.decode() for line in lines if line]
        assert "shutting down" in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert server.end(20) == (0, "")
        assert time.monotonic() - began < 15  # the answer would take a minute


def test_an_address_that_is_taken_is_said_before_anything_is_loaded(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, out, said = run("serve", "no/such/model", "--port", taken.getsockname()[1])
    assert (status, out) == (2, "")
    assert said.startswith("loadstone: cannot listen at 127.0.0.1, port")
    assert said.count("\n") == 1


def test_without_the_extra_it_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("loadstone.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    status, _, said = run("serve", "tiny")
    assert (status, said.count("\n")) == (2, 1)
    assert 'pip install "loadstone[serve]"' in said


def test_what_did_not_load_right_is_not_served(run: Run, folder: Path) -> None:
    status, _, said = run("serve", folder, "--port", 0)
    assert status == 2
    assert re.fullmatch(r"loadstone: hostile: not served, as it did not load right: .*--no-verify.*\n", said)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a/x", "b/x"), "two models would be called x"),
        (("m=tiny", "m=smollm2"), "two models would be called m"),
        (("tiny", "--api-key-file", "/no/such/file"), "--api-key-file /no/such/file: cannot be read"),
        (("tiny", "--cors", "here.example"), "an origin is written as"),
        (("tiny", "--cors", "https://here.example/"), "an origin is written as"),
        (("tiny", "--host", "no.such.host.invalid"), "cannot listen at no.such.host.invalid"),
        (("no/such/model", "--port", "0"), "no/such/model"),
    ],
)
def test_what_cannot_be_served_is_said(run: Run, arguments: tuple[str, ...], message: str) -> None:
    status, out, said = run("serve", *arguments)
    assert (status, out) == (2, "")
    assert message in said


@pytest.mark.parametrize("content", [b"", b"\n", b"   \nsecond line", b"\xff\xfe"])
def test_a_file_without_a_key_does_not_open_the_server_to_all(run: Run, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    status, _, said = run("serve", "tiny", "--api-key-file", tmp_path / "key")
    assert status == 2
    assert "--api-key-file" in said


@pytest.mark.parametrize("value", ["", "  ", "\n"])
def test_an_empty_variable_does_not_open_the_server_to_all(
    run: Run, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("LOADSTONE_API_KEY", value)
    status, _, said = run("serve", "tiny")
    assert status == 2
    assert "LOADSTONE_API_KEY is set, but there is no key in it" in said


def test_until_the_models_are_loaded_connections_are_refused() -> None:
    with bind("127.0.0.1", 0) as bound, pytest.raises(ConnectionRefusedError):
        socket.create_connection(bound.getsockname(), timeout=5)
