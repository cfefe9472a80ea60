"""The same small checkpoint in every format, and what people name instead of one."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from bundle_writer import write_bundle
from gguf_files import gguf_file, tensor
from loadstone.checkpoint import open_checkpoint

ONES = np.ones((2, 3), np.float32)


def safetensors(path: Path, value: float = 1) -> Path:
    save_file({"w": ONES * np.float32(value)}, path)
    return path


def torch_file(path: Path, value: float = 2, legacy: bool = False) -> Path:
    torch.save({"w": torch.ones(2, 3) * value}, path, _use_new_zipfile_serialization=not legacy)
    return path


def gguf(path: Path, value: float = 3) -> Path:
    path.write_bytes(gguf_file(tensors=[tensor("w", [3, 2], 0, 0)], data=struct.pack("<6f", *[value] * 6) + bytes(8)))
    return path


def bundle(folder: Path, prefix: str = "model.ckpt", value: float = 4) -> Path:
    write_bundle(folder / prefix, {"w": ONES * np.float32(value)})
    return folder / f"{prefix}.index"


def index(folder: Path, name: str, shard: str) -> Path:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": {"w": shard}}))
    return folder / name


def value(path: Path | str) -> tuple[str, float]:
    found = open_checkpoint(path)
    assert found.names() == ["w"]
    assert found.read("w").shape == (2, 3)
    return found.format, float(found.read("w")[0, 0])


def some_zip(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, "x" * 100)
    return buffer.getvalue()


LFS = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 548105171\n"
)
