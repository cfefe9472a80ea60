"""Reading tensor by tensor: files far larger than the address space, many mappings, files that change meanwhile."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from bundle_writer import entry, masked_crc, write_raw
from gguf_files import gguf_file, tensor
from hostile_pickle import mapping, pickled, storage
from hostile_pickle import tensor as pickled_tensor
from loadstone.checkpoint import datafile, open_checkpoint
from loadstone.checkpoint.datafile import SMALL, DataFile
from loadstone.errors import FormatError, LoadstoneError
from mapped import lies_in
from safetensors_files import pack

GIB = 1 << 30


def grown(path: Path, head: bytes, size: int, tail: bytes = b"") -> Path:
    """A sparse file: `head`, a hole up to `size` bytes, `tail`."""
    with path.open("wb") as file:
        file.write(head)
        file.seek(size)
        file.write(tail)
        file.truncate()
    if path.stat().st_blocks * 512 > 1 << 20:
        pytest.skip("this file system has no sparse files")
    return path


def sparse_safetensors(folder: Path, sizes: list[int]) -> Path:
    ends = list(accumulate(sizes, initial=0))
    header = {
        f"w{i}": {"dtype": "F16", "shape": [size // 2], "data_offsets": ends[i : i + 2]} for i, size in enumerate(sizes)
    }
    head = pack(json.dumps(header))
    return grown(folder / "big.safetensors", head, len(head) + ends[-1])


def sparse_gguf(folder: Path, sizes: list[int]) -> Path:
    ends = list(accumulate(sizes, initial=0))
    head = gguf_file(tensors=[tensor(f"w{i}", [size // 4], 0, ends[i]) for i, size in enumerate(sizes)])
    return grown(folder / "big.gguf", head, len(head) + ends[-1])


def state(sizes: list[int]) -> bytes:
    """The opcodes of a state dict, a storage of floats for each tensor."""
    numels = {f"w{i}": (str(i), size // 4) for i, size in enumerate(sizes)}
    return mapping(
        **{name: pickled_tensor(storage(key, numel), 0, (numel,), (1,)) for name, (key, numel) in numels.items()}
    )


def sparse_legacy(folder: Path, sizes: list[int]) -> Path:
    heads: tuple[Any, ...] = (0x1950A86A20F9469CFC6C, 1001, {})
    parts = [pickle.dumps(part, 2) for part in heads]
    head = b"".join([*parts, pickled(state(sizes)), pickle.dumps([str(i) for i in range(len(sizes))], 2)])
    path = grown(folder / "big.pt", head, len(head) + sum(sizes) + 8 * len(sizes))
    with path.open("r+b") as file:
        file.seek(len(head))
        for size in sizes:
            file.write(struct.pack("<q", size // 4))
            file.seek(size, os.SEEK_CUR)
    return path


def sparse_zip(folder: Path, sizes: list[int]) -> Path:
    """A zip archive as `torch.save` writes it, its storages holes; sizes and offsets in ZIP64's extra fields."""
    content = pickled(state(sizes))
    at, directory = 0, b""
    heads: list[tuple[int, bytes]] = []
    for name, size, crc in [("data.pkl", len(content), zlib.crc32(content))] + [
        (f"data/{i}", size, 0) for i, size in enumerate(sizes)
    ]:
        raw = f"archive/{name}".encode()
        big = struct.pack("<HHQQQ", 1, 24, size, size, at)
        fields = struct.pack("<HHHIII", 0, 0, 0, crc, 0xFFFFFFFF, 0xFFFFFFFF)
        directory += b"PK\x01\x02" + struct.pack("<HHH", 45, 45, 0) + fields
        directory += struct.pack("<HHHHHII", len(raw), len(big), 0, 0, 0, 0, 0xFFFFFFFF) + raw + big
        head = b"PK\x03\x04" + struct.pack("<HH", 45, 0) + fields
        pad = -(at + len(head) + 4 + len(raw)) % 64  # as torch aligns
        head += struct.pack("<HH", len(raw), pad) + raw + bytes(pad) + (content if name == "data.pkl" else b"")
        heads.append((at, head))
        at += len(head) + (0 if name == "data.pkl" else size)
    count = len(sizes) + 1
    end = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, len(directory), at)
    end += b"PK\x06\x07" + struct.pack("<IQI", 0, at + len(directory), 1)
    end += b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path = grown(folder / "big.pth", heads[0][1], at, directory + end)
    with path.open("r+b") as file:
        for offset, head in heads:
            file.seek(offset)
            file.write(head)
    return path


