"""The families: what makes a model one of them apart from its sizes, and what other programs call them.

One row per architecture. A family is these values and its weight tables; nothing else in the program knows it by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        models: published ones, for people.
        hf: the class in transformers.
        gguf: what llama.cpp calls it (`general.architecture`); empty: it has no graph for it.
        fields: of `GPTConfig`.
    """

    models: str
    hf: str
    gguf: str = ""
    fields: dict[str, Any] = field(default_factory=dict)


LLAMA_FIELDS: dict[str, Any] = {
    "norm": "rmsnorm",
    "norm_bias": False,
    "activation": "silu",
    "gated_mlp": True,
    "qkv_bias": False,
    "attn_out_bias": False,
    "mlp_bias": False,
}
# Rotary dims are a quarter of a head in every published GPT-NeoX.
GPT_NEOX_FIELDS: dict[str, Any] = {"activation": "gelu", "parallel_residual": True, "tied": False}
GPTJ_FIELDS: dict[str, Any] = {
    "parallel_residual": True,
    "shared_norm": True,
    "qkv_bias": False,
    "attn_out_bias": False,
    "tied": False,
    "head_bias": True,
}

SPARSE = ("mixtral", "qwen3_moe")  # those that have experts
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "gpt2": Family("GPT-2, DistilGPT2, DialoGPT", "GPT2LMHeadModel", "gpt2"),
        "gptj": Family("GPT-J", "GPTJForCausalLM", "", GPTJ_FIELDS),
        "gpt_neox": Family("GPT-NeoX, Pythia", "GPTNeoXForCausalLM", "gptneox", GPT_NEOX_FIELDS),
        "llama": Family("Llama 1 to 3.3, TinyLlama, SmolLM and SmolLM2", "LlamaForCausalLM", "llama", LLAMA_FIELDS),
        "mistral": Family("Mistral", "MistralForCausalLM", "llama", LLAMA_FIELDS),
        "mixtral": Family("Mixtral", "MixtralForCausalLM", "llama", LLAMA_FIELDS),
        "qwen2": Family("Qwen2, Qwen2.5", "Qwen2ForCausalLM", "qwen2", LLAMA_FIELDS | {"qkv_bias": True}),
        "qwen3": Family("Qwen3", "Qwen3ForCausalLM", "qwen3", LLAMA_FIELDS | {"qk_norm": True}),
        "qwen3_moe": Family("Qwen3-MoE", "Qwen3MoeForCausalLM", "qwen3moe", LLAMA_FIELDS | {"qk_norm": True}),
        "phi3": Family("Phi-3, Phi-3.5, Phi-4 without longrope", "Phi3ForCausalLM", "phi3", LLAMA_FIELDS),
    }
)

# llama.cpp calls Mistral and Mixtral a `llama` too; which of them it is says the number of experts.
OF_GGUF: Mapping[str, str] = MappingProxyType(
    {family.gguf: name for name, family in reversed([*FAMILIES.items()]) if family.gguf}
)
