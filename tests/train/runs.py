"""Small training runs on ids in memory, for the tests of the loop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loadstone import GPT, GPTConfig
from loadstone.data.batch import Samples
from loadstone.data.loader import Loader
from loadstone.data.windows import Windows
from loadstone.finetune.presets import strategy_for
from loadstone.train.log import JsonLines, Listener
from loadstone.train.loop import Trainer
from loadstone.train.settings import Settings
from loadstone.train.state import Run
from loadstone.train.task import LanguageModel
from loadstone.train.world import World

CONFIG = GPTConfig(61, 16, 24, 3, 2)
SMALL: Mapping[str, Any] = {"steps": 12, "batch_size": 4, "lr": 1e-2, "warmup": 2, "eval_every": 5, "log_every": 1}


def ids(n: int = 2000) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Something that can be learnt: a walk with steps of 1 to 3."""
    steps = np.random.default_rng(0).integers(1, 4, n)
    return (np.cumsum(steps) % CONFIG.vocab_size).astype(np.uint16)


def small_model(seed: int = 0, **fields: Any) -> GPT:
    torch.manual_seed(seed)
    return GPT(CONFIG.with_overrides(fields))


def trainer(
    folder: Path,
    model: GPT | None = None,
    *,
    strategy: str | None = None,
    layer_decay: float = 1.0,
    rows: Samples | None = None,
    heard: list[tuple[str, dict[str, Any]]] | None = None,
    resume: bool = False,
    world: World | None = None,
    validation: Samples | None = None,
    **settings: Any,
) -> Trainer:
    """A run of SMALL settings in `folder`; events go to `heard` as well."""
    chosen, model = Settings(**{**SMALL, **settings}), model or small_model()
    run, world = Run(folder), world or World()
    if not resume and world.main:
        run.begin({"request": {}})
    listeners: list[Listener] = [JsonLines(folder)]
    if heard is not None:
        listeners.append(lambda kind, record: heard.append((kind, dict(record))))
    made = Trainer(
        model,
        LanguageModel(compile=chosen.compile),
        Loader(rows or Windows(ids(), 16, 8), chosen.batch_size, seed=chosen.seed, rank=world.rank, world=world.size),
        chosen,
        run,
        validation=validation or Windows(ids(3000)[2000:], 16),
        strategy=strategy_for(model, strategy, layer_decay=layer_decay) if strategy else None,
        world=world,
        listeners=listeners,
    )
    if resume:
        made.resume()
    return made


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same_weights(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
