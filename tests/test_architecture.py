"""The architecture is under test: which way imports run, how long a file may be, what may start without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import loadstone

PACKAGE = Path(loadstone.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Each part may import those before it in the list, and itself.
LAYERS = [
    {"errors", "_version", "checks"},
    {"config"},
    {"positions", "checkpoint"},
    {"model", "hashing"},
    {"weightmap", "sampling", "kernels"},
    {"tokenizer"},
    {"load", "certificate"},
    {"native"},
    {"engines"},
    {"diagnose", "generate", "report", "diff", "sizes", "layouts"},
    {"verify"},
    {"convert"},
    {"save"},
    {"data"},
    {"finetune"},
    {"train"},
    {"plot", "extend", "scratch", "evaluate"},
    {"chat", "compare", "calibrate", "serve"},
    {"quantize", "prune", "upcycle"},
    {"cli"},
    {"__init__", "__main__"},
]
# Torch-free: inspect, plan and any engine that is not torch must start in a blink.
TORCH_FREE = (
    "errors",
    "config",
    "checkpoint",
    "weightmap",
    "tokenizer",
    "report",
    "checks",
    "diff",
    "sizes",
    "certificate",
    "hashing",
    "layouts",
    "convert",
    "native",
)


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """Top-level parts of loadstone that a file imports, inside functions and for types too."""
    found = set()
    package = ("loadstone", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            full = (*base, *(node.module.split(".") if node.module else ()))
            if full[:1] == ("loadstone",):
                found |= {full[1]} if len(full) > 1 else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    own = part(path)
    assert own in level, f"{own} has no place in LAYERS"
    if own == "model":
        assert imported_parts(path) <= {"config", "positions"}
    for other in imported_parts(path) - {own}:
        # __init__ only re-exports, and the version is everybody's.
        assert other == "_version" or own == "__init__" or level[other] < level[own], f"{own} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_longer_than_350_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350


@pytest.mark.parametrize("path", [f for f in FILES if part(f) in TORCH_FREE], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_torch_free_parts_never_import_torch(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert not any(name.split(".")[0] == "torch" for name in names)


def test_no_code_of_ours_can_execute_a_file() -> None:
    """No unpickler but our own, no eval, no import of a name that a file gave."""
    for path in FILES:
        nodes = ast.walk(ast.parse(path.read_text()))
        calls = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
        assert not calls & {
            "eval",
            "exec",
            "pickle.load",
            "pickle.loads",
            "pickle.Unpickler",
            "torch.load",
            "__import__",
        }


def test_public_names_resolve_and_functions_win_over_their_modules() -> None:
    code = """
import loadstone
loadstone.load_model, loadstone.generate_text, loadstone.verify  # import the modules of the same name first
import loadstone.generate, loadstone.load, loadstone.verify
assert all(callable(getattr(loadstone, name)) for name in ("load", "generate", "verify"))
missing = [name for name in loadstone.__all__ if not hasattr(loadstone, name)]
assert not missing, missing
assert set(loadstone.__all__) == {*loadstone._HOME, *loadstone._SAME_NAME, "__version__"}
try:
    loadstone.nonsense
except AttributeError as error:
    assert "nonsense" in str(error)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "--help"], ["--version"]])
def test_the_command_line_starts_without_torch(arguments: list[str]) -> None:
    code = f"import sys, runpy; sys.argv = ['loadstone', *{arguments!r}]; from loadstone.cli import main\n"
    code += "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
