"""Shared fixtures: where ../shared lies, and the skip for whoever has no copy of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def shared_folder() -> Path:
    """Real checkpoints and texts lie beside the checkout; LOADSTONE_SHARED names another place."""
    return Path(os.environ.get("LOADSTONE_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = shared_folder()
    if not folder.is_dir():
        pytest.skip(f"needs the shared data at {folder} (set LOADSTONE_SHARED)")
    return folder
