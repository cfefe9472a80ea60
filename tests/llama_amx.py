"""llama.cpp on processors with AMX: without it. What tests/peers and the benchmarks share.

Built by GCC 12, llama-cpp-python 0.3.36 ends with a segmentation fault there at the first product of several tokens
with quantised weights (ggml-org/llama.cpp#20824): `ldtilecfg` reads a description whose stores the compiler has left
out, as the intrinsic names eight of its bytes only. A build that keeps them works; LLAMA_AMX=1 says that this is one:

    CMAKE_ARGS="-DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'" pip install --no-cache-dir llama-cpp-python==0.3.36
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def has_amx() -> bool:
    file = Path("/proc/cpuinfo")
    return file.is_file() and "amx_int8" in file.read_text()


def without_amx() -> None:
    """Models that this process opens from here on keep their weights as the file has them."""
    import llama_cpp.llama_cpp as library

    if not has_amx() or os.environ.get("LLAMA_AMX") == "1":
        return
    defaults = library.llama_model_default_params

    def params() -> Any:
        found = defaults()
        assert hasattr(found, "use_extra_bufts")
        found.use_extra_bufts = False
        return found

    library.llama_model_default_params = params


if __name__ == "__main__":  # `python llama_amx.py ...` is `python -m llama_cpp.server ...`
    import runpy

    without_amx()
    runpy.run_module("llama_cpp.server", run_name="__main__")
