"""Files that are no files, archives of very many entries, headers that are holes: no hang, and no memory filled."""

from __future__ import annotations

import json
import os
import signal
import struct
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hostile_pickle import mapping, tensor, write_zip
from loadstone.checkpoint import open_checkpoint
from loadstone.checkpoint.audit import audit
from loadstone.errors import LoadstoneError
from loadstone.load import open_source
from loadstone.tokenizer import load_tokenizer
from model_files import write_hf
from small_vocabularies import byte_level, write_pair


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    def give_up(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


BESIDE = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja", "params.json", "hparams.json"),
    *("checkpoint", "model.safetensors.index.json", "pytorch_model.bin", "extra.gguf", "tokenizer.model", "x.index"),
)


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop of links", "link to a device"])
def test_whatever_lies_beside_is_no_file(tmp_path: Path, kind: str) -> None:
    folder = write_hf(tmp_path / "m")
    (folder / "config.json").unlink()
    for name in BESIDE:
        if kind == "pipe":
            os.mkfifo(folder / name)
        elif kind == "folder":
            (folder / name).mkdir()
        else:
            (folder / name).symlink_to("/dev/zero" if kind == "link to a device" else name)
    identity = open_source(folder)
    assert identity.plan.clean
    assert load_tokenizer(folder) is None
    assert [file.file for file in audit(folder).files] == ["model.safetensors"]


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_shards_that_are_no_files(tmp_path: Path, make: object) -> None:
    assert callable(make)
    shard = "model-00001-of-00001.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    make(tmp_path / shard)
    with pytest.raises(LoadstoneError, match=r"1 of its 1 shards are missing|which is a link out of its folder"):
        open_checkpoint(tmp_path)
    (tmp_path / shard).rmdir() if (tmp_path / shard).is_dir() else (tmp_path / shard).unlink()
    (tmp_path / "model.ckpt.index").mkdir()
    make(tmp_path / "checkpoint")
    with pytest.raises(LoadstoneError):
        open_checkpoint(tmp_path / "checkpoint")


# -- sizes


def hole(path: Path, head: bytes, size: int, tail: bytes = b"") -> Path:
    with path.open("wb") as file:
        file.write(head)
        file.seek(size - len(tail))
        file.write(tail)
        file.truncate(size)
    return path


@pytest.mark.parametrize(
    ("name", "head", "tail"),
    [
        ("header.safetensors", struct.pack("<Q", 99_999_999) + b"{", b""),
        ("m.safetensors.index.json", b'{"weight_map": {', b""),
        ("m.gguf", b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 1 << 40), b""),
        ("m.gguf", b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 1 << 40), b""),
        ("m.pt", b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.", b""),
        ("m.pt", b"\x80\x02\x8e" + struct.pack("<Q", 1 << 36), b""),
        ("m.pt", b"\x80\x02(" + b"X" + struct.pack("<I", 0xFFFFFFFF), b""),
        ("m.pt", b"PK\x03\x04", b"PK\x05\x06" + bytes(18)),
        ("m.index", b"", bytes.fromhex("57fb808b247547db")),
        ("checkpoint", b'model_checkpoint_path: "', b""),
    ],
)
def test_a_file_of_68_gb_that_is_a_hole(tmp_path: Path, name: str, head: bytes, tail: bytes) -> None:
    path = hole(tmp_path / name, head, 1 << 36, tail)
    tracemalloc.start()
    with pytest.raises(LoadstoneError):
        open_checkpoint(path)
    audit(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 250 << 20 if name == "header.safetensors" else peak < 8 << 20


def test_an_archive_of_very_many_entries(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "m.pt", mapping(w=tensor()))
    with zipfile.ZipFile(path, "a") as archive:
        one = archive.getinfo("archive/version")
        for i in range(10_000):
            info = zipfile.ZipInfo(f"a{i:x}")
            info.header_offset, info.CRC, info.file_size, info.compress_size = one.header_offset, one.CRC, 2, 2
            archive.filelist.append(info)
        archive._didModify = True  # type: ignore[attr-defined]
    tracemalloc.start()
    assert open_checkpoint(path).names() == ["w"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * path.stat().st_size


def test_a_tensor_may_be_empty_and_absurd(tmp_path: Path) -> None:
    header = b'{"w":{"dtype":"F32","shape":[0,4611686018427387904,4],"data_offsets":[0,0]}}'
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(LoadstoneError, match=r"a shape that numpy cannot hold|overflows"):
        open_checkpoint(tmp_path / "m.safetensors").read("w")


def test_a_shard_that_is_replaced_by_another_one(tmp_path: Path) -> None:
    """Between opening and reading: what is read is of one file, the old one."""
    save_file({"w": np.ones(100_000, np.float32)}, tmp_path / "m.safetensors")
    found = open_checkpoint(tmp_path)
    save_file({"w": np.zeros(10, np.float32)}, tmp_path / "other")
    (tmp_path / "other").replace(tmp_path / "m.safetensors")
    assert found.read("w").sum() == 100_000
    assert open_checkpoint(tmp_path).info("w").shape == (10,)


def test_token_ids_that_collide(tmp_path: Path) -> None:
    """Python hashes integers without a secret: a set of these would take minutes."""
    folder = write_hf(tmp_path)
    write_pair(folder, *byte_level())
    ids = [i * (2**61 - 1) for i in range(50_000)]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(LoadstoneError, match=r"eos_token_id is .* and a token id or a list of them was expected"):
        load_tokenizer(folder)
