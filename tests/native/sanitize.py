"""Run the native engine's tests with the library built under AddressSanitizer + UBSan, then under ThreadSanitizer.

    python tests/native/sanitize.py [pytest arguments]

The sanitizer's own library must come first in the process, so Python is started anew with LD_PRELOAD.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "src"))

from loadstone.native.build import build, find_compiler  # noqa: E402

# Python itself is not instrumented: its leaks at exit and its own threads are none of ours.
RUNS = {
    "address,undefined": ("libasan.so", {"ASAN_OPTIONS": "detect_leaks=0"}),
    "thread": ("libtsan.so", {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1 exitcode=66"}),
}


def main() -> None:
    arguments = sys.argv[1:] or [str(Path(__file__).parent)]
    for sanitizers, (runtime, options) in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder, "engine.so")
            if problem := build(library, sanitizers):
                sys.exit(f"{sanitizers}: {problem}")
            found = subprocess.run(
                [str(find_compiler()), f"-print-file-name={runtime}"], capture_output=True, text=True, check=True
            )
            environment = os.environ | options
            environment |= {"LD_PRELOAD": found.stdout.strip(), "LOADSTONE_NATIVE_LIBRARY": str(library)}
            print(f"-- {sanitizers}", flush=True)
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
            if status := subprocess.run(command, env=environment, cwd=ROOT).returncode:
                sys.exit(status)


if __name__ == "__main__":
    main()
