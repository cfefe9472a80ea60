"""verify: sound loads pass, and each kind of damage makes it say no."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import dialects
from loadstone.errors import LoadstoneError
from loadstone.load import load_model, open_source
from loadstone.model import GPT
from loadstone.verify import english_loss, judge_loss, verify
from loadstone.weightmap import Identity
from model_files import GPT2, tensors_of, write_hf, write_torch


@pytest.fixture
def loaded(tmp_path: Path) -> tuple[Identity, GPT]:
    identity = open_source(write_hf(tmp_path))
    return identity, load_model(identity)


def failed(identity: Identity, model: GPT, **options: Any) -> dict[str, str]:
    return {c.name: c.detail for c in verify(identity, model, **options).checks if c.ok is False}


def test_a_sound_load_passes_and_counts(loaded: tuple[Identity, GPT]) -> None:
    report = verify(*loaded)
    assert report.ok
    total = sum(array.size for array in GPT2.values())
    assert report.counts == {
        "parameters": total, "parameters_with_untied_head": total + 101 * 32, "not_parameters_in_file": 0,
    }  # fmt: skip
    assert report.as_dict()["ok"] is True


def test_masks_are_counted_apart(tmp_path: Path) -> None:
    path = write_torch(tmp_path / "r.pth", tensors_of(dialects.gpt2_raschka(GPT2)))
    identity = open_source(path, config={"n_heads": 4})
    counts = verify(identity, load_model(identity)).counts
    assert counts["not_parameters_in_file"] == 3 * 40 * 40
    assert counts["parameters"] == sum(array.size for array in GPT2.values())


@pytest.mark.parametrize(
    "name", ["tok_emb.weight", "blocks.1.attn.k.weight", "blocks.2.mlp.down.bias", "norm.bias", "blocks.0.norm2.weight"]
)
def test_one_changed_bit_in_one_parameter_is_found(loaded: tuple[Identity, GPT], name: str) -> None:
    identity, model = loaded
    bits = model.get_parameter(name).detach().view(torch.int32)
    bits[(-1,) * bits.dim()] ^= 1  # copy-on-write: the file keeps its bit
    assert list(failed(identity, model)) == ["every parameter equals its source"]


def test_exchanged_parameters_are_found(loaded: tuple[Identity, GPT]) -> None:
    identity, model = loaded
    model.blocks[0].norm1, model.blocks[0].norm2 = model.blocks[0].norm2, model.blocks[0].norm1
    assert "h.0.ln_1.weight" in failed(identity, model)["every parameter equals its source"]


def test_a_file_that_changed_after_the_load_is_found(loaded: tuple[Identity, GPT]) -> None:
    identity, model = loaded
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.clone())  # private memory: the file may now change beneath
    file = identity.checkpoint.path
    with file.open("r+b") as stream:  # in place: truncating would pull the mapped pages away
        stream.seek(-1, 2)
        last = stream.read(1)[0]
        stream.seek(-1, 2)
        stream.write(bytes([last ^ 0x10]))
    assert "every parameter equals its source" in failed(identity, model)


def test_nan_is_found(tmp_path: Path) -> None:
    broken = GPT2 | {"h.1.ln_1.bias": GPT2["h.1.ln_1.bias"] * float("nan")}
    identity = open_source(write_hf(tmp_path, broken))
    assert failed(identity, load_model(identity)) == {
        "all values finite": "NaN or infinity in blocks.1.norm1.bias",
        "runs": "logits are NaN or infinite",
    }


def test_a_cast_model_is_compared_with_the_cast_file(loaded: tuple[Identity, GPT]) -> None:
    identity, _ = loaded
    assert verify(identity, load_model(identity, dtype="bfloat16")).ok


class Bytes:
    """A tokenizer of letters, for a vocabulary of 101."""

    vocab_size = 101

    def encode(self, text: str) -> list[int]:
        return [ord(c) % 101 for c in text]


def test_loss_of_random_weights_is_no_verdict_and_of_hostile_ones_a_no(loaded: tuple[Identity, GPT]) -> None:
    tokenizer: Any = Bytes()
    torch.manual_seed(0)
    fresh = GPT(loaded[1].config)
    loss = english_loss(fresh, tokenizer)
    assert loss == pytest.approx(math.log(101), rel=0.05)
    assert judge_loss(loss, 101).ok is None
    assert "worse than guessing" in failed(*loaded, tokenizer=tokenizer)["loss on English"]


@pytest.mark.parametrize(
    ("loss", "ok", "word"),
    [(3.2, True, "trained"), (9.5, None, "untrained"), (10.8, None, "untrained"), (12.0, False, "worse than guessing"),
     (math.nan, False, "broken")],
)  # fmt: skip
def test_verdicts_on_gpt2s_loss(loss: float, ok: bool | None, word: str) -> None:
    check = judge_loss(loss, 50257)
    assert check.ok is ok
    assert word in check.detail


def test_without_a_reference_the_witnesses_are_asked_and_with_one_they_are_not(
    loaded: tuple[Identity, GPT], tmp_path: Path
) -> None:
    alone = {check.name for check in verify(*loaded).checks}
    compared = {check.name for check in verify(*loaded, against=str(tmp_path)).checks}
    assert {f"logits at length {n}" for n in (1, 7, 40)} == compared - alone
    assert alone - compared


def test_an_engine_is_compared_with_the_cpu(loaded: tuple[Identity, GPT]) -> None:
    report = verify(*loaded, engine="cached")
    assert report.ok
    assert any("engine cached on cpu in float32" in check.name for check in report.checks)
    with pytest.raises(LoadstoneError, match="no engine is called 'warp'"):
        verify(*loaded, engine="warp")


def test_a_reference_that_is_not_there_is_refused(loaded: tuple[Identity, GPT]) -> None:
    with pytest.raises(LoadstoneError, match="gpt4all: there is no such file or folder"):
        verify(*loaded, against="gpt4all")


def test_a_reference_of_another_model_is_refused(loaded: tuple[Identity, GPT], tmp_path: Path) -> None:
    other = write_hf(tmp_path / "other", dialects.gpt2_hf(width=48), n_embd=48)
    with pytest.raises(LoadstoneError, match=r"of another model.*d_model is 48 there and 32 here"):
        verify(*loaded, against=str(other))


@pytest.mark.skipif(find_spec("transformers") is not None, reason="transformers is installed")
def test_a_comparison_that_was_asked_for_and_cannot_be_made_is_an_error(loaded: tuple[Identity, GPT]) -> None:
    with pytest.raises(LoadstoneError, match=r"the package is not installed.*A trace"):
        verify(*loaded, against="transformers")
