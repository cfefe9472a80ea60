"""From a `Request` to a `Trainer`: model, data and folder of a run, each checked before it costs time."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .._version import __version__
from ..config import PRESETS, GPTConfig
from ..config.own import to_own
from ..data.loader import Loader
from ..data.shards import Dataset
from ..errors import ConfigError, LoadstoneError
from ..finetune.classifier import Classifier
from ..finetune.classifier_files import fill_classifier, save_classifier
from ..finetune.lora import LoRA, add_lora
from ..finetune.presets import strategy_for
from ..finetune.strategy import Strategy, untie
from ..kernels import keep_freed_memory, speed_up
from ..load import load, require_device, require_tokenizer
from ..model import GPT
from .devices import local_device
from .flops import palm_per_token
from .log import JsonLines, Listener, TensorBoard
from .loop import Trainer
from .materials import Bytes, Material, instructions, labelled, language, text_data
from .request import Request, Tuning
from .settings import Settings
from .state import WHOLE_MODEL, Run, Weights
from .world import World

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

# What a model has where nothing is said: small enough for a laptop's evening.
SMALL: Mapping[str, Any] = {"d_model": 256, "n_layers": 6, "n_heads": 4, "context_length": 256}


@dataclass
class Start:
    """A model and its data, ready to be trained."""

    gpt: GPT
    tokenizer: Tokenizer | None
    material: Material
    settings: Settings


def begin(
    request: Request,
    folder: Path,
    *,
    resume: bool = False,
    command: str = "",
    world: World | None = None,
    listeners: Sequence[Listener] = (),
    progress: Bytes | None = None,
) -> Trainer:
    """A run that is ready for `run_to_end`.

    Args:
        request: what is wanted; for a resume, what the run was begun with, or it is refused.
        folder: the run's; new, unless resumed.
        command: written down beside the request.
        world: the processes that train together; all of them call this.
        listeners: besides the run's own files.
        progress: called with (bytes, bytes in all) while text is turned into tokens.

    Raises a LoadstoneError for whatever is wrong with the request, the data or the folder.
    """
    run, world = Run(folder), world or World()
    if resume:
        require_same(request, run)
    elif world.main:
        run.require_new()
    require_device(request.device)
    torch.manual_seed(request.settings.seed)
    start = (loaded if request.source else from_scratch)(request, folder, progress, world)
    require_sample(start)
    if resume:
        require_same_data(start, run)
    model: nn.Module = Classifier(start.gpt, start.material.labels) if start.material.labels else start.gpt
    strategy = adapted(model, request.tuning) if request.source else None
    if request.device == "cpu":
        keep_freed_memory()
        speed_up(model)
    if not resume and world.main:
        run.begin(record(request, start, strategy, command))
    heard: list[Listener] = [JsonLines(folder), *listeners]
    if start.settings.tensorboard and world.main:
        heard.append(TensorBoard(folder / "tensorboard"))
    trainer = Trainer(
        model,
        start.material.task,
        Loader(
            start.material.train, start.settings.batch_size, seed=start.settings.seed, rank=world.rank, world=world.size
        ),
        start.settings,
        run,
        validation=start.material.validation,
        strategy=strategy,
        tokenizer=start.tokenizer,
        world=world,
        listeners=heard,
        weights=weights_of(request, model),
        flops=peak_and_need(start, request.device),
    )
    if resume:
        trainer.resume()
    return trainer


def from_scratch(request: Request, folder: Path, progress: Bytes | None, world: World) -> Start:
    """A model with random weights, as large as its data's vocabulary."""
    if request.data.kind != "text":
        raise ConfigError(
            "instructions and labelled texts are for a model that knows language: loadstone finetune SRC."
        )
    dataset = _text(request, folder, None, progress, world)
    tokenizer = dataset.tokenizer()
    config = model_config(request.model, dataset, tokenizer)
    settings = with_length(request.settings, config)
    return Start(GPT(config).to(world.loading_device(request.device)), tokenizer, language(dataset, settings), settings)


def loaded(request: Request, folder: Path, progress: Bytes | None, world: World) -> Start:
    """A pretrained model, in float32 and in memory of its own."""
    gpt, tokenizer = load(request.source, dtype="float32", device=world.loading_device(request.device))
    for module in gpt.modules():
        # Copies, row by row: a mapped file's tensors lie at any address, GPT-2's are transposed views, and a matrix
        # product may round by how its operands lie. FSDP wants rows, too.
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().clone(memory_format=torch.contiguous_format)))
    settings = with_length(request.settings, gpt.config)
    if request.data.kind == "text":
        dataset = _text(request, folder, tokenizer, progress, world)
        dataset.require_fits(gpt.config.vocab_size)
        if tokenizer is not None:
            dataset.require_same_text(tokenizer)
        return Start(gpt, tokenizer or dataset.tokenizer(), language(dataset, settings), settings)
    tokenizer = require_tokenizer(tokenizer, request.source)
    if request.data.kind == "sft":
        material = instructions(request.data, tokenizer, settings)
        if material.chat_template:
            tokenizer = replace(tokenizer, chat_template=material.chat_template)
        return Start(gpt, tokenizer, material, settings)
    return Start(gpt, tokenizer, labelled(request.data, tokenizer, settings, folder), settings)


