"""Modules with the parameters and buffers that other programs' GPT-2s have, to load exported files into, strictly.

Names and shapes only, after "Build a Large Language Model (From Scratch)" (`GPTModel`) and nanoGPT (`GPT`).
"""

from __future__ import annotations

import torch
from torch import nn


class _Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))


class _Attention(nn.Module):
    def __init__(self, width: int, context: int, bias: bool) -> None:
        super().__init__()
        self.W_query, self.W_key, self.W_value = (nn.Linear(width, width, bias=bias) for _ in range(3))
        self.out_proj = nn.Linear(width, width)
        self.register_buffer("mask", torch.triu(torch.ones(context, context), diagonal=1))


class _FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class _Block(nn.Module):
    def __init__(self, width: int, context: int, bias: bool) -> None:
        super().__init__()
        self.att, self.ff = _Attention(width, context, bias), _FeedForward(width)
        self.norm1, self.norm2 = _Norm(width), _Norm(width)


class BookModel(nn.Module):
    """The book's `GPTModel(cfg)`."""

    def __init__(self, vocab: int, context: int, width: int, layers: int, bias: bool = True) -> None:
        super().__init__()
        self.tok_emb, self.pos_emb = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.trf_blocks = nn.Sequential(*(_Block(width, context, bias) for _ in range(layers)))
        self.final_norm = _Norm(width)
        self.out_head = nn.Linear(width, vocab, bias=False)


class NanoGPT(nn.Module):
    """nanoGPT's `GPT(config)`, with the head tied as it does it."""

    def __init__(self, vocab: int, context: int, width: int, layers: int) -> None:
        super().__init__()

        def block() -> nn.Module:
            attention = nn.ModuleDict({"c_attn": nn.Linear(width, 3 * width), "c_proj": nn.Linear(width, width)})
            mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})
            norms = {"ln_1": nn.LayerNorm(width), "ln_2": nn.LayerNorm(width)}
            return nn.ModuleDict({**norms, "attn": attention, "mlp": mlp})

        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab, width),
                "wpe": nn.Embedding(context, width),
                "h": nn.ModuleList(block() for _ in range(layers)),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.lm_head.register_parameter("weight", self.get_parameter("transformer.wte.weight"))
