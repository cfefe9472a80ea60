"""The native CPU engine: C++ for the machine at hand, weights packed for it, no torch on the way to the first token.

Why not as others do it: frameworks pay for each operation of a token and read their weights from 4 KB pages; here one
call runs a token through all layers, and weights lie in the order of use in pages of 2 MB. docs/native.md says how.
"""

from .engine import NativeCache, NativeEngine, open_native
from .library import available, how, levels, missing

__all__ = ["NativeCache", "NativeEngine", "available", "how", "levels", "missing", "open_native"]
