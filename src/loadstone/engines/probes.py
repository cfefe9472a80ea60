"""Can an engine run on this machine? Answers in words, without importing what is asked for (that takes seconds)."""

from __future__ import annotations

import os
import shutil

from ..errors import LoadstoneError

MAX_VERSIONS = ("26.6",)  # whose graph interface `max_graph` was written and tested against


def compiler() -> str:
    """torch.compile makes C++ of the model and needs a compiler for it: $CXX, or the first of the usual ones."""
    wanted = os.environ.get("CXX", "")
    if wanted and not shutil.which(wanted):
        return f"it needs a C++ compiler, and $CXX names {wanted!r}, which is not there. Unset it or install g++."
    if wanted or shutil.which("g++") or shutil.which("clang++"):
        return ""
    return "it needs a C++ compiler, and neither g++ nor clang++ is there. Install one (`apt install g++`)."


def max_package() -> str:
    install = f"Install it with `pip install 'loadstone[max]'` (max=={MAX_VERSIONS[-1]}.*, 240 MB; no Windows)."
    from importlib import metadata  # slow, and no command but `engines` asks

    try:
        found = metadata.version("max")
    except metadata.PackageNotFoundError:
        return f"it needs Modular's package `max`, which is not installed. {install}"
    if found.split(".")[:2] not in [known.split(".") for known in MAX_VERSIONS]:
        return (
            f"it was written for max {' and '.join(MAX_VERSIONS)}, whose interface changes between versions; here is "
            f"max {found}. {install}"
        )
    return ""


def native() -> str:
    from ..native import missing

    return missing()


def native_here() -> str:
    from ..native import how

    try:
        return how()
    except LoadstoneError as error:  # a level that there is not, from the environment
        return str(error)
