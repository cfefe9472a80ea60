"""Models that no test machine could hold: converted under a hard limit on memory, planned in a moment.

The 7B model has 10 of its 32 layers, which is four times the limit: the peak is the same, and to hash 13.5 GB takes a
minute. All of it, as `make peers` does: LARGE_LAYERS=32 pytest tests/test_large.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import large_models

LAYERS = int(os.environ.get("LARGE_LAYERS", "10"))
PARAMETERS = 262_148_096 + LAYERS * 202_383_360  # 32 layers: 6,738,415,616
LIMIT = 1_200_000_000  # bytes of address space; Python with numpy and tokenizers takes half of it

CONVERT = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({limit},) * 2)
from loadstone.convert import convert
found = convert({source!r}, {target!r}, to={to!r})
assert "torch" not in sys.modules
assert found["counts"] == {{"parameters": {parameters}, "tensors": {tensors}}}, found["counts"]
assert found["parity"] == {{"run": False, "why": "{whole} in float32; ask for it with --parity"}}, found["parity"]
# VmHWM, not getrusage's ru_maxrss: that also counts the process that started this one, as it was before exec.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """A folder on a file system that has holes."""
    probe = tmp_path / "probe"
    with probe.open("wb") as file:
        file.truncate(1 << 30)
    if probe.stat().st_blocks * 512 > 1 << 20:
        pytest.skip("the file system has no sparse files")
    if shutil.disk_usage(tmp_path).free < 15_000_000_000:
        pytest.skip("needs 15 GB of free space, of which it takes next to nothing")
    return tmp_path


def test_a_7b_model_is_converted_under_a_limit_far_below_its_size(sparse: Path) -> None:
    """Three shards of safetensors -> Meta's one file, q and k permuted: peak is the largest tensor + constant."""
    source, nbytes = sparse / "7b", 2 * PARAMETERS
    source.mkdir()
    assert large_models.write(source, large_models.LLAMA_7B | {"num_hidden_layers": LAYERS}, nbytes * 2 // 5) == nbytes
    assert len(list(source.glob("*.safetensors"))) == 3
    code = CONVERT.format(
        limit=LIMIT, source=str(source), target=str(sparse / "out"), to="meta", parameters=PARAMETERS,
        tensors=9 * LAYERS + 3, whole=f"{4 * PARAMETERS / 1e9:.2g} GB",
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    largest = 2 * 32000 * 4096
    assert int(done.stdout) * 1024 < 2 * largest + 110_000_000
    assert (sparse / "out" / "consolidated.00.pth").stat().st_size > nbytes
    assert sum(file.stat().st_blocks * 512 for file in (sparse / "out").iterdir()) < 100_000_000


def test_a_limit_below_the_largest_tensor_is_met_with_an_error_not_a_crash(sparse: Path) -> None:
    """The test above can fail, and what a user then reads is one sentence."""
    source = sparse / "7b"
    source.mkdir()
    large_models.write(source, large_models.LLAMA_7B | {"num_hidden_layers": 1}, 5_000_000_000)
    code = """
import resource, sys
import loadstone.convert, loadstone.checkpoint.write_torch, loadstone.tokenizer, loadstone.cli.write
from loadstone.cli import main
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 150_000_000,) * 2)  # the embedding has 262 MB
sys.argv = ["loadstone", "convert", sys.argv[1], sys.argv[2], "--to", "meta"]
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(sparse / "out")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "memory" in done.stderr
    assert not (sparse / "out").exists()


def test_a_70b_model_is_planned_in_two_seconds(sparse: Path) -> None:
    total = large_models.write(sparse, large_models.LLAMA_70B, 5_000_000_000)
    assert total > 141_000_000_000
    command = [sys.executable, "-m", "loadstone", "plan", str(sparse)]
    times = []
    for _ in range(3):
        start = time.monotonic()
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        times.append(time.monotonic() - start)
    assert "clean: nothing missing, nothing unused" in output
    assert min(times) < 2, times
