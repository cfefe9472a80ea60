"""What a dialect's own config cannot say: found by reading back what was written, refused unless the user accepts it.

One rule for every dialect, so that a field which somebody adds to `GPTConfig` later is never dropped in silence.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from typing import Any

from ..errors import ConfigError
from .base import GPTConfig, Rope

# Known to nobody but the tokenizer in most dialects: what the model computes does not depend on them.
TOKEN_IDS = ("bos_id", "eos_ids")


def differences(wanted: GPTConfig, meant: GPTConfig) -> dict[str, tuple[Any, Any]]:
    """Field -> (wanted, meant), where they differ; the fields of a rope as `rope.theta` and so on."""
    found = {field.name: (getattr(wanted, field.name), getattr(meant, field.name)) for field in fields(GPTConfig)}
    found["window"] = _plain_window(wanted), _plain_window(meant)
    ours, theirs = plain_rope(wanted), plain_rope(meant)
    if ours and theirs:
        del found["rope"]
        found |= {
            f"rope.{field.name}": (getattr(ours, field.name), getattr(theirs, field.name)) for field in fields(Rope)
        }
    return {name: pair for name, pair in found.items() if pair[0] != pair[1]}


def plain_rope(config: GPTConfig) -> Rope | None:
    """The rope with `dims` 0 where every element of a head is turned, and nothing said that its scaling ignores."""
    rope = config.rope
    if rope is None:
        return None
    used = _USED[rope.scaling]
    dims = 0 if rope.dims == config.head_dim else rope.dims
    return Rope(theta=rope.theta, scaling=rope.scaling, dims=dims, **{name: getattr(rope, name) for name in used})


def _plain_window(config: GPTConfig) -> int:
    """The window; 0 where it holds the whole context."""
    return config.window if config.window < config.context_length else 0


def require_said(
    wanted: GPTConfig, meant: GPTConfig, dialect: str, accept: Collection[str] = (), unrecorded: Collection[str] = ()
) -> None:
    """Refuse a config that says something else than what is wanted.

    Args:
        wanted: the model.
        meant: what the dialect's program makes of what would be written.
        dialect: its name, for the error.
        accept: fields whose change the user accepts; `rope` stands for all of a rope's.
        unrecorded: fields that the dialect leaves to other files or to its user, and that change no answer.

    Raises ConfigError that lists the fields, and for a name in `accept` that is no field.
    """
    require_fields(accept)
    passed = {*accept, *unrecorded}
    lost = {name: pair for name, pair in differences(wanted, meant).items() if name.split(".")[0] not in passed}
    if lost:
        listed = "; ".join(
            f"{name}: wanted {ours!r}, {dialect} means {theirs!r}" for name, (ours, theirs) in lost.items()
        )
        names = dict.fromkeys(name.split(".")[0] for name in lost)
        raise ConfigError(
            f"{dialect} cannot say all that this model does: {listed}. Its program would compute something else. "
            f"If you accept that: {' '.join(f'--accept {name}' for name in names)}"
        )


def require_fields(accept: Collection[str]) -> None:
    """Raises ConfigError if something is accepted that is no field."""
    if unknown := sorted(set(accept) - {field.name for field in fields(GPTConfig)}):
        raise ConfigError(f"no config field is called {', '.join(unknown)}, so its change cannot be accepted.")


def require_architecture(config: GPTConfig, dialect: str, *known: str) -> None:
    """Raises ConfigError if the dialect has no word for the config's architecture."""
    if config.architecture not in known:
        raise ConfigError(
            f"{dialect} is written for {' and '.join(known)} only; this model is a {config.architecture}."
        )


_USED: dict[str, tuple[str, ...]] = {
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_context", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_context", "beta_fast", "beta_slow", "attention_factor"),
    "factors": ("factors",),
}
