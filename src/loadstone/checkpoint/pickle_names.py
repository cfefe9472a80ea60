"""What a name that a pickle imports can do to the program that loads it: three verdicts, and who gets which.

`harmless`: the closed set that Loadstone's reader understands and that makes data only. `dangerous`: known to take over
a program, or to reach what does. `unknown`: everything else, which is importing and running somebody's code.
"""

from __future__ import annotations

import re

from .torch_values import HANDLERS, STORAGE_MODULES, STORAGES

HARMLESS, UNKNOWN, DANGEROUS = "harmless", "unknown", "dangerous"
VERDICTS = (HARMLESS, UNKNOWN, DANGEROUS)  # from good to bad

# Packages by which a pickle takes over the program that loads it; builtins are dangerous but for those below.
_PACKAGES = frozenset(
    "os posix nt subprocess sys shutil socket runpy importlib ctypes marshal pickle _pickle cloudpickle dill joblib "
    "webbrowser pty code codeop asyncio timeit bdb pdb pip pydoc imp pkgutil multiprocessing urllib requests http "
    "ftplib smtplib tempfile glob ensurepip venv cProfile profile trace types operator".split()
)
# A name may be dotted (protocol 4): torch.serialization.os.system is os.system.
_WITHIN = frozenset("os posix nt subprocess sys builtins importlib ctypes shutil socket pickle marshal".split())
_DUNDER = re.compile(r"__\w+__")
_BUILTINS = frozenset(
    "set frozenset slice complex bytearray bytes int float str bool list dict tuple object range type getattr".split()
)
# Functions of packages that are otherwise merely unknown: these load and run what they are given.
_FUNCTIONS = frozenset(
    (
        *("torch.load", "torch.serialization.load", "torch.storage._load_from_bytes", "torch.jit.load"),
        *("torch.jit.unsupported_tensor_ops.execWrapper", "torch.ops.load_library", "torch.classes.load_library"),
        *("numpy.load", "numpy.testing._private.utils.runstring", "numpy.f2py.compile", "pandas.read_pickle"),
    )
)
_LOADERS = ("torch.hub.", "torch.utils.cpp_extension.", "torch.package.")
# What makes data and is no handler: numpy's arrays, Python's plain objects, torch's own names of types.
_DATA = frozenset(
    (
        *("numpy.dtype", "numpy.ndarray", "numpy.core.multiarray.scalar", "numpy.core.multiarray._reconstruct"),
        *("numpy.core.numeric._frombuffer", "argparse.Namespace", "types.SimpleNamespace", "copyreg._reconstructor"),
        *("torch.Tensor", "torch.nn.parameter.Buffer", "torch._utils._rebuild_device_tensor_from_numpy"),
        *("datetime.datetime", "datetime.date", "datetime.timedelta", "decimal.Decimal", "fractions.Fraction"),
    )
)
_TYPES = re.compile(
    r"torch\.(b?float|complex|u?int|bool|half|double|long|short|q?u?int)[\w]*|pathlib\.(Pure)?(Posix|Windows)?Path"
    r"|builtins\.(set|frozenset|slice|complex|bytearray|bytes|int|float|str|bool|list|dict|tuple|object|range)"
)
_STORAGES = frozenset(f"{module}.{name}" for module in STORAGE_MODULES for name in STORAGES)


def is_dangerous(full_name: str) -> bool:
    """Whether `module.name` takes over a program that imports and calls it."""
    package, _, rest = full_name.partition(".")
    rest = rest.removesuffix("(...)")
    if full_name in _DATA:
        return False
    return (
        package in _PACKAGES
        or full_name in _FUNCTIONS
        or full_name.startswith(_LOADERS)
        or (package == "builtins" and rest not in _BUILTINS)
        or any(part in _WITHIN or _DUNDER.fullmatch(part) for part in rest.split(".")[:-1])
        or bool(_DUNDER.fullmatch(rest.split(".")[-1]) and package != "builtins")
    )


def verdict(full_name: str) -> str:
    """One of `VERDICTS` for a global, as "module.name" (Python 2's and numpy 2's names already made the usual ones)."""
    if is_dangerous(full_name):
        return DANGEROUS
    known = full_name in HANDLERS or full_name in _STORAGES or full_name in _DATA or _TYPES.fullmatch(full_name)
    return HARMLESS if known else UNKNOWN
