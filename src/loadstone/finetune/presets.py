"""Strategies by name, as text and as tables: what a user writes becomes a `Strategy` that fits the model.

A preset ends as plain phases, so a run's record says what was done even if a preset should change later.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from ..checkpoint.wording import shown
from ..errors import ConfigError
from .selectors import Parts
from .strategy import Phase, Strategy

_START = re.compile(r"(\d{1,15})(ep)?")
_FORM = (
    "phases are START:SELECTORS, as in `0:head,norm;1ep:blocks.9-11;2ep:all`; a start is in steps, or in epochs (ep)"
)


def strategy_for(
    model: nn.Module,
    given: str | Sequence[Mapping[str, Any]] = "full",
    *,
    layer_decay: float = 1.0,
    untie: bool = False,
) -> Strategy:
    """The strategy that a user asked for, checked against the model.

    Args:
        model: a GPT, or a module that holds one.
        given: one of `PRESETS`; phases as text, as in `0:head,norm;1ep:blocks.9-11;2ep:all`; or a list of mappings
            with `at`, `unit` and `train`.
        layer_decay, untie: see `Strategy`.

    Raises ConfigError for what cannot be meant, and for what this model cannot do.
    """
    name, _, argument = given.partition(":") if isinstance(given, str) else ("", "", "")
    if name in PRESETS:
        phases = PRESETS[name].build(Parts.of(model, untie=untie), argument)
    elif isinstance(given, str) and not given[:1].isdigit():
        usages = "; ".join(preset.usage for preset in PRESETS.values())
        raise ConfigError(f"strategy: {shown(given)} is not known. Presets: {usages}. Otherwise {_FORM}.")
    elif isinstance(given, str):
        phases = tuple(_from_text(part.strip()) for part in given.split(";"))
    elif isinstance(given, Sequence):
        phases = tuple(map(Phase.from_json, given))
    else:
        raise ConfigError(f"strategy: expected a text, or a list of phases, found {shown(given)}; {_FORM}.")
    strategy = Strategy(phases, layer_decay, untie)
    strategy.check(model)
    return strategy


def _from_text(text: str) -> Phase:
    start, _, train = text.partition(":")
    return Phase(*_start(start, text), tuple(word.strip() for word in train.split(",")))


def _start(start: str, text: str) -> tuple[int, str]:
    match = _START.fullmatch(start.strip())
    if match is None:
        raise ConfigError(f"strategy: {shown(text)}: {shown(start)} is no start; {_FORM}.")
    return int(match[1]), "epoch" if match[2] else "step"


# -- presets


def _output(parts: Parts) -> str:
    return "score" if parts.has("score") else "head"


def _top(parts: Parts) -> tuple[str, ...]:
    """The final norm, and the output layer unless the embedding is it."""
    return ("norm",) if parts.tied else ("norm", _output(parts))


def _full(parts: Parts, argument: str) -> tuple[Phase, ...]:
    return _once("full", argument, "all")


def _head(parts: Parts, argument: str) -> tuple[Phase, ...]:
    return _once("head", argument, _output(parts))


def _lora(parts: Parts, argument: str) -> tuple[Phase, ...]:
    return _once("lora", argument, "lora", *(("score",) if parts.has("score") else ()))


def _once(preset: str, argument: str, *train: str) -> tuple[Phase, ...]:
    if argument:
        raise ConfigError(f"strategy: {preset} takes nothing behind a colon, found {shown(argument)}.")
    return (Phase(0, "step", train),)


def _freeze(parts: Parts, argument: str) -> tuple[Phase, ...]:
    first = _count(parts, argument, "freeze:K")
    return (Phase(0, "step", (*((f"blocks.{first}-",) if first < parts.n_layers else ()), *_top(parts))),)


def _last(parts: Parts, argument: str) -> tuple[Phase, ...]:
    count = _count(parts, argument, "last:K")
    return (Phase(0, "step", (*((f"blocks.-{count}-",) if count else ()), *_top(parts))),)


def _count(parts: Parts, argument: str, usage: str) -> int:
    if not re.fullmatch(r"\d{1,6}", argument) or int(argument) > parts.n_layers:
        raise ConfigError(
            f"strategy: K in {usage} is a number of blocks, 0 to {parts.n_layers} in this model; found "
            f"{shown(argument)}."
        )
    return int(argument)


def _gradual(parts: Parts, argument: str) -> tuple[Phase, ...]:
    """The lesson's (document 002): output layer and final norm, then the last 3 blocks (a third if fewer), then all."""
    starts = (argument or "1ep,2ep").split(",")
    if len(starts) != 2:
        raise ConfigError(f"strategy: gradual wants the starts of phases 2 and 3, as 1ep,2ep; found {shown(argument)}.")
    second, third = (_start(start, f"gradual:{argument}") for start in starts)
    blocks = max(1, min(3, parts.n_layers // 3))
    return (
        Phase(0, "step", (_output(parts), "norm")),
        Phase(*second, (f"blocks.-{blocks}-",)),
        Phase(*third, ("all",)),
    )


class Preset(NamedTuple):
    usage: str
    build: Callable[[Parts, str], tuple[Phase, ...]]


PRESETS: Mapping[str, Preset] = {
    "full": Preset("full", _full),
    "head": Preset("head (the output layer alone)", _head),
    "freeze": Preset("freeze:K (embeddings and the first K blocks stay)", _freeze),
    "last": Preset("last:K (the last K blocks, final norm and output layer learn)", _last),
    "gradual": Preset("gradual, gradual:1ep,2ep or gradual:200,400 (starts of its phases 2 and 3)", _gradual),
    "lora": Preset("lora (the adapter alone)", _lora),
}
