"""Builds the native engine: `python -m loadstone.native.build`, and the package's own build through `hatch_build.py`.

Nothing but the standard library, as it runs before the package is installed. What builds alone need is imported there,
as the package asks here for the sources' hash. The arithmetic is compiled once per instruction set, whatever this
machine has and as far as the compiler knows them; which one runs is found out when the library is opened.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
LIBRARY = HERE / "_engine.so"
ONCE, PER_LEVEL = ("engine.cpp", "team.cpp"), "level.cpp"
HEADERS = "engine.h vectors.h products.h tiles.h worker.h attention.h forward.h packing.h".split()
SOURCES = tuple(HERE / name for name in (*HEADERS, *ONCE, PER_LEVEL))
_AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512".split()
LEVELS: dict[str, Sequence[str]] = {
    "portable": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": _AVX512,
    "avx512vnni": (*_AVX512, "-mavx512vnni"),
    "avx512bf16": (*_AVX512, "-mavx512vnni", "-mavx512bf16"),
    "amx": (*_AVX512, "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
}
_FLAGS = (
    "-std=c++17 -O3 -fPIC -fno-exceptions -fno-rtti -fvisibility=hidden -Wall -Wextra -Wno-psabi "
    "-Wno-maybe-uninitialized"  # GCC 12's own headers
).split()


def source_hash() -> str:
    """Of what the library is built from; empty where the sources were not kept."""
    if not all(source.is_file() for source in SOURCES):
        return ""
    return hashlib.sha256(b"".join(source.read_bytes() for source in SOURCES)).hexdigest()[:16]


def platform_tag() -> str:
    """A wheel's. Linux only: elsewhere nothing is built."""
    import platform

    return f"linux_{platform.machine()}"


def find_compiler() -> str | None:
    """$CXX, g++ or c++."""
    import shutil

    wanted = os.environ.get("CXX", "")
    return next((found for name in (wanted, "g++", "c++") if name and (found := shutil.which(name))), None)


def build(target: Path = LIBRARY, sanitizers: str = "") -> str:
    """Compile and link; returns why that was not possible, or nothing.

    Args:
        target: the library to write.
        sanitizers: for tests, as `-fsanitize=` takes them: `address,undefined` or `thread`.
    """
    import platform
    import shutil
    import tempfile
    from concurrent.futures import ThreadPoolExecutor

    compiler = find_compiler()
    if sys.platform != "linux":
        return f"it is built on Linux only, and this is {sys.platform}"
    if compiler is None:
        return "no C++ compiler was found (g++, c++, or $CXX)"
    x86 = platform.machine() in ("x86_64", "AMD64")
    flags = [*_FLAGS, f'-DSOURCE_HASH="{source_hash()}"']
    checks = ["-g", "-O1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"] if sanitizers else []
    with tempfile.TemporaryDirectory() as folder:
        jobs = [[*flags, *checks, str(HERE / name)] for name in ONCE]
        jobs += [
            [*flags, *checks, *extra, f"-DLEVEL={level}", str(HERE / PER_LEVEL)]
            for level, extra in LEVELS.items()
            if not extra or (x86 and _knows(compiler, extra))
        ]
        objects = [str(Path(folder, f"{i}.o")) for i in range(len(jobs))]
        commands = [[compiler, *job, "-c", "-o", object_] for job, object_ in zip(jobs, objects, strict=True)]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            problem = next(filter(None, pool.map(_run, commands)), "")
        new = Path(folder, "engine.so")
        # Without libstdc++, as nothing of it is used; a sanitizer's own library needs the compiler's defaults.
        libraries = [] if sanitizers else ["-nodefaultlibs", "-lgcc"]
        link = ["-shared", *checks, "-o", str(new), *objects, *libraries, "-lm", "-lpthread", "-lc"]
        problem = problem or _run([compiler, *link])
        if not problem:
            shutil.copyfile(new, part := target.with_suffix(".part"))
            part.replace(target)
    return problem


def _knows(compiler: str, flags: Sequence[str]) -> bool:
    """g++ knows AMX from version 11 on, avx512bf16 from 10 on."""
    return not _run([compiler, *flags, "-E", "-x", "c++", os.devnull])


def _run(command: Sequence[str]) -> str:
    import subprocess

    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]} cannot be run ({error})"
    errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
    return "" if done.returncode == 0 else f"{command[0]} failed: {(errors or ['no message'])[0]}"


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--to", type=Path, default=LIBRARY)
    parser.add_argument("--sanitize", default="", help="address,undefined or thread")
    arguments = parser.parse_args()
    if problem := build(arguments.to, arguments.sanitize):
        sys.exit(f"the native engine was not built: {problem}")


if __name__ == "__main__":
    main()
