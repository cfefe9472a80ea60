"""What quantize and prune write, in the programs that it is for: llama.cpp reads the blocks, transformers the rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from loadstone.calibrate.rows import Rows
from loadstone.config import GPTConfig
from loadstone.model import GPT
from loadstone.prune.run import Settings as Pruning
from loadstone.prune.run import prune
from loadstone.quantize.blocks import TYPES
from loadstone.quantize.run import Settings, quantize
from loadstone.quantize.write import write_quantised
from loadstone.save import save_model
from peers.test_exported import GPT2, LLAMA, opened

pytestmark = pytest.mark.filterwarnings("default")
SHAPES = {
    "gpt2": replace(GPT2, vocab_size=410, d_model=128, n_heads=4, head_dim=32, d_ff=256),
    "llama": replace(LLAMA, vocab_size=410, d_model=128, n_heads=4, n_kv_heads=2, head_dim=32, d_ff=256),
}
IDS = torch.randint(0, 400, (8, 40), generator=torch.Generator().manual_seed(0))


def hostile(config: GPTConfig) -> GPT:
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)
    return model.eval()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_computes_with_our_blocks(name: str, kind: str, tmp_path: Path) -> None:
    """It rounds activations to 8 bits where weights are blocks, so logits are close, not equal."""
    model = hostile(SHAPES[name])
    done = quantize(model, Settings(kind, "gptq"), Rows(IDS, "made"))
    write_quantised(model, done, tmp_path / "q", None, {}, source=Path("made"))
    ids = list(range(100, 140))
    expected = model(torch.tensor([ids]))[0].detach().numpy()
    with opened(tmp_path / "q" / "model.gguf", logits_all=True) as llama:
        llama.eval(ids)
        found = np.array(llama.scores[:40], np.float32)
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.99


@pytest.mark.parametrize("structure", ["none", "heads", "layers"])
@pytest.mark.parametrize("name", SHAPES)
def test_transformers_loads_a_pruned_model(name: str, structure: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    if (name, structure) == ("gpt2", "heads"):
        pytest.skip("GPT-2's config has no head_dim; the command says so (tests/prune)")
    done = prune(hostile(SHAPES[name]), Pruning(0.5, "wanda", structure), Rows(IDS, "made"))
    save_model(done.model, tmp_path / "p")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "p", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.inference_mode():
        assert float((theirs.eval()(IDS).logits - done.model(IDS)).abs().max()) < 1e-4
    assert sum(value.numel() for value in theirs.parameters()) == done.parameters
