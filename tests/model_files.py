"""Small GPT-2 models on disk, in the containers that users have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import save_file

import dialects
from bundle_writer import write_bundle

GPT2 = dialects.gpt2_hf()
CONFIG = {
    "model_type": "gpt2", "vocab_size": 101, "n_positions": 40, "n_embd": 32, "n_layer": 3, "n_head": 4,
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
}  # fmt: skip


def write_hf(folder: Path, tensors: dialects.Tensors = GPT2, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    return folder


def write_torch(path: Path, value: Any, legacy: bool = False) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


def tensors_of(arrays: dialects.Tensors) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


def write_gguf(path: Path, tensors: dialects.Tensors = GPT2, heads: int = 4) -> Path:
    """With the gguf package's own writer."""
    import gguf

    context, width = tensors["wpe.weight"].shape
    writer: Any = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_block_count(sum(name.endswith("ln_1.weight") for name in tensors))
    writer.add_feed_forward_length(tensors["h.0.mlp.c_fc.bias"].size)
    writer.add_head_count(heads)
    writer.add_layer_norm_eps(1e-5)
    for name, value in dialects.gpt2_gguf(tensors).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_openai(folder: Path) -> Path:
    folder.mkdir()
    write_bundle(folder / "model.ckpt", dialects.gpt2_openai(GPT2))
    hparams = {"n_vocab": 101, "n_ctx": 40, "n_embd": 32, "n_head": 4, "n_layer": 3}
    (folder / "hparams.json").write_text(json.dumps(hparams))
    return folder
