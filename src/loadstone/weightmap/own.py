"""The model's own names as a dialect, `loadstone`: what `torch.save(model.state_dict())` writes is read back.

One table for all: a model that is of no family (a GPT-2 with rotary embedding and experts, say) has these names too.
"""

from __future__ import annotations

from ..config import GPTConfig
from ..config.families import FAMILIES
from .canonical import parameter_shapes
from .rules import EXPERT, LAYER, Rule, WeightMap

# Two small configs that have every parameter between them.
_DENSE = GPTConfig(1, 1, 2, 1, 1, gated_mlp=True, qk_norm=True, tied=False, head_bias=True)
_SPARSE = _DENSE.with_overrides({"n_experts": 1, "n_experts_used": 1})
_NAMES = dict.fromkeys(
    name.replace("blocks.0.", f"blocks.{LAYER}.").replace("experts.0.", f"experts.{EXPERT}.")
    for name in (*parameter_shapes(_DENSE), *parameter_shapes(_SPARSE))
)

TABLES = tuple(
    WeightMap(architecture, "loadstone", tuple(Rule(name, (name,)) for name in _NAMES)) for architecture in FAMILIES
)
