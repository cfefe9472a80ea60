"""Our own record of a config: every field of `GPTConfig` by its name, as a certificate (`loadstone.json`) holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ..errors import ConfigError
from .base import GPTConfig, gpt2_config


def to_own(config: GPTConfig) -> dict[str, Any]:
    """All fields, as JSON has them."""
    return asdict(config)


def from_own(values: Mapping[str, Any], where: str) -> GPTConfig:
    """The inverse. Raises ConfigError for missing or unknown fields and for values of the wrong kind."""
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    rope = fields.get("rope")
    if isinstance(rope, Mapping) and isinstance(rope.get("factors"), list):
        fields["rope"] = {**rope, "factors": tuple(rope["factors"])}
    if missing := [name for name in asdict(_ANY) if name not in fields and name not in LATER]:
        raise ConfigError(f"{where}: its config lacks {', '.join(missing)}. Was it written by another version?")
    try:
        return _ANY.with_overrides(fields)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from None


# Fields that came later, so that older records do not have them; what they ask for was off then.
LATER = (
    "window", "qk_norm", "shared_norm", "n_experts", "n_experts_used", "expert_weights_sum_to_one", "head_bias",
)  # fmt: skip
_ANY = gpt2_config(8, 1, 1)  # every field is replaced
