"""For whoever learns from "Build a Large Language Model (From Scratch)": the book's names over Loadstone's model.

Document 003's examples run as they are written. Differences, all in the reader's favour: no TensorFlow; text may be
tokenized without tiktoken; dropout is off while text is generated or a loss evaluated, whatever mode the model is in;
`load_state_dict` also takes the book's own files and HuggingFace's; and the classic mistakes are answered in words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..config import GPTConfig
from ..errors import ConfigError, LoadstoneError
from ..model import GPT
from ..tokenizer import Tokenizer, gpt2_tokenizer
from .weights import FIELDS, from_arrays
from .weights import download_and_load_gpt2 as download_and_load_gpt2
from .weights import load_weights_into_gpt as load_weights_into_gpt

GPT_CONFIG_124M: dict[str, Any] = {
    "vocab_size": 50257, "context_length": 256, "emb_dim": 768, "n_heads": 12, "n_layers": 12, "drop_rate": 0.1,
    "qkv_bias": False,
}  # fmt: skip
Batches = DataLoader[tuple[Tensor, Tensor]]


class GPTModel(GPT):
    """The book's model: `GPT` with a head of its own, from the book's dictionary. The parameters' names are ours."""

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        if set(cfg) != {*FIELDS, "drop_rate"}:
            wrong = sorted(set(cfg) ^ {*FIELDS, "drop_rate"})
            raise ConfigError(f"the model's dictionary needs {', '.join(GPT_CONFIG_124M)}; see {', '.join(wrong)}.")
        super().__init__(GPTConfig(**{ours: cfg[name] for name, ours in FIELDS.items()}, tied=False))
        self.set_dropout(cfg["drop_rate"])

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's; a state dict with another dialect's names (the book's, HuggingFace's) is translated first."""
        if inner := [name for name, value in state_dict.items() if not isinstance(value, Tensor)]:
            raise LoadstoneError(f"this is no state dict: {inner[0]!r} is no tensor. Do you want its ['{inner[0]}']?")
        if strict and not assign and state_dict.keys() != self.state_dict().keys():
            arrays = {name: tensor.detach().cpu().float().numpy() for name, tensor in state_dict.items()}
            state_dict = from_arrays(self.config, arrays, "the state dict")
        return super().load_state_dict(state_dict, strict, assign)


class GPTDatasetV1(Dataset[tuple[Tensor, Tensor]]):
    """Overlapping windows of a text: `input_ids` [N, max_length] and `target_ids`, the same one token later (views)."""

    def __init__(self, txt: str, tokenizer: Any, max_length: int, stride: int) -> None:
        ids = text_to_token_ids(txt, tokenizer)[0]
        if max_length < 1 or stride < 1 or len(ids) <= max_length:
            raise LoadstoneError(
                f"the text has {len(ids)} tokens, and one window of max_length {max_length} needs {max_length + 1} "
                f"(its targets are one token later), stride {stride} 1 or more. Take a longer text or a smaller window."
            )
        self.input_ids, self.target_ids = ids[:-1].unfold(0, max_length, stride), ids[1:].unfold(0, max_length, stride)

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, idx: int) -> tuple[Tensor, Tensor]:
        return self.input_ids[idx], self.target_ids[idx]


def create_dataloader_v1(
    txt: str, batch_size: int = 4, max_length: int = 256, stride: int = 128, shuffle: bool = True,
    drop_last: bool = True, num_workers: int = 0, tokenizer: Any = None,
) -> Batches:  # fmt: skip
    """Batches of windows; GPT-2's tokenizer if none is given. Raises LoadstoneError if there is not a single batch."""
    dataset = GPTDatasetV1(txt, tokenizer or gpt2_tokenizer(), max_length, stride)
    if drop_last and len(dataset) < batch_size:
        raise LoadstoneError(
            f"the text gives {len(dataset)} windows, fewer than one batch of {batch_size}, which drop_last drops: "
            "nothing would be left, and a loss over nothing is NaN. Use drop_last=False or a smaller batch_size."
        )
    return DataLoader(dataset, batch_size, shuffle=shuffle, drop_last=drop_last, num_workers=num_workers)


def text_to_token_ids(text: str, tokenizer: Any) -> Tensor:
    """[1, T]. `tokenizer`: one of ours, or tiktoken's; the text <|endoftext|> becomes that token, as in the book."""
    if isinstance(tokenizer, Tokenizer):
        return torch.tensor([tokenizer.encode(text, add_special=False, parse_special=True)], dtype=torch.int64)
    return torch.tensor([tokenizer.encode(text, allowed_special={"<|endoftext|>"})], dtype=torch.int64)


def token_ids_to_text(token_ids: Tensor, tokenizer: Any) -> str:
    """The text of [1, T] or [T]."""
    ids = token_ids.flatten().tolist()
    return str(tokenizer.decode(ids, skip_special=False) if isinstance(tokenizer, Tokenizer) else tokenizer.decode(ids))