def sparse_bundle(folder: Path, sizes: list[int]) -> Path:
    ends = list(accumulate(sizes, initial=0))
    crcs = {size: masked_crc(bytes(size)) for size in set(sizes)}
    entries = {
        f"w{i}".encode(): entry(1, (size // 4,), offset=ends[i], size=size, crc=crcs[size])
        for i, size in enumerate(sizes)
    }
    index = write_raw(folder, entries)
    grown(folder / "m.data-00000-of-00001", b"", ends[-1])
    return index


@pytest.mark.parametrize(
    ("write", "sizes", "limit"),
    [
        (sparse_safetensors, [GIB // 2] * 60 + [4096], 2 * GIB),
        (sparse_gguf, [GIB // 2] * 60 + [4096], 2 * GIB),
        (sparse_zip, [GIB // 2] * 60 + [4096], 2 * GIB),
        (sparse_legacy, [GIB // 8] * 9, GIB),  # not aligned: read() copies
        (sparse_bundle, [GIB // 4] * 5, GIB),  # checksums: read() reads every byte
    ],
    ids=lambda value: value.__name__.removeprefix("sparse_") if callable(value) else "",
)
def test_a_file_larger_than_the_address_space(
    tmp_path: Path, write: Callable[[Path, list[int]], Path], sizes: list[int], limit: int
) -> None:
    path = write(tmp_path, sizes)
    code = f"""
import resource
from loadstone.checkpoint import open_checkpoint
resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))
checkpoint = open_checkpoint({str(path)!r})
for name, info in checkpoint.tensors.items():
    array = checkpoint.read(name)
    assert array.nbytes == info.nbytes and array[0] == array[-1] == 0, name
    array[-1] = 1
print(len(checkpoint.tensors))
"""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.stdout.strip(), done.stderr) == (str(len(sizes)), "")
    assert sum(sizes) > limit


def test_a_tensor_beyond_the_address_space_is_an_error_of_ours(tmp_path: Path) -> None:
    path = sparse_safetensors(tmp_path, [1 << 42])  # no Linux machine gives 128 TiB to a process; some give less
    code = f"""
import resource
from loadstone.checkpoint import open_checkpoint
resource.setrlimit(resource.RLIMIT_AS, ({2 * GIB}, {2 * GIB}))
open_checkpoint({str(path)!r}).read("w0")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "big.safetensors: 4,398,046,511,1" in done.stderr.splitlines()[-1]
    assert "cannot be mapped into memory" in done.stderr.splitlines()[-1]


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_many_tensors_alive_at_once(tmp_path: Path) -> None:
    """More than there are descriptors: as a model of many experts needs when it is loaded, all of it views."""
    count = datafile.MAX_MAPPINGS + 60
    weights = {f"w{i}": np.full(SMALL // 4 + 1, i, np.float32) for i in range(count)}
    save_file(weights, tmp_path / "m.safetensors")
    before, descriptors = (tmp_path / "m.safetensors").read_bytes(), open_descriptors()
    checkpoint = open_checkpoint(tmp_path)
    arrays = {name: checkpoint.read(name) for name in checkpoint.names()}
    assert open_descriptors() - descriptors <= datafile.MAX_MAPPINGS + 2
    for name, array in arrays.items():
        assert np.array_equal(array, weights[name])
        assert lies_in(array, tmp_path / "m.safetensors")
        array[:] = -1
    assert (tmp_path / "m.safetensors").read_bytes() == before
    del arrays, array
    assert len(datafile._alive) == 0
    del checkpoint
    assert open_descriptors() <= descriptors


def test_every_offset_and_size(tmp_path: Path) -> None:
    raw = np.random.default_rng(0).integers(0, 256, 5 * SMALL, np.uint8).tobytes()
    (tmp_path / "x").write_bytes(raw)
    file = DataFile(tmp_path / "x")
    for offset in (0, 1, 4095, 4096, 4097, SMALL, 3 * SMALL + 5):
        for nbytes in (0, 1, SMALL - 1, SMALL, SMALL + 1, len(raw) - offset):
            if offset + nbytes <= len(raw):
                assert file.tensor(offset, nbytes) == file.read(offset, nbytes) == raw[offset : offset + nbytes]


# -- files that change between opening and reading


def a_checkpoint(path: Path, value: float = 1) -> Path:
    large = np.full(SMALL, value, np.float32)
    save_file({"large": large, "small": np.full(4, value, np.float32)}, path)
    return path


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def rewrite(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # the clock of file times may tick too slowly for a test


@pytest.mark.parametrize("change", [cut, grow, rewrite])
@pytest.mark.parametrize("name", ["large", "small"])
def test_a_file_that_is_changed_in_place_is_an_error(tmp_path: Path, change: Callable[[Path], None], name: str) -> None:
    path = a_checkpoint(tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(path)
    checkpoint.read(name)
    change(path)
    with pytest.raises(FormatError, match="it was changed while it was being read"):
        checkpoint.read(name)


def replace(path: Path) -> None:
    a_checkpoint(path.with_name("other"), 2).replace(path)


@pytest.mark.parametrize("change", [replace, Path.unlink])
def test_a_file_that_is_replaced_is_still_read_as_it_was(tmp_path: Path, change: Callable[[Path], None]) -> None:
    path = a_checkpoint(tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(path)
    change(path)
    assert {name: set(checkpoint.read(name).tolist()) for name in checkpoint.names()} == {"large": {1}, "small": {1}}


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(FormatError, match="no regular file, but a folder, a device or a pipe"):
            DataFile(path)
    (tmp_path / "empty").touch()
    with pytest.raises(LoadstoneError, match="the file is empty"):
        DataFile(tmp_path / "empty")
