"""`upcycle`: a changed model that starts from the trained one's weights, where that is defined.

Fewer key/value heads: each is the mean of those that it stands for (Ainslie et al. 2023, arXiv:2305.13245). Experts:
each is a copy of the MLP, and the router is small and random (Komatsuzaki et al. 2022, arXiv:2212.05055); as the
weights of the picked ones sum to one, the new model computes what the old one did.

*Others*: a config edited by hand, and weights loaded without strictness: what has no defined start gets random values,
and the user finds out from the loss. Here it is refused with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from .config import GPTConfig
from .errors import ConfigError, LoadstoneError
from .model import GPT
from .weightmap.canonical import parameter_shapes

DEFINED = ("n_kv_heads", "n_experts", "n_experts_used")
ROUTER_STD = 0.02  # of a new router's weights, as of every other matrix that begins at random
# The family whose dialects know the sparse form of a dense one; another one's has our own names alone.
SPARSE_FORM = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}
WHY_NOT = {
    "rope": "positions are learned vectors added to the input, or a rotation of q and k; neither computes what the "
    "other did, and q and k were trained on the one they have",
    "gated_mlp": "the gate is a third matrix, and nothing in the model corresponds to it",
    "activation": "another activation makes another function of the same weights",
    "norm": "LayerNorm takes the mean away and RMSNorm does not, and the weights after it were trained with the one",
    "expert_weights_sum_to_one": "weights that sum to less than one make the copies' sum smaller than the MLP's output",
}
_KV = re.compile(r"blocks\.\d+\.attn\.[kv]\.(weight|bias)")
_MLP = re.compile(r"(blocks\.\d+\.mlp\.)((?:gate|up|down)\.(?:weight|bias))")


@torch.no_grad()
def upcycle(model: GPT, changes: Mapping[str, Any], *, seed: int = 0) -> GPT:
    """A model with other config fields, begun from this one's weights.

    Args:
        model: stays as it is. The new one shares the parameters that are the same in both; to train it beside the old
            one, save and load it first.
        changes: fields of `GPTConfig`; what may differ are DEFINED.
        seed: of the routers.

    Raises ConfigError with the reason for a field whose change has no defined start, and LoadstoneError for a model
    that has other parameters than its config says (an adapter's, say).
    """
    target = target_config(model.config, changes)
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if odd := sorted(name for name, _ in shapes.items() ^ parameter_shapes(model.config).items()):
        raise LoadstoneError(f"{odd[0]}: the model is not as its config says. Merge an adapter first: loadstone merge.")
    if target.n_kv_heads != model.config.n_kv_heads:
        tensors = with_pooled_heads(tensors, model.config.n_kv_heads, target.n_kv_heads)
    if target.n_experts != model.config.n_experts:
        tensors = with_experts(tensors, target.n_experts, seed)
    with torch.device("meta"):
        changed = GPT(target)
    changed.load_state_dict(tensors, assign=True)
    return changed.eval()


def target_config(config: GPTConfig, changes: Mapping[str, Any]) -> GPTConfig:
    """The config that is wanted. Raises ConfigError where no weights follow from the old ones."""
    target = config.with_overrides(changes)
    names = (field.name for field in fields(GPTConfig))
    differ = [name for name in names if getattr(target, name) != getattr(config, name)]
    reasons = [
        f"{name} ({getattr(config, name)!r} to {getattr(target, name)!r}): "
        + WHY_NOT.get(name, "no rule makes the new weights out of the old ones")
        for name in differ
        if name not in DEFINED
    ]
    if config.n_kv_heads % target.n_kv_heads:
        reasons.append(f"n_kv_heads: {config.n_kv_heads} heads cannot be pooled into {target.n_kv_heads} equal groups")
    if config.n_experts and {"n_experts", "n_experts_used"} & set(differ):
        reasons.append(f"n_experts: the model has {config.n_experts} already; experts are copies of one MLP")
    elif target.n_experts and not target.expert_weights_sum_to_one:
        reasons.append(f"n_experts: {WHY_NOT['expert_weights_sum_to_one']}")
    if reasons:
        raise ConfigError(
            f"The weights of the changed model do not follow from this one's: {'; '.join(reasons)}. Train it from "
            f"scratch (docs/refine.md), or change only {', '.join(DEFINED)}."
        )
    sparse = target.n_experts > 0 and not config.n_experts
    return replace(target, architecture=SPARSE_FORM.get(config.architecture, config.architecture)) if sparse else target


def with_pooled_heads(tensors: Mapping[str, Tensor], heads: int, left: int) -> dict[str, Tensor]:
    """Parameters with fewer K/V heads; those that become one are neighbours, as are the query heads that share them."""
    return {name: pooled(value, heads, left) if _KV.fullmatch(name) else value for name, value in tensors.items()}


def pooled(rows: Tensor, heads: int, left: int) -> Tensor:
    """[heads * D, ...] -> [left * D, ...]: the mean of heads / left neighbours. Heads that are equal stay as they are.

    Rotation is linear, so for k too the mean of turned heads is the turned mean.
    """
    grouped = rows.reshape(left, heads // left, rows.shape[0] // heads, *rows.shape[1:])
    return grouped.double().mean(1).flatten(0, 1).to(rows.dtype)


def with_experts(tensors: Mapping[str, Tensor], experts: int, seed: int) -> dict[str, Tensor]:
    """Parameters with each MLP copied, and a router of random weights.

    A router of zeros would send every token to the same experts: all ties, and no other would ever learn.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _MLP.fullmatch(name)
        if not match:
            found[name] = tensor
            continue
        at, rest = match.groups()
        if rest == "up.weight":
            router = torch.randn(experts, tensor.shape[1], generator=generator) * ROUTER_STD
            found[f"{at}router.weight"] = router.to(tensor)
        found |= {f"{at}experts.{e}.{rest}": tensor.clone() for e in range(experts)}
    return found
