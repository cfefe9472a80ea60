"""llama.cpp as it works on every machine."""

from __future__ import annotations

import importlib.util

from llama_amx import without_amx

if importlib.util.find_spec("llama_cpp"):
    without_amx()
