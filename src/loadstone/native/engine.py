"""`NativeEngine`: a model that runs in the native library. Rows of a cache, tokens in, scores out; no torch.

Shapes: R rows of a call, V vocabulary.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import GPTConfig
from ..config.base import ACTIVATIONS
from ..config.common import require_fields
from ..config.frequencies import frequencies_of
from ..load import settle_tie
from ..weightmap import Identity
from .library import Config, choose_level, choose_threads, library
from .packing import F16, F32, Slots, choose_types, fill

Floats = NDArray[np.float32]


class NativeCache:
    """Keys and values of some rows, in the library's memory; pages are taken as tokens come.

    Attributes:
        size: most tokens of a row.
        lengths: tokens held, per row. To forget the last ones is to lower it.
        nbytes: memory that it takes when it is full.
    """

    def __init__(self, engine: NativeEngine, batch: int, length: int) -> None:
        self.size, self.lengths = length, [0] * batch
        self.handle = library().ls_cache_open(engine.handle, batch, length)
        if not self.handle:
            raise MemoryError(f"no memory for a cache of {batch} rows of {length} tokens")
        self.nbytes: int = library().ls_cache_bytes(self.handle)
        weakref.finalize(self, library().ls_cache_close, self.handle)


class NativeEngine:
    """A model that is ready to run: `new_cache`, `prefill`, `decode`, `reset`.

    Logits are float32, [rows, V], and the caller's own. One call runs at a time; others wait for it.

    Attributes:
        config: the model's.
        threads, level: as they came out (`level` is the instruction set).
        packed_bytes: memory that the weights take.
    """

    device = "cpu"

    def __init__(
        self, identity: Identity, *, width: str = "auto", threads: int | None = None, level: str | None = None
    ) -> None:
        settle_tie(identity)
        self.config, slots = identity.config, Slots(identity)
        types = choose_types(identity, slots, width)
        number = choose_level(level)
        exact = all(types[slots.matrices[name]] in (F32, F16) for name in _targets(identity) if name in slots.matrices)
        native = _native_config(self.config, narrow_cache=not exact)
        self.handle = library().ls_open(ctypes.byref(native), types.ctypes.data, choose_threads(threads), number)
        if not self.handle:
            raise MemoryError("no memory for the packed weights")
        self._close = weakref.finalize(self, library().ls_close, self.handle)
        self.level = library().ls_level(number).decode()
        self.threads, self.packed_bytes = library().ls_threads(self.handle), library().ls_bytes(self.handle)
        self._lock = threading.Lock()
        self._slots = slots
        fill(self.handle, identity, slots, types)

    def new_cache(self, batch: int = 1, length: int | None = None, *, allocate: int | None = None) -> NativeCache:
        """An empty cache; `allocate` is not needed, as memory is taken when it is written."""
        del allocate
        context = self.config.context_length
        if batch < 1 or (length is not None and length < 1):
            raise ValueError(f"a cache has 1 row or more of 1 token or more, found {batch} of {length}")
        return NativeCache(self, batch, min(length or context, context))

    def prefill(self, cache: NativeCache, prompts: Mapping[int, Sequence[int]]) -> Floats:
        """Read one or more tokens into each of the named rows; logits after each one's last.

        Raises IndexError beyond the cache's size, for a row that is not there and a token outside the vocabulary.
        """
        return self._read(cache, list(prompts), list(prompts.values()))

    def decode(self, cache: NativeCache, tokens: Sequence[int]) -> Floats:
        """Read one more token into every row; logits after it. Raises IndexError as `prefill` does."""
        if len(tokens) != len(cache.lengths):
            raise ValueError(f"the cache has {len(cache.lengths)} rows, and {len(tokens)} tokens were given")
        return self._read(cache, range(len(tokens)), [(token,) for token in tokens])

    def reset(self, cache: NativeCache, lengths: Sequence[int]) -> None:
        """Each row forgets all but its first tokens. Raises ValueError for a length that it has not reached."""
        known = len(lengths) == len(cache.lengths)
        if not known or not all(0 <= new <= old for new, old in zip(lengths, cache.lengths, strict=True)):
            raise ValueError(f"rows that hold {cache.lengths} tokens cannot be set to {list(lengths)}")
        cache.lengths = list(lengths)

    def copy(self, cache: NativeCache, source: int, target: int, tokens: int) -> None:
        """The first tokens of one row, as read, over those of another. Lengths stay: they are the caller's to set."""
        with self._lock:
            if library().ls_cache_copy(self.handle, cache.handle, source, target, tokens):
                raise IndexError(f"{tokens} tokens of row {source} cannot go to row {target} of this cache")

    def scores(self, ids: Sequence[int]) -> Floats:
        """Logits after every token of one text, [len(ids), V]."""
        return self._read(self.new_cache(1, len(ids)), (0,), [ids], every=True)

    def weight_row(self, name: str, row: int) -> Floats:
        """One row of a packed matrix, as products see it; `name` as in `GPT`. For tests and the curious."""
        out = np.empty(max(self.config.d_model, self.config.d_ff, self.config.n_heads * self.config.head_dim), "f4")
        if library().ls_row(self.handle, self._slots.matrices[name], row, out.ctypes.data):
            raise IndexError(f"{name} has no row {row}")
        return out

    def _read(
        self, cache: NativeCache, rows: Sequence[int], new: Sequence[Sequence[int]], every: bool = False
    ) -> Floats:
        if not len(rows) or not all(map(len, new)):
            raise ValueError("every row needs at least one token")
        vocab, size = self.config.vocab_size, cache.size
        tokens, counts = _ids(new), np.array([len(row) for row in new], np.int32)
        if tokens.min() < 0 or tokens.max() >= vocab:
            raise IndexError(f"a token is outside the vocabulary of {vocab}")
        if not all(0 <= row < len(cache.lengths) for row in rows):
            raise IndexError(f"the cache has {len(cache.lengths)} rows; {list(rows)} were named")
        with self._lock:
            starts = np.array([cache.lengths[row] for row in rows], np.int32)
            if (starts + counts).max() > size:
                raise IndexError(f"position {(starts + counts).max() - 1} is beyond the limit of {size} tokens")
            logits = np.empty((int(counts.sum()) if every else len(rows), vocab), np.float32)
            places = np.array(rows, np.int32)
            pointers = (array.ctypes.data for array in (places, counts, starts))
            status = library().ls_run(
                self.handle, cache.handle, tokens.ctypes.data, len(rows), *pointers, every, logits.ctypes.data
            )
            if status:
                raise ValueError(f"the native engine refused the call (status {status}): is a row named twice?")
            for row, start, count in zip(rows, starts.tolist(), counts.tolist(), strict=True):
                cache.lengths[row] = start + count
        return logits


