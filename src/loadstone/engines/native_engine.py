"""The engine `native`: loadstone.native behind the protocol; it has the methods already."""

from __future__ import annotations

from ..native import NativeEngine, open_native
from ..weightmap import Identity
from .protocol import Engine

Engine.register(NativeEngine)


def start(identity: Identity, dtype: str) -> NativeEngine:
    """Threads: OMP_NUM_THREADS, or all cores."""
    return open_native(identity, width=dtype)
