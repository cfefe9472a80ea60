"""The native engine's tests need the library; where it is not built they are skipped with its own reason."""

from __future__ import annotations

import pytest

from loadstone.native import missing


@pytest.fixture(autouse=True)
def _built(request: pytest.FixtureRequest) -> None:
    if "unbuilt" not in request.fixturenames and (reason := missing()):
        pytest.skip(reason)


@pytest.fixture
def unbuilt() -> None:
    """For tests that need no library."""
