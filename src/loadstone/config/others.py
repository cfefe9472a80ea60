"""Other programs' configs: OpenAI's `hparams.json`, Meta's `params.json`, nanoGPT's and llama2.c's `model_args`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ..errors import ConfigError
from .base import GPTConfig, Rope
from .families import LLAMA_FIELDS
from .fields import Fields

ENDOFTEXT = 50_256  # GPT-2's only special token; the programs here do not write it down


def from_openai(values: Mapping[str, Any], where: str = "hparams.json", ignore: Iterable[str] = ()) -> GPTConfig:
    """OpenAI's GPT-2 (`src/model.py` of openai/gpt-2): five sizes, everything else fixed in its code."""
    fields = Fields(values, where, ignore)
    vocab = fields.integer("n_vocab")
    config = fields.build(
        vocab_size=vocab,
        context_length=fields.integer("n_ctx"),
        d_model=fields.integer("n_embd"),
        n_layers=fields.integer("n_layer"),
        n_heads=fields.integer("n_head"),
        **_endoftext(vocab),
    )
    fields.refuse_others()
    return config


def from_nanogpt(values: Mapping[str, Any], where: str = "model_args", ignore: Iterable[str] = ()) -> GPTConfig:
    """nanoGPT's `model_args` inside `ckpt.pt`. Its model uses the exact (erf) GELU, so that is what we run."""
    fields = Fields(values, where, ignore)
    bias = fields.flag("bias", True)
    vocab = fields.integer("vocab_size", 50_304)
    config = fields.build(
        vocab_size=vocab,
        context_length=fields.integer("block_size"),
        d_model=fields.integer("n_embd"),
        n_layers=fields.integer("n_layer"),
        n_heads=fields.integer("n_head"),
        activation="gelu",
        qkv_bias=bias,
        attn_out_bias=bias,
        mlp_bias=bias,
        norm_bias=bias,
        **_endoftext(vocab),
    )
    fields.refuse_others(("dropout",))
    return config


def from_meta(
    values: Mapping[str, Any], facts: Mapping[str, Any], where: str = "params.json", ignore: Iterable[str] = ()
) -> GPTConfig:
    """Meta's `params.json` and llama2.c's `model_args`.

    Args:
        values: the parsed file. It may say `vocab_size: -1`, and gives the MLP width only as a recipe.
        facts: config fields that the tensors themselves show: `vocab_size`, `d_ff`, `tied`, ...
        where: for errors.
        ignore: fields that the caller knows to be harmless.
    """
    fields = Fields(values, where, ignore)
    n_heads = fields.integer("n_heads")
    if (said := fields.integer("vocab_size", -1)) not in (-1, facts["vocab_size"]):
        raise ConfigError(f"{where}: vocab_size is {said}, but the token embedding has {facts['vocab_size']} rows.")
    rope = Rope(theta=fields.number("rope_theta", 10_000.0))
    if fields.flag("use_scaled_rope", False):
        # Llama 3.1's code fixes 8192, 1 and 4; the factor is 8 there and 32 for the small 3.2 models.
        factor = fields.number("rope_scaling_factor", 8.0)
        rope = replace(rope, scaling="llama3", factor=factor, original_context=8192)
    config = fields.build(
        architecture="llama",
        vocab_size=facts["vocab_size"],
        # params.json does not record the context; llama2.c does. Llama 1 had 2048.
        context_length=fields.integer("max_seq_len", 131_072 if rope.scaling == "llama3" else 2048),
        d_model=fields.integer("dim"),
        n_layers=fields.integer("n_layers"),
        n_heads=n_heads,
        n_kv_heads=fields.integer("n_kv_heads", n_heads),
        d_ff=facts["d_ff"],
        **LLAMA_FIELDS,
        norm_eps=fields.number("norm_eps", 1e-5),
        rope=rope,
        tied=facts["tied"],
    )
    fields.refuse_others(("multiple_of", "ffn_dim_multiplier", "hidden_dim", "dropout", "max_batch_size"))
    return config


def _endoftext(vocab_size: int) -> dict[str, Any]:
    """GPT-2's vocabulary, padded or not, is known by its size; any other has no special token that we know of."""
    known = 50_257 <= vocab_size <= 50_304
    return {"bos_id": ENDOFTEXT, "eos_ids": (ENDOFTEXT,)} if known else {}