def open_native(
    identity: Identity, *, width: str = "auto", threads: int | None = None, level: str | None = None
) -> NativeEngine:
    """An opened source (`load.open_source`) as a native engine.

    Args:
        identity: its plan must be clean.
        width: `auto` (as stored), or one of `packing.WIDTHS`: `float32`, `bfloat16`, `float16`, `q8`, `q4`.
        threads: OMP_NUM_THREADS or the usable cores if not given.
        level: an instruction set (`library.levels`), LOADSTONE_NATIVE_LEVEL or the best if not given.

    Raises LoadstoneError if the library is not built, or the model has something that it does not know.
    """
    identity.plan.require_clean(str(identity.checkpoint.path))
    require_fields(identity.config, "native")
    return NativeEngine(identity, width=width, threads=threads, level=level)


def _targets(identity: Identity) -> Iterable[str]:
    return (target for step in identity.plan.steps for target in step.targets)


def _native_config(config: GPTConfig, *, narrow_cache: bool) -> Config:
    c, rope = config, config.rope
    factor = frequencies_of(rope, rope.dims or c.head_dim)[1] if rope else 1.0
    return Config(
        c.vocab_size, c.context_length, c.d_model, c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim, c.d_ff,
        c.norm == "rmsnorm", ACTIVATIONS.index(c.activation), c.gated_mlp, c.parallel_residual, c.tied, rope is None,
        (rope.dims or c.head_dim) if rope else 0, narrow_cache, c.norm_eps, factor,
    )  # fmt: skip


def _ids(new: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    arrays: list[NDArray[Any]] = [np.asarray(row) for row in new]
    if any(array.dtype.kind not in "iu" or array.ndim != 1 for array in arrays):
        raise TypeError("tokens are lists of whole numbers")
    whole = np.concatenate(arrays)
    return whole.clip(-1, 2**31 - 1).astype(np.int32)
