"""What the build does with a compiler that is not the newest; the library itself is what all other tests run."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loadstone.native import build

OLD = """#!/bin/sh
for argument; do
  case $argument in -mamx-*|-mavx*) echo "error: unrecognized command-line option $argument" >&2; exit 1;; esac
done
exec {compiler} "$@" -O0
"""
PLAY = """
from loadstone.errors import LoadstoneError
from loadstone.native.library import choose_level, library
found = [library().ls_level(i) for i in range(7)]
assert found == [b"portable", b"", b"", b"", b"", b"", None], found
assert not library().ls_runs(5)
try:
    choose_level("amx")
except LoadstoneError as error:
    print(error)
from loadstone.native import how
print(how())
"""


@pytest.mark.skipif(build.find_compiler() is None or platform.machine() != "x86_64", reason="needs a compiler for x86")
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is built")
def test_levels_that_a_compiler_does_not_know_are_left_out(
    unbuilt: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, library = tmp_path / "g++", tmp_path / "engine.so"
    old.write_text(OLD.format(compiler=build.find_compiler()))
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    assert build.build(library) == ""
    for name, value in (("LIBRARY", library), ("LEVEL", "")):
        monkeypatch.setenv(f"LOADSTONE_NATIVE_{name}", str(value))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = subprocess.run([sys.executable, "-c", PLAY], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "cannot run as 'amx' here; it can as portable" in found.stdout
    without = "avx2, avx512, avx512vnni, avx512bf16, amx"
    assert f"level portable (of portable), 1 thread; built without {without}" in found.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is built")
def test_without_a_compiler_it_says_so(unbuilt: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "no C++ compiler" in build.build(tmp_path / "engine.so")
