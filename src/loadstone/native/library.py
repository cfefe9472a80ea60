"""The native library: found, checked and described to ctypes. Nothing is opened before it is asked for."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

from ..errors import LoadstoneError
from .build import LEVELS, LIBRARY, source_hash

MOST_THREADS = 64  # engine.h's
VARIABLE, LEVEL_VARIABLE = "LOADSTONE_NATIVE_LIBRARY", "LOADSTONE_NATIVE_LEVEL"
_AGAIN = "`python -m loadstone.native.build` builds it (g++ is needed); without it, the engine torch runs everything."


class Config(ctypes.Structure):
    """engine.h's."""

    _fields_ = [
        *((name, c_int32) for name in "vocab context d_model layers heads kv_heads head_dim d_ff".split()),
        *((name, c_int32) for name in "rms activation gated parallel tied learned rope_dims narrow_cache".split()),
        *((name, c_float) for name in ("eps", "rope_factor")),
    ]


class Packing(ctypes.Structure):
    """engine.h's."""

    _fields_ = [
        ("source", c_void_p),
        *((name, c_int64) for name in ("row_stride", "col_stride")),
        *((name, c_int32) for name in "slot kind first rows mapped".split()),
    ]


# Addresses are passed as whole numbers: `array.ctypes.data`.
_FUNCTIONS = {
    "ls_hash": (c_char_p, ()),
    "ls_level": (c_char_p, (c_int,)),
    "ls_runs": (c_int, (c_int,)),
    "ls_cores": (c_int, ()),
    "ls_open": (c_void_p, (POINTER(Config), c_void_p, c_int, c_int)),
    "ls_close": (None, (c_void_p,)),
    "ls_bytes": (c_int64, (c_void_p,)),
    "ls_threads": (c_int, (c_void_p,)),
    "ls_pack": (c_int, (c_void_p, c_void_p, c_int)),
    "ls_vector": (c_int, (c_void_p, c_int, c_void_p, c_int64)),
    "ls_row": (c_int, (c_void_p, c_int, c_int, c_void_p)),
    "ls_cache_open": (c_void_p, (c_void_p, c_int, c_int)),
    "ls_cache_bytes": (c_int64, (c_void_p,)),
    "ls_cache_copy": (c_int, (c_void_p, c_void_p, c_int, c_int, c_int)),
    "ls_cache_close": (None, (c_void_p,)),
    "ls_run": (c_int, (c_void_p, c_void_p, c_void_p, c_int, c_void_p, c_void_p, c_void_p, c_int, c_void_p)),
}


def missing() -> str:
    """Why the native engine cannot run here, and what to do about it; empty if it can."""
    try:
        library()
    except LoadstoneError as error:
        return str(error)
    return ""


def available() -> bool:
    return not missing()


@cache
def library() -> ctypes.CDLL:
    """The opened library. Raises LoadstoneError if it is not built, cannot be opened, or is older than its sources."""
    path = Path(os.environ.get(VARIABLE) or LIBRARY)
    if not path.is_file():
        raise LoadstoneError(f"the native engine is not built ({path.name} is missing). {_AGAIN}")
    try:
        opened = ctypes.CDLL(str(path))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(opened, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise LoadstoneError(f"{path}: the native engine cannot be opened ({error}). {_AGAIN}") from None
    if (wanted := source_hash()) and opened.ls_hash().decode() != wanted:
        raise LoadstoneError(f"{path}: the native engine was built from other sources than those beside it. {_AGAIN}")
    return opened


def levels() -> list[str]:
    """Instruction sets that this machine can run, from the plainest to the best."""
    found, number = [], 0
    while (name := library().ls_level(number)) is not None:
        if library().ls_runs(number):
            found.append(name.decode())
        number += 1
    return found


def choose_level(wanted: str | None) -> int:
    """Number of an instruction set; the best if none is named. Raises LoadstoneError for one that cannot run here."""
    wanted = wanted or os.environ.get(LEVEL_VARIABLE) or levels()[-1]
    if wanted not in levels():
        raise LoadstoneError(f"the native engine cannot run as {wanted!r} here; it can as {', '.join(levels())}.")
    number = 0
    while library().ls_level(number).decode() != wanted:
        number += 1
    return number


def how() -> str:
    """What a call uses if nothing is named, and what the library lacks, as its compiler did not know it."""
    level, threads = library().ls_level(choose_level(None)).decode(), choose_threads(None)
    without = [name for number, name in enumerate(LEVELS) if not library().ls_level(number)]
    lacks = f"; built without {', '.join(without)}" if without else ""
    return f"level {level} (of {', '.join(levels())}), {threads} thread{'s' * (threads > 1)}{lacks}"


def choose_threads(wanted: int | None) -> int:
    """As asked for, else OMP_NUM_THREADS, else the cores that this process may use; the latter up to `MOST_THREADS`."""
    if wanted is not None and not 1 <= wanted <= MOST_THREADS:
        raise LoadstoneError(f"the native engine takes 1 to {MOST_THREADS} threads, found {wanted}.")
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    usual = int(given) if given.isdigit() and int(given) else library().ls_cores()
    return wanted or min(usual, MOST_THREADS)
