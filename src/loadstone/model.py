"""The GPT: the full definition of every family's model, in this single file, read top to bottom.

Shapes: B batch, T tokens of this call, S cache slots attended to, C d_model, H query heads, K key/value heads,
D head_dim, F d_ff, V vocabulary, N tokens of all rows, E experts, A experts of one token.

The model knows token ids and one naming of its parameters. Weights enter and leave through weight maps alone. It has
no buffers: whatever is not a parameter follows from the config, so nothing but parameters can be lost in a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .config import GPTConfig
from .positions import KVCache, Positions, rotate


class Linear(nn.Linear):
    """nn.Linear that leaves its weights unset: `GPT.init_weights` or a checkpoint sets them, never both."""

    product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = staticmethod(F.linear)  # see kernels

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """nn.Embedding that leaves its weights unset, likewise."""

    def reset_parameters(self) -> None:
        pass


class Norm(nn.Module):
    """LayerNorm or RMSNorm, with or without bias, over the residual stream or (`width`) over each head."""

    def __init__(self, config: GPTConfig, width: int = 0) -> None:
        super().__init__()
        self.eps, self.rms, self.shape = config.norm_eps, config.norm == "rmsnorm", (width or config.d_model,)
        self.weight = nn.Parameter(torch.empty(self.shape))
        self.bias = nn.Parameter(torch.empty(self.shape)) if config.norm_bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.rms:
            y = F.rms_norm(x, self.shape, self.weight, self.eps)
            return y if self.bias is None else y + self.bias
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


class Attention(nn.Module):
    """Causal self-attention. Query heads share key/value heads in groups of H/K (MHA if K = H, MQA if K = 1)."""

    dropout = 0.0
    attend: Callable[..., Tensor] = staticmethod(F.scaled_dot_product_attention)  # see kernels

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        width, kv_width = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        # q, k and v are separate so that every dialect's layout is a view: fused files are split, none is joined.
        self.q = Linear(config.d_model, width, bias=config.qkv_bias)
        self.k = Linear(config.d_model, kv_width, bias=config.qkv_bias)
        self.v = Linear(config.d_model, kv_width, bias=config.qkv_bias)
        self.q_norm = Norm(config, self.head_dim) if config.qk_norm else None
        self.k_norm = Norm(config, self.head_dim) if config.qk_norm else None
        self.out = Linear(width, config.d_model, bias=config.attn_out_bias)

    def forward(self, x_BTC: Tensor, positions: Positions, cache: KVCache | None, layer: int) -> Tensor:
        B, T, _ = x_BTC.shape
        q = self.q(x_BTC).view(B, T, self.n_heads, self.head_dim).transpose(1, 2)  # [B, H, T, D]
        k = self.k(x_BTC).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)  # [B, K, T, D]
        v = self.v(x_BTC).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)  # [B, K, T, D]
        if self.q_norm is not None and self.k_norm is not None:
            kind = self.q_norm.weight.dtype  # under autocast q and k come in its type, and are normed in float32
            q, k = self.q_norm(q.to(kind)), self.k_norm(k.to(kind))
        if positions.rotation:
            q, k = rotate(q, *positions.rotation), rotate(k, *positions.rotation)
        if cache is not None:
            k, v = cache.update(layer, k, v, positions)  # both [B, K, S, D]
        grouped = self.n_heads != self.n_kv_heads
        p = self.dropout if self.training else 0.0
        y = self.attend(
            q, k, v, attn_mask=positions.mask, is_causal=positions.causal, enable_gqa=grouped, dropout_p=p
        )  # [B, H, T, D]
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
}


class MLP(nn.Module):
    """down(act(up(x))), or gated (SwiGLU): down(act(gate(x)) * up(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gate = Linear(config.d_model, config.d_ff, bias=config.mlp_bias) if config.gated_mlp else None
        self.up = Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.down = Linear(config.d_ff, config.d_model, bias=config.mlp_bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        h_BTF = self.up(x_BTC)
        h_BTF = self.activation(h_BTF) if self.gate is None else self.activation(self.gate(x_BTC)) * h_BTF
        return self.down(h_BTF)


class Experts(nn.Module):
    """Sparse mixture (Shazeer et al. 2017, arXiv:1701.06538): a router picks a few of the MLPs for each token.

    The router's softmax is over all experts, in float32; the weights of those picked may be made to sum to 1.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_used, self.sum_to_one = config.n_experts_used, config.expert_weights_sum_to_one
        self.router = Linear(config.d_model, config.n_experts, bias=False)
        self.experts = nn.ModuleList(MLP(config) for _ in range(config.n_experts))

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_NC = x_BTC.flatten(0, -2)
        weights_NA, chosen_NA = F.softmax(self.router(x_NC), dim=-1, dtype=torch.float32).topk(self.n_used, dim=-1)
        if self.sum_to_one:
            weights_NA = weights_NA / weights_NA.sum(dim=-1, keepdim=True)
        y_NC = torch.zeros_like(x_NC)
        # In training all take part, if with no rows: processes that add up gradients must have the same ones.
        for e in range(len(self.experts)) if self.training else torch.unique(chosen_NA).tolist():
            rows, place = (chosen_NA == e).nonzero(as_tuple=True)
            part = self.experts[e](x_NC[rows]) * weights_NA[rows, place, None]
            y_NC = y_NC.index_add(0, rows, part.to(y_NC.dtype))
        return y_NC.view_as(x_BTC)


class Block(nn.Module):
    """Pre-norm residual block; in the parallel form attention and MLP read the same x, and may share its norm."""

    dropout = 0.0

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.parallel = config.parallel_residual
        self.norm1 = Norm(config)
        self.attn = Attention(config)
        self.norm2 = None if config.shared_norm else Norm(config)
        self.mlp = Experts(config) if config.n_experts else MLP(config)

    def forward(self, x_BTC: Tensor, positions: Positions, cache: KVCache | None, layer: int) -> Tensor:
        h_BTC = self.norm1(x_BTC)
        attended_BTC = x_BTC + dropped(self, self.attn(h_BTC, positions, cache, layer))
        if self.norm2 is not None:
            h_BTC = self.norm2(x_BTC if self.parallel else attended_BTC)
        return attended_BTC + dropped(self, self.mlp(h_BTC))


def dropped(module: Block | GPT, x: Tensor) -> Tensor:
    """Dropout, in training only."""
    return F.dropout(x, module.dropout) if module.dropout and module.training else x


class GPT(nn.Module):
    """A decoder-only transformer. `GPT(config)` has random weights (GPT-2's initialisation); `loadstone.load` fills it.

    A tied head is no module of its own: the embedding matrix is used twice, so a tie cannot come apart.

    Attributes:
        dropout: set with `set_dropout`; it is how one trains, so it is no part of the config.
        recompute: in training, keep each block's input only and compute the rest again for the gradients.
    """

    dropout = 0.0
    recompute = False
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = staticmethod(F.linear)  # the head's, as in Linear

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_emb = Embedding(config.vocab_size, config.d_model)
        self.pos_emb = None if config.rope else Embedding(config.context_length, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = Norm(config)
        self.head = None if config.tied else Linear(config.d_model, config.vocab_size, bias=config.head_bias)
        if not self.tok_emb.weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's: normal(0, 0.02), residual outputs scaled by 1/sqrt(2 n_layers), biases 0, norms 1."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("attn.out.weight", ".down.weight"))
                parameter.normal_(0.0, 0.02 / math.sqrt(2 * self.config.n_layers) if residual else 0.02)
            else:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)

    def set_dropout(self, p: float) -> None:
        """The share of values dropped, in training, after the embeddings, in attention and on each residual branch."""
        for module in self.modules():
            if isinstance(module, (Attention, Block, GPT)):
                module.dropout = p

    def hidden(self, ids_BT: Tensor, cache: KVCache | None = None, segments_BT: Tensor | None = None) -> Tensor:
        """Final hidden states [B, T, C], after the last norm.

        Args:
            ids_BT: token ids, int64.
            cache: continue after the tokens that it holds; they are at positions `cache.lengths`.
            segments_BT: for packed rows, without a cache: the number of the document that each token belongs to.

        Raises IndexError beyond the context length or the cache, and for ids outside the vocabulary.
        """
        B, T = ids_BT.shape
        starts = cache.lengths if cache else [0] * B
        limit = cache.size if cache else self.config.context_length
        positions = Positions(self.config, starts, T, limit, self.tok_emb.weight, segments_BT)
        if cache:
            cache.reserve(positions.end)
        x_BTC = self.tok_emb(ids_BT)
        if self.pos_emb is not None:
            x_BTC = x_BTC + self.pos_emb(positions.ids_BT)
        x_BTC = dropped(self, x_BTC)
        again = self.recompute and self.training and torch.is_grad_enabled()
        for layer, block in enumerate(self.blocks):
            call = partial(checkpoint, block, use_reentrant=False) if again else block
            x_BTC = call(x_BTC, positions, cache, layer)
        if cache:
            cache.lengths = [start + T for start in starts]
        return self.norm(x_BTC)

    @property
    def output(self) -> tuple[Tensor, Tensor | None]:
        """What makes logits of hidden states: the matrix [V, C], the embedding's own if tied, and the bias [V]."""
        return (self.tok_emb.weight, None) if self.head is None else (self.head.weight, self.head.bias)

    def logits(self, x_BTC: Tensor) -> Tensor:
        """Hidden states -> scores over the vocabulary, [..., V]."""
        return self.product(x_BTC, *self.output)

    def forward(self, ids_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        """Token ids [B, T] -> logits [B, T, V] for the token after each."""
        return self.logits(self.hidden(ids_BT, cache))

    def new_cache(self, batch: int = 1, length: int | None = None, *, allocate: int | None = None) -> KVCache:
        """An empty cache of the model's type, on its device; `length` slots, the whole context if not given."""
        weight = self.tok_emb.weight
        return KVCache(self.config, batch, length, allocate=allocate, dtype=weight.dtype, device=weight.device)
