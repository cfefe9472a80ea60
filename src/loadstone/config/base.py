"""`GPTConfig`: the fields that make one GPT a GPT-2 and another a Llama. A family is a set of values, never a subclass.

Pure data: no torch, no file access. What each program writes into its own config file is translated in the
neighbouring modules.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

from ..errors import ConfigError

NORMS = ("layernorm", "rmsnorm")
ACTIVATIONS = ("gelu_tanh", "gelu", "silu", "relu")
ROPE_SCALINGS = ("none", "linear", "llama3", "yarn", "factors")


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), with the scalings that lengthen the context.

    The model rotates halves: element j with element j + head_dim/2. Files that rotate neighbouring pairs (Meta, GGUF)
    have their q and k rows permuted on the way in.
    """

    theta: float = 10_000.0  # base of the wavelengths
    scaling: str = "none"  # one of ROPE_SCALINGS
    factor: float = 1.0  # how many times longer the context became
    original_context: int = 0  # tokens of the first training; llama3 and yarn scale relative to it
    low_freq_factor: float = 1.0  # llama3: wavelengths above original_context/low are scaled in full
    high_freq_factor: float = 4.0  # llama3: wavelengths below original_context/high are left alone
    beta_fast: float = 32.0  # yarn: rotations above which a dimension is left alone
    beta_slow: float = 1.0  # yarn: rotations below which a dimension is scaled in full
    attention_factor: float | None = None  # yarn: multiplies cos and sin; None means 0.1 ln(factor) + 1
    factors: tuple[float, ...] = ()  # "factors": one divisor per frequency (GGUF's rope_freqs.weight)
    dims: int = 0  # elements of each head that are turned, the first ones; 0 means all (GPT-NeoX turns a quarter)

    def __post_init__(self) -> None:
        if self.scaling not in ROPE_SCALINGS:
            raise ConfigError(f"rope scaling {self.scaling!r} is not supported; known: {', '.join(ROPE_SCALINGS)}.")
        relative = self.scaling in ("llama3", "yarn")
        for name, good, range_ in (
            ("theta", _positive(self.theta) and self.theta != 1, "a positive number other than 1"),
            ("dims", type(self.dims) is int and self.dims >= 0 and self.dims % 2 == 0, "an even whole number"),
            ("factor", _positive(self.factor), "a positive number"),
            ("original_context", not relative or _positive(self.original_context), "1 or more"),
            ("low_freq_factor", _positive(self.low_freq_factor), "a positive number"),
            ("high_freq_factor", _positive(self.high_freq_factor - self.low_freq_factor), "above low_freq_factor"),
            ("beta_fast", _positive(self.beta_fast), "a positive number"),
            ("beta_slow", _positive(self.beta_slow), "a positive number"),
            ("factors", all(map(_positive, self.factors)), "positive numbers"),
        ):
            if not good:
                raise ConfigError(f"rope {name} must be {range_}, found {getattr(self, name)!r}.")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


