"""The GPT: the full definition of every family's model, in this single file, read top to bottom.

Shapes: B batch, T tokens of this call, S cache slots attended to, C d_model, H query heads, K key/value heads,
D head_dim, R the turned elements of a head (all, usually), F d_ff, V vocabulary.

The model knows token ids and one naming of its parameters. Weights enter and leave through weight maps alone. It has
no buffers: whatever is not a parameter follows from the config, so nothing but parameters can be lost in a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .config import GPTConfig, Rope
from .config.frequencies import frequencies_of


class KVCache:
    """Keys and values of every layer, allocated once (or, with `allocate`, in doublings from so many slots on).

    Rows may have different lengths. A row's tokens lie at slots 0 .. length-1, at their own positions; what lies beyond
    is garbage that no query can see (a key at slot s is visible from position p only if s <= p) and that the row's next
    tokens overwrite. So prompts of unequal length are padded on the right and need no mask of their own.

    Attributes:
        lengths: tokens held, per row. The model reads them as the positions where the next tokens go, and adds to them;
            a caller that padded sets them back, and to forget tokens is to lower them.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch: int = 1,
        length: int | None = None,
        *,
        allocate: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.size = config.context_length if length is None else min(length, config.context_length)
        slots = self.size if allocate is None else min(allocate, self.size)
        shape = (config.n_layers, 2, batch, config.n_kv_heads, slots, config.head_dim)
        # Zeros, not empty: a masked slot has weight 0, and 0 * NaN is NaN.
        self.kv = torch.zeros(shape, dtype=dtype, device=device)  # [layers, 2, B, K, slots, D]
        self.lengths = [0] * batch

    def reserve(self, end: int) -> None:
        """Make room up to slot `end`, doubling: for a conversation, whose length nobody knows beforehand."""
        slots = self.kv.shape[4]
        if end > slots:
            grown = self.kv.new_zeros((*self.kv.shape[:4], min(max(end, 2 * slots), self.size), self.kv.shape[5]))
            grown[:, :, :, :, :slots] = self.kv
            self.kv = grown

    def update(self, layer: int, k_BKTD: Tensor, v_BKTD: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Write this call's keys and values; return all that the queries may attend to, both [B, K, S, D]."""
        keys, values = self.kv[layer]
        if positions.uniform:
            slots = slice(positions.end - k_BKTD.shape[2], positions.end)
            keys[:, :, slots], values[:, :, slots] = k_BKTD, v_BKTD
        else:
            rows = torch.arange(len(self.lengths), device=keys.device)[:, None]
            keys[rows, :, positions.ids_BT] = k_BKTD.transpose(1, 2)  # indexed as [B, T, K, D]
            values[rows, :, positions.ids_BT] = v_BKTD.transpose(1, 2)
        return keys[:, :, : positions.end], values[:, :, : positions.end]


class Positions:
    """Where the tokens of one call stand, and what follows from it for all layers: rotation and mask.

    `segments_BT` numbers the documents packed into each row: positions begin anew in each, and none sees another.

    Raises IndexError if a position lies beyond the context or the cache.
    """

    def __init__(
        self, config: GPTConfig, starts: Sequence[int], n_tokens: int, limit: int, like: Tensor,
        segments_BT: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.end = max(starts) + n_tokens
        if self.end > limit:
            raise IndexError(f"position {self.end - 1} is beyond the limit of {limit} tokens")
        self.uniform = len(set(starts)) == 1
        first = starts[:1] if self.uniform else starts
        device = like.device
        # [1, T] if all rows stand alike, else [B, T]
        self.ids_BT = torch.tensor(first, device=device)[:, None] + torch.arange(n_tokens, device=device)
        self.causal = n_tokens > 1 and max(starts) == 0
        self.mask: Tensor | None = None  # [B or 1, 1, T, S]; None means causal, or everything
        if not self.causal and (n_tokens > 1 or not self.uniform):
            self.mask = (torch.arange(self.end, device=device) <= self.ids_BT[..., None])[:, None]
        if segments_BT is not None:
            self._separate(segments_BT)
        self.rotation = rotation(config.rope, config.head_dim, self.ids_BT, like) if config.rope else None

    def _separate(self, segments_BT: Tensor) -> None:
        """Positions and mask of packed documents; each occupies neighbouring tokens of its row."""
        steps = self.ids_BT.expand_as(segments_BT)  # [B, T]
        same_BTT = segments_BT[:, :, None] == segments_BT[:, None]
        self.mask = (same_BTT & (steps[:, None] <= steps[..., None]))[:, None]
        begins = F.pad(segments_BT[:, 1:] != segments_BT[:, :-1], (1, 0))  # where another document starts
        self.ids_BT = steps - torch.where(begins, steps, 0).cummax(dim=1).values
        self.causal = False


@cache
def inverse_frequencies(rope: Rope, dims: int) -> tuple[Tensor, float]:
    """Radians per position for each of the R/2 turned pairs (of R elements), float32, and the factor on cos and sin."""
    frequencies, factor = frequencies_of(rope, dims)
    return torch.from_numpy(frequencies), factor


def rotation(rope: Rope, head_dim: int, positions_BT: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin for `rotate`, both [B, 1, T, R/2], computed in float32 and given in the type of `like`."""
    frequencies, factor = inverse_frequencies(rope, rope.dims or head_dim)
    angles = positions_BT[:, None, :, None].float() * frequencies.to(positions_BT.device)
    return (angles.cos() * factor).to(like.dtype), (angles.sin() * factor).to(like.dtype)


def rotate(x_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn element j with element j + R/2 by the angle of its position; the elements from R on stay as they are."""
    half = cos.shape[-1]
    a, b = x_BHTD[..., :half], x_BHTD[..., half : 2 * half]  # both [B, H, T, R/2]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, x_BHTD[..., 2 * half :]), dim=-1)


class Linear(nn.Linear):
    """nn.Linear that leaves its weights unset: `GPT.init_weights` or a checkpoint sets them, never both."""

    product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = staticmethod(F.linear)  # see kernels.speed_up

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """nn.Embedding that leaves its weights unset, likewise."""

    def reset_parameters(self) -> None:
        pass


class Norm(nn.Module):
    """LayerNorm or RMSNorm, with or without bias."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.eps, self.rms, self.shape = config.norm_eps, config.norm == "rmsnorm", (config.d_model,)
        self.weight = nn.Parameter(torch.empty(config.d_model))
        self.bias = nn.Parameter(torch.empty(config.d_model)) if config.norm_bias else None

    def forward(self, x_BTC: Tensor) -> Tensor:
        if self.rms:
            y = F.rms_norm(x_BTC, self.shape, self.weight, self.eps)
            return y if self.bias is None else y + self.bias
        return F.layer_norm(x_BTC, self.shape, self.weight, self.bias, self.eps)


class Attention(nn.Module):
    """Causal self-attention. Query heads share key/value heads in groups of H/K (MHA if K = H, MQA if K = 1)."""

    dropout = 0.0
    attend: Callable[..., Tensor] = staticmethod(F.scaled_dot_product_attention)  # see kernels.speed_up

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        width, kv_width = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        # q, k and v are separate so that every dialect's layout is a view: fused files are split, none is joined.
        self.q = Linear(config.d_model, width, bias=config.qkv_bias)
        self.k = Linear(config.d_model, kv_width, bias=config.qkv_bias)
        self.v = Linear(config.d_model, kv_width, bias=config.qkv_bias)
        self.out = Linear(width, config.d_model, bias=config.attn_out_bias)

    def forward(self, x_BTC: Tensor, positions: Positions, cache: KVCache | None, layer: int) -> Tensor:
        B, T, _ = x_BTC.shape
        q = self.q(x_BTC).view(B, T, self.n_heads, self.head_dim).transpose(1, 2)  # [B, H, T, D]
        k = self.k(x_BTC).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)  # [B, K, T, D]
        v = self.v(x_BTC).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)  # [B, K, T, D]
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


class Block(nn.Module):
    """Pre-norm residual block; in the parallel form attention and MLP read the same x."""

    dropout = 0.0

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.parallel = config.parallel_residual
        self.norm1 = Norm(config)
        self.attn = Attention(config)
        self.norm2 = Norm(config)
        self.mlp = MLP(config)

    def forward(self, x_BTC: Tensor, positions: Positions, cache: KVCache | None, layer: int) -> Tensor:
        attended_BTC = x_BTC + dropped(self, self.attn(self.norm1(x_BTC), positions, cache, layer))
        return attended_BTC + dropped(self, self.mlp(self.norm2(x_BTC if self.parallel else attended_BTC)))


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

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_emb = Embedding(config.vocab_size, config.d_model)
        self.pos_emb = None if config.rope else Embedding(config.context_length, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = Norm(config)
        self.head = None if config.tied else Linear(config.d_model, config.vocab_size, bias=False)
        if not self.tok_emb.weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's: normal(0, 0.02), residual outputs scaled by 1/sqrt(2 n_layers), biases 0, norms 1."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("attn.out.weight", "mlp.down.weight"))
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

    def logits(self, x_BTC: Tensor) -> Tensor:
        """Hidden states -> scores over the vocabulary, [..., V]."""
        return F.linear(x_BTC, self.tok_emb.weight if self.head is None else self.head.weight)

    def forward(self, ids_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        """Token ids [B, T] -> logits [B, T, V] for the token after each."""
        return self.logits(self.hidden(ids_BT, cache))

    def new_cache(self, batch: int = 1, length: int | None = None, *, allocate: int | None = None) -> KVCache:
        """An empty cache of the model's type, on its device; `length` slots, the whole context if not given."""
        weight = self.tok_emb.weight
        return KVCache(self.config, batch, length, allocate=allocate, dtype=weight.dtype, device=weight.device)
