"""PEFT's adapter files: read as they are, written where PEFT can say what ours are.

PEFT is no dependency: what it writes is written here by hand, from its checkpoint guide and from files of version 0.21.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn
from typer import Typer
from typer.testing import CliRunner

from loadstone.cli.adapter import merge as merge_command
from loadstone.cli.options import spread
from loadstone.errors import LoadstoneError
from loadstone.finetune.adapter import load_adapter, save_adapter
from loadstone.finetune.lora import LoRA, adapted, merge
from loadstone.finetune.record import RECORD, WEIGHTS
from loadstone.save import save_model
from small_gpt import Wrapped, small_gpt, small_llama, small_neox, trained

CONFIG = "adapter_config.json"


def test_peft_s_files_are_written_where_it_can_read_them(tmp_path: Path) -> None:
    save_adapter(
        trained(small_llama(2), LoRA(rank=3, alpha=7, targets=("q", "down", "head"))), tmp_path / "a", "my/llama"
    )
    values = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert values["target_modules"] == ["lm_head", "mlp.down_proj", "self_attn.q_proj"]
    assert (values["r"], values["lora_alpha"], values["fan_in_fan_out"]) == (3, 7, False)
    assert values["base_model_name_or_path"] == "my/llama"
    shapes = {name: array.shape for name, array in load_file(tmp_path / "a" / WEIGHTS).items()}
    start = "base_model.model.model.layers.1.mlp.down_proj"
    assert shapes[f"{start}.lora_A.weight"] == (3, 64)
    assert shapes[f"{start}.lora_B.weight"] == (16, 3)
    assert shapes["base_model.model.lm_head.lora_B.weight"] == (61, 3)
    assert len(shapes) == 10
    save_adapter(trained(small_gpt(2), LoRA(rank=2, targets=("out", "up"))), tmp_path / "g", "gpt2")
    values = json.loads((tmp_path / "g" / CONFIG).read_text())
    assert values["target_modules"] == ["attn.c_proj", "mlp.c_fc"]
    assert values["fan_in_fan_out"] is True


@pytest.mark.parametrize("make", [lambda: small_gpt(2), small_neox, lambda: Wrapped(small_llama(1))])
def test_where_peft_could_not_read_them_there_is_no_file_for_it(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    also = ["score.weight"] if isinstance(make(), Wrapped) else []
    save_adapter(trained(make(), None, *also), tmp_path / "a", "x")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [RECORD, WEIGHTS]
    load_adapter(make(), tmp_path / "a")


def peft_adapter(folder: Path, modules: dict[str, tuple[int, int]], rank: int = 2, **config: Any) -> dict[str, Any]:
    """As PEFT writes it; modules are {HuggingFace's name: (in, out)}."""
    rng = np.random.default_rng(0)
    tensors = {}
    for module, (into, out) in modules.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = rng.standard_normal((rank, into), np.float32)
        tensors[f"base_model.model.{module}.lora_B.weight"] = rng.standard_normal((out, rank), np.float32)
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "bias": "none", "peft_version": "0.21", **config}
    (folder / CONFIG).write_text(json.dumps(values))
    return tensors


def test_peft_s_adapter_of_a_fused_matrix_is_split(tmp_path: Path) -> None:
    """GPT-2's c_attn: x W + scale * B A x on the fused rows must be what q, k and v get."""
    modules = {f"transformer.h.{i}.attn.c_attn": (16, 48) for i in range(2)}
    tensors = peft_adapter(tmp_path / "a", modules, fan_in_fan_out=True, base_model_name_or_path="gpt2")
    model, base = small_gpt(2), small_gpt(2)
    found = load_adapter(model, tmp_path / "a")
    assert (found.source, found.weights, found.lora.targets) == ("gpt2", None, ("q", "k", "v"))
    merge(model)
    for i in range(2):
        name = f"base_model.model.transformer.h.{i}.attn.c_attn"
        update = torch.from_numpy(tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]) * 2
        for rows, part in zip(update.split(16), "qkv", strict=True):  # type: ignore[no-untyped-call]
            weight = f"blocks.{i}.attn.{part}.weight"
            torch.testing.assert_close(model.get_parameter(weight).detach(), base.get_parameter(weight) + rows)


