"""What is fuzzed: for each format, bytes become a file that is opened as a user would, and every promise is checked."""

from __future__ import annotations

import shutil
import time
import tracemalloc
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from resource import RUSAGE_SELF, getrusage
from types import MappingProxyType

from fuzz import mutate, seeds
from loadstone.checkpoint import open_checkpoint
from loadstone.checkpoint.audit import audit, audit_lines
from loadstone.checkpoint.audit_pickle import audit_pickle
from loadstone.checkpoint.base import Checkpoint
from loadstone.checkpoint.pickle_opcodes import unpickle
from loadstone.checkpoint.pickle_vm import PickleVM
from loadstone.checkpoint.torch_state import find_weights
from loadstone.checkpoint.torch_values import HANDLERS, StorageTable
from loadstone.errors import LoadstoneError
from loadstone.tokenizer import load_tokenizer
from loadstone.weightmap import identify

SECONDS = 5  # of the processor
MEMORY, TIMES = 64 << 20, 16  # bytes, and so many times the size of the file
SMALL = 1 << 20  # bytes of a tensor that is read
LONGEST = 4000  # characters of an error


@dataclass(frozen=True)
class Target:
    """`open` gets the folder, filled with `beside`, and the bytes; for `inner` and `grammar` see `mutate.py`."""

    seeds: Callable[[], list[bytes]]
    open: Callable[[Path, bytes], None]
    inner: mutate.Inner | None = None
    grammar: mutate.Grammar | None = None
    beside: Callable[[], Mapping[str, bytes]] = dict
    tokens: tuple[bytes, ...] = ()

    def mutated(self, data: bytes, random: Random, other: Callable[[bytes], bytes] | None = None) -> bytes:
        """A changed input: by our mutations, or half of the time by `other`."""

        def change(part: bytes) -> bytes:
            if other is not None and random.random() < 0.5:
                return other(part)
            return mutate.mutated(part, random, self.tokens, self.grammar)

        return mutate.within(data, self.inner if random.random() < 0.7 else None, change)


class BrokenPromiseError(AssertionError):
    """What a hostile file must not achieve."""


