"""PEFT's adapter files (`adapter_config.json`, `adapter_model.safetensors`): read, and written where PEFT can say it.

PEFT's names are those of HuggingFace's model: `base_model.model.` + module + `.lora_A.weight` ([rank, in]) and
`.lora_B.weight` ([out, rank]), as its checkpoint guide says. Which module is which layer follows from the weight table.
An adapter of a fused matrix (GPT-2's `c_attn`) becomes one each for q, k and v, with the same A and B's rows. The other
way there is none, since ours have an A each: such an adapter is written under our own names alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..checkpoint.base import Checkpoint
from ..checkpoint.wording import few, shown
from ..errors import ConfigError, FormatError
from ..load import to_tensor
from ..model import GPT
from ..weightmap import Rule, apply, parameter_shapes, table_for
from ..weightmap.ops import Transpose
from .lora import LoRA, kinds_of, target_layers

CONFIG = "adapter_config.json"
_START, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
# What of adapter_config.json is read, or says nothing of what the adapter computes. All else must be null, false or
# empty: it is another method (DoRA, aLoRA, ...) or another rank here and there.
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "base_model_name_or_path", "init_lora_weights"}
_HARMLESS = {
    *("alora_offset", "auto_mapping", "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern"),
    *("layers_to_transform", "megatron_core", "peft_version", "qalora_group_size", "revision", "target_modules"),
    *("task_type",),
}
_IN_LAYER = re.compile(r".*\.\d+\.")
_INITS = (True, False, None, "gaussian")  # others (pissa, olora, ...) change the base as well


class Found(NamedTuple):
    lora: LoRA
    base: str  # what PEFT recorded as its name
    tensors: dict[str, Tensor]  # by our names


def names(gpt: GPT, settings: LoRA) -> dict[str, str] | None:
    """Our name of each adapter tensor -> PEFT's; None if a target is only a part of one of HuggingFace's matrices."""
    found: dict[str, str] = {}
    modules = {layer: (module, rule) for module, rule in _modules(gpt) for layer in _layers(rule)}
    for layer in target_layers(gpt, settings):
        module, rule = modules[layer]
        if len(rule.target) > 1:
            return None
        found |= {f"{layer}.lora_a": f"{_START}{module}{_A}", f"{layer}.lora_b": f"{_START}{module}{_B}"}
    return found


def config(gpt: GPT, settings: LoRA, base: str) -> dict[str, Any]:
    """`adapter_config.json` of an adapter that has `names`."""
    layers = target_layers(gpt, settings)
    modules = {module: rule for module, rule in _modules(gpt) if not layers.keys().isdisjoint(_layers(rule))}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "target_modules": sorted({_IN_LAYER.sub("", module) for module in modules}),
        "fan_in_fan_out": any(isinstance(op, Transpose) for rule in modules.values() for op in rule.ops),
        "bias": "none",
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def read(path: Path, gpt: GPT, values: Mapping[str, Any], checkpoint: Checkpoint) -> Found:
    """An adapter that PEFT saved, for this model. Raises FormatError if it is not plain LoRA, or not of such a model.

    Args:
        path: its folder.
        gpt: the base; nothing is changed.
        values: `adapter_config.json`.
        checkpoint: `adapter_model.safetensors`.
    """
    rest = {"use_bias": values.get("bias") not in (None, "none"), **values}
    strange = [name for name, value in rest.items() if value and name not in {*_READ, *_HARMLESS, "bias"}]
    if values.get("peft_type") != "LORA" or strange or values.get("init_lora_weights") not in _INITS:
        what = few(strange) or f"peft_type {shown(values.get('peft_type'))}, or its init_lora_weights"
        raise FormatError(path / CONFIG, f"this is not plain LoRA: {what}.", "Merge it with PEFT, and load the result.")
    tensors = dict(_tensors(path, gpt, checkpoint))
    try:
        rank, alpha, dropout = values.get("r"), values.get("lora_alpha"), values.get("lora_dropout", 0.0)
        lora = LoRA(rank, alpha, dropout, kinds_of(tensors), bool(values.get("use_rslora")))  # type: ignore[arg-type]
        layers = target_layers(gpt, lora)
    except ConfigError as error:
        raise FormatError(path / CONFIG, f"it describes an adapter that this model cannot have: {error}") from None
    shapes = {f"{name}.lora_a": (lora.rank, layer.in_features) for name, layer in layers.items()}
    shapes |= {f"{name}.lora_b": (layer.out_features, lora.rank) for name, layer in layers.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wrong := sorted(dict(found.items() ^ shapes.items())):
        raise FormatError(path, f"its tensors do not fit this model: {few(wrong)}.", "Is it an adapter of this base?")
    return Found(lora, str(values.get("base_model_name_or_path")), tensors)


def _tensors(path: Path, gpt: GPT, checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file under our names; a fused matrix's are split."""
    modules = dict(_modules(gpt))
    for name, info in checkpoint.tensors.items():
        part = next((part for part in (_A, _B) if name.endswith(part)), "")
        rule = modules.get(name.removeprefix(_START).removesuffix(part)) if part else None
        if rule is None or not name.startswith(_START) or len(info.shape) != 2 or "float" not in info.dtype:
            expected = f"matrices such as {_START}{next(iter(modules))}{_A}"
            raise FormatError(path, f"tensor {shown(name)} ({info.dtype} {[*info.shape]}): expected {expected}.")
        layers = _layers(rule)
        arrays = [checkpoint.read(name)] * len(layers)
        if part == _B and len(layers) > 1:
            splits = tuple(op for op in rule.ops if not isinstance(op, Transpose))
            if info.shape[0] != sum(parameter_shapes(gpt.config)[target][0] for target in rule.target):
                raise FormatError(path, f"tensor {shown(name)} has {info.shape[0]} rows, and this model's has others.")
            arrays = apply(splits, arrays[:1], gpt.config)
        for layer, array in zip(layers, arrays, strict=True):
            yield f"{layer}.{'lora_a' if part == _A else 'lora_b'}", to_tensor(array)


def _modules(gpt: GPT) -> Iterator[tuple[str, Rule]]:
    """HuggingFace's name of each module with a matrix that an adapter can stand beside, and the rule for it."""
    table = table_for(gpt.config.architecture, "hf")
    for rule in table.needed(gpt.config, parameter_shapes(gpt.config)):
        if rule.source.endswith(".weight") and kinds_of(rule.target):
            yield table.written_name(rule).removesuffix(".weight"), rule


def _layers(rule: Rule) -> list[str]:
    return [target.removesuffix(".weight") for target in rule.target]
