"""`sniff`: the bytes tell the format, whatever the name, and errors say what a file is."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import struct
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loadstone.checkpoint import open_checkpoint
from loadstone.checkpoint.sniff import sniff
from loadstone.checkpoint.sstable import MAGIC
from loadstone.errors import FormatError, LoadstoneError
from small_files import LFS, ONES, bundle, gguf, index, safetensors, some_zip, torch_file, value

# -- the bytes decide, whatever the name


@pytest.mark.parametrize("name", ["model.safetensors", "x.bin", "x.gguf", "x.pt", "x.index", "x.json", "x"])
def test_the_bytes_decide_and_not_the_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    assert value(safetensors(path)) == ("safetensors", 1)
    assert value(torch_file(path)) == ("pytorch-zip", 2)
    assert value(torch_file(path, legacy=True)) == ("pytorch-legacy", 2)
    assert value(gguf(path)) == ("gguf", 3)
    safetensors(tmp_path / "shard")
    assert value(index(tmp_path, name, "shard")) == ("safetensors", 1)
    assert value(str(path)) == ("safetensors", 1)


def test_tensorflow_by_index_prefix_state_and_folder(tmp_path: Path) -> None:
    path = bundle(tmp_path)
    assert path.read_bytes().endswith(MAGIC)
    for way in (path, tmp_path / "model.ckpt", tmp_path / "checkpoint", tmp_path):
        assert value(way) == ("tensor-bundle", 4), way


def test_every_length_of_a_safetensors_header_is_recognised(tmp_path: Path) -> None:
    # 640 bytes begin like a pickle of protocol 2, 0x504b... like a zip archive.
    for length in (640, 0x380, 0x480, 0x580, 0x4B50, 0x8B1F):
        (tmp_path / "x").write_bytes(struct.pack("<Q", length) + b"{}".ljust(length))
        assert open_checkpoint(tmp_path / "x").format == "safetensors"


def test_sniffing_reads_a_few_kilobytes(tmp_path: Path) -> None:
    with (tmp_path / "zeros").open("wb") as file:
        file.truncate(1 << 40)
    begin = time.process_time()
    with pytest.raises(FormatError, match=r"a file of zero bytes \(1,099,511,627,776 bytes, zero wherever looked\)"):
        open_checkpoint(tmp_path / "zeros")
    assert time.process_time() - begin < 0.2


# -- what is no checkpoint is described


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.bin"), io.BytesIO())
    return buffer.getvalue()


def _npy(compressed: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=ONES) if compressed else np.save(buffer, ONES)
    return buffer.getvalue()


FOREIGN = {
    "empty": (b"", r"this is an empty file \(0 bytes\)\. The download failed"),
    "html": (
        b"\n <!DOCTYPE html><html lang=en><head><title>\n Sign in to\n your account</title>",
        "this is a web page .* saying 'Sign in to your account'. The download failed",
    ),
    "html without title": (b"<html><body>404", r"this is a web page \(HTML\)\. The"),
    "xml": (
        b'<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>No.</Message></Error>',
        "this is an XML document saying 'AccessDenied'",
    ),
    "lfs": (LFS, r"a git-LFS pointer, not the file itself \(548,105,171 bytes\)\. Fetch it: run `git lfs pull`"),
    "json error": (b'{"error":"Repository\\n not found"}', "this is a JSON error message: 'Repository not found'"),
    "json error object": (b'{"error":{"code":404}}', "JSON error message: \"{'code': 404}\""),
    "config": (
        b'{\n  "architectures": ["GPT2"],\n  "n_embd": 768}',
        r"a model's config \(JSON\).* Name the folder instead: ",
    ),
    "long config": (b'{"model_type": "gpt2", "x": "' + b"a" * 20_000 + b'"}', "a model's config"),
    "tokenizer": (b'{"version": "1.0", "added_tokens": []}', "a JSON file without a weight_map. Name the weights, or"),
    "vocabulary": (b'{"!": 0, "\\u0120": 1' + b', "a": 2' * 9999, "a JSON file without a weight_map"),
    "deep json": (b'{"a":' + b"[" * 5000, "a JSON file without"),
    "json list": (b'[{"error": 1}]', "a JSON file without"),
    "gzip": (gzip.compress(b"x"), "a gzip archive. Unpack it"),
    "bzip2": (bz2.compress(b"x"), "a bzip2 archive. Unpack it"),
    "xz": (lzma.compress(b"x"), "an xz archive. Unpack it"),
    "zstd": (b"\x28\xb5\x2f\xfd\x24\x00", "a Zstandard .* archive"),
    "7z": (b"7z\xbc\xaf\x27\x1c\x00\x04", "a 7z archive"),
    "rar": (b"Rar!\x1a\x07\x01\x00", "a RAR archive"),
    "tar": (_tar(), "a tar archive"),
    "npy": (_npy(), r"a NumPy array \(.npy\)"),
    "npz": (_npy(True), r"a NumPy archive \(.npz\)"),
    "zip": (some_zip("letter.docx"), "letter.docx"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(50), r"an HDF5 file \(Keras\)"),
    "onnx": (b"\x08\x07\x12\x07pytorch\x1a\x052.1.0:\xff\xff\x01", "probably an ONNX model"),
    "saved model": (b"\x08\x01\x12\x8a\xff\x01\x0a\x10" + bytes(40), "no format that Loadstone knows"),
    "tflite": (b"\x1c\0\0\0TFL3" + bytes(40), "a TensorFlow Lite model"),
    "ggml": (b"lmgg" + bytes(40), "an old ggml model"),
    "ggmf": (b"fmgg\x01\0\0\0" + bytes(40), "an old ggmf model"),
    "ggjt": (b"tjgg\x03\0\0\0" + bytes(40), r"an old ggjt model \(before GGUF\)\. Convert it with llama.cpp"),
    "ggla": (b"algg\x01\0\0\0" + bytes(40), "LoRA"),
    "elf": (b"\x7fELF\x02\x01\x01" + bytes(40), "a program"),
    "python": (b"import torch\n\nmodel = ...\n", r"a text file \(it begins with 'import torch model = ...'\)"),
    "broken off text": ("ä".encode() * 10_000, "a text file"),
    "latin-1": (b"caf\xe9 noir", "no format that Loadstone knows"),
    "short": (b"\x01\x02", r"no format that Loadstone knows \(it begins with the bytes 01 02\)"),
    "a brace at byte 8": (b"abcdefgh{", "a text file"),
    "zeros first": (bytes(9000) + b"x", "begins with the bytes 00 00"),
    "noise": (b"\xa7\x13\xfe\x99" * 3000, "begins with the bytes a7 13 fe 99"),
    "zeros": (bytes(5000), r"a file of zero bytes \(5,000 bytes"),
    "truncated safetensors": (
        struct.pack("<Q", 5000) + b'{"a":',
        "its header announces 5,000 bytes but the file has 13",
    ),
    "old gguf": (b"GGUF\x01\0\0\0" + bytes(40), "GGUF version 1"),
}


@pytest.mark.parametrize("case", FOREIGN)
@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt.data-00000-of-00001"])
def test_the_error_says_what_the_file_is(tmp_path: Path, case: str, name: str) -> None:
    raw, message = FOREIGN[case]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(FormatError, match=message) as caught:
        open_checkpoint(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert len(str(caught.value)) < 700
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_plain_pickle_is_called_one(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "x").write_bytes(pickle.dumps({"stoi": {"a": 0}}, protocol))
    with pytest.raises(FormatError, match="this is a plain pickle"):
        open_checkpoint(tmp_path / "x")


def test_torchscript(tmp_path: Path) -> None:
    # Written by a program in a file of its own, as torch.jit reads the source.
    (tmp_path / "script.py").write_text(
        "import sys, torch\ntorch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", tmp_path / "script.py", tmp_path / "x"], check=True)
    with pytest.raises(FormatError, match="this is a TorchScript program"):
        open_checkpoint(tmp_path / "x")


def test_a_part_of_a_tensorflow_checkpoint_names_its_index(tmp_path: Path) -> None:
    path = bundle(tmp_path)
    (tmp_path / "model.ckpt.meta").write_bytes(b"\x0a\xff\x80")
    for part in ("model.ckpt.data-00000-of-00001", "model.ckpt.meta"):
        with pytest.raises(FormatError, match=f"a part of a TensorFlow checkpoint. Name its index: {path}"):
            open_checkpoint(tmp_path / part)


# -- hostile bytes

BEGINNINGS = [raw[:40] for raw, _ in FOREIGN.values()] + [
    b"GGUF\x03\0\0\0",
    b"PK\x03\x04",
    b"\x80\x02",
    b"\x80\x02\x8a\x0a",
]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(BEGINNINGS), st.binary(max_size=60), st.sampled_from([b"", MAGIC]))
def test_only_our_errors_come_out(tmp_path: Path, begin: bytes, rest: bytes, end: bytes) -> None:
    (tmp_path / "x").write_bytes(begin + rest + end)
    sniff(tmp_path / "x")
    try:
        open_checkpoint(tmp_path / "x")
    except LoadstoneError as error:
        message = str(error)
        assert message.startswith(str(tmp_path / "x"))
