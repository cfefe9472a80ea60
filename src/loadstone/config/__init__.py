"""The model's configuration, and the translations from every dialect's own."""

from .base import PRESETS, GPTConfig, Rope, gpt2_config
from .gguf import from_gguf
from .hf import from_hf
from .others import from_meta, from_nanogpt, from_openai
from .own import from_own, to_own

__all__ = [
    "PRESETS",
    "GPTConfig",
    "Rope",
    "from_gguf",
    "from_hf",
    "from_meta",
    "from_nanogpt",
    "from_openai",
    "from_own",
    "gpt2_config",
    "to_own",
]
