"""Records as files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from records_files import Rows, Write


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def rows_to_file(rows: Rows) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return rows_to_file
