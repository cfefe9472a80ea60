"""Bytes that a training step needs on one device: what each operation of `model.py` keeps for its gradient, and more.

The rule of autograd: a product keeps its input and its weight; a norm its input and the statistics; an activation
function its input; attention q, k, v, its result and one number per row. Each tensor counts once, however many
operations keep it. Under autocast each product keeps its own bfloat16 copy of the input, and of the weight.

Shapes: B rows, T tokens, C d_model, H query heads, F d_ff, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import GPTConfig
from ..weightmap.canonical import parameter_count, parameter_shapes

FLOAT, HALF = 4, 2  # bytes


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by purpose; `peak` is less than the sum where not all of it is there at one moment.

    Attributes:
        weights: float32, this rank's share of the trained ones and all that is gathered for a block.
        gradients: float32, of what is trained.
        optimizer: AdamW's two moments, float32.
        copies: bfloat16 copies of the matrices, which autocast makes for each micro-batch.
        activations: what the forward pass keeps for the backward pass, of one micro-batch.
        head: the loss: gradients of the last hidden states and of the head's matrix, and one chunk of logits.
        data: token ids and targets of one micro-batch.
        peak: the most at any one moment.
    """

    weights: int
    gradients: int
    optimizer: int
    copies: int
    activations: int
    head: int
    data: int
    peak: int


@dataclass(frozen=True)
class Step:
    """How a step is computed on one rank, as far as its memory depends on it.

    Attributes:
        micro_batch, length: sequences at once, and their tokens.
        accumulates: whether a step has several micro-batches (gradients are then there during the next one).
        half: products in bfloat16 (autocast).
        recompute, dropout: see `GPT`.
        cuda: on a GPU; a CPU's kernels keep more.
    """

    micro_batch: int
    length: int
    accumulates: bool = False
    half: bool = False
    recompute: bool = False
    dropout: float = 0.0
    cuda: bool = False

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.length


