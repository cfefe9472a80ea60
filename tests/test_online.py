"""GPT-2 by name, from the hub: what was published for it. Only with `pytest -m online`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from loadstone.errors import SourceError
from loadstone.evaluate.run import evaluate
from loadstone.evaluate.tasks import task_named
from loadstone.load import load
from loadstone.model import GPT
from loadstone.tokenizer import Tokenizer

pytestmark = [pytest.mark.online, pytest.mark.shared]


@pytest.fixture(scope="module")
def gpt2() -> tuple[GPT, Tokenizer]:
    try:
        model, tokenizer = load("gpt2", dtype="float32")
    except SourceError as error:
        if "could not be reached" not in str(error):
            raise
        pytest.skip(f"gpt2 cannot be had here: {error}")
    assert tokenizer is not None
    return model, tokenizer


@pytest.mark.parametrize("prompt", range(5))
def test_the_published_logits_of_the_last_position(gpt2: tuple[GPT, Tokenizer], shared: Path, prompt: int) -> None:
    """Up to one constant for all logits, which no probability depends on."""
    golden = np.load(shared / "golden" / "gpt2_124m_last_logits.npz", allow_pickle=False)
    ids, expected = torch.from_numpy(golden[f"ids{prompt}"]), torch.from_numpy(golden[f"logits{prompt}"])
    with torch.inference_mode():
        found = gpt2[0](ids[None])[0, -1].log_softmax(-1)
    expected = expected.log_softmax(-1)
    assert found.argmax() == expected.argmax()
    assert (expected.exp() * (expected - found)).sum() < 1e-3
    assert (found - expected).abs().max() < 0.05


def test_wikitext2_is_what_others_measured(gpt2: tuple[GPT, Tokenizer], shared: Path, tmp_path: Path) -> None:
    """29.94: token level, stride 1024, the hub's rows joined by blank lines (transformers#13761, llm.c PR #276).

    They score no token at the start of a window, so ours is a little more: 281 tokens of 287,644 that are given one.
    """
    lines = (shared / "data" / "wikitext2.test.raw.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    theirs = tmp_path / "wikitext2.txt"
    theirs.write_text("\n\n".join(line if line.strip() else "" for line in lines), encoding="utf-8")
    options = {"context": 1024, "stride": 1024, "data": {"wikitext2": str(theirs)}}
    (found,) = evaluate(*gpt2, [task_named("wikitext2")], **options)  # type: ignore[arg-type]
    assert found.tokens == 287_644
    assert found.value("token_perplexity") == pytest.approx(29.94, rel=0.01)
