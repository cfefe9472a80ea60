"""`Settings`: everything that decides what a training run computes, and how it reports. Pure data.

The field's help texts are the command line's; a TOML or JSON file sets the same names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ..checkpoint.wording import shown
from ..errors import ConfigError

SCHEDULES = ("cosine", "linear", "constant")
SAMPLINGS = ("windows", "crops", "packed")
DTYPES = ("float32", "bfloat16")
LARGEST = 1 << 53  # of any number: above, a float is no longer exact, and an int may not even become one


def _option(default: Any, help: str, harmless: bool = False) -> Any:
    return field(default=default, metadata={"help": help, "harmless": harmless})


@dataclass(frozen=True)
class Settings:
    """One run. Raises ConfigError for values that make no sense."""

    steps: int = _option(0, "Optimizer steps; 0: as many as --epochs need.")
    epochs: float = _option(1.0, "Passes over the training data, where --steps is not given.")
    batch_size: int = _option(16, "Sequences per step, over all micro-batches and ranks together.")
    micro_batch: int = _option(0, "Sequences at once on one device; the rest is accumulated. 0: all.")
    length: int = _option(0, "Tokens per sequence; 0: the model's context.")
    stride: int = _option(0, "Tokens from one window to the next; 0: the length (no overlap).")
    sampling: str = _option("windows", "windows, crops (random places) or packed (whole documents, separated).")
    lr: float = _option(6e-4, "Learning rate at its highest; of finetune: 5e-5.")
    min_lr: float = _option(0.1, "Learning rate at the end, as a share of --lr.")
    warmup: int = _option(0, "Steps in which the learning rate rises from 0; 0: 2% of the steps.")
    schedule: str = _option("cosine", "How the learning rate falls: cosine, linear or constant.")
    weight_decay: float = _option(0.1, "AdamW's, for matrices and embeddings only.")
    beta1: float = _option(0.9, "AdamW's decay of the mean of gradients.")
    beta2: float = _option(0.95, "AdamW's decay of the mean of their squares.")
    eps: float = _option(1e-8, "AdamW's epsilon.")
    clip: float = _option(1.0, "Longest gradient (norm over all parameters); 0: any.")
    dropout: float = _option(0.0, "Share of values dropped in training.")
    seed: int = _option(0, "Of initial weights, order of the data and dropout.")
    dtype: str = _option("float32", "float32, or bfloat16 (autocast; weights and optimizer stay float32).")
    compile: bool = _option(False, "Compile the step with torch.compile: slow to begin, faster then.")
    recompute: bool = _option(False, "Compute each block twice instead of keeping what it computed (less memory).")
    eval_every: int = _option(200, "Steps from one evaluation to the next; 0: only at the end.")
    eval_batches: int = _option(0, "Batches of one evaluation; 0: all of the validation data.")
    patience: int = _option(0, "Evaluations without a better loss after which the run stops; 0: never.")
    sample_every: int = _option(0, "Steps from one sample text to the next; 0: none.", harmless=True)
    sample_prompt: str = _option("", "Beginning of the sample texts; empty: the begin token alone.", harmless=True)
    sample_tokens: int = _option(60, "Tokens of a sample text.", harmless=True)
    save_every: int = _option(0, "Steps from one checkpoint to the next; 0: as --eval-every.", harmless=True)
    keep: int = _option(2, "Checkpoints kept, besides the best.", harmless=True)
    log_every: int = _option(10, "Steps from one line of metrics.jsonl to the next.", harmless=True)
    updates_every: int = _option(
        0, "Steps from one line of updates.jsonl (how far each layer moved) to the next; 0: none."
    )
    tensorboard: bool = _option(False, "Write TensorBoard's event files too (extra `tensorboard`).", harmless=True)

    def __post_init__(self) -> None:
        for good, problem in (
            (self.steps > 0 or self.epochs > 0, "steps or epochs must be above 0"),
            (self.batch_size >= 1, f"batch_size must be at least 1, found {self.batch_size}"),
            (
                self.micro_batch == 0 or (self.micro_batch > 0 and self.batch_size % self.micro_batch == 0),
                f"batch_size {self.batch_size} must be a multiple of micro_batch {self.micro_batch}",
            ),
            (self.schedule in SCHEDULES, f"schedule {self.schedule!r} is none of {', '.join(SCHEDULES)}"),
            (self.sampling in SAMPLINGS, f"sampling {self.sampling!r} is none of {', '.join(SAMPLINGS)}"),
            (self.dtype in DTYPES, f"dtype {self.dtype!r} is none of {', '.join(DTYPES)}"),
            (0 <= self.min_lr <= 1, f"min_lr is a share of lr, from 0 to 1, found {self.min_lr}"),
            (0 <= self.dropout < 1, f"dropout must be at least 0 and below 1, found {self.dropout}"),
            (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1, "beta1 and beta2 must be at least 0 and below 1"),
            (self.eps > 0, f"eps must be above 0, found {self.eps}"),
            (self.keep >= 1, "keep must be at least 1: the run could not be resumed"),
            (self.log_every >= 1, "log_every must be at least 1"),
        ):
            if not good:
                raise ConfigError(f"training settings: {problem}.")
        for name in ("batch_size", "epochs", "lr", "weight_decay", "clip", "length", "stride", "warmup", "steps",
                     "eval_every", "eval_batches", "save_every", "sample_every", "sample_tokens", "updates_every",
                     "patience", "seed"):  # fmt: skip
            value = getattr(self, name)
            if not 0 <= value < LARGEST:
                problem = f"{name} must not be negative or infinite, or 2^53 and more; found {shown(value)}."
                raise ConfigError(f"training settings: {problem}")

    def merged(self, values: Mapping[str, Any], where: str) -> Settings:
        """A copy with some fields replaced. Raises ConfigError for unknown names and values of another type."""
        kinds: dict[str, Any] = {f.name: type(f.default) for f in fields(self)}
        for name, value in values.items():
            if name not in kinds:
                from difflib import get_close_matches

                near = ", ".join(get_close_matches(name, kinds, n=3)) or ", ".join(kinds)
                raise ConfigError(f"{where}: no training setting is called {name!r}; nearest: {near}.")
            kind = kinds[name]
            good = type(value) is kind or (kind is float and type(value) is int)
            if not good:
                raise ConfigError(f"{where}: {name} must be a {_NAMES[kind]}, found {value!r}.")
        return replace(self, **{name: kinds[name](value) for name, value in values.items()})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def changes(self, other: Settings) -> list[str]:
        """What differs in a way that changes the computation, as `name: ours, not theirs`."""
        return [
            f"{f.name}: {getattr(self, f.name)!r} instead of {getattr(other, f.name)!r}"
            for f in fields(self)
            if not f.metadata["harmless"] and getattr(self, f.name) != getattr(other, f.name)
        ]


_NAMES: Mapping[type, str] = {int: "whole number", float: "number", bool: "true or false", str: "text"}