def test_gpt_neox_interleaves_q_k_and_v_within_each_head(tmp_path: Path) -> None:
    modules = {f"gpt_neox.layers.{i}.attention.query_key_value": (16, 48) for i in range(2)}
    tensors = peft_adapter(tmp_path / "a", modules)
    model = small_neox()
    load_adapter(model, tmp_path / "a")
    rows = tensors["base_model.model.gpt_neox.layers.1.attention.query_key_value.lora_B.weight"].reshape(4, 3, 4, 2)
    for j, part in enumerate("qkv"):  # [heads, q/k/v, head_dim, rank]
        found = model.get_parameter(f"blocks.1.attn.{part}.lora_b").detach().numpy()
        assert np.array_equal(found, rows[:, j].reshape(16, 2))


def test_peft_s_llama_adapter_is_read(tmp_path: Path) -> None:
    sizes = {"self_attn.q_proj": (16, 16), "self_attn.v_proj": (16, 8), "mlp.down_proj": (64, 16)}
    modules = {f"model.layers.{i}.{name}": size for i in range(2) for name, size in sizes.items()}
    tensors = peft_adapter(tmp_path / "a", modules, use_rslora=True, lora_dropout=0.05, task_type="CAUSAL_LM")
    model = small_llama(2)
    lora = load_adapter(model, tmp_path / "a").lora
    assert lora == LoRA(2, 4, 0.05, ("q", "v", "down"), True)
    name = "model.layers.1.self_attn.v_proj"
    assert np.array_equal(
        model.get_parameter("blocks.1.attn.v.lora_b").detach().numpy(),
        tensors[f"base_model.model.{name}.lora_B.weight"],
    )


@pytest.mark.parametrize(
    ("modules", "config", "problem"),
    [
        ({"model.layers.0.self_attn.q_proj": (16, 16)}, {}, r"do not fit this model: blocks.1.attn.q.lora_a"),
        (
            {"model.layers.0.self_attn.c_attn": (16, 16)},
            {},
            "expected matrices such as base_model.model.lm_head.lora_A",
        ),
        ({"model.layers.9.self_attn.q_proj": (16, 16)}, {}, "expected matrices such as"),
        ({f"model.layers.{i}.self_attn.q_proj": (16, 20) for i in (0, 1)}, {}, "do not fit this model"),
        ({f"model.layers.{i}.self_attn.q_proj": (16, 16) for i in (0, 1)}, {"r": 3}, "do not fit this model"),
        ({}, {}, "at least one kind"),
        ({}, {"use_dora": True}, "not plain LoRA: use_dora"),
        ({}, {"rank_pattern": {"q": 3}, "new_trick": 1}, "not plain LoRA: rank_pattern, new_trick"),
        ({}, {"bias": "all"}, "not plain LoRA: "),
        ({}, {"modules_to_save": ["lm_head"]}, "not plain LoRA: modules_to_save"),
        ({}, {"peft_type": "IA3"}, "not plain LoRA: peft_type 'IA3'"),
        ({}, {"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({}, {"init_lora_weights": ["x"]}, "init_lora_weights"),
        ({}, {"r": None}, "rank must be"),
    ],
)
def test_what_is_not_plain_lora_of_this_model_is_refused(
    modules: dict[str, tuple[int, int]], config: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    peft_adapter(tmp_path / "a", modules, **config)
    model = small_llama(2)
    with pytest.raises(LoadstoneError, match=problem):
        load_adapter(model, tmp_path / "a")
    assert not list(adapted(model))


def test_merge_says_that_a_peft_base_is_unchecked(tmp_path: Path) -> None:
    command = Typer()
    command.command()(spread(merge_command))
    save_model(small_llama(1), tmp_path / "base")
    peft_adapter(
        tmp_path / "a", {"model.layers.0.self_attn.q_proj": (16, 16)}, base_model_name_or_path="some/\x1b[31mbase"
    )
    result = CliRunner().invoke(command, [str(tmp_path / name) for name in ("base", "a", "out")])
    assert result.exit_code == 0, result.output
    assert "not checked: PEFT records a base by name alone, here some/\\x1b[31mbase" in result.output