def memory(
    config: GPTConfig, step: Step, *, trained: int, added: int = 0, ranks: int = 1, live_from: int = 0
) -> Memory:
    """Memory of one rank.

    Args:
        config, step: what is trained, and how.
        trained: parameters with a gradient, of all ranks together.
        added: parameters that are not in the config (LoRA's).
        ranks: over how many the parameters, their gradients and moments are divided (FSDP2).
        live_from: blocks below need no gradient and keep nothing.
    """
    total = parameter_count(config) + added
    # FSDP2 gathers one block while it computes, and the next while it waits; embeddings and head stay gathered.
    gathered = 0 if ranks == 1 else FLOAT * (_outside_blocks(config) + 2 * _block_parameters(config))
    weights = FLOAT * -(-total // ranks) + gathered
    gradients, moments = FLOAT * -(-trained // ranks), 2 * FLOAT * -(-trained // ranks)
    copies = HALF * sum(_matrices(config)) if step.half else 0
    kept = activations(config, step, live_from=live_from)
    head = head_buffers(config, step, trains_head=trained > added)
    table = FLOAT * config.vocab_size * config.d_model
    data = 2 * 8 * step.tokens
    end_of_forward = copies + kept + head + (gradients if step.accumulates else 0)
    # The embedding's gradient is a whole matrix. A tied head's is added to it out of place, and both to an earlier one.
    end_of_backward = gradients + (2 * config.tied + step.accumulates) * (table if trained > added else 0)
    peak = weights + moments + data + max(end_of_forward, end_of_backward)
    return Memory(weights, gradients, moments, copies, kept, head, data, peak)


def activations(config: GPTConfig, step: Step, *, live_from: int = 0) -> int:
    """Bytes that the forward pass of one micro-batch keeps, up to the last norm's result; fewer, if some are frozen."""
    # The last block's result, the last norm and what it makes of it, ids and positions.
    per_token = 2 * FLOAT * config.d_model + _norm(config, step) + 2 * 8
    if step.dropout:
        per_token += config.d_model * (1 if step.cuda else FLOAT)
    live = config.n_layers - live_from
    block = block_bytes(config, step)
    if step.recompute:  # a block's input is the residual, kept; the rest exists for one block at a time
        return step.tokens * (per_token + FLOAT * config.d_model * live + block)
    return step.tokens * (per_token + live * block)


def block_bytes(config: GPTConfig, step: Step) -> int:
    """Bytes that one block keeps for each token."""
    c, e = config, HALF if step.half else FLOAT
    norms = (1 if c.shared_norm else 2) * _norm(c, step)
    residuals = FLOAT * c.d_model * (1 if c.parallel_residual else 2)
    # One copy of a norm's result serves q, k and v, and the MLP's matrices; autocast makes one for each.
    inputs = (3 if step.half else 1) * c.d_model * e
    both = 2 if step.cuda else e + (FLOAT if c.n_experts else e)  # experts are added up in float32
    masks = both * c.d_model if step.dropout else 0
    return norms + residuals + inputs + _attention(c, step) + _mlp(c, step) + masks


def _mlp(c: GPTConfig, step: Step) -> int:
    """Bytes that the MLP, or the experts of a token, keep for it."""
    e = HALF if step.half else FLOAT
    inner = (4 if c.gated_mlp else 1 if c.activation == "relu" else 2) * c.d_ff * e
    own = (1 + c.gated_mlp if step.half else 1) * c.d_model * e
    if not c.n_experts:
        return inner + (0 if c.shared_norm and not step.half else own)  # what attention kept serves it too
    # Each expert has copies of its rows, its result before and after it is weighted, and where the rows belong.
    each = own + inner + c.d_model * (e + FLOAT) + 2 * 8 + 2 * FLOAT
    return c.d_model * e + c.n_experts * FLOAT + c.n_experts_used * each  # the router's input and shares


def _attention(c: GPTConfig, step: Step) -> int:
    """Bytes that attention keeps for each token: q, k, v, the result, and what its kernel needs besides."""
    e = HALF if step.half else FLOAT
    width, kv_width = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    # RMSNorm of heads keeps them twice and one number of each, in float32.
    normed = (2 * (width + kv_width) + c.n_heads + c.n_kv_heads) * FLOAT if c.qk_norm else 0
    return normed + _attend(c, step, width, kv_width, e)


def _attend(c: GPTConfig, step: Step, width: int, kv_width: int, e: int) -> int:
    from ..kernels.attention import LONGEST, _blocks

    if step.cuda:
        return (2 * width + 2 * kv_width) * e + c.n_heads * FLOAT
    if step.dropout:  # no fused kernel: float32, and the probabilities three times
        return width * e + 3 * width * FLOAT + 3 * c.n_heads * step.length * FLOAT
    masked = 0 < c.window < step.length
    if step.half and step.length <= LONGEST and not masked:  # our own kernel keeps the probabilities
        pairs = sum((end - start) * end for start, end in _blocks(step.length))
        return 4 * width * e + c.n_heads * pairs * e // step.length
    # Rotated heads lie in another order, and torch's kernel gives its result in that order: one more copy.
    mask = step.length * e // step.micro_batch if masked else 0  # one for all rows
    return (2 * width + 2 * kv_width) * e + c.n_heads * FLOAT + (width * e if c.rope else 0) + mask


def head_buffers(config: GPTConfig, step: Step, *, trains_head: bool = True) -> int:
    """Bytes that `losses.head_loss` holds at its widest: with a chunk's logits, or its part of the gradient."""
    from .losses import chunks

    matrix, rows = config.vocab_size * config.d_model, min(chunks(step.tokens, config.vocab_size)[0].stop, step.tokens)
    logits, several = rows * config.vocab_size, step.tokens > rows
    hidden = step.tokens * config.d_model * (FLOAT + HALF * step.half)  # its gradient; its bfloat16 copy
    total = matrix * trains_head * FLOAT
    softmax = logits * (2 * FLOAT + HALF * step.half) + total * several
    products = (
        logits * (FLOAT + HALF * step.half) + total + matrix * trains_head * (HALF if step.half else FLOAT * several)
    )
    return hidden + matrix * HALF * step.half + max(softmax, products)


def _norm(config: GPTConfig, step: Step) -> int:
    """Statistics of one norm per token; RMSNorm has no fused kernel on a CPU and keeps the normalised input too."""
    if config.norm == "layernorm":
        return 2 * FLOAT
    return FLOAT + (0 if step.cuda else FLOAT * config.d_model)


def _matrices(config: GPTConfig) -> list[int]:
    """Elements of the matrices inside blocks."""
    shapes = parameter_shapes(config).items()
    return [math.prod(shape) for name, shape in shapes if name.startswith("blocks.") and len(shape) == 2]


def _block_parameters(config: GPTConfig) -> int:
    return sum(math.prod(s) for name, s in parameter_shapes(config).items() if name.startswith("blocks.0."))


def _outside_blocks(config: GPTConfig) -> int:
    return sum(math.prod(s) for name, s in parameter_shapes(config).items() if not name.startswith("blocks."))
