"""OpenAI's GPT-2 in the book's shape, and weights of any dialect for a model that is there already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..checkpoint import open_checkpoint
from ..checkpoint.base import Array
from ..checkpoint.hub import resolve
from ..checkpoint.memory import Arrays
from ..config import PRESETS, GPTConfig
from ..config.to_others import to_openai
from ..errors import PlanError
from ..load import load_model
from ..model import GPT
from ..weightmap import identify

# The book's name of a setting -> ours; its drop_rate is no part of our config.
FIELDS = {name: name for name in ("vocab_size", "context_length", "n_heads", "n_layers", "qkv_bias")}
FIELDS["emb_dim"] = "d_model"
# What does not change the function, or follows from FIELDS.
OTHERS = ("tied", "bos_id", "eos_ids", "n_kv_heads", "head_dim")


def download_and_load_gpt2(model_size: str, models_dir: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings, params) of OpenAI's GPT-2: 124M, 355M, 774M or 1558M, without TensorFlow.

    `models_dir/model_size` is used if it is there. Else it becomes a link into Loadstone's cache, where the files are
    downloaded to, resumed if need be, and checked.
    """
    folder = Path(models_dir) / model_size
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.unlink(missing_ok=True)  # a link into a cache that was emptied
        folder.symlink_to(resolve(f"openai:{model_size}").absolute(), target_is_directory=True)
    identity = identify(open_checkpoint(folder), dialect="openai")
    identity.plan.require_clean(str(folder))
    params: dict[str, Any] = {}
    for step in identity.plan.steps:
        place, (*scopes, leaf) = params, step.source.removeprefix("model/").removeprefix("ln_f/").split("/")
        for scope in scopes:
            place = place.setdefault(scope, {})
        place[leaf] = np.squeeze(identity.checkpoint.read(step.source))
    params["blocks"] = [params.pop(f"h{i}") for i in range(identity.config.n_layers)]
    return to_openai(identity.config), params


def load_weights_into_gpt(gpt: GPT, params: Mapping[str, Any]) -> None:
    """Copies `params` of `download_and_load_gpt2` into a model; the head becomes a copy of the token embedding.

    Raises PlanError if the model was made for other sizes, and says which settings are wrong.
    """
    if not isinstance(params, Mapping) or "blocks" not in params:
        raise PlanError("params: expected the second of the two things that download_and_load_gpt2 returns.")
    arrays = {f"model/{'ln_f/' * (key in 'gb')}{key}": value for key, value in params.items() if key != "blocks"}
    for i, block in enumerate(params["blocks"]):
        arrays |= dict(_flat(block, f"model/h{i}"))
    gpt.load_state_dict(from_arrays(gpt.config, arrays, "params"))


def _flat(tree: Mapping[str, Any], at: str) -> Iterator[tuple[str, Array]]:
    """Leaves by OpenAI's names; its matrices are kernels of convolutions of width 1, so they have one more axis."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{at}/{key}")
        else:
            yield f"{at}/{key}", value[None] if value.ndim == 2 else value


def from_arrays(ours: GPTConfig, arrays: dict[str, Array], called: str) -> dict[str, Tensor]:
    """Weights of any dialect under our names, with a head. Raises PlanError if they are another model's than `ours`."""
    identity = identify(Arrays(Path(called), arrays))
    theirs = identity.config
    # Shapes do not show the number of heads; where they are a published model's, it is known.
    heads_known = (theirs.d_model, theirs.n_layers) in {(p.d_model, p.n_layers) for p in PRESETS.values()}
    told = [name for name in FIELDS if name != "n_heads" or heads_known]
    wrong = {n: getattr(theirs, FIELDS[n]) for n in told if getattr(ours, FIELDS[n]) != getattr(theirs, FIELDS[n])}
    if wrong:
        found = ", ".join(f"{name} {getattr(ours, FIELDS[name])}" for name in wrong)
        needed = ", ".join(f'"{name}": {value}' for name, value in wrong.items())
        raise PlanError(
            f"{called}: these weights belong to another model than the one that was made with {found}. Make it with "
            f"`GPTModel({{**GPT_CONFIG_124M, {needed}}})`, and generate with the same context_size."
        )
    rest = [field.name for field in fields(ours) if field.name not in (*FIELDS.values(), *OTHERS)]
    if differs := [f"{n} {getattr(theirs, n)!r}" for n in rest if getattr(ours, n) != getattr(theirs, n)]:
        raise PlanError(f"{called}: of a model with {', '.join(differs)}, unlike GPTModel. Use loadstone.load.")
    state = load_model(identity).state_dict()
    return {"head.weight": state["tok_emb.weight"]} | state
