"""The model's own names as a dialect, `loadstone`: what `torch.save(model.state_dict())` writes is read back."""

from __future__ import annotations

from ..config import GPTConfig, Rope
from ..config.others import GPT_NEOX_FIELDS, LLAMA_FIELDS
from .canonical import parameter_shapes
from .rules import LAYER, Rule, WeightMap

# Small configs that have every parameter of their architecture.
_WHOLE = {
    "gpt2": GPTConfig(1, 1, 2, 1, 1, tied=False),
    "llama": GPTConfig(
        1, 1, 2, 1, 1, architecture="llama", rope=Rope(), tied=False,
        **(LLAMA_FIELDS | dict.fromkeys(("qkv_bias", "attn_out_bias", "mlp_bias"), True)),
    ),
    "gpt_neox": GPTConfig(1, 1, 8, 1, 1, architecture="gpt_neox", rope=Rope(dims=2), **GPT_NEOX_FIELDS),
}  # fmt: skip


def _table(architecture: str) -> WeightMap:
    names = (name.replace("blocks.0.", f"blocks.{LAYER}.") for name in parameter_shapes(_WHOLE[architecture]))
    return WeightMap(architecture, "loadstone", tuple(Rule(name, (name,)) for name in names))


TABLES = tuple(map(_table, _WHOLE))
