"""Memory: how much is free, and how what a training step frees is kept for the next one."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Tell the allocator, for the rest of the process; False where it is not glibc's.

    glibc maps every block of some 32 MB or more by itself and unmaps it when it is freed. A step of GPT-2 124M then
    has the system zero 1.6 GB of fresh pages (400,000 page faults) again and again: a fifth of its time on 2 cores.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl, or statically linked
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))


def free_memory(system: Path = Path("/")) -> int:
    """Bytes that the process may still take: the machine's, or less in a container (cgroup 2); 0 where none says.

    What a page cache holds counts as free.
    """
    try:
        free = _figures(system / "proc/meminfo")["MemAvailable:"] * 1024
    except (OSError, KeyError):
        return 0
    try:
        limit = int((system / "sys/fs/cgroup/memory.max").read_text())
        taken = _figures(system / "sys/fs/cgroup/memory.stat")["anon"]
    except (OSError, KeyError, ValueError):  # another system's container, or none; the limit may be the word `max`
        return free
    return max(0, min(free, limit - taken))


def _figures(file: Path) -> dict[str, int]:
    return {line.split()[0]: int(line.split()[1]) for line in file.read_text().splitlines()}