@dataclass(frozen=True)
class GPTConfig:
    """Everything the model needs to know besides its weights. Units are counts unless said otherwise.

    The default biases, norm and activation are GPT-2's. Raises ConfigError on values that contradict each other.
    """

    vocab_size: int  # rows of the token embedding; may be padded beyond what the tokenizer knows
    context_length: int  # most tokens the model can attend over
    d_model: int  # width of the residual stream
    n_layers: int
    n_heads: int  # query heads
    n_kv_heads: int = 0  # key/value heads, shared by groups of query heads (GQA); 0 means n_heads
    head_dim: int = 0  # 0 means d_model / n_heads
    d_ff: int = 0  # width inside the MLP; 0 means 4 d_model
    architecture: str = "gpt2"  # which weight tables apply; docs/dialects.md lists them
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    activation: str = "gelu_tanh"  # GPT-2 was trained with the tanh form: erf (`gelu`) differs by up to 4.7e-4 a unit
    gated_mlp: bool = False  # SwiGLU: down(act(gate(x)) * up(x)) instead of down(act(up(x)))
    rope: Rope | None = None  # None: learned position embeddings
    window: int = 0  # tokens that each one sees, itself and those just before it (Mistral); 0: all
    qk_norm: bool = False  # every head's q and k are normed before they are turned (Qwen3)
    parallel_residual: bool = False  # x + attn(norm1(x)) + mlp(norm2(x)), as in GPT-J and GPT-NeoX
    shared_norm: bool = False  # parallel, and norm2 is norm1 (GPT-J)
    n_experts: int = 0  # MLPs of which a router picks some for each token (Mixtral); 0: one MLP for all
    n_experts_used: int = 0  # how many it picks
    expert_weights_sum_to_one: bool = True  # those of the picked ones, as they were a softmax over them alone
    qkv_bias: bool = True
    attn_out_bias: bool = True
    mlp_bias: bool = True
    norm_bias: bool = True
    tied: bool = True  # the head is the token embedding: one tensor
    head_bias: bool = False  # of an untied head (GPT-J)
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "d_model", "n_layers", "n_heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a positive whole number, found {value!r}.")
        for name, default in (("n_kv_heads", self.n_heads), ("d_ff", 4 * self.d_model)):
            if not getattr(self, name):
                object.__setattr__(self, name, default)
        if not self.head_dim:
            if self.d_model % self.n_heads:
                raise ConfigError(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}.")
            object.__setattr__(self, "head_dim", self.d_model // self.n_heads)
        for name in ("n_kv_heads", "head_dim", "d_ff"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a positive whole number, found {value!r}.")
        self._check_types()
        self._check()

    def _check_types(self) -> None:
        flags = [field.name for field in fields(self) if field.type == "bool"]
        ids = (*self.eos_ids, *(() if self.bos_id is None else (self.bos_id,))) if self._is_ids() else (None,)
        for name, good, wanted in (
            *((flag, isinstance(getattr(self, flag), bool), "true or false") for flag in flags),
            ("rope", self.rope is None or isinstance(self.rope, Rope), "a Rope or null"),
            ("eos_ids", self._is_ids(), "a list of token ids"),
            ("bos_id", all(type(token) is int and token >= 0 for token in ids), "a token id or null, as eos_ids"),
            ("norm_eps", _positive(self.norm_eps), "a positive number"),
            ("window", _is_count(self.window), "a number of tokens, or 0 for all"),
            ("n_experts", _is_count(self.n_experts), "a whole number, 0 for none"),
            ("n_experts_used", _is_count(self.n_experts_used), "a whole number"),
        ):
            if not good:
                raise ConfigError(f"{name} must be {wanted}, found {getattr(self, name)!r}.")

    def _is_ids(self) -> bool:
        return isinstance(self.eos_ids, tuple)

    def _check(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}.")
        if not (0 < self.n_experts_used <= self.n_experts or self.n_experts_used == self.n_experts == 0):
            raise ConfigError(
                f"n_experts_used {self.n_experts_used} cannot be picked out of n_experts {self.n_experts}."
            )
        if self.shared_norm and not self.parallel_residual:
            raise ConfigError("shared_norm needs parallel_residual: one after the other, each part has its own norm.")
        if self.head_bias and self.tied:
            raise ConfigError("head_bias needs tied = false: a tied head is the token embedding, which has no bias.")
        if self.rope is not None:
            self._check_rope(self.rope)
        for name, value, known in (
            ("norm", self.norm, NORMS),
            ("activation", self.activation, ACTIVATIONS),
        ):
            if value not in known:
                raise ConfigError(f"{name} {value!r} is not supported; known: {', '.join(known)}.")

    def _check_rope(self, rope: Rope) -> None:
        if self.head_dim % 2 and not rope.dims:
            raise ConfigError(f"rotary embedding turns pairs: head_dim {self.head_dim} is odd.")
        if rope.dims > self.head_dim:
            raise ConfigError(f"rope dims {rope.dims} is more than the head_dim {self.head_dim}.")
        turned = rope.dims or self.head_dim
        if rope.scaling == "factors" and len(rope.factors) != turned // 2:
            raise ConfigError(
                f"{turned} turned elements have {turned // 2} rotary frequencies, but {len(rope.factors)} factors are "
                "given."
            )

    def with_overrides(self, overrides: Mapping[str, Any]) -> GPTConfig:
        """A copy with some fields replaced. Derived fields that the caller does not name are derived anew.

        `rope` may be given as a mapping of `Rope`'s fields.
        Raises ConfigError for a name that is no field and for values of the wrong kind.
        """
        known = {field.name for field in fields(self)}
        if unknown := sorted(set(overrides) - known):
            raise ConfigError(f"no config field is called {', '.join(unknown)}; fields: {', '.join(sorted(known))}.")
        derived: dict[str, int] = {}
        if {"n_heads", "d_model"} & set(overrides):
            derived = {"head_dim": 0} | ({"n_kv_heads": 0} if self.n_kv_heads == self.n_heads else {})
        values = derived | dict(overrides)
        if isinstance(rope := values.get("rope"), Mapping):
            try:
                values["rope"] = Rope(**rope)
            except TypeError:
                names = ", ".join(field.name for field in fields(Rope))
                raise ConfigError(f"rope has the fields {names}; found {', '.join(map(str, rope))}.") from None
        return replace(self, **values)


def gpt2_config(d_model: int, n_layers: int, n_heads: int) -> GPTConfig:
    """One of OpenAI's four GPT-2 sizes (and anything of that shape)."""
    return GPTConfig(50_257, 1024, d_model, n_layers, n_heads, bos_id=50_256, eos_ids=(50_256,))


# OpenAI's sizes by what they are called; the true counts are 124.4M, 354.8M, 774.0M and 1,557.6M parameters.
PRESETS: Mapping[str, GPTConfig] = MappingProxyType(
    {
        "gpt2": gpt2_config(768, 12, 12),
        "gpt2-medium": gpt2_config(1024, 24, 16),
        "gpt2-large": gpt2_config(1280, 36, 20),
        "gpt2-xl": gpt2_config(1600, 48, 25),
    }
)
