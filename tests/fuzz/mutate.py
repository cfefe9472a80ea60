"""Mutations that get past a format's front door: what is damaged lies behind right lengths, checksums and directories.

A blind mutation of a safetensors file breaks the length of its header, of a TensorFlow index its checksum, of a zip
archive its directory: the code behind these is never reached. So each format has an `Inner`: how to take out the part
that is worth mutating, and how to put it back in a sound wrapping. Blind mutations are made as well.
"""

from __future__ import annotations

import copy
import io
import json
import pickletools
import warnings
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from random import Random
from typing import Any

from bundle_writer import masked_crc

# Another content of the same grammar; ValueError where the content has none.
Grammar = Callable[[bytes, Random], bytes]
# (the inner part, what puts a changed one back); ValueError where there is none
Inner = Callable[[bytes], tuple[bytes, Callable[[bytes], bytes]]]

_NUMBERS = (0, 1, 2, 7, 8, 31, 127, 128, 255, 256, 0x7FFF, 0xFFFF, 1 << 20, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_LARGE = (1 << 32, (1 << 53) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 8)
MAX_SIZE = 1 << 16  # bytes; nothing in the formats needs more, and small files are read faster


def mutated(data: bytes, random: Random, tokens: Sequence[bytes], grammar: Grammar | None = None) -> bytes:
    """One to four random changes, half of the time such as keep the grammar."""
    if grammar is not None and random.random() < 0.5:
        with suppress(ValueError, IndexError, TypeError, RecursionError):
            return grammar(data, random)[:MAX_SIZE]
    out = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        random.choice(_CHANGES)(out, random, tokens)
    return bytes(out[:MAX_SIZE])


def within(data: bytes, inner: Inner | None, change: Callable[[bytes], bytes]) -> bytes:
    """Apply `change` to the inner part, or to the whole where the inner part cannot be found any more."""
    if inner is None:
        return change(data)
    try:
        part, put_back = inner(data)
    except Exception:  # whatever zipfile and zlib make of a damaged archive
        return change(data)
    return put_back(change(part))


# -- single changes


def _place(out: bytearray, random: Random) -> int:
    return random.randrange(len(out) + 1)


def _flip(out: bytearray, random: Random, _: Sequence[bytes]) -> None:
    if out:
        out[random.randrange(len(out))] ^= 1 << random.randrange(8)


def _byte(out: bytearray, random: Random, _: Sequence[bytes]) -> None:
    if out:
        out[random.randrange(len(out))] = random.choice((0, 0xFF, random.randrange(256), ord("{"), ord("9")))


def _number(out: bytearray, random: Random, _: Sequence[bytes]) -> None:
    """A boundary value over 1, 2, 4 or 8 bytes, in either order."""
    at, size = _place(out, random), random.choice((1, 2, 4, 4, 8, 8))
    value = random.choice(_NUMBERS + _LARGE) % (1 << 8 * size)
    out[at : at + size] = value.to_bytes(size, random.choice(("little", "big")))


def _digits(out: bytearray, random: Random, _: Sequence[bytes]) -> None:
    """Another number where one stands in a text."""
    spots = [i for i, byte in enumerate(out) if 48 <= byte <= 57]
    if spots:
        at = random.choice(spots)
        end = next((i for i in range(at, len(out)) if not 48 <= out[i] <= 57), len(out))
        out[at:end] = str(random.choice((*_NUMBERS, *_LARGE, -1, 1e308, "1" * 400))).encode()


def _remove(out: bytearray, random: Random, _: Sequence[bytes]) -> None:
    at = _place(out, random)
    del out[at : at + random.choice((1, 2, 4, 8, 32, len(out)))]


def _double(out: bytearray, random: Random, _: Sequence[bytes]) -> None:
    at, size = _place(out, random), random.choice((1, 4, 16, 64, 256))
    out[at:at] = out[at : at + size] * random.choice((1, 1, 2, 50))


def _move(out: bytearray, random: Random, _: Sequence[bytes]) -> None:
    at, to, size = _place(out, random), _place(out, random), random.choice((1, 4, 16, 64))
    out[to : to + size] = out[at : at + size]


def _token(out: bytearray, random: Random, tokens: Sequence[bytes]) -> None:
    at, token = _place(out, random), random.choice(tokens)
    out[at : at + random.choice((0, 0, len(token)))] = token


def _noise(out: bytearray, random: Random, _: Sequence[bytes]) -> None:
    at = _place(out, random)
    out[at:at] = random.randbytes(random.choice((1, 3, 8, 40)))


_CHANGES = (_flip, _flip, _byte, _number, _number, _digits, _digits, _remove, _double, _move, _token, _token, _noise)


# -- the inner parts


def safetensors_header(data: bytes) -> tuple[bytes, Callable[[bytes], bytes]]:
    end = 8 + int.from_bytes(data[:8], "little")
    if not 8 <= end <= len(data):
        raise ValueError("no header")
    return data[8:end], lambda header: len(header).to_bytes(8, "little") + header + data[end:]


def zipped_pickle(data: bytes) -> tuple[bytes, Callable[[bytes], bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist() if info.file_size <= MAX_SIZE}
    name = next((name for name in entries if name.endswith("data.pkl")), "")
    if not name:
        raise ValueError("no pickle")

    def put_back(pickle: bytes) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for entry, content in (entries | {name: pickle}).items():
                archive.writestr(entry, content)
        return out.getvalue()

    return entries[name], put_back


def table_with_checksums(data: bytes) -> tuple[bytes, Callable[[bytes], bytes]]:
    """A TensorFlow index as it is; what is put back has the right checksum in every block."""
    return data, checksummed


def checksummed(data: bytes) -> bytes:
    """An index with the checksums that its blocks should have, as far as they can be found."""
    from loadstone.checkpoint.protobuf import CorruptError
    from loadstone.checkpoint.sstable import FOOTER_SIZE, _block_entries, _handle

    out, end = bytearray(data), len(data) - FOOTER_SIZE

    def seal(pos: int, source: bytes) -> tuple[bytes, int]:
        handle, after = _handle(source, pos)
        stop = handle.offset + handle.size
        if stop + 5 <= end:
            out[stop + 1 : stop + 5] = masked_crc(bytes(out[handle.offset : stop + 1])).to_bytes(4, "little")
        return bytes(out[handle.offset : stop]), after

    try:
        _, pos = seal(0, data[end:])
        index, _ = seal(pos, data[end:])
        for _, value in _block_entries(index):
            seal(0, value)
    except (CorruptError, IndexError):
        pass
    return bytes(out)


# -- changes that keep a grammar


def changed_json(data: bytes, random: Random) -> bytes:
    """Valid JSON in which one value is another one, is gone, or stands twice."""
    root = json.loads(data)
    spots: list[tuple[Any, Any]] = []
    pending = [root]
    while pending:
        node = pending.pop()
        inside = list(node.items()) if isinstance(node, dict) else list(enumerate(node))
        spots += [(node, key) for key, _ in inside]
        pending += [value for _, value in inside if isinstance(value, (dict, list))]
    for _ in range(random.choice((1, 1, 2, 3)) if spots else 0):
        node, key = random.choice(spots)
        other, other_key = random.choice(spots)
        try:
            if random.random() < 0.15:
                del node[key]
            elif random.random() < 0.3:
                node[key] = copy.deepcopy(other[other_key])
            elif isinstance(node, dict) and random.random() < 0.2:
                node[f"{key}{random.choice(('x', '', '.', '_orig_mod.'))}"] = node.pop(key)
            else:
                node[key] = random.choice(_VALUES)
        except (KeyError, IndexError):  # an earlier change took it away
            pass
    return json.dumps(root, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")


_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 8, 0.5, -0.0, 1e308, float("nan"), float("inf"), 1 << 31, 1 << 53, 1 << 63),
    *(1 << 64, 10**400 // 3 % 10**40, "", "x", "\0", "\ud800", "é" * 300, "1", "../x", "F32", "gpt2", "llama"),
    *([], [0], [1, -1], [0, 1 << 62], {}, {"a": {}}, [[[]]], [None], {"type": "BPE"}, {"rope_type": "yarn"}),
)


def changed_pickle(data: bytes, random: Random) -> bytes:
    """A pickle whose opcodes are whole, but some are missing, doubled, exchanged or taken from elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pickletools speaks of unknown escapes
        starts = [position for _, _, position in pickletools.genops(data) if position is not None]
    pieces = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(random.choice((1, 1, 2, 4))):
        at, other = random.randrange(len(pieces)), random.randrange(len(pieces))
        end = at + random.choice((1, 1, 2, 8))
        pieces[at:end] = random.choice(
            (
                [],
                pieces[at:end] * 2,
                pieces[other : other + end - at],
                [*pieces[at:end], pieces[other]],
                [b"0"],
                [random.choice(_SMALL_OPCODES)],
            )
        ) or [b""]
    return b"".join(pieces)


_SMALL_OPCODES = (b"N", b"]", b")", b"}", b"K\x01", b"\x88", b"X\x01\0\0\0a", b"\x8a\x09" + b"\xff" * 8 + b"\x7f")


def changed_tokenizer_file(data: bytes, random: Random) -> bytes:
    """The JSON behind the byte that says which file it is."""
    return data[:1] + changed_json(data[1:], random)
