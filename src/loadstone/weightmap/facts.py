"""What the shapes of a bare file say about the model, and the config that can be inferred from them.

Shapes do not show head counts, norm epsilons or rotary bases. Where nothing beside the file tells, they are taken from
the published sizes, and each such guess is reported as one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..config import PRESETS, GPTConfig, Rope
from ..config.families import FAMILIES, SPARSE
from ..config.others import ENDOFTEXT
from ..errors import ConfigError
from .canonical import Shape
from .ops import ShapeError, apply_shapes
from .rules import WeightMap

BLOCK = "blocks.0."
HEADS_BY_WIDTH = {preset.d_model: preset.n_heads for preset in PRESETS.values()}


class OtherFamilyError(ConfigError):
    """A table of one family, and a config or tensors of another."""


def read_facts(weight_map: WeightMap, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Config fields that the tensors show by themselves, plus `d_model`, `n_layers`, `q_rows` and `kv_rows`.

    Args:
        weight_map: the table that the names were recognised by.
        shapes: stem -> shape in the file.

    Raises ConfigError if the embedding is missing or is no matrix, for then nothing can be said.
    """
    targets = _targets(weight_map, shapes, 0)
    n_experts = targets.get(f"{BLOCK}mlp.router.weight", (0,))[0]
    if n_experts:
        targets = _targets(weight_map, shapes, n_experts)
    embedding = targets.get("tok_emb.weight") or targets.get("head.weight")
    if embedding is None or len(embedding) != 2:
        raise ConfigError(
            f"the names are those of {weight_map.name}, but its token embedding "
            f"{weight_map.source_of('tok_emb.weight')} is not there as a matrix with elements: the width is unknown."
        )
    up_name = f"{BLOCK}mlp.experts.0.up" if n_experts else f"{BLOCK}mlp.up"
    up = targets.get(f"{up_name}.weight", (4, embedding[1]))
    facts: dict[str, Any] = {
        "vocab_size": embedding[0],
        "d_model": embedding[1],
        "n_layers": weight_map.count_layers(shapes.keys()),
        "q_rows": targets.get(f"{BLOCK}attn.q.weight", (embedding[1],))[0],
        "kv_rows": targets.get(f"{BLOCK}attn.k.weight", (embedding[1],))[0],
        # The side that is not d_model, so that a matrix which lies the wrong way is seen as that and nothing else.
        "d_ff": math.prod(up) // embedding[1] if len(up) == 2 else 0,
        "tied": "head.weight" not in targets or "tok_emb.weight" not in targets,
        "qkv_bias": f"{BLOCK}attn.q.bias" in targets,
        "attn_out_bias": f"{BLOCK}attn.out.bias" in targets,
        "mlp_bias": f"{up_name}.bias" in targets,
        "norm_bias": f"{BLOCK}norm1.bias" in targets,
        "head_bias": "head.bias" in targets,
        "qk_norm": f"{BLOCK}attn.q_norm.weight" in targets,
        "shared_norm": f"{BLOCK}norm2.weight" not in targets,
        "head_dim": targets.get(f"{BLOCK}attn.q_norm.weight", (0,))[0],
        "n_experts": n_experts,
    }
    if "pos_emb.weight" in targets:
        facts["context_length"] = targets["pos_emb.weight"][0]
    return facts


def _targets(weight_map: WeightMap, shapes: Mapping[str, Shape], n_experts: int) -> dict[str, Shape]:
    """Parameter -> shape, of the first layer and outside the blocks, as far as the tensors show it."""
    targets: dict[str, Shape] = {}
    for rule in weight_map.expand(1, n_experts):
        if rule.source in shapes:
            try:
                found = apply_shapes(rule.ops, [shapes[rule.source]], None)
            except ShapeError:
                continue  # the plan reports this tensor as mismatched
            # Anything but a vector or matrix with elements says nothing; the plan reports it as mismatched.
            targets |= {t: s for t, s in zip(rule.target, found, strict=False) if len(s) in (1, 2) and min(s) > 0}
    return targets


# Dialects whose program has one activation and one epsilon in its code, so that the dialect tells them.
FIXED_BY_PROGRAM = ("openai", "raschka", "nanogpt")
BIASES = ("qkv_bias", "attn_out_bias", "mlp_bias", "norm_bias")
# What tells families of the same names apart. Biases do not: they are a choice within each.
STRUCTURE = ("qk_norm", "shared_norm", "head_bias")
USED = 2  # experts of a token, where nothing tells: Mixtral's


def infer_config(weight_map: WeightMap, facts: Mapping[str, Any]) -> tuple[GPTConfig, list[str]]:
    """A config from shapes alone, and one sentence for each value that the shapes do not show."""
    family = FAMILIES[weight_map.architecture].fields
    other = [name for name in STRUCTURE if family.get(name, False) != facts[name]]
    if other or (facts["n_experts"] > 0) != (weight_map.architecture in SPARSE):
        raise OtherFamilyError(
            f"these tensors are not those of a {weight_map.architecture} ({', '.join(other) or 'experts'}), and no "
            "config lies beside them that says what they are."
        )
    assumed: list[str] = []
    d_model, rows = facts["d_model"], facts["q_rows"]
    heads = HEADS_BY_WIDTH.get(d_model) if weight_map.architecture == "gpt2" and rows == d_model else None
    if heads is None and facts["head_dim"]:
        heads = rows // facts["head_dim"]
    if heads is None:
        usual = (128, 64) if d_model >= 4096 else (64, 32, 16, 8)
        heads = rows // next((dim for dim in usual if rows % dim == 0 and facts["kv_rows"] % dim == 0), rows)
    assumed.append(
        f"n_heads = {heads} (heads of {rows // heads}; shapes do not show it: --set n_heads=N if it is other)"
    )
    sizes: dict[str, Any] = {key: facts[key] for key in ("vocab_size", "d_model", "n_layers", "d_ff", "tied")}
    sizes |= {"architecture": weight_map.architecture, "n_heads": heads, "head_dim": rows // heads}
    if weight_map.architecture != "gpt2":
        rope = Rope(dims=rows // heads // 4 // 2 * 2 if "parallel_residual" in family else 0)
        sizes = {**family, **sizes}
        if facts["n_experts"]:
            sizes |= {"n_experts": facts["n_experts"], "n_experts_used": min(USED, facts["n_experts"])}
            assumed.append(f"n_experts_used = {sizes['n_experts_used']} (not recorded in the file)")
        sizes |= {"n_kv_heads": facts["kv_rows"] * heads // rows, "rope": rope, "context_length": 2048}
        turned = f", rope dims = {rope.dims}, parallel_residual = true" if rope.dims else ""
        assumed.append(
            f"context_length = 2048, norm_eps = 1e-05, rope theta = 10000{turned} (not recorded in the file)"
        )
    else:
        sizes |= {"context_length": facts.get("context_length", 1024)}
        if 50_257 <= facts["vocab_size"] <= 50_304:
            sizes |= {"bos_id": ENDOFTEXT, "eos_ids": (ENDOFTEXT,)}
        if weight_map.dialect == "nanogpt":
            sizes["activation"] = "gelu"
            assumed.append("activation = gelu (erf), as nanoGPT's model has it; OpenAI's weights want gelu_tanh")
        elif weight_map.dialect not in FIXED_BY_PROGRAM:
            assumed.append("activation = gelu_tanh, norm_eps = 1e-05 (GPT-2's; the file does not record them)")
    sizes |= {key: facts[key] for key in BIASES}
    return GPTConfig(**sizes), assumed
