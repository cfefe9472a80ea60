"""A running server on loopback, in a thread of the tests: small hostile models, real sockets."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from extendable import KNOWN, gpt2_like, hostile
from loadstone.serve.app import Settings, create_app
from loadstone.serve.batch import Batch
from loadstone.serve.served import Served

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}{% endif %}"
    "{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def small(
    name: str = "small", *, chat: bool = False, seed: int = 0, rows: int = 4, waiting: int = 64, context: int = 192
) -> Served:
    """A model of 401 tokens that answers at once."""
    model = hostile(KNOWN, seed=seed, context_length=context)
    tokenizer = replace(gpt2_like(), chat_template=TEMPLATE if chat else None)
    batch = Batch(model, rows=rows, waiting=waiting, n_tokens=KNOWN)
    return Served(name, model, tokenizer, batch, 1, {})


@dataclass
class Answered:
    """A response as it came over the wire."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Serving:
    """A server that runs. `pace` makes each step of every model take so many seconds."""

    port: int
    models: dict[str, Served]
    paced: list[float] = field(default_factory=lambda: [0.0])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def pace(self, seconds: float) -> Iterator[None]:
        self.paced[0] = seconds
        try:
            yield
        finally:
            self.paced[0] = 0.0

    def call(self, path: str, body: Any = None, *, method: str = "", **headers: str) -> Answered:
        """One request on a connection of its own; a body that is not bytes is sent as JSON."""
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        if raw is not None:
            named = {"content-type": "application/json"} | named
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method or ("GET" if raw is None else "POST"), path, raw, named)
            found = connection.getresponse()
            return Answered(found.status, {k.lower(): v for k, v in found.getheaders()}, found.read())
        finally:
            connection.close()

    def raw(self, sent: bytes, timeout: float = 30) -> socket.socket:
        """A socket on which these bytes went out."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout)
        connection.sendall(sent)
        return connection

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples of that name that have these labels."""
        text = self.call("/metrics").body.decode()
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    def until(self, true: Callable[[], bool], seconds: float = 10) -> None:
        """Wait until something is so."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, "it did not come to that"
            time.sleep(0.01)

    def idle(self) -> bool:
        return not self.metric("loadstone_running") and not self.metric("loadstone_waiting")


@contextmanager
def serving(*models: Served, **settings: Any) -> Iterator[Serving]:
    """Serve until the block ends; then everything that runs ends too."""
    listening = socket.create_server(("127.0.0.1", 0))
    found = Serving(listening.getsockname()[1], {each.name: each for each in models})
    for each in models:
        _pace(each.batch, found.paced)
    config = uvicorn.Config(
        create_app(models, Settings(**settings)), log_level="warning", access_log=False, lifespan="on",
        timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        found.until(lambda: server.started, 30)
        yield found
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()
        assert not thread.is_alive()


def _pace(batch: Batch, paced: list[float]) -> None:
    step = batch.step

    def slowly() -> None:
        if paced[0]:
            time.sleep(paced[0])
        step()

    batch.step = slowly  # type: ignore[method-assign]
