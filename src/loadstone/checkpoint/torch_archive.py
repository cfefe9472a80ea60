"""The two containers that `torch.save` writes: what the pickle holds, and where in the file each storage lies.

Since torch 1.6 a zip archive: `NAME/data.pkl`, one entry `NAME/data/KEY` per storage, `NAME/byteorder`. Before that,
and with `_use_new_zipfile_serialization=False`, five pickles in a row (magic number, protocol version, system, object,
storage keys), then for each key the number of elements as int64 and the bytes; always little-endian.
Sources: `torch/serialization.py`, `torch/csrc/serialization.cpp`.
"""

from __future__ import annotations

import mmap
import struct
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FormatError
from .datafile import DataFile
from .pickle_opcodes import unpickle
from .pickle_vm import PickleVM, printable
from .torch_state import SAVE_WEIGHTS, hostile
from .torch_values import HANDLERS, ITEMSIZES, StorageRef, StorageTable

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
PROTOCOL_VERSION = 1001
MAX_PICKLES = 1 << 29  # bytes of the five pickles before the tensors; a real one has a few hundred thousand
# torch never compresses, so these are for somebody's re-zipped file. Weights deflate to a half at best, constant masks
# to a thousandth: an entry may claim many times the whole file, but not the memory of the machine.
MAX_INFLATED = 1 << 26  # bytes that any entry may have when decompressed,
MAX_INFLATION = 16  # or so many times the size of the file

_PROTO = 0x80  # the opcode that begins every pickle since protocol 2
_AGAIN = "Download or copy the file again."
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., length of the name, length of the extra field


@dataclass(frozen=True, slots=True)
class Region:
    """The bytes of one zip entry or storage: `stored` bytes at `offset` in the file, `nbytes` once inflated."""

    offset: int
    stored: int
    nbytes: int
    deflated: bool = False
    crc: int = 0


@dataclass(frozen=True, slots=True)
class Archive:
    """An opened file: the pickled object, and the region of each storage key."""

    format: str
    root: Any
    regions: dict[str, Region]
    globals_seen: list[str]
    swapped: bool = False  # the bytes are in the other order than this machine's


def open_archive(file: DataFile) -> Archive:
    """Read the pickle and find the storages. Raises FormatError for anything that torch.save did not write."""
    head = file.read(0, min(len(file), 262))
    if head.startswith(b"PK"):
        return _open_zip(file)
    if head[257:] == b"ustar":
        raise FormatError(
            file.path,
            "this is a tar archive, the format of PyTorch 0.1, which Loadstone does not read.",
            "Load it with that PyTorch and save the state dict with a newer one.",
        )
    return _open_legacy(file)


def inflate(file: DataFile, region: Region) -> bytes:
    """The bytes of a region, decompressed if need be. Never more than the size that the archive declares."""
    raw = file.read(region.offset, region.stored)
    if not region.deflated:
        return raw
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = stream.decompress(raw, region.nbytes + 1)
    except (zlib.error, MemoryError, OverflowError) as error:
        problem = f"the entry at byte {region.offset} does not decompress ({error})."
        raise FormatError(file.path, problem, _AGAIN) from None
    if len(content) != region.nbytes or zlib.crc32(content) != region.crc:
        problem = f"the entry at byte {region.offset} does not decompress to its declared {region.nbytes:,} bytes."
        raise FormatError(file.path, problem, _AGAIN)
    return content


# -- the zip archive


def _open_zip(file: DataFile) -> Archive:
    path, entries = file.path, _directory(file)
    prefix = _prefix(path, entries)
    pickled = zip_region(file, entries[f"{prefix}data.pkl"])
    storages = StorageTable()
    vm = _machine(file, pickled, storages)
    root = unpickle(vm)
    regions = {}
    for key, storage in storages.by_key.items():
        entry = entries.get(f"{prefix}data/{key}")
        if entry is None:
            raise FormatError(path, f"its pickle names the storage '{printable(key)}', which it does not hold.", _AGAIN)
        regions[key] = region = zip_region(file, entry)
        if region.nbytes != storage.nbytes:
            problem = f"storage '{printable(key)}' has {region.nbytes:,} bytes; its pickle says {storage.nbytes:,}."
            raise FormatError(path, problem, _AGAIN)
    _refuse_overlap(path, [pickled, *regions.values()])
    order = _byte_order(file, entries.get(f"{prefix}byteorder"))
    return Archive("pytorch-zip", root, regions, list(vm.globals_seen), swapped=order != sys.byteorder)


def _machine(file: DataFile, pickled: Region, storages: StorageTable) -> PickleVM:
    """A machine before the pickle, which is mapped rather than copied if it is stored as it is."""
    if pickled.deflated:
        return PickleVM(inflate(file, pickled), file.path, HANDLERS, storages)
    start = pickled.offset % mmap.ALLOCATIONGRANULARITY
    data = file.map(pickled.offset - start, start + pickled.stored)
    return PickleVM(data, file.path, HANDLERS, storages, start)


def _directory(file: DataFile) -> dict[str, zipfile.ZipInfo]:
    """The archive's entries by name. Only zipfile's reading of the central directory is used, not of the contents."""
    path = file.path
    try:
        with file.stream() as stream, zipfile.ZipFile(stream) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, OverflowError, struct.error) as error:
        problem = f"it begins as a zip archive, but its directory cannot be read ({printable(str(error))})."
        raise FormatError(path, problem, "It may be cut off: download or copy it again.") from None
    entries = {info.filename: info for info in infos}
    if len(entries) != len(infos):
        raise FormatError(path, "two entries of its zip archive have the same name.", "Do not trust it.")
    return entries


