"""`sniff`: what a file is, from a few kilobytes of its bytes; never from its name.

Whatever is no checkpoint is described all the same, as people name downloads that failed, archives and configs by
mistake, and the error should say which it was.
"""

from __future__ import annotations

import json
import re
from codecs import getincrementaldecoder
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .safetensors import MAX_HEADER

# `unsure` is a pickle or a zip archive that torch.save may have written: only opening it tells.
Kind = Literal["safetensors", "torch", "unsure", "gguf", "index", "bundle", "other"]

_HEAD = 8192  # bytes read from the beginning of a file
_AGAIN = "The download failed: get the file again, and check the address, the name and your access."
_OLD_GGML = "Convert it with llama.cpp's convert_llama_ggml_to_gguf.py."
_UNPACK = "Unpack it, and name what comes out."
# torch.save's older format begins with a pickle of its magic number 0x1950a86a20f9469cfc6c (torch/serialization.py).
_TORCH_LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_PICKLES = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))
# The end of a sorted string table, as in sstable.py, whose checksums take 20 ms to import.
_TABLE_END = (0xDB4775248B80FB57).to_bytes(8, "little")
_ZIPS = (b"PK\x03\x04", b"PK\x05\x06")


@dataclass(frozen=True, slots=True)
class Sniffed:
    """`what` the file is, as the end of the sentence "this is ..."; for kind `other` what to do instead."""

    kind: Kind
    what: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class _Sample:
    path: Path
    size: int
    head: bytes
    tail: bytes  # the last 8 bytes


# (offset, bytes, what, hint) of formats that Loadstone does not read.
_FOREIGN = (
    (0, b"\x1f\x8b", "a gzip archive", _UNPACK),
    (0, b"BZh", "a bzip2 archive", _UNPACK),
    (0, b"\xfd7zXZ\x00", "an xz archive", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard (zstd) archive", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"\x93NUMPY", "a NumPy array (.npy)", "It is one array without a name. Name a checkpoint."),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras)", "Load it with Keras, and save it as a TensorFlow checkpoint."),
    (4, b"TFL3", "a TensorFlow Lite model", "Name the checkpoint that it was converted from."),
    (0, b"lmgg", "an old ggml model (before GGUF)", _OLD_GGML),
    (0, b"fmgg", "an old ggmf model (before GGUF)", _OLD_GGML),
    (0, b"tjgg", "an old ggjt model (before GGUF)", _OLD_GGML),
    (0, b"algg", "an old ggla LoRA adapter (before GGUF)", "It is no whole model: name the base model."),
    (0, b"%PDF", "a PDF document", _AGAIN),
    (0, b"\x89PNG", "an image", _AGAIN),
    (0, b"\x7fELF", "a program (ELF)", "Name a checkpoint."),
)


def sniff(path: Path) -> Sniffed:
    """What the file at `path` is. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
        size = file.seek(0, 2)
        file.seek(max(0, size - 8))
        sample = _Sample(path, size, head, file.read(8))
    for rule in _RULES:
        if found := rule(sample):
            return found
    return Sniffed("other", f"no format that Loadstone knows (it begins with the bytes {head[:8].hex(' ')})")


def _checkpoint(s: _Sample) -> Sniffed | None:
    # Safetensors comes first: a header of 640 bytes begins like a pickle. No other format has its zeros and the brace.
    length = int.from_bytes(s.head[:8], "little")
    if length <= MAX_HEADER and s.head[8:].lstrip(b" \t\r\n")[:1] == b"{":
        return Sniffed("safetensors", "a safetensors file")
    if s.head[:4] == b"GGUF":
        return Sniffed("gguf", "a GGUF file")
    if s.head[:4] in _ZIPS:
        return _zip(s)
    if s.head.startswith(_TORCH_LEGACY):
        return Sniffed("torch", "a PyTorch checkpoint")
    if s.head[:2] in _PICKLES:
        return Sniffed("unsure", "a pickle")
    if s.tail == _TABLE_END:
        return Sniffed("bundle", "the index of a TensorFlow checkpoint")
    return None


def _zip(s: _Sample) -> Sniffed:
    name_length = int.from_bytes(s.head[26:28], "little")
    first = s.head[30 : 30 + name_length]
    if first.endswith(b".npy"):
        return Sniffed("other", "a NumPy archive (.npz)", "Save its arrays with safetensors.numpy.save_file.")
    return Sniffed("torch" if first.endswith(b"data.pkl") else "unsure", "a zip archive")


def _empty(s: _Sample) -> Sniffed | None:
    return None if s.size else Sniffed("other", "an empty file (0 bytes)", _AGAIN)


def _foreign(s: _Sample) -> Sniffed | None:
    for offset, magic, what, hint in _FOREIGN:
        if s.head[offset : offset + len(magic)] == magic:
            return Sniffed("other", what, hint)
    return None


def _bundle_part(s: _Sample) -> Sniffed | None:
    """TensorFlow's data shards and graphs have no magic number: here the name helps to say which index to open."""
    stem, parts = re.subn(r"\.(data-\d+-of-\d+|meta)$", "", s.path.name)
    index = s.path.with_name(f"{stem}.index")
    if parts and index.is_file():
        return Sniffed("other", "a part of a TensorFlow checkpoint", f"Name its index: {index}")
    return None


