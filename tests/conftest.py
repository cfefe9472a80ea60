"""Shared fixtures: where ../shared lies, and the skip for whoever has no copy of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loadstone.cli import main

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before anything imports torch: the workers share the cores. If each had a thread on every core, the threads of the
    # one would wait, spinning, for those of the other; models as small as here then take several times as long.
    os.environ.setdefault(
        "OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
    )

Run = Callable[..., tuple[int, str, str]]


def shared_folder() -> Path:
    """Real checkpoints and texts lie beside the checkout; LOADSTONE_SHARED names another place."""
    return Path(os.environ.get("LOADSTONE_SHARED", Path(__file__).parents[2] / "shared"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "online" in config.option.markexpr:
        return
    for item in items:
        if "online" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="downloads from the hub: only with `pytest -m online`"))


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = shared_folder()
    if not folder.is_dir():
        pytest.skip(f"needs the shared data at {folder} (set LOADSTONE_SHARED)")
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `loadstone ARGUMENTS`; returns (exit status, standard output, standard error)."""

    def invoke(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["loadstone", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return invoke


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As in the processes that a module compares with runs in this one; threads that wait for others take minutes."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