def prepare(target: Target, folder: Path) -> Path:
    """An empty folder with what lies beside the file."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in target.beside().items():
        (folder / name).write_bytes(content)
    return folder


def check(target: Target, folder: Path, data: bytes, *, traced: bool = True) -> LoadstoneError | None:
    """Open the bytes; returns the error of ours that came of it, if any. Raises BrokenPromiseError.

    Any other exception that escapes is a finding too. Memory is what Python and numpy ask for, if `traced`, which
    takes three times as long; else the growth of what the process ever held.
    """
    if traced:
        tracemalloc.start(1)
    began, held = time.process_time(), getrusage(RUSAGE_SELF).ru_maxrss
    outcome: LoadstoneError | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            target.open(folder, data)
        except LoadstoneError as error:
            outcome = error.with_traceback(None)  # which would keep the file open
    seconds, peak = time.process_time() - began, (getrusage(RUSAGE_SELF).ru_maxrss - held) * 1024
    if traced:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    if seconds > SECONDS:
        raise BrokenPromiseError(f"it took {seconds:.1f} s")
    if peak > MEMORY + TIMES * len(data):
        raise BrokenPromiseError(f"it took {peak:,} bytes of memory, for {len(data):,}")
    if len(text := str(outcome or "")) > LONGEST:
        raise BrokenPromiseError(f"an error of {len(text):,} characters: {text[:500]}")
    return outcome


# -- as a user opens things


def _file(name: str) -> Callable[[Path, bytes], None]:
    def open_file(folder: Path, data: bytes) -> None:
        path = folder / name
        path.unlink(missing_ok=True)  # not written in place: something may still map the last one
        path.write_bytes(data)
        list(audit_lines(audit(path)))
        checkpoint = open_checkpoint(path)
        read_all(checkpoint)
        try:
            recognise(checkpoint)
        finally:
            if checkpoint.format == "gguf":
                _tokenize(checkpoint.folder, checkpoint)

    return open_file


def _beside(name: str, weights: str) -> Callable[[Path, bytes], None]:
    def open_folder(folder: Path, data: bytes) -> None:
        (folder / name).write_bytes(data)
        recognise(open_checkpoint(folder / weights))

    return open_folder


def read_all(checkpoint: Checkpoint) -> None:
    """Read what is small. A tensor that is refused is no reason to skip the next."""
    for name in checkpoint.names():
        info = checkpoint.info(name)
        if info.nbytes <= SMALL and info.size <= SMALL:
            try:
                array = checkpoint.read(name)
            except LoadstoneError:
                continue
            if array.shape != info.shape or not array.flags.writeable:
                raise BrokenPromiseError(f"{name!r} is {array.shape}, and {info.shape} was announced")
            array.tobytes()


def recognise(checkpoint: Checkpoint) -> None:
    identify(checkpoint).plan.require_clean(str(checkpoint.path))


def _tokenize(folder: Path | None, checkpoint: Checkpoint | None = None) -> None:
    tokenizer = load_tokenizer(folder, checkpoint.metadata if checkpoint else None)
    if tokenizer is not None:
        tokenizer.decode(tokenizer.encode("a cat <|endoftext|> é"))
        if tokenizer.chat_template is not None:
            tokenizer.apply_chat([{"role": "user", "content": "hi"}])


def _pickle(folder: Path, data: bytes) -> None:
    path = folder / "x.pkl"
    audit_pickle(path, data)
    vm = PickleVM(data, path, HANDLERS, StorageTable())
    find_weights(path, unpickle(vm), vm.globals_seen)


def _tokenizer(folder: Path, data: bytes) -> None:
    """The first byte says which file is replaced. Without tokenizer.json, the vocabulary pair is read."""
    files = seeds.tokenizer_files()
    name = list(files)[data[0] % len(files)] if data else "tokenizer.json"
    for other, content in {**files, name: data[1:]}.items():
        if other == "tokenizer.json" and name in ("vocab.json", "merges.txt"):
            (folder / other).unlink(missing_ok=True)
        else:
            (folder / other).write_bytes(content)
    _tokenize(folder)


_JSON = (b"null", b"true", b"NaN", b"Infinity", b"-1", b"1e999", b"[]", b"{}", b'""', b'"\\ud800"', b"[" * 300, b",")
_DTYPES = (b'"F32"', b'"BF16"', b'"F4"', b'"__metadata__"', b'"shape":[0]', b'"data_offsets":[0,0]')
_PICKLE = (
    b"cos\nsystem\n", b"\x93", b"R", b"b", b"\x81", b"\x92", b"(", b"t", b"o", b"ib\nc\n", b"\x94", b"h\x00", b"q\x00",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._tensor\n_rebuild_from_type_v2\n", b"ccollections\nOrderedDict\n",
    b"Q", b"P", b"\x8a\x09", b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x95", b"]", b"}", b")", b"a", b"s", b"u", b"e",
)  # fmt: skip
_HF = tuple(f'"{key}"'.encode() for key in [*seeds.CONFIG, *seeds.LLAMA_CONFIG, "torch_dtype", "auto_map"])

TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "safetensors": Target(
            seeds.safetensors, _file("model.safetensors"), mutate.safetensors_header, mutate.changed_json,
            tokens=_JSON + _DTYPES,
        ),
        "index": Target(
            seeds.index, _file("model.safetensors.index.json"), grammar=mutate.changed_json,
            beside=lambda: seeds.SHARDS,
            tokens=(*_JSON, b'"../x"', b'"weight_map"', b'"/etc/passwd"', f'"{seeds.SHARD}"'.encode()),
        ),
        "torch-zip": Target(
            seeds.torch_zip, _file("model.pt"), mutate.zipped_pickle, mutate.changed_pickle, tokens=_PICKLE,
        ),
        "torch-legacy": Target(seeds.torch_legacy, _file("model.pth"), tokens=_PICKLE),
        "pickle": Target(seeds.pickles, _pickle, grammar=mutate.changed_pickle, tokens=_PICKLE),
        "gguf": Target(
            seeds.gguf, _file("model.gguf"), tokens=(b"GGUF", b"general.alignment", b"split.count", b"\x09\0\0\0"),
        ),
        "bundle": Target(
            seeds.bundle, _file("model.ckpt.index"), mutate.table_with_checksums, beside=seeds.bundle_files,
            tokens=(b"\0", b"\x08\x01", b"\x12\x04\x12\x02\x08\x02", b"\x3a\x00", b"\xff" * 8 + b"\x7f"),
        ),
        "checkpoint": Target(
            seeds.state, _file("checkpoint"), beside=seeds.bundle_files,
            tokens=(b'model_checkpoint_path: "', b"../", b"/", b"\\\\", b"\\0", b"C:\\\\", b"\\377"),
        ),
        "config": Target(
            seeds.config, _beside("config.json", "model.safetensors"), grammar=mutate.changed_json, tokens=_JSON + _HF,
            beside=lambda: {"model.safetensors": seeds.safetensors()[0]},
        ),
        "tokenizer": Target(
            seeds.tokenizer, _tokenizer, grammar=mutate.changed_tokenizer_file,
            tokens=(*_JSON, b"{% for x in range(9999999) %}", b"{{ ''.__class__ }}", b'"Split"', b'"Regex":"(a*)*b"'),
        ),
    }
)  # fmt: skip
