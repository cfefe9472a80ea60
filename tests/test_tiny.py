"""The model that comes with the package: whole, small, what its card says, and found without any network."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

import loadstone
from conftest import Run
from loadstone.checkpoint.hub import OWN
from loadstone.convert import convert
from loadstone.tokenizer import Tokenizer
from loadstone.verify import ENGLISH

TINY = OWN["tiny"]
CARD = (TINY / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tiny() -> tuple[loadstone.GPT, Tokenizer]:
    model, tokenizer = loadstone.load("tiny", dtype="float32")
    assert tokenizer is not None
    return model, tokenizer


def test_it_needs_no_network_and_is_verified(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    status, out, err = run("verify", "tiny")
    assert status == 0, err
    assert "a trained model" in out


def test_a_file_of_that_name_comes_first(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "tiny")
    (tmp_path / "tiny" / "model.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert run("inspect", "tiny")[0] == 2


def test_a_revision_of_it_is_refused(run: Run) -> None:
    assert run("inspect", "tiny@main")[0] == 2


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in TINY.iterdir()) < 24_000_000
    with (TINY / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"BF16"}


def test_the_card_says_what_is_there(tiny: tuple[loadstone.GPT, Tokenizer]) -> None:
    model, tokenizer = tiny
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in CARD
    assert f"{tokenizer.vocab_size:,} tokens" in CARD
    loss, bits, perplexity = (
        float(re.search(rf"\| {name} \| ([\d.]+)", CARD)[1])  # type: ignore[index]
        for name in ("loss", "bits per byte", "perplexity")
    )
    assert math.exp(loss) == pytest.approx(perplexity, rel=1e-3)
    log = [json.loads(line) for line in (TINY / "metrics.jsonl").read_text().splitlines()]
    best = min(line["val_loss"] for line in log if "val_loss" in line)
    assert loss == pytest.approx(best, abs=0.1)  # the run evaluates a part of the validation books, in bfloat16
    assert bits < 2
    assert CARD.count(". prompt: ") == 10


@torch.inference_mode()
def test_it_has_learnt_english(tiny: tuple[loadstone.GPT, Tokenizer]) -> None:
    model, tokenizer = tiny
    ids = torch.tensor([tokenizer.encode(ENGLISH)])
    text = torch.nn.functional.cross_entropy(model(ids)[0, :-1].float(), ids[0, 1:])
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    other = torch.nn.functional.cross_entropy(model(shuffled)[0, :-1].float(), shuffled[0, 1:])
    assert text < 5.5 < other - 1


def test_its_samples_are_those_of_the_card(tiny: tuple[loadstone.GPT, Tokenizer]) -> None:
    """Unedited means that anybody gets them; not compared to the last word, as rounding differs between machines."""
    from loadstone.generate import stream_text

    model, tokenizer = tiny
    prompt = "The old house"
    ids = tokenizer.encode(prompt)
    text = "".join(stream_text(model, tokenizer, ids, max_new_tokens=60, seed=1, temperature=0.8, top_k=50))
    assert prompt + text[:12] in CARD


@pytest.mark.parametrize("dialect", ["openai", "lesson", "raschka", "gguf"])
@torch.inference_mode()
def test_it_survives_every_dialect(tiny: tuple[loadstone.GPT, Tokenizer], dialect: str, tmp_path: Path) -> None:
    target = tmp_path / {"gguf": "tiny.gguf", "openai": "tiny"}.get(dialect, "tiny.pth")
    convert("tiny", target, to=dialect, parity=False)
    back, _ = loadstone.load(target, dtype="float32")
    ids = torch.arange(40)[None] * 7
    assert torch.equal(copied(back)(ids), copied(tiny[0])(ids))
    torch.testing.assert_close(back(ids), tiny[0](ids))


def copied(model: loadstone.GPT) -> loadstone.GPT:
    """The same weights, in memory of their own: on one thread, MKL rounds by where they lie in a mapped file."""
    fresh = loadstone.GPT(model.config)
    assert not any(fresh.load_state_dict(model.state_dict()))
    return fresh.eval()
