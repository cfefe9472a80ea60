"""The build compiles the native engine where it can; without a compiler the package is pure Python, and whole."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUILD = Path("src", "loadstone", "native", "build.py")


class NativeEngine(BuildHookInterface):
    """Runs for wheels and editable installs. A failure is told and is none of the installation."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        spec = importlib.util.spec_from_file_location("native_build", Path(self.root, BUILD))
        if spec is None or spec.loader is None:
            return
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if problem := module.build():
            self.app.display_warning(f"the native engine is left out, torch runs everything: {problem}")
            return
        build_data["artifacts"].append(str(BUILD.with_name("_engine.so")))
        if version != "editable":  # the library is this machine's kind, but no Python's in particular
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{module.platform_tag()}"
