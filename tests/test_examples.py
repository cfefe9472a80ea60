"""The example that needs nothing but the package runs, and says what its text promises."""

from __future__ import annotations

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
