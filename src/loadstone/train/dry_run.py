"""`--dry-run`: the plan of a requested run, from headers and sizes alone; nothing is tokenized, loaded or written."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from ..config import PRESETS, GPTConfig
from ..data.corpus import Corpus
from ..data.shards import Dataset
from ..errors import ConfigError
from ..load import open_source
from ..model import GPT
from .begin import SMALL, adapted, from_fields, with_length
from .plan import RunPlan, plan_run
from .request import DataRequest, Request

BYTES_PER_TOKEN = 4.0  # of English in a byte-level BPE of tens of thousands of tokens


def plan_request(
    request: Request, *, devices: int = 1, on: str = "", mfu: float = 0.0, measure: bool = False
) -> tuple[RunPlan, list[str]]:
    """The plan, and what had to be assumed for it.

    `devices`, `on` (a device's name), `mfu` and `measure` are `plan_run`'s.
    """
    assumed: list[str] = []
    config = _config(request, assumed)
    settings = with_length(request.settings, config)
    data_tokens = _data_tokens(request.data, assumed)
    steps = settings.steps
    if not steps:
        if not data_tokens:
            why = "their size is not known before they are read" if request.data.sources else "no --data are named"
            raise ConfigError(f"how long the run is cannot be reckoned, since {why}: say --steps.")
        steps = max(
            1, int(settings.epochs * data_tokens / (settings.batch_size * (settings.stride or settings.length)))
        )
    trainable, lora = None, 0
    if request.source:
        with torch.device("meta"):
            model = GPT(config)
        strategy = adapted(model, request.tuning)
        per_epoch = data_tokens // (settings.batch_size * settings.length)
        strategy.phase(0, max(1, per_epoch))  # phases in steps and in epochs must be in order
        trainable = strategy.ever_trainable(model)
        lora = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
        trainable = frozenset(name for name in trainable if ".lora_" not in name)
    plan = plan_run(
        config, batch_size=settings.batch_size, length=settings.length, micro_batch=settings.micro_batch, steps=steps,
        data_tokens=data_tokens, world=devices, dtype=settings.dtype, recompute=settings.recompute,
        dropout=settings.dropout, trainable=trainable, lora=lora, pretrained=bool(request.source),
        device=on or request.device, mfu=mfu, measure=measure,
    )  # fmt: skip
    return plan, assumed


def _config(request: Request, assumed: list[str]) -> GPTConfig:
    if request.source:
        return open_source(request.source).config
    prepared = _prepared(request.data)
    if prepared:
        return from_fields(request.model, {"vocab_size": prepared.info.vocab_size})
    fields = {**({} if request.model.get("preset") else SMALL), **request.model}
    if "vocab_size" not in fields:
        spec = request.data.tokenizer or "gpt2"
        size = re.fullmatch(r"bpe:(\d+)", spec)
        fields["vocab_size"] = int(size[1]) if size else 100 if spec == "char" else PRESETS["gpt2"].vocab_size
        assumed.append(f"a vocabulary of {fields['vocab_size']:,} tokens")
    return from_fields(fields, {})


def _data_tokens(wanted: DataRequest, assumed: list[str]) -> int:
    """Tokens to train on; 0 where nobody knows. Raises SourceError for a source that is not there."""
    prepared = _prepared(wanted)
    if prepared:
        return len(prepared.tokens("train"))
    if wanted.kind != "text" or not wanted.sources:
        return 0
    nbytes = Corpus(wanted.sources).total
    per_token = 1.0 if wanted.tokenizer == "char" else BYTES_PER_TOKEN
    if nbytes:
        each = "1 byte" if per_token == 1 else f"{per_token:g} bytes"
        assumed.append(f"{each} of the data's files to a token (archives and JSON hold more or less)")
    return int(nbytes / per_token * (1 if wanted.validation_sources else 1 - wanted.validation))


def _prepared(wanted: DataRequest) -> Dataset | None:
    if len(wanted.sources) == 1 and (Path(wanted.sources[0]) / "dataset.json").is_file():
        return Dataset.open(Path(wanted.sources[0]))
    return None
