"""docs/scale.md holds: two servers behind nginx, with the configuration of that page; one is killed, one is ended."""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from server_load import Answer, Server, ask, free_port, loadstone, request

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
CLIENTS, PATIENCE = 6, 60.0
CONTENT = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 40, "temperature": 0}
MAIN = """
daemon off; pid {place}/pid; error_log {place}/errors warn; worker_processes 2;
events {{}}
http {{
    log_format tried '$upstream_addr; $upstream_bytes_sent; $status'; access_log {place}/tried tried;
    client_body_temp_path {place}/body; proxy_temp_path {place}/proxy; fastcgi_temp_path {place}/fastcgi;
    uwsgi_temp_path {place}/uwsgi; scgi_temp_path {place}/scgi;
    {site}
}}
"""


def tiny(port: int) -> Server:
    return Server(loadstone("tiny", "--no-verify", "--dtype", "float32", "--rows", "4"), port=port)


@contextmanager
def nginx(place: Path, ports: list[int]) -> Iterator[int]:
    """nginx with the page's configuration, but for the ports and a shorter time out; the port where it listens."""
    (site,) = re.findall(r"```nginx\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    listen = free_port()
    changes = {"listen 8080": f"listen 127.0.0.1:{listen}", "fail_timeout=10s": "fail_timeout=1s"}
    changes |= {f"127.0.0.1:800{number}": f"127.0.0.1:{port}" for number, port in enumerate(ports, 1)}
    for old, new in changes.items():
        assert old in site
        site = site.replace(old, new)
    (place / "conf").write_text(MAIN.format(place=place, site=site))
    assert NGINX
    command = [NGINX, "-p", str(place), "-c", str(place / "conf"), "-e", str(place / "errors")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_for(listen)
        yield listen
    finally:
        process.terminate()
        process.wait(20)
        assert "emerg" not in (place / "errors").read_text()


def wait_for(port: int) -> None:
    until = time.monotonic() + 20
    while True:
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < until
        time.sleep(0.05)


@dataclass
class Load:
    """Clients that ask again and again, every other one for a stream; each answer with when it was begun."""

    port: int
    answers: list[tuple[float, Answer]] = field(default_factory=list)
    over: bool = False

    async def client(self, number: int) -> None:
        while not self.over:
            began = time.monotonic()
            content = CONTENT | {"stream": number % 2 == 0}
            self.answers.append((began, await ask(self.port, "/v1/completions", content, timeout=PATIENCE)))

    async def around(self, server: Server, number: int) -> tuple[float, int]:
        """Load before, while and after the server gets the signal; when it had ended, and its status."""
        clients = [asyncio.create_task(self.client(n)) for n in range(CLIENTS)]
        await until(lambda: {"whole", "stream"} <= self.kinds(server.port))
        status = await asyncio.to_thread(server.end, number)
        ended = time.monotonic()
        await until(lambda: sum(began > ended for began, _ in self.answers) >= 2 * CLIENTS)
        self.over = True
        await asyncio.gather(*clients)
        return ended, status

    def kinds(self, port: int) -> set[str]:
        """Forms of answers that the server behind nginx has given."""
        given = [answer.headers for _, answer in self.answers if upstream(answer) == port]
        return {"stream" if "event-stream" in headers["content-type"] else "whole" for headers in given}


async def until(met: Callable[[], bool]) -> None:
    for _ in range(2000):
        if met():
            return
        await asyncio.sleep(0.05)
    pytest.fail("it does not come to that")


def upstream(answer: Answer) -> int:
    """The port of the server that was asked last; 0 if none was."""
    return int(answer.headers.get("x-upstream", ":0").rpartition(":")[2])


async def served_by(listen: int, port: int) -> None:
    """Ask until a server answers through nginx."""
    while upstream(await ask(listen, "/v1/completions", CONTENT | {"max_tokens": 1}, timeout=PATIENCE)) != port:
        await asyncio.sleep(0.1)


@dataclass
class Cluster:
    """nginx, its files and the port where it listens, and the two servers behind it."""

    place: Path
    listen: int
    servers: list[Server]

    def begun_twice(self) -> list[str]:
        """Requests that one server had got when another was asked."""
        lines = [line.split("; ") for line in (self.place / "tried").read_text().splitlines()]
        return [addresses for addresses, sent, _ in lines if any(int(each) for each in sent.split(", ")[:-1])]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if NGINX is None:
        pytest.skip("nginx is not installed (apt-get install nginx-light)")
    place = tmp_path_factory.mktemp("nginx")
    place.chmod(0o755)
    with ExitStack() as stack:
        servers = [tiny(0), tiny(0)]  # both start at once
        for server in servers:
            stack.enter_context(server)
        yield Cluster(place, stack.enter_context(nginx(place, [server.port for server in servers])), servers)


def test_a_server_that_is_killed_takes_only_its_own_answers_along(cluster: Cluster) -> None:
    listen, (dies, lives) = cluster.listen, cluster.servers
    load = Load(listen)
    ended, _ = asyncio.run(load.around(dies, signal.SIGKILL))
    whole = [answer for _, answer in load.answers if answer.whole]
    broken = [(began, answer) for began, answer in load.answers if not answer.whole]
    assert broken
    for began, answer in broken:
        assert began < ended
        assert upstream(answer) == dies.port
        assert answer.error
        assert answer.status in (200, 502)
    assert len(broken) <= CLIENTS
    assert len({answer.text for answer in whole}) == 1
    after = [answer for began, answer in load.answers if began > ended]
    assert len(after) >= CLIENTS
    assert {upstream(answer) for answer in after} == {lives.port}
    assert cluster.begun_twice() == []


def test_a_server_that_is_back_is_asked_again_and_one_that_is_ended_loses_nothing(
    cluster: Cluster,
) -> None:
    listen, (dead, lives) = cluster.listen, cluster.servers
    assert dead.process.poll() is not None
    with tiny(dead.port) as back:
        asyncio.run(asyncio.wait_for(served_by(listen, back.port), PATIENCE))
        load = Load(listen)
        ended, status = asyncio.run(load.around(back, signal.SIGTERM))
    assert status == 0
    assert [answer for _, answer in load.answers if not answer.whole] == []
    assert {upstream(answer) for began, answer in load.answers if began > ended} == {lives.port}


def test_a_request_on_a_connection_from_just_before_the_end_is_answered() -> None:
    with tiny(0) as server, socket.create_connection(("127.0.0.1", server.port)) as taken:
        time.sleep(0.2)
        server.process.terminate()
        time.sleep(0.25)  # uvicorn looks for a signal every tenth of a second
        taken.sendall(request("/tokenize", b'{"text": "a"}'))
        assert taken.recv(100).startswith(b"HTTP/1.1 200")


def test_each_token_comes_through_as_it_is_made(cluster: Cluster) -> None:
    listen = cluster.listen
    began = time.monotonic()
    answer = asyncio.run(ask(listen, "/v1/completions", CONTENT | {"stream": True}))
    assert answer.pieces > 10
    assert answer.first is not None
    assert answer.first < (time.monotonic() - began) / 2


def test_what_nginx_refuses_itself(cluster: Cluster) -> None:
    listen = cluster.listen
    assert asyncio.run(ask(listen, "/metrics", {})).status == 404
    long = asyncio.run(ask(listen, "/v1/completions", {"prompt": "x" * (5 << 20)}))
    assert long.status in (413, 0)
