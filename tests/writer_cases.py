"""What the tests of writers share: random checkpoints, a source that never holds a tensor, and the peak of memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from loadstone.checkpoint.base import DTYPES, Checkpoint
from memory import MemoryCheckpoint


@st.composite
def arrays(draw: st.DrawFn, dtypes: Collection[str]) -> NDArray[Any]:
    """Any shape (0-d and empty too), any bits (NaNs too); whole, transposed, sliced or repeated."""
    dtype = DTYPES[draw(st.sampled_from(sorted(dtypes)))]
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = int(np.prod(shape)) * dtype.itemsize
    raw = rng.integers(0, 2 if dtype == np.bool_ else 256, size=count, dtype=np.uint8)
    array = raw.view(dtype).reshape(shape)
    views = [array, array.T, array[..., ::-1, :] if array.ndim > 1 else array, np.broadcast_to(array, (2, *shape))]
    return draw(st.sampled_from(views))


@st.composite
def checkpoints(draw: st.DrawFn, dtypes: Collection[str], names: st.SearchStrategy[str]) -> MemoryCheckpoint:
    """Some tensors and aliases of them, in any order."""
    stored = draw(st.dictionaries(names, arrays(dtypes), max_size=6))
    aliases = {}
    if stored:
        aliases = draw(st.dictionaries(names.filter(lambda n: n not in stored), st.sampled_from([*stored]), max_size=3))
    return aliased(stored, aliases, draw(st.permutations([*stored, *aliases])))


def aliased(
    stored: dict[str, NDArray[Any]], aliases: dict[str, str], order: list[str] | None = None
) -> MemoryCheckpoint:
    checkpoint = MemoryCheckpoint(stored, aliases=aliases)
    infos = checkpoint.tensors | {name: checkpoint.tensors[kept] for name, kept in aliases.items()}
    checkpoint.tensors = {name: infos[name] for name in order or infos}
    return checkpoint


def groups(checkpoint: Checkpoint) -> set[frozenset[str]]:
    """The names that share one non-empty tensor, whichever of them is called the alias."""
    kept = {checkpoint.aliases.get(name, name) for name, info in checkpoint.tensors.items() if info.size}
    return {frozenset([k, *(name for name, of in checkpoint.aliases.items() if of == k)]) for k in kept}


def assert_same(found: Checkpoint, expected: Checkpoint) -> None:
    """The same names, shapes, types, bits and ties."""
    assert found.tensors.keys() == expected.tensors.keys()
    for name, info in expected.tensors.items():
        want, have = expected.read(name), found.read(name)
        assert (found.info(name).shape, found.info(name).dtype) == (info.shape, info.dtype), name
        assert (have.shape, have.dtype, have.tobytes()) == (want.shape, want.dtype, want.tobytes()), name
    assert groups(found) == groups(expected)


_PEAK = """
import re, sys, threading, time
from pathlib import Path
import ml_dtypes, numpy as np
from loadstone.checkpoint.base import Checkpoint, TensorInfo
from loadstone.checkpoint.safetensors import Safetensors
from loadstone.checkpoint.{module} import {writer}

class Source(Checkpoint):
    def __init__(self, path):
        super().__init__(path)
        self.inner = Safetensors(path)
        for name, info in self.inner.tensors.items():
            shape, dtype = info.shape[::-1], "bfloat16" if {cast} else info.dtype
            self.tensors[name] = TensorInfo(shape, dtype, info.size * (2 if {cast} else 4))
    def read(self, name):
        array = self.inner.read(name).T
        return array.astype(ml_dtypes.bfloat16) if {cast} else array

def private():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

def watch():
    while not done:
        peak.append(private())
        time.sleep(0.0005)

source, done = Source(Path(sys.argv[1])), []
{writer}(source, Path(sys.argv[2]))  # once before, so that the interpreter's own growth does not count
peak = [0]
before = private()
thread = threading.Thread(target=watch)
thread.start()
{writer}(source, Path(sys.argv[2]))
done.append(1)
thread.join()
print(max(peak) - before)
"""


def peak_growth(source: Path, target: Path, module: str, writer: str, *, cast: bool) -> int:
    """Bytes of private memory that writing a file's tensors takes, transposed (and cast to bf16, which is a copy)."""
    code = _PEAK.format(module=module, writer=writer, cast=cast)
    command = [sys.executable, "-c", code, str(source), str(target)]
    # Else glibc keeps large blocks once freed, and the writing beforehand would hide what the second one takes.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60, env=environment)
    return int(done.stdout)


def big_source(folder: Path) -> Path:
    """Four tensors of 24 MB each."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(3000, 2000)).astype(np.float32)
    save_file({f"w{i}": matrix + np.float32(i) for i in range(4)}, folder / "big.safetensors")
    return folder / "big.safetensors"
