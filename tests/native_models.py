"""Small hostile models for the native engine, and torch doing what the engine does at each width."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from loadstone.config import GPTConfig, Rope
from loadstone.config.families import GPT_NEOX_FIELDS
from loadstone.load import open_source
from loadstone.model import GPT, Attention, Linear
from loadstone.native import NativeEngine, open_native
from small_gpt import LLAMA

Floats = NDArray[np.float32]
Rounding = Callable[[Tensor], Tensor]

GPT2: dict[str, Any] = {"n_heads": 4, "d_model": 64}
NEOX: dict[str, Any] = dict(GPT_NEOX_FIELDS) | {"architecture": "gpt_neox", "n_heads": 2, "d_model": 64}
# Every family, every kind of biases, head dimensions and sizes that fill no vector.
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "gpt2 erf, untied": GPT2 | {"activation": "gelu", "tied": False},
    "gpt2 head 48": {"n_heads": 2, "d_model": 96, "vocab_size": 50_257, "n_layers": 1},
    "llama": LLAMA | {"n_heads": 6, "n_kv_heads": 2, "d_model": 96, "d_ff": 80},
    "llama head 64": LLAMA | {"n_heads": 6, "n_kv_heads": 2, "head_dim": 64, "d_model": 64, "d_ff": 96},
    "llama biases, odd head": LLAMA | {"n_heads": 3, "n_kv_heads": 1, "head_dim": 10, "d_model": 32, "qkv_bias": True},
    "llama yarn": LLAMA | {"n_heads": 4, "d_model": 64, "rope": Rope(1e4, "yarn", 4.0, original_context=16)},
    "llama3 rope": LLAMA | {"n_heads": 4, "d_model": 64, "rope": Rope(5e5, "llama3", 8.0, original_context=16)},
    "gpt_neox": NEOX | {"rope": Rope(dims=8)},
    "relu, one head": GPT2 | {"n_heads": 1, "activation": "relu", "d_ff": 33},
}


def model_of(fields: dict[str, Any], seed: int = 0) -> GPT:
    """Random norms and biases, and matrices whose products stay of one size through the layers."""
    values = {"vocab_size": 259, "context_length": 40, "n_layers": 3} | fields
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**values)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.5 / parameter.shape[-1] ** 0.5 if parameter.dim() == 2 else 0.2
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, scale)
    return model


def engine_of(model: GPT, width: str = "float32", threads: int = 2, level: str | None = None) -> NativeEngine:
    return open_native(open_source(model), width=width, threads=threads, level=level)


def ids_of(length: int, seed: int = 1, vocab: int = 259) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, vocab, length)]


def bf16(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


def same(x: Tensor) -> Tensor:
    return x


def int8_groups(x: Tensor) -> Tensor:
    """Groups of 32 along the last dimension, each rounded to 127 steps of its largest number."""
    length = x.shape[-1]
    groups = F.pad(x, (0, -length % 32)).reshape(*x.shape[:-1], -1, 32)
    step = groups.abs().amax(-1, keepdim=True) / 127
    whole = torch.where(step > 0, (groups / step).round() * step, groups)
    return whole.flatten(-2)[..., :length]


@torch.no_grad()
def take_weights(model: GPT, engine: NativeEngine) -> None:
    """The model's matrices become the engine's, as these were rounded."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and name != "pos_emb.weight":
            rows = [engine.weight_row(name, row)[: parameter.shape[1]] for row in range(parameter.shape[0])]
            parameter.copy_(torch.from_numpy(np.stack(rows)))


@torch.no_grad()
def emulate(model: GPT, ids: list[int], activations: Rounding, cached: Rounding, weights: Rounding = same) -> Floats:
    """Logits after every token, with rounded inputs of each product, keys and values, and attention's own factors."""

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(activations(x), weight, bias)

    def attend(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        group, length = q.shape[1] // k.shape[1], q.shape[2]
        k, v = (cached(x).repeat_interleave(group, 1) for x in (k, v))
        scores = weights(q / q.shape[-1] ** 0.5) @ k.transpose(-1, -2)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        likely = (scores - scores.amax(-1, keepdim=True)).exp()
        return weights(likely) @ v / likely.sum(-1, keepdim=True)

    for module in model.modules():
        if isinstance(module, Linear):
            module.product = product
        if isinstance(module, Attention):
            module.attend = attend
    logits: Floats = model.logits(activations(model.hidden(torch.tensor([ids]))))[0].numpy()
    return logits


def decided(model: GPT, ids: list[int], *roundings: Rounding) -> tuple[int, Floats]:
    """How many tokens, from the first on, have no number that may be rounded to either side; and torch's own error.

    That error, [len(ids), V], is what float32 and float64 differ by. A number may fall to either side if 16 times its
    own error, and 16 units in the last place of its row's largest, reach across the border between two steps; whatever
    follows such a token may see it.
    """
    (logits, narrow), (exact, wide) = (_recorded(m, ids, roundings) for m in (model, copy.deepcopy(model).double()))
    either = torch.zeros(len(ids), dtype=torch.bool)
    for (_, x), (rounding, y) in zip(narrow, wide, strict=True):
        reach = 16 * (x - y).abs() + 2.0**-20 * y.abs().amax(-1, keepdim=True)
        apart = (rounding(y + reach) - rounding(y - reach)).abs() > 1e-3 * y.abs()  # a step is 1/256 of it or more
        either |= apart.any(-1).reshape(-1, len(ids)).any(0)
    return int(either.nonzero()[0, 0]) if either.any() else len(ids), np.abs(logits - exact)


def _recorded(
    model: GPT, ids: list[int], roundings: Sequence[Rounding]
) -> tuple[Floats, list[tuple[Rounding, Tensor]]]:
    inputs: list[tuple[Rounding, Tensor]] = []

    def spied(rounding: Rounding) -> Rounding:
        def record(x: Tensor) -> Tensor:
            if rounding is not same:
                inputs.append((rounding, x))
            return rounding(x)

        return record

    return emulate(model, ids, *map(spied, roundings)), inputs