def _prefix(path: Path, entries: dict[str, zipfile.ZipInfo]) -> str:
    """The folder inside the archive, with its slash: `archive/`, or named after the file that was saved."""
    names = [name for name in entries if name.split("/")[-1] == "data.pkl" and name.count("/") <= 1]
    if len(names) != 1:
        holds = ", ".join(printable(name, 40) for name in list(entries)[:4]) or "nothing"
        problem = (
            f"a zip archive with {len(names)} data.pkl entries, where a PyTorch checkpoint has one; it holds {holds}."
        )
        raise FormatError(path, problem, SAVE_WEIGHTS)
    prefix = names[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in entries:
        problem = "this is a TorchScript program (torch.jit.save), not a checkpoint."
        hint = "Save its weights alone: torch.save(torch.jit.load(path).state_dict(), 'weights.pt')."
        raise FormatError(path, problem, hint)
    return prefix


def zip_region(file: DataFile, info: zipfile.ZipInfo) -> Region:
    path = file.path
    name, deflated = printable(info.filename), info.compress_type == zipfile.ZIP_DEFLATED
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise FormatError(path, f"its entry {name} is encrypted or compressed in an unusual way.", "Re-zip it, stored.")
    start = info.header_offset
    signature, name_length, extra_length = b"", 0, 0
    if 0 <= start <= len(file) - _LOCAL_HEADER.size:
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(start, _LOCAL_HEADER.size))
    offset = start + _LOCAL_HEADER.size + name_length + extra_length
    if signature != b"PK\x03\x04" or offset + info.compress_size > len(file):
        raise FormatError(path, f"its entry {name} does not lie where the zip directory says, at byte {start}.", _AGAIN)
    limit = max(MAX_INFLATED, MAX_INFLATION * len(file)) if deflated else info.compress_size
    if info.file_size > limit:
        problem = f"its entry {name} declares {info.file_size:,} bytes and stores {info.compress_size:,}."
        raise FormatError(path, problem, "Do not trust it.")
    return Region(offset, info.compress_size, info.file_size, deflated, info.CRC)


def _refuse_overlap(path: Path, regions: list[Region]) -> None:
    end = 0
    for region in sorted(regions, key=lambda r: r.offset):
        if region.stored and region.offset < end:
            raise FormatError(path, f"two of its entries share the bytes at {region.offset}.", "Do not trust it.")
        end = max(end, region.offset + region.stored)


def _byte_order(file: DataFile, entry: zipfile.ZipInfo | None) -> str:
    if entry is None:  # files from before torch 2.1; big-endian machines were asked to say so since then
        return "little"
    order = inflate(file, zip_region(file, entry)) if entry.file_size < 16 else b"?"
    if order not in (b"little", b"big"):
        raise FormatError(file.path, f"its byte order is {order!r}, not little or big.", _AGAIN)
    return order.decode()


# -- five pickles and the bytes


def _open_legacy(file: DataFile) -> Archive:
    path, data = file.path, file.map(0, min(len(file), MAX_PICKLES))
    storages, seen = StorageTable(), dict[str, Any]()
    position = 0

    def load() -> Any:
        nonlocal position
        vm = PickleVM(data, path, HANDLERS, storages, position)
        value = unpickle(vm)
        position = vm.position
        seen.update(vm.globals_seen)
        return value

    try:
        magic = load()
    except FormatError:
        if data[0] == _PROTO:
            raise
        raise FormatError(path, "this is neither of the formats of torch.save.", _AGAIN) from None
    if type(magic) is not int or magic != MAGIC_NUMBER:
        problem = "this is a plain pickle, which torch.save did not write."
        raise hostile(path, magic, seen) or FormatError(path, problem, SAVE_WEIGHTS)
    version, _system = load(), load()
    if type(version) is not int or version != PROTOCOL_VERSION:
        raise FormatError(path, f"its protocol version is not {PROTOCOL_VERSION}.", _AGAIN)
    root, keys = load(), load()
    if type(keys) is not list or not all(type(key) is str for key in keys) or sorted(keys) != sorted(storages.by_key):
        raise FormatError(path, "its list of storages is not that of the tensors in its pickle.", _AGAIN)
    regions = _legacy_regions(file, position, [storages.by_key[key] for key in keys])
    return Archive("pytorch-legacy", root, regions, list(seen), swapped=sys.byteorder != "little")


def _legacy_regions(file: DataFile, position: int, storages: list[StorageRef]) -> dict[str, Region]:
    """The storages behind the pickles, one after the other from byte `position`: elements as int64, then the bytes."""
    regions = {}
    for storage in storages:
        region = Region(position + 8, storage.nbytes, storage.nbytes)
        position, name = region.offset + region.nbytes, f"'{printable(storage.key)}'"
        if position > len(file):
            problem = f"it ends at byte {len(file):,}, before the end of storage {name} at {position:,}."
            raise FormatError(file.path, problem, "It is cut off: download or copy it again.")
        numel = int.from_bytes(file.read(region.offset - 8, 8), "little", signed=True)
        if numel * ITEMSIZES[storage.dtype] != storage.nbytes:
            problem = f"storage {name} has {numel:,} elements of {storage.dtype}; its pickle says otherwise."
            raise FormatError(file.path, problem, _AGAIN)
        regions[storage.key] = region
    return regions
