"""`save_model`: a live model as a folder that any program of the field opens, or nothing at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loadstone import GPT, GPTConfig, LoadstoneError, load
from loadstone.certificate import check
from loadstone.config import Rope
from loadstone.config.families import LLAMA_FIELDS
from loadstone.save import save_model

CONFIGS = {
    "gpt2": GPTConfig(97, 24, 32, 2, 4),
    "gpt2, untied, as the book trains it": GPTConfig(97, 24, 32, 2, 4, qkv_bias=False, tied=False),
    "llama": GPTConfig(97, 24, 32, 2, 4, architecture="llama", n_kv_heads=2, rope=Rope(), tied=False, **LLAMA_FIELDS),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_saved_is_loaded_to_the_bit(name: str, tmp_path: Path) -> None:
    model = GPT(CONFIGS[name]).eval()
    model.train()

    def more(folder: Path) -> None:
        (folder / "more.txt").write_text("more")

    values = save_model(model, tmp_path / "model", beside=more)
    assert model.training  # left as it was
    again, _ = load(tmp_path / "model")
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert all(found.ok for found in check(tmp_path / "model"))
    assert (tmp_path / "model" / "more.txt").read_text() == "more"
    assert values["counts"]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert (tmp_path / "model" / "config.json").exists() == (name != "gpt2, untied, as the book trains it")


def test_another_type_and_a_live_model_of_that_type(tmp_path: Path) -> None:
    model = GPT(CONFIGS["gpt2"])
    save_model(model, tmp_path / "half", dtype="bfloat16")
    again, _ = load(tmp_path / "half")
    assert torch.equal(again.tok_emb.weight, model.tok_emb.weight.bfloat16())


def test_whatever_fails_leaves_nothing(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(LoadstoneError, match="the disk is full"):
        save_model(GPT(CONFIGS["gpt2"]), tmp_path / "model", beside=full)
    assert not list(tmp_path.iterdir())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    with pytest.raises(LoadstoneError, match="no conversion wrote it"):
        save_model(GPT(CONFIGS["gpt2"]), tmp_path / "model", force=True)
    assert (tmp_path / "model" / "mine.txt").read_text() == "mine"
