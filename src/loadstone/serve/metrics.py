"""What the server counts, in Prometheus's form."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from .reply import Reply
    from .served import Served

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server; a registry of its own, so that several can live in one process."""

    def __init__(self, served: Iterable[Served]) -> None:
        self._registry = registry = CollectorRegistry()
        model = ["model"]
        self.requests = Counter("loadstone_requests_total", "HTTP requests.", ["path", "status"], registry=registry)
        self.read = Counter("loadstone_prompt_tokens_total", "Tokens of prompts.", model, registry=registry)
        self.known = Counter("loadstone_prompt_tokens_known_total", "Of these, known.", model, registry=registry)
        self.made = Counter("loadstone_generated_tokens_total", "Tokens generated.", model, registry=registry)
        self.first = Histogram(
            "loadstone_first_token_seconds", "Until a stream's first token.", model, registry=registry, buckets=SECONDS
        )
        running = Gauge("loadstone_running", "Requests in the batch.", model, registry=registry)
        waiting = Gauge("loadstone_waiting", "Requests that wait for a row.", model, registry=registry)
        for each in served:
            running.labels(each.name).set_function(partial(_load, each, 0))
            waiting.labels(each.name).set_function(partial(_load, each, 1))

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def ended(self, served: Served, reply: Reply) -> None:
        """Count the tokens of an answer that is over, whole or not."""
        usage = reply.usage
        self.read.labels(served.name).inc(usage["prompt_tokens"])
        self.known.labels(served.name).inc(usage["prompt_tokens_details"]["cached_tokens"])
        self.made.labels(served.name).inc(usage["completion_tokens"])

    async def watched(self, served: Served, reply: Reply, events: AsyncIterator[str]) -> AsyncIterator[str]:
        """The same events, counted."""
        began, first = time.perf_counter(), True
        try:
            async for event in events:
                if first and any(choice.answer.made for choice in reply.choices):
                    self.first.labels(served.name).observe(time.perf_counter() - began)
                    first = False
                yield event
        finally:
            self.ended(served, reply)


def _load(served: Served, which: int) -> float:
    return served.batch.load[which]
