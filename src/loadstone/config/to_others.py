"""Writing other programs' configs: OpenAI's, nanoGPT's, Meta's, and that of the book "LLMs from Scratch"."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..errors import ConfigError
from .base import GPTConfig, Rope
from .losses import TOKEN_IDS, require_architecture, require_said
from .others import from_meta, from_nanogpt, from_openai
from .rope_factors import with_named_scaling

_MULTIPLES = [2**power for power in range(12, -1, -1)]  # 4096 ... 1; Meta has 256, 1024 and 4096


def to_openai(config: GPTConfig, accept: Collection[str] = ()) -> dict[str, Any]:
    """`hparams.json` of openai/gpt-2. Raises ConfigError for what its code, which has five sizes, does not do."""
    require_architecture(config, "OpenAI's hparams.json", "gpt2")
    values = {
        "n_vocab": config.vocab_size,
        "n_ctx": config.context_length,
        "n_embd": config.d_model,
        "n_head": config.n_heads,
        "n_layer": config.n_layers,
    }
    meant = from_openai(values)
    require_said(config, meant, "OpenAI's GPT-2", accept, _unnamed_tokens(meant))
    return values


def to_nanogpt(config: GPTConfig, accept: Collection[str] = ()) -> dict[str, Any]:
    """nanoGPT's `model_args`. Its GELU is the exact one, which OpenAI's weights were not trained with.

    nanoGPT itself loads GPT-2's weights so without a word; here that has to be accepted (`activation`).
    Raises ConfigError for what its model does not do.
    """
    require_architecture(config, "nanoGPT's model_args", "gpt2")
    values = {
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_embd": config.d_model,
        "block_size": config.context_length,
        "bias": config.qkv_bias,
        "vocab_size": config.vocab_size,
        "dropout": 0.0,
    }
    meant = from_nanogpt(values)
    require_said(config, meant, "nanoGPT", accept, _unnamed_tokens(meant))
    return values


def to_raschka(config: GPTConfig, accept: Collection[str] = ()) -> dict[str, Any]:
    """The `GPT_CONFIG_124M` dictionary of "Build a Large Language Model (From Scratch)", for its `GPTModel(cfg)`.

    The book's file holds weights alone, so this is for the reader to type in. Its model has biases everywhere but, at
    choice, in q, k and v; a tied head becomes a second, equal tensor.
    Raises ConfigError for what its model does not do.
    """
    require_architecture(config, "the book's GPTModel", "gpt2")
    values = {
        "vocab_size": config.vocab_size,
        "context_length": config.context_length,
        "emb_dim": config.d_model,
        "n_heads": config.n_heads,
        "n_layers": config.n_layers,
        "drop_rate": 0.0,
        "qkv_bias": config.qkv_bias,
    }
    meant = _gpt2_of(config, qkv_bias=config.qkv_bias)
    require_said(config, meant, "the book's GPTModel", accept, (*TOKEN_IDS, "tied"))
    return values


def require_lesson(config: GPTConfig, accept: Collection[str] = ()) -> None:
    """The lesson's file holds weights alone. Raises ConfigError for what its model, OpenAI's GPT-2, does not do."""
    require_architecture(config, "the lesson's model", "gpt2")
    require_said(config, _gpt2_of(config), "the lesson's model", accept, (*TOKEN_IDS, "tied"))


def _gpt2_of(config: GPTConfig, **differences: Any) -> GPTConfig:
    """OpenAI's GPT-2 in the sizes of `config`."""
    sizes = (config.vocab_size, config.context_length, config.d_model, config.n_layers, config.n_heads)
    return GPTConfig(*sizes, **differences)


def to_meta(config: GPTConfig, accept: Collection[str] = ()) -> dict[str, Any]:
    """Meta's `params.json`. It has no field for the context, which Meta's code takes as an argument.

    Raises ConfigError for what that code does not do.
    """
    require_architecture(config, "Meta's params.json", "llama")
    config = with_named_scaling(config)
    rope = config.rope or Rope()
    values: dict[str, Any] = {
        "dim": config.d_model,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": config.norm_eps,
        **_width_recipe(config.d_model, config.d_ff),
    }
    # Older releases refuse the fields that they do not know, so each is written only where it says something.
    optional = {
        "n_kv_heads": (config.n_kv_heads, config.n_heads),
        "rope_theta": (rope.theta, 10_000.0),
        "use_scaled_rope": (rope.scaling == "llama3", False),
    }
    values |= {name: value for name, (value, default) in optional.items() if value != default}
    if rope.scaling == "llama3" and rope.factor != 8:
        values["rope_scaling_factor"] = rope.factor
    facts = {"vocab_size": config.vocab_size, "d_ff": config.d_ff, "tied": config.tied}
    require_said(config, from_meta(values, facts), "Meta's Llama", accept, (*TOKEN_IDS, "context_length"))
    return values


def meta_width(dim: int, multiple_of: int, ffn_dim_multiplier: float | None = None) -> int:
    """The MLP's width by Meta's recipe (`FeedForward` of meta-llama/llama): 8/3 of `dim`, scaled and rounded up."""
    width = int(2 * (4 * dim) / 3)
    if ffn_dim_multiplier is not None:
        width = int(ffn_dim_multiplier * width)
    return -(-width // multiple_of) * multiple_of


def _width_recipe(dim: int, d_ff: int) -> dict[str, Any]:
    """`multiple_of` and, where needed, `ffn_dim_multiplier` that give exactly `d_ff`, the roundest numbers first."""
    plain = meta_width(dim, 1)
    for multiple in _MULTIPLES:
        # The middle of what is cut and rounded up to d_ff, so that no rounding of floats can leave it.
        exact = (d_ff + 1 - multiple / 2) / plain
        for scale in (None, round(d_ff / plain, 1), round(exact, 1), round(exact, 2), exact):
            if meta_width(dim, multiple, scale) == d_ff:
                return {"multiple_of": multiple} | ({} if scale is None else {"ffn_dim_multiplier": scale})
    raise ConfigError(f"Meta's params.json: no recipe gives d_ff {d_ff} at d_model {dim}.")


def _unnamed_tokens(meant: GPTConfig) -> tuple[str, ...]:
    """Begin and end token, where the reader does not know them by the size of the vocabulary."""
    return () if meant.eos_ids else TOKEN_IDS
