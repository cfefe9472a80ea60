"""GPT-2 of the full 124M shape with hostile weights, in four containers, each written by its own program.

HuggingFace safetensors (safetensors' library), rasbt's `.pth` (torch.save), OpenAI's checkpoint (TensorFlow), GGUF (the
gguf package): all load into the same model, bit for bit, and its logits are transformers'.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dialects
from loadstone.load import load_model, open_source
from loadstone.model import GPT
from model_files import write_gguf

transformers = pytest.importorskip("transformers")
tensorflow = pytest.importorskip("tensorflow")
pytestmark = pytest.mark.filterwarnings("default")

CONFIG = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "n_positions": 1024, "n_ctx": 1024,
    "n_embd": 768, "n_layer": 12, "n_head": 12, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    "bos_token_id": 50256, "eos_token_id": 50256,
}  # fmt: skip


def full_size() -> dialects.Tensors:
    """Sigma 0.04 on rows of 768 is as hostile as 0.2 on rows of 32: more saturates every softmax, and then rounding
    alone moves logits by more than the tolerance."""
    return dialects.gpt2_hf(vocab=50257, context=1024, width=768, layers=12, sigma=0.04)


@pytest.fixture(scope="module")
def weights() -> dialects.Tensors:
    return full_size()


@pytest.fixture(scope="module")
def from_safetensors(weights: dialects.Tensors, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, GPT]]:
    from safetensors.numpy import save_file

    folder = tmp_path_factory.mktemp("hf")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    yield folder, load_model(open_source(folder))
    (folder / "model.safetensors").unlink()


def same_bits(a: GPT, b: GPT) -> bool:
    left, right = dict(a.named_parameters()), dict(b.named_parameters())
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_parameter_count_and_logits(from_safetensors: tuple[Path, GPT]) -> None:
    folder, model = from_safetensors
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    for length in (1, 7, 64, 1024):
        ids = torch.randint(0, 50257, (1, length), generator=torch.Generator().manual_seed(length))
        with torch.inference_mode():
            ours, reference = model(ids), theirs(ids).logits
        assert (ours - reference).abs().max() < 1e-4


def test_rasbt_pth(weights: dialects.Tensors, from_safetensors: tuple[Path, GPT], tmp_path: Path) -> None:
    state = {name: torch.from_numpy(value) for name, value in dialects.gpt2_raschka(weights).items()}
    torch.save(state, tmp_path / "gpt2-small-124M.pth")
    identity = open_source(tmp_path / "gpt2-small-124M.pth")
    model = load_model(identity)
    assert identity.weight_map.name == "gpt2/raschka"
    assert identity.config.tied
    assert same_bits(model, from_safetensors[1])
    (tmp_path / "gpt2-small-124M.pth").unlink()


def test_openai_checkpoint_written_by_tensorflow(
    weights: dialects.Tensors, from_safetensors: tuple[Path, GPT], tmp_path: Path
) -> None:
    tf1 = tensorflow.compat.v1
    with tensorflow.Graph().as_default(), tf1.Session() as session:
        for name, value in dialects.gpt2_openai(weights).items():
            tf1.get_variable(name, initializer=tf1.placeholder_with_default(value, value.shape))
        session.run(tf1.global_variables_initializer())
        tf1.train.Saver().save(session, str(tmp_path / "model.ckpt"), write_meta_graph=False)
    hparams = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
    (tmp_path / "hparams.json").write_text(json.dumps(hparams))
    identity = open_source(tmp_path)
    assert (identity.weight_map.name, identity.config_source) == ("gpt2/openai", "hparams.json")
    assert same_bits(load_model(identity), from_safetensors[1])


def test_gguf(weights: dialects.Tensors, from_safetensors: tuple[Path, GPT], tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", weights, heads=12)
    identity = open_source(tmp_path / "model.gguf")
    assert (identity.weight_map.name, identity.config_source) == ("gpt2/gguf", "GGUF metadata")
    assert same_bits(load_model(identity), from_safetensors[1])
    (tmp_path / "model.gguf").unlink()
