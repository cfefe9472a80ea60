"""Small live GPTs with hostile weights (random norms and biases, large matrices), and the plainest training loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loadstone.config import GPTConfig, Rope
from loadstone.config.families import GPT_NEOX_FIELDS, LLAMA_FIELDS
from loadstone.finetune.lora import LoRA, add_lora
from loadstone.model import GPT

LLAMA: dict[str, Any] = dict(LLAMA_FIELDS) | {"architecture": "llama", "rope": Rope(), "n_kv_heads": 2, "tied": False}


def small_gpt(layers: int = 6, seed: int = 0, **fields: Any) -> GPT:
    """A GPT-2 (tied) unless the fields say otherwise."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(61, 24, 16, layers, 4, **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    return model


def small_llama(layers: int = 3, seed: int = 0, **fields: Any) -> GPT:
    return small_gpt(layers, seed, **LLAMA | fields)


class Wrapped(nn.Module):
    """As a classifier has it: a GPT, and an output layer of its own."""

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt, self.score = gpt, nn.Linear(gpt.config.d_model, 2, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        scores: Tensor = self.score(self.gpt.hidden(ids))
        return scores


def tokens(rows: int = 2, length: int = 12, seed: int = 1) -> Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(ids[:, :-1])
    if logits.shape[-1] == 2:
        return F.cross_entropy(logits[:, -1], ids[:, -1] % 2)
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def copies(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters}


def train_plainly(model: nn.Module, steps: int, lr: float = 1e-2) -> None:
    """All trainable parameters, with AdamW and decay."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.1)
    for step in range(steps):
        loss_of(model, tokens(seed=step)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


def small_neox() -> GPT:
    return small_gpt(2, architecture="gpt_neox", rope=Rope(dims=2), **GPT_NEOX_FIELDS)


def trained(model: nn.Module, adapter: LoRA | None = None, *also: str) -> nn.Module:
    """With an adapter that has learnt a little, and so have the parameters `also`."""
    add_lora(model, adapter or LoRA(rank=2))
    for name in also:
        model.get_parameter(name).requires_grad_()
    train_plainly(model, 3)
    return model
