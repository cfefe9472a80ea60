"""Fixtures for preparing data: a source, and pieces so small that little text makes many."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadstone.data import encoding
from prepared_data import TEXTS


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pieces and many groups, even of little text."""
    monkeypatch.setattr(encoding, "_PIECE", 200)
    monkeypatch.setattr(encoding, "_GROUP", 3000)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path
