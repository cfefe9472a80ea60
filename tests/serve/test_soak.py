"""A short run of benchmarks/serve_soak.py: good and bad clients at once; and that it would notice what it looks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import loadstone
from loadstone.model import GPT
from loadstone.save import save_model
from test_chat_template import CHATML

SOAK = Path(__file__).parents[2] / "benchmarks" / "serve_soak.py"


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that knows messages: tiny's shape and vocabulary, other weights."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    model, tokenizer = loadstone.load("tiny")
    assert tokenizer
    torch.manual_seed(0)
    other = GPT(model.config)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    save_model(other, folder, replace(tokenizer, chat_template=CHATML))
    return folder


def test_some_seconds_of_everything_at_once(chat_model: Path) -> None:
    command = [sys.executable, str(SOAK), str(chat_model), "--seconds", "8", "--threads", "1", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=150, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    kinds = {outcome.partition(":")[0] for outcome in found["outcomes"]}
    assert {"behaves", "vanishes", "is_refused"} <= kinds
