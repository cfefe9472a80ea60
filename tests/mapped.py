"""Whether an array lies in a mapping of a file, as the kernel tells it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray


def lies_in(array: NDArray[Any], path: Path) -> bool:
    """Whether the memory of `array` is a mapping of the file at `path`."""
    address = array.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= address < last:
            return line.endswith(str(path.resolve()))
    return False
