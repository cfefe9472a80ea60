"""What devices can do at most: operations per second and memory, from their makers' data sheets, or measured.

Dense figures (data sheets often print twice as much, "with sparsity"), products of bfloat16 summed in float32, and
float32 without TF32, which is what torch multiplies with unless told otherwise.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    import torch

GB = 10**9
TERA = 10**12


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        name: as people say it.
        bfloat16, float32: peak operations per second; None where the device does not have the type.
        memory: bytes; data sheets count in GB.
        source: where the figures are from.
    """

    name: str
    bfloat16: float | None
    float32: float | None
    memory: int
    source: str

    def peak(self, dtype: str) -> float | None:
        """Operations per second with `float32` or `bfloat16` products."""
        return self.bfloat16 if dtype == "bfloat16" else self.float32


# What torch.cuda.get_device_name() says (after _plain), or people do -> the device.
_TABLE = (
    (r"b200", "B200", 2250, 75, 180, "NVIDIA's DGX B200 data sheet"),
    (r"h200( \d+gb.*| sxm)?", "H200 SXM", 989.4, 66.9, 141, "NVIDIA's H200 data sheet"),
    (r"h200 nvl", "H200 NVL", 835.5, 60, 141, "NVIDIA's H200 data sheet"),
    (r"h100( sxm\d?)?( \d+gb)?( hbm3)?", "H100 SXM", 989.4, 66.9, 80, "NVIDIA's H100 data sheet"),
    (r"h100 nvl", "H100 NVL", 835.5, 60, 94, "NVIDIA's H100 data sheet"),
    (r"h100 pcie", "H100 PCIe", 756.5, 51.2, 80, "NVIDIA's H100 data sheet"),
    (r"a100 (sxm\d? |pcie )?40gb", "A100 40 GB", 312, 19.5, 40, "NVIDIA's A100 data sheet"),
    (r"a100( (sxm\d? |pcie )?80gb( pcie)?)?", "A100 80 GB", 312, 19.5, 80, "NVIDIA's A100 data sheet"),
    (r"a10", "A10", 125, 31.2, 24, "NVIDIA's A10 data sheet"),
    (r"(rtx )?a6000", "RTX A6000", 154.8, 38.7, 48, "NVIDIA's Ampere GA102 white paper"),
    (r"l4", "L4", 121, 30.3, 24, "NVIDIA's L4 data sheet"),
    (r"l40s", "L40S", 362, 91.6, 48, "NVIDIA's L40S data sheet"),
    (r"(rtx )?4090", "RTX 4090", 165.2, 82.6, 24, "NVIDIA's Ada white paper"),
    (r"(rtx )?3090", "RTX 3090", 71, 35.6, 24, "NVIDIA's Ampere GA102 white paper"),
    (r"t4", "T4", None, 8.1, 16, "NVIDIA's T4 data sheet"),
    (r"v100( sxm\d?)? 32gb", "V100 SXM 32 GB", None, 15.7, 32, "NVIDIA's V100 data sheet"),
    (r"v100( sxm\d?)?( 16gb)?", "V100 SXM 16 GB", None, 15.7, 16, "NVIDIA's V100 data sheet"),
    (r"(instinct )?mi300x", "MI300X", 1307.4, 163.4, 192, "AMD's MI300X data sheet"),
)


def known_devices() -> list[str]:
    """Names of the devices in the table."""
    return [name for _, name, *_ in _TABLE]


def find_device(name: str) -> Device | None:
    """The table's entry for what torch or a person calls a device. A laptop's version is another device."""
    for pattern, own, bfloat16, float32, memory, source in _TABLE:
        if re.fullmatch(pattern, plain := _plain(name)) or plain == _plain(own):
            return Device(own, bfloat16 and bfloat16 * TERA, float32 * TERA, memory * GB, source)
    return None


def named_device(name: str) -> Device:
    """As `find_device`. Raises ConfigError for an unknown name."""
    if found := find_device(name):
        return found
    raise ConfigError(f"no device is called {name!r}; known: cpu, cuda (this machine's), {', '.join(known_devices())}.")


def local_device(device: torch.device | str, dtype: str = "float32") -> Device:
    """The device that torch has here: a GPU by its name, a CPU with its peak measured (a second or less).

    A GPU that the table does not know has no peaks, only its memory. Raises ConfigError if there is no such device.
    """
    import torch

    try:
        kind = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from None
    if kind.type == "cpu":
        return this_cpu(dtype)
    if kind.type != "cuda":
        return Device(str(kind), None, None, _memory(), "not in the table of devices")
    name, memory = torch.cuda.get_device_name(kind), torch.cuda.get_device_properties(kind).total_memory
    known = find_device(name)
    if known is None:
        return Device(name, None, None, memory, "not in the table of devices")
    return Device(known.name, known.bfloat16, known.float32, memory, known.source)


def this_cpu(*dtypes: str) -> Device:
    """The machine we run on, with the peak of the given types measured by multiplying matrices."""
    peaks = {dtype: measure_peak(dtype) for dtype in dtypes or ("float32",)}
    import torch

    threads = torch.get_num_threads()
    return Device(
        f"this CPU ({threads} thread{'s' * (threads > 1)})", peaks.get("bfloat16"), peaks.get("float32"), _memory(),
        "measured with matrices of 1024 x 1024",
    )  # fmt: skip


def measure_peak(dtype: str, *, size: int = 1024, seconds: float = 0.6) -> float:
    """The best rate of square products on the CPU, in operations per second: the fastest of as many as fit."""
    import torch

    a, b = (torch.ones(size, size, dtype=getattr(torch, dtype)) for _ in range(2))  # random ones would move the seed
    out, best, begun = torch.empty_like(a), float("inf"), time.perf_counter()
    while time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def rate_text(peak: float) -> str:
    """`989 TFLOP/s`."""
    return f"{peak / TERA:,.3g} TFLOP/s" if peak >= TERA else f"{peak / GB:,.3g} GFLOP/s"


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|amd|[-_\s]+", " ", name.lower()).strip().replace("  ", " ")


def _memory() -> int:
    """Bytes that this process may use: the machine's, or less in a container (cgroup 2)."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total