def _text(request: Request, folder: Path, tokenizer: Tokenizer | None, progress: Bytes | None, world: World) -> Dataset:
    """The main process prepares the data, the others open them. What a run that never began left there is replaced."""
    with world.main_first():
        anew = world.main and not Run(folder).record.exists()
        return text_data(request.data, folder, tokenizer, progress, anew=anew)


def adapted(model: nn.Module, tuning: Tuning) -> Strategy:
    """Which parameters are trained when; the model gets its own head or its adapters first, where asked for."""
    if tuning.untie:
        untie(model)
    if tuning.lora:
        named: dict[str, Any] = {"targets": tuning.lora_targets} if tuning.lora_targets else {}
        add_lora(model, LoRA(tuning.lora, tuning.lora_alpha or 2.0 * tuning.lora, **named))
    chosen = "lora" if tuning.lora and tuning.strategy == "full" else tuning.strategy
    return strategy_for(model, chosen, layer_decay=tuning.layer_decay, untie=tuning.untie)


def peak_and_need(start: Start, device: str) -> tuple[float, float] | None:
    """FLOPs of one token, and of the device in a second (a CPU's is measured, in less than a second)."""
    peak = local_device(device, start.settings.dtype).peak(start.settings.dtype)
    return (palm_per_token(start.gpt.config, start.settings.length), peak) if peak else None


def weights_of(request: Request, model: nn.Module) -> Weights:
    """How the trained module is saved and comes back."""
    if request.tuning.lora:
        from ..finetune.adapter import fill_adapter, save_adapter

        return Weights(
            lambda model, path, tokenizer, beside: save_adapter(model, path, request.source, beside=beside),
            fill_adapter,
        )
    if isinstance(model, Classifier):
        return Weights(
            lambda model, path, tokenizer, beside: save_classifier(model, path, tokenizer, beside=beside),
            fill_classifier,
        )
    return WHOLE_MODEL


def require_same(request: Request, run: Run) -> None:
    """Raises LoadstoneError if a resumed run would not be the same run."""
    saved = Request().merged(run.read().get("request", {}), str(run.record))
    if changes := request.changes(saved):
        raise LoadstoneError(
            f"{run.folder}: the run was begun with other settings: {'; '.join(changes)}. Resume it without naming them "
            "(run.json remembers), or begin a new run in another folder."
        )


def require_same_data(start: Start, run: Run) -> None:
    """Raises LoadstoneError if prepared data are no longer those that the run was begun with."""
    recorded = run.read().get("data")
    begun = recorded.get("identity") if isinstance(recorded, Mapping) else None
    if begun and begun != start.material.record.get("identity"):
        raise LoadstoneError(
            f"{start.material.record.get('folder')}: these are not the data that {run.folder} was begun with: ids or "
            "tokenizer have changed. Put the old ones back, or begin a new run in another folder."
        )


def require_sample(start: Start) -> None:
    """Raises TokenizerError if the sample texts' beginning cannot be encoded: now, and not in the middle of the run."""
    if start.settings.sample_every and start.tokenizer is not None:
        start.tokenizer.encode(start.settings.sample_prompt)


def record(request: Request, start: Start, strategy: Strategy | None, command: str) -> dict[str, Any]:
    """What run.json says."""
    return {
        "request": request.as_dict(),
        "config": to_own(start.gpt.config),
        "strategy": strategy.to_json() if strategy else None,
        "data": start.material.record,
        "notes": start.material.notes,
        "command": command,
        "versions": {"loadstone": __version__, "torch": torch.__version__, "python": sys.version.split()[0]},
    }


def model_config(wanted: Mapping[str, Any], dataset: Dataset, tokenizer: Tokenizer) -> GPTConfig:
    """The model to train from scratch, as large as its data's vocabulary."""
    known = {"bos_id": tokenizer.bos_id, "eos_ids": tokenizer.eos_ids, "vocab_size": dataset.info.vocab_size}
    config = from_fields(wanted, known)
    dataset.require_fits(config.vocab_size)
    return config


def from_fields(wanted: Mapping[str, Any], known: Mapping[str, Any]) -> GPTConfig:
    """A preset or the small model, with what is known of the data, and over it the fields that the user names."""
    fields = dict(wanted)
    preset = fields.pop("preset", "")
    if preset and preset not in PRESETS:
        raise ConfigError(f"there is no preset {preset!r}; presets: {', '.join(PRESETS)}. Or name the fields: --set.")
    base = PRESETS[preset or "gpt2"].with_overrides({"bos_id": None, "eos_ids": (), **known})
    if not preset:
        fields = {**SMALL, **fields}
    if "d_model" in fields:
        fields = {"d_ff": 0, **fields}  # derived anew, unless the user names it
    return base.with_overrides(fields)


def with_length(settings: Settings, config: GPTConfig) -> Settings:
    """The settings with the length of a sequence said. Raises ConfigError if it is beyond the context."""
    length = settings.length or config.context_length
    if length > config.context_length:
        raise ConfigError(f"length {length} is beyond the model's context of {config.context_length} tokens.")
    return replace(settings, length=length)
