"""An assembler for pickles, and torch's two containers around them: what an attacker would write, byte by byte."""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path

FLOATS = struct.pack("<6f", 1, 2, 3, 4, 5, 6)
EMPTY_ORDERED = b"ccollections\nOrderedDict\n)R"


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def tuple_of(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def call(module: str, attribute: str, *args: bytes) -> bytes:
    return name(module, attribute) + tuple_of(*args) + b"R"


def mapping(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def storage(
    key: str = "0", numel: int = 6, kind: str = "FloatStorage", module: str = "torch", view: bytes = b""
) -> bytes:
    return tuple_of(text("storage"), name(module, kind), text(key), text("cpu"), number(numel), view) + b"Q"


def tensor(
    held: bytes | None = None, offset: int = 0, shape: tuple[int, ...] = (2, 3), stride: tuple[int, ...] = (3, 1)
) -> bytes:
    dims = [tuple_of(*map(number, numbers)) for numbers in (shape, stride)]
    return call("torch._utils", "_rebuild_tensor_v2", held or storage(), number(offset), *dims, b"\x89", EMPTY_ORDERED)


def pickled(value: bytes) -> bytes:
    return b"\x80\x02" + value + b"."


# What an attacker would have called; the commands leave a mark in the current folder. By the name that is reported.
SENTINEL = "sentinel"
COMMAND = text(f"touch {SENTINEL}")
PYTHON = text(f"__import__('pathlib').Path('{SENTINEL}').touch()")

SYSTEM = call("builtins", "getattr", call("builtins", "__import__", text("os")), text("system"))
CALLS = {
    "posix.system": call("posix", "system", COMMAND),
    "os.system": call("os", "system", COMMAND),
    "nt.system": call("nt", "system", COMMAND),
    "builtins.eval": call("builtins", "eval", PYTHON),
    "builtins.exec": call("__builtin__", "exec", PYTHON),
    "builtins.__import__": SYSTEM + tuple_of(COMMAND) + b"R",
    "importlib.import_module": call("importlib", "import_module", text("this")),
    "subprocess.Popen": name("subprocess", "Popen") + tuple_of(COMMAND) + b"\x81",
    "runpy.run_path": name("runpy", "run_path") + tuple_of(text("x")) + b"}\x92",
    "pty.spawn": text("pty") + text("spawn") + b"\x93" + tuple_of(COMMAND) + b"R",
    "os.popen": b"(" + COMMAND + b"ios\npopen\n",
    "posix.execv": b"(" + name("posix", "execv") + COMMAND + b"o",
    "pickle.loads": call("pickle", "loads", text("x")),
    "os.putenv": name("collections", "Odd") + b")\x81}" + text("__setstate__") + name("os", "putenv") + b"sb",
}


def write_zip(path: Path, value: bytes, storages: dict[str, bytes] | None = None, **entries: bytes) -> Path:
    """A zip checkpoint that holds the pickle of `value` (opcodes without PROTO and STOP)."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(value))
        archive.writestr("archive/version", "3\n")
        for key, data in ({"0": FLOATS} if storages is None else storages).items():
            archive.writestr(f"archive/data/{key}", data)
        for entry, data in entries.items():
            archive.writestr(f"archive/{entry}", data)
    return path


def write_legacy(path: Path, value: bytes, storages: dict[str, tuple[int, bytes]] | None = None) -> Path:
    """The same in the format before torch 1.6; each storage with the number of elements that it claims."""
    parts = [pickle.dumps(head, 2) for head in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    held = {"0": (6, FLOATS)} if storages is None else storages
    parts += [pickled(value), pickle.dumps(list(held), 2)]
    parts += [struct.pack("<q", numel) + data for numel, data in held.values()]
    path.write_bytes(b"".join(parts))
    return path