def calc_loss_batch(input_batch: Tensor, target_batch: Tensor, model: nn.Module, device: Any) -> Tensor:
    """Mean cross entropy of the next tokens. Raises LoadstoneError for ids and lengths that the model cannot take."""
    config: GPTConfig = model.config  # type: ignore[assignment]
    highest, length = int(max(input_batch.max(), target_batch.max())), input_batch.shape[1]
    if highest >= config.vocab_size or length > config.context_length:
        raise LoadstoneError(
            f"the batch has token {highest} and {length} tokens in a row; the model has vocab_size {config.vocab_size} "
            f"and context_length {config.context_length}. Make the model for this tokenizer and max_length."
        )
    logits = model(input_batch.to(device))
    return nn.functional.cross_entropy(logits.flatten(0, 1), target_batch.to(device).flatten())


def calc_loss_loader(data_loader: Batches, model: nn.Module, device: Any, num_batches: int | None = None) -> float:
    """Mean over the first so many batches; NaN over none."""
    count = len(data_loader) if num_batches is None else min(num_batches, len(data_loader))
    losses = [calc_loss_batch(x, y, model, device).item() for x, y in islice(data_loader, count)]
    return sum(losses) / count if count else float("nan")


def evaluate_model(
    model: nn.Module, train_loader: Batches, val_loader: Batches, device: Any, eval_iter: int
) -> tuple[float, float]:
    """(training loss, validation loss) over `eval_iter` batches each, without dropout."""
    with _evaluating(model):
        train_loss = calc_loss_loader(train_loader, model, device, eval_iter)
        return train_loss, calc_loss_loader(val_loader, model, device, eval_iter)


def generate_and_print_sample(model: nn.Module, tokenizer: Any, device: Any, start_context: str) -> None:
    """Prints 50 tokens of greedy continuation in one line."""
    context_size: int = model.config.context_length  # type: ignore[union-attr, assignment]
    ids = generate(model.to(device), text_to_token_ids(start_context, tokenizer), 50, context_size)
    print(token_ids_to_text(ids, tokenizer).replace("\n", " "))


def train_model_simple(
    model: nn.Module, train_loader: Batches, val_loader: Batches, optimizer: torch.optim.Optimizer, device: Any,
    num_epochs: int, eval_freq: int, eval_iter: int, start_context: str, tokenizer: Any,
) -> tuple[list[float], list[float], list[int]]:  # fmt: skip
    """The book's loop. Returns (training losses, validation losses, tokens seen) at each evaluation."""
    train_losses, val_losses, track_tokens_seen, tokens_seen, step = list[float](), list[float](), list[int](), 0, 0
    for epoch in range(num_epochs):
        model.train()
        for input_batch, target_batch in train_loader:
            optimizer.zero_grad()
            calc_loss_batch(input_batch, target_batch, model, device).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            tokens_seen += input_batch.numel()
            if step % eval_freq == 0:
                train_loss, val_loss = evaluate_model(model, train_loader, val_loader, device, eval_iter)
                train_losses.append(train_loss)
                val_losses.append(val_loss)
                track_tokens_seen.append(tokens_seen)
                print(f"Ep {epoch + 1} (Step {step:06d}): Train loss {train_loss:.3f}, Val loss {val_loss:.3f}")
            step += 1
        generate_and_print_sample(model, tokenizer, device, start_context)
    return train_losses, val_losses, track_tokens_seen


def generate(
    model: nn.Module, idx: Tensor, max_new_tokens: int, context_size: int, temperature: float = 0.0,
    top_k: int | None = None, eos_id: int | None = None,
) -> Tensor:  # fmt: skip
    """[B, T] -> [B, T + at most max_new_tokens]. The model sees the last `context_size` tokens; 0 is greedy.

    Stops when every row has met `eos_id`, which is not appended. Draws from torch's own generator (torch.manual_seed).
    """
    idx = idx.to(next(model.parameters()).device)
    ended = torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)
    with _evaluating(model):
        for _ in range(max_new_tokens):
            logits_BV = model(idx[:, -context_size:])[:, -1]
            if top_k is not None:
                lowest = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
                logits_BV = logits_BV.masked_fill(logits_BV < lowest, -torch.inf)
            if temperature > 0:
                chosen_B1 = torch.multinomial(torch.softmax(logits_BV / temperature, -1), 1)
            else:
                chosen_B1 = logits_BV.argmax(-1, keepdim=True)
            if eos_id is not None:
                ended |= chosen_B1 == eos_id
                chosen_B1 = chosen_B1.masked_fill(ended, eos_id)
            if ended.all():
                break
            idx = torch.cat((idx, chosen_B1), dim=1)
    return idx


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradients; the mode is restored."""
    before = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(before)
