"""A server on loopback, for the tests of downloads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from loopback import Loopback


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Loopback() as loopback:
        yield loopback
