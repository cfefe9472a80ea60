"""Models and tokenizers to extend: hostile weights, and one tokenizer of every kind that `tokenizers` can add to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from loadstone.config import GPTConfig, Rope
from loadstone.model import GPT
from loadstone.tokenizer import Tokenizer, from_gguf
from loadstone.tokenizer.bpe import add_tokens
from small_vocabularies import byte_level, gguf_byte_level, gguf_sentencepiece

VOCAB, MERGES = byte_level()
KNOWN = len(VOCAB)  # 401
END = VOCAB["<|endoftext|>"]
LLAMA: dict[str, Any] = {
    "architecture": "llama", "norm": "rmsnorm", "activation": "silu", "gated_mlp": True, "rope": Rope(),
    "n_kv_heads": 2,
    **dict.fromkeys(("qkv_bias", "attn_out_bias", "mlp_bias", "norm_bias"), False),
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2 untied": {"tied": False},
    "llama": LLAMA,
    "llama untied": LLAMA | {"tied": False},
}


def gpt2_like() -> Tokenizer:
    """Byte-level, 401 tokens."""
    backend = Backend(models.BPE(vocab=VOCAB, merges=MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    add_tokens(backend, ["<|endoftext|>"], special=True)
    return Tokenizer(backend, "made", bos_id=END, eos_ids=(END,))


def padded_gguf() -> Tokenizer:
    """Of a GGUF file whose format names its padding: 401 tokens and [PAD401] to [PAD415]."""
    metadata = gguf_byte_level(VOCAB, MERGES)
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], *(f"[PAD{i}]" for i in range(401, 416))]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], *[5] * 15]
    return from_gguf(metadata, "padded.gguf")


def lowercase() -> Tokenizer:
    """Normalizes what it reads: composed characters, small letters."""
    tokenizer = gpt2_like()
    tokenizer.backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": gpt2_like,
    "byte level of a GGUF": lambda: from_gguf(gguf_byte_level(VOCAB, MERGES), "some.gguf"),
    "padded GGUF": padded_gguf,
    "sentencepiece": lambda: from_gguf(gguf_sentencepiece(), "some.gguf"),
    "normalizing": lowercase,
}


def hostile(rows: int, seed: int = 0, sigma: float = 0.2, **fields: Any) -> GPT:
    """A model none of whose parameters is at its initial value."""
    sizes: dict[str, Any] = {"context_length": 72, "d_model": 32, "n_layers": 2, "n_heads": 4}
    config = GPTConfig(rows, **(sizes | {"bos_id": END, "eos_ids": (END,)} | fields))
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(sigma * torch.randn_like(parameter))
    return model.eval()
