"""Checkpoints of the shape of 7B and 70B models in sparse files: a few megabytes of disk, and every byte readable."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 32, "vocab_size": 32000}  # fmt: skip
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
             "num_key_value_heads": 8, "vocab_size": 128256}  # fmt: skip


def shapes(sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """HuggingFace's names and shapes of a Llama."""
    width, inner, vocab = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    kv = width // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
    for i in range(sizes["num_hidden_layers"]):
        at = f"model.layers.{i}"
        found |= {f"{at}.{norm}_layernorm.weight": (width,) for norm in ("input", "post_attention")}
        found |= {
            f"{at}.self_attn.{n}_proj.weight": (rows, width) for n, rows in zip("qkv", (width, kv, kv), strict=True)
        }
        found |= {f"{at}.self_attn.o_proj.weight": (width, width), f"{at}.mlp.down_proj.weight": (width, inner)}
        found |= {f"{at}.mlp.{n}_proj.weight": (inner, width) for n in ("gate", "up")}
    return found | {"model.norm.weight": (width,), "lm_head.weight": (vocab, width)}


def write(folder: Path, sizes: dict[str, int], shard_size: int) -> int:
    """A HuggingFace folder of bf16 zeros in sparse shards. Returns the bytes of its tensors."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in shapes(sizes).items():
        nbytes = 2 * math.prod(shape)
        if held + nbytes > shard_size:
            shards.append({})
            held = 0
        shards[-1][name], held = shape, held + nbytes
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shard.items():
            start, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            weight_map[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
        total += end
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = sizes | {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
                      "tie_word_embeddings": False}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return total
