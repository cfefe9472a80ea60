"""The examples that need nothing but the package run, and say what their texts promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_find_a_bad_conversion() -> None:
    run = [sys.executable, "-W", "error", str(EXAMPLES / "find_a_bad_conversion.py")]
    found = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert "activation is 'gelu', should be 'gelu_tanh'" in found
    assert "transformer.h.1.attn.c_proj.weight: transposed" in found
    assert "these 2 repairs together restore the logits" in found


def test_from_scratch() -> None:
    run = [sys.executable, "-W", "error", str(EXAMPLES / "from_scratch.py")]
    found = subprocess.run(run, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert "saved and loaded: True" in found.stdout
