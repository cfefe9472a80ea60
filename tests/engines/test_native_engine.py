"""The native engine behind `--engine native`: the same greedy text as torch's, and what it refuses."""

from __future__ import annotations

import json
import re

import pytest
import torch

from conftest import Run
from loadstone.engines import Engine, open_engine, start_engine
from loadstone.generate import Session, generate
from loadstone.load import load_model, open_source
from loadstone.native import NativeEngine, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "it is there")


@pytest.mark.parametrize("overflow", ["refuse", "window"])
def test_generation_is_that_of_torch(overflow: str) -> None:
    identity = open_source("tiny")
    engine, model = open_engine("native", identity, "float32"), load_model(identity, dtype="float32")
    assert isinstance(engine, Engine)
    prompts = [[5, 6, 7], [900, 13], list(range(100, 150))]
    options = {"max_new_tokens": 230 if overflow == "refuse" else 40, "overflow": overflow}
    assert generate(engine, prompts, **options) == generate(model, prompts, **options)
    session = Session(engine.new_cache(1))
    first = generate(engine, [[5, 6, 7]], max_new_tokens=4, session=session)[0].ids
    again = generate(engine, [[5, 6, 7, *first, 9]], max_new_tokens=4, session=session)[0].ids
    assert again == generate(model, [[5, 6, 7, *first, 9]], max_new_tokens=4)[0].ids


def test_the_command_line(run: Run) -> None:
    for choice in (["--temperature", 0], ["--temperature", 1.2, "--seed", 3], ["--top-p", 0.9, "--seed", 4]):
        same = ["generate", "tiny", "It was a dark night, and", *choice, "-n", 12, "--json", "--dtype", "float32"]
        texts = {json.loads(run(*same, "--engine", engine)[1])[0]["text"] for engine in ("torch", "native")}
        assert len(texts) == 1, choice
    status, out, _ = run("generate", "tiny", "It was", "--engine", "native", "--dtype", "q4", "-n", 3)
    assert status == 0
    assert out.startswith("It was")


def test_what_it_does_not_do_is_refused(run: Run) -> None:
    status, _, error = run("generate", "tiny", "It was", "--engine", "native", "--dtype", "float64")
    assert status == 2
    assert "computes in float32 and bfloat16 and float16 and q8 and q4 only" in re.sub(r"\s+", " ", error)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verify_runs_its_self_test_on_it(run: Run, dtype: str) -> None:
    status, out, _ = run("verify", "tiny", "--engine", "native", "--dtype", dtype)
    assert status == 0
    assert f"engine native on cpu in {dtype}: equals CPU float32 at 16 lengths" in out
    engine = start_engine("native", load_model(open_source("tiny"), dtype="float32"))
    assert isinstance(engine, NativeEngine)
    weights = engine.weight_row("tok_emb.weight", 5)[: engine.config.d_model]
    assert (weights == load_model(open_source("tiny"), dtype="float32").tok_emb.weight[5].detach().numpy()).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_was_changed_in_place_is_packed_as_it_is_and_left_as_it_is(dtype: str) -> None:
    model = load_model(open_source("tiny"), dtype=dtype)  # views of the file, copied where they are written
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    engine = start_engine("native", model)
    assert isinstance(engine, NativeEngine)
    row = torch.from_numpy(engine.weight_row("blocks.0.mlp.up.weight", 3)[: model.config.d_model])
    assert torch.equal(row, before["blocks.0.mlp.up.weight"][3].float())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
