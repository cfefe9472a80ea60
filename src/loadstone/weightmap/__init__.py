"""From a file's tensors to the model's parameters and back: tables, ops, plans. Never imports torch."""

from .canonical import parameter_shapes
from .identify import TABLES, Identity, identify
from .ops import apply, apply_shapes
from .plan import LoadPlan, Step, make_plan
from .rules import Ignore, Rule, WeightMap
from .translate import Translated, table_for

__all__ = [
    "TABLES",
    "Identity",
    "Ignore",
    "LoadPlan",
    "Rule",
    "Step",
    "Translated",
    "WeightMap",
    "apply",
    "apply_shapes",
    "identify",
    "make_plan",
    "parameter_shapes",
    "table_for",
]