def _zeros(s: _Sample) -> Sniffed | None:
    if any(s.head) or any(s.tail):
        return None
    return Sniffed(
        "other", f"a file of zero bytes ({s.size:,} bytes, zero wherever looked): nothing was written", _AGAIN
    )


def _onnx(s: _Sample) -> Sniffed | None:
    """ONNX is a bare protobuf: field 1 is a small version, field 2 the name of the program that wrote it."""
    match = re.match(rb"\x08[\x01-\x1f]\x12([\x01-\x40])([ -~]+)", s.head)
    if match and len(match[2]) >= match[1][0]:
        return Sniffed("other", "probably an ONNX model", "Name the checkpoint that it was exported from.")
    return None


def _text(s: _Sample) -> Sniffed | None:
    try:
        text = getincrementaldecoder("utf-8-sig")().decode(s.head)  # which may end inside a character
    except UnicodeDecodeError:
        return None
    if re.search(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]", text):
        return None
    text = text.lstrip()
    for begins, rule in _TEXTS:
        if text[:64].lower().startswith(begins):
            return rule(s, text)
    return Sniffed("other", f"a text file (it begins with {_line(text)!r})", "Name a checkpoint.")


def _state(s: _Sample, text: str) -> Sniffed:
    return Sniffed("bundle", "the state file of a TensorFlow checkpoint")


def _lfs(s: _Sample, text: str) -> Sniffed:
    size = re.search(r"^size (\d{1,19})$", text, re.MULTILINE)
    what = "a git-LFS pointer, not the file itself" + (f" ({int(size[1]):,} bytes)" if size else "")
    return Sniffed("other", what, "Fetch it: run `git lfs pull` in its folder, or download it again.")


def _page(s: _Sample, text: str) -> Sniffed:
    """A web page, or the XML in which storage servers report errors."""
    title = re.search(r"<(title|message|code)\b[^>]*>([^<]+)", text, re.IGNORECASE)
    kind = "an XML document" if text.startswith("<?xml") else "a web page (HTML)"
    return Sniffed("other", kind + (f" saying {_line(title[2])!r}" if title else ""), _AGAIN)


def _json(s: _Sample, text: str) -> Sniffed:
    if '"weight_map"' in text:
        return Sniffed("index", "the index of a sharded checkpoint")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None  # longer than the sample, or damaged
    messages = [value.get(key) for key in ("error", "message", "detail")] if isinstance(value, dict) else []
    if message := next(filter(None, messages), None):
        return Sniffed("other", f"a JSON error message: {_line(str(message))!r}", _AGAIN)
    if re.search(r'"(model_type|architectures|n_embd|n_layer|hidden_size)"', text):
        return Sniffed("other", "a model's config (JSON), not its weights", f"Name the folder instead: {s.path.parent}")
    return Sniffed("other", "a JSON file without a weight_map", f"Name the weights, or their folder: {s.path.parent}")


def _line(text: str) -> str:
    return " ".join(text.split())[:80]


_TEXTS: tuple[tuple[str | tuple[str, ...], Callable[[_Sample, str], Sniffed]], ...] = (
    ("version https://git-lfs", _lfs),
    ("model_checkpoint_path:", _state),
    (("<!doctype", "<html", "<head", "<?xml", "<error"), _page),
    (("{", "["), _json),
)
_RULES: tuple[Callable[[_Sample], Sniffed | None], ...] = (
    _empty,
    _checkpoint,
    _bundle_part,
    _foreign,
    _zeros,
    _text,
    _onnx,
)
