"""One hostile model of each architecture, in memory, in every dialect that is written down by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dialects
from memory import MemoryCheckpoint

GPT2 = dialects.gpt2_hf()
GPT2_WRITERS: dict[str, Callable[[dialects.Tensors], dialects.Tensors]] = {
    "hf": lambda w: w,
    "nanogpt": dialects.gpt2_nanogpt,
    "openai": dialects.gpt2_openai,
    "raschka": dialects.gpt2_raschka,
    "lesson": dialects.gpt2_lesson,
    "gguf": dialects.gpt2_gguf,
}
META = dialects.llama_meta()
LLAMA_WRITERS: dict[str, Callable[[dialects.Tensors], dialects.Tensors]] = {
    "meta": lambda w: w,
    "hf": lambda w: dialects.llama_hf(w, heads=6, kv_heads=2),
    "gguf": dialects.llama_gguf,
}
GPT2_GGUF_METADATA = {
    "general.architecture": "gpt2",
    "gpt2.context_length": 40,
    "gpt2.embedding_length": 32,
    "gpt2.block_count": 3,
    "gpt2.feed_forward_length": 128,
    "gpt2.attention.head_count": 4,
    "gpt2.attention.layer_norm_epsilon": 1e-5,
}
LLAMA_GGUF_METADATA = {
    "general.architecture": "llama",
    "llama.context_length": 40,
    "llama.embedding_length": 48,
    "llama.block_count": 3,
    "llama.feed_forward_length": 80,
    "llama.attention.head_count": 6,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": 8,
}


def gpt2_checkpoint(dialect: str) -> MemoryCheckpoint:
    metadata = GPT2_GGUF_METADATA if dialect == "gguf" else {}
    return MemoryCheckpoint(GPT2_WRITERS[dialect](GPT2), metadata=metadata)


def llama_checkpoint(dialect: str) -> MemoryCheckpoint:
    metadata = LLAMA_GGUF_METADATA if dialect == "gguf" else {}
    return MemoryCheckpoint(LLAMA_WRITERS[dialect](META), metadata=metadata)


NEOX = dialects.gpt_neox_hf()
NEOX_CONFIG = {"n_heads": 4, "head_dim": 12, "rope": {"dims": 4}}


def gpt_neox_checkpoint(dialect: str) -> MemoryCheckpoint:
    assert dialect == "hf"
    return MemoryCheckpoint(NEOX)


CHECKPOINTS = {"gpt2": gpt2_checkpoint, "llama": llama_checkpoint, "gpt_neox": gpt_neox_checkpoint}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_heads": 4},
    "llama": {"n_heads": 6, "head_dim": 8, "n_kv_heads": 2},
    "gpt_neox": NEOX_CONFIG,
}
