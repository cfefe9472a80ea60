"""One hostile model of each architecture, in memory, in every dialect that is written down by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import dialects
import kin
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
NEOX_GGUF_METADATA = {
    "general.architecture": "gptneox",
    "gptneox.context_length": 2048,
    "gptneox.embedding_length": 48,
    "gptneox.block_count": 3,
    "gptneox.feed_forward_length": 80,
    "gptneox.attention.head_count": 4,
    "gptneox.attention.layer_norm_epsilon": 1e-5,
    "gptneox.rope.dimension_count": 4,
    "gptneox.use_parallel_residual": True,
}
NEOX_CONFIG = {"n_heads": 4, "head_dim": 12, "rope": {"dims": 4}}


def gpt_neox_checkpoint(dialect: str) -> MemoryCheckpoint:
    if dialect == "gguf":
        return MemoryCheckpoint(dialects.gpt_neox_gguf(NEOX, heads=4), metadata=NEOX_GGUF_METADATA)
    return MemoryCheckpoint(NEOX)


def gptj_checkpoint(dialect: str) -> MemoryCheckpoint:
    assert dialect == "hf"
    return MemoryCheckpoint(kin.gptj_hf(), metadata={"hf_config": kin.GPTJ_CONFIG})


CHECKPOINTS: dict[str, Callable[[str], MemoryCheckpoint]] = {
    "gpt2": gpt2_checkpoint,
    "llama": llama_checkpoint,
    "gpt_neox": gpt_neox_checkpoint,
    "gptj": gptj_checkpoint,
    **{name: partial(kin.checkpoint, family) for name, family in kin.KIN.items()},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_heads": 4},
    "llama": {"n_heads": 6, "head_dim": 8, "n_kv_heads": 2},
    "gpt_neox": NEOX_CONFIG,
    "gptj": {"n_heads": 6, "rope": {"dims": kin.GPTJ_TURNED}},
    **{name: {"n_heads": 6, "head_dim": 8, "n_kv_heads": 2} for name in kin.KIN},
}
