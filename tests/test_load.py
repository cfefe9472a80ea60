"""open -> plan -> load from real files of every container: same bits, no copies, types, memory, live modules."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import dialects
from loadstone.errors import LoadstoneError, PlanError, TokenizerError
from loadstone.load import load, load_model, load_tokenizer_for, open_source, require_tokenizer
from loadstone.model import GPT
from mapped import lies_in
from model_files import GPT2, tensors_of, write_gguf, write_hf, write_openai, write_torch


def state(model: GPT) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def same_bits(a: GPT, b: GPT) -> bool:
    left, right = state(a), state(b)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_every_container_gives_the_same_model_bit_for_bit(tmp_path: Path) -> None:
    raschka, nano = tensors_of(dialects.gpt2_raschka(GPT2)), tensors_of(dialects.gpt2_nanogpt(GPT2))
    arguments = {"n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 40, "bias": True, "vocab_size": 101}
    training = {
        "model": {f"_orig_mod.{name}": value for name, value in nano.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}},
        "model_args": arguments,
        "iter_num": 5,
    }
    heads = {"n_heads": 4}
    reference = load_model(open_source(write_hf(tmp_path / "hf")))
    # DialoGPT's .pkl: HuggingFace's names with the head's old one, the head a second copy.
    dialogue = tensors_of({f"transformer.{name}": array for name, array in GPT2.items()})
    dialogue["lm_head.decoder.weight"] = dialogue["transformer.wte.weight"].clone()
    sources: list[tuple[Path, dict[str, Any], str]] = [
        (write_torch(tmp_path / "small_ft.pkl", dialogue, legacy=True), heads, "gpt2/hf"),
        (write_torch(tmp_path / "zip.pth", raschka), heads, "gpt2/raschka"),
        (write_torch(tmp_path / "legacy.bin", raschka, legacy=True), heads, "gpt2/raschka"),
        (write_torch(tmp_path / "ckpt.pt", training), {"activation": "gelu_tanh"}, "gpt2/nanogpt"),
        (write_openai(tmp_path / "openai"), {}, "gpt2/openai"),
        (write_gguf(tmp_path / "model.gguf"), {}, "gpt2/gguf"),
    ]
    for path, config, name in sources:
        identity = open_source(path, config=config)
        assert identity.weight_map.name == name
        model = load_model(identity)
        assert same_bits(model, reference), name
        ids = torch.arange(20)[None]
        with torch.no_grad():
            assert (model(ids) - reference(ids)).abs().max() < 1e-5


def test_shards_give_the_same_model(tmp_path: Path) -> None:
    whole = load_model(open_source(write_hf(tmp_path / "whole")))
    folder, names = tmp_path / "shards", list(GPT2)
    write_hf(folder)
    (folder / "model.safetensors").unlink()
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: GPT2[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same_bits(load_model(open_source(folder)), whole)


def test_parameters_are_views_of_the_file_and_training_never_writes_to_it(tmp_path: Path) -> None:
    weights = dialects.gpt2_hf(width=160)
    folder = write_hf(tmp_path, weights, n_embd=160)
    model = load_model(open_source(folder))
    q = state(model)["blocks.1.attn.q.weight"]
    assert lies_in(q.detach().numpy(), folder / "model.safetensors")
    before = (folder / "model.safetensors").read_bytes()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.arange(20)[None]).logsumexp(-1).sum().backward()
    optimizer.step()
    assert not np.array_equal(q.detach().numpy(), weights["h.1.attn.c_attn.weight"][:, :160].T)
    assert (folder / "model.safetensors").read_bytes() == before


def test_peak_memory_of_a_load_without_rewriting_is_small(tmp_path: Path) -> None:
    """34 MB of weights in HuggingFace's layout, all views: private memory may grow by a few MB, not by the model."""
    folder = write_hf(
        tmp_path, dialects.gpt2_hf(vocab=9000, width=512, layers=1), n_embd=512, vocab_size=9000, n_layer=1
    )
    code = f"""
import re
from loadstone.load import load_model, open_source
import loadstone.model, loadstone.checkpoint.safetensors
def private():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = private()
model = load_model(open_source({str(folder)!r}))
print(private() - before, sum(p.numel() for p in model.parameters()) * 4)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    grown, size = map(int, done.stdout.split())
    assert size > 30e6
    assert grown < 0.2 * size


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32"])
def test_the_stored_type_is_kept_and_can_be_changed(tmp_path: Path, kind: str) -> None:
    numpy_type = np.dtype(ml_dtypes.bfloat16) if kind == "bfloat16" else np.dtype(kind)
    folder = write_hf(tmp_path, {name: value.astype(numpy_type) for name, value in GPT2.items()})
    model, _ = load(folder)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, kind)}
    as_float = state(load(folder, dtype="float32")[0])["blocks.0.mlp.up.weight"]
    assert torch.equal(as_float, state(model)["blocks.0.mlp.up.weight"].float())
    assert {p.dtype for p in load(folder, dtype=torch.float16)[0].parameters()} == {torch.float16}


def test_mixed_types_become_the_widest(tmp_path: Path) -> None:
    mixed = {name: value if value.ndim == 1 else value.astype(np.float16) for name, value in GPT2.items()}
    assert {p.dtype for p in load(write_hf(tmp_path, mixed))[0].parameters()} == {torch.float32}


def test_vectors_that_fit_the_matrices_type_take_it(tmp_path: Path) -> None:
    """GGUF's way: float32 norms beside 16-bit matrices, most widened from 16 bits. One that was not decides."""
    half = {name: value.astype(np.float16) for name, value in GPT2.items()}
    widened = {name: value.astype(np.float32) if value.ndim == 1 else value for name, value in half.items()}
    model, _ = load(write_hf(tmp_path / "fits", widened))
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    for name, value in state(load(write_hf(tmp_path / "half", half))[0]).items():
        assert torch.equal(state(model)[name], value)
    finer = next(name for name, value in widened.items() if value.ndim == 1)
    widened[finer] = widened[finer] + np.float32(1e-7)
    assert {p.dtype for p in load(write_hf(tmp_path / "finer", widened))[0].parameters()} == {torch.float32}


def test_unknown_types_and_integer_weights_are_refused(tmp_path: Path) -> None:
    for wrong_type in ("int7", "int8", "float8_e4m3fn", torch.int8):
        with pytest.raises(PlanError, match=r"dtype .* is not supported"):
            load(write_hf(tmp_path / "a"), dtype=wrong_type)
    for device in ("nonsense", "cuda:99"):
        with pytest.raises(PlanError, match=f"device '{device}' cannot be used here"):
            load(tmp_path / "a", device=device)
    wrong = GPT2 | {"h.0.mlp.c_fc.weight": np.zeros((32, 128), np.int8)}
    with pytest.raises(PlanError, match=r"h.0.mlp.c_fc.weight holds int8; weights must be floating point"):
        load(write_hf(tmp_path / "b", wrong))
    with pytest.raises(PlanError, match=r"h.0.mlp.c_fc.weight holds int8"):
        load(tmp_path / "b", dtype="float32")


def test_nothing_is_allocated_for_a_plan_with_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_hf(tmp_path, {name: value for name, value in GPT2.items() if name != "ln_f.bias"})
    monkeypatch.setattr(GPT, "__init__", lambda *_: pytest.fail("built although a tensor is missing"))
    with pytest.raises(PlanError, match=r"missing 1: ln_f.bias"):
        load(folder)


def test_config_beside_the_file_must_be_of_the_same_model(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"wpe.weight should be \[80, 32\], is \[40, 32\]"):
        load(write_hf(tmp_path, n_positions=80))


def test_progress_counts_bytes_up_to_the_whole(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    load(write_hf(tmp_path), progress=lambda done, total: seen.append((done, total)))
    total = sum(array.nbytes for array in GPT2.values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_live_module_is_a_source_and_its_ties_are_seen() -> None:
    class Named(torch.nn.Module):
        """Any module whose state dict has a known dialect's names."""

        def __init__(self) -> None:
            super().__init__()
            self.held = tensors_of(dialects.gpt2_nanogpt(GPT2))
            self.held["lm_head.weight"] = self.held["transformer.wte.weight"]

        def state_dict(self, *_: Any, **__: Any) -> Any:
            return self.held

    identity = open_source(Named(), config={"n_heads": 4})
    assert "one storage" in identity.plan.tie
    model = load_model(identity)
    assert np.array_equal(state(model)["tok_emb.weight"].detach().numpy(), GPT2["wte.weight"])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_live_half_precision_module(kind: torch.dtype) -> None:
    class Half(torch.nn.Module):
        def state_dict(self, *_: Any, **__: Any) -> Any:
            return {name: value.to(kind) for name, value in tensors_of(GPT2).items()}

    model = load_model(open_source(Half(), config={"n_heads": 4}))
    assert torch.equal(state(model)["pos_emb.weight"], torch.from_numpy(GPT2["wpe.weight"]).to(kind))


def test_what_tokenizer_and_model_disagree_about_is_remarked(tmp_path: Path) -> None:
    folder = write_hf(tmp_path)
    small: dict[str, Any] = {
        "version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(small))
    identity = open_source(folder)
    tokenizer = load_tokenizer_for(identity)
    assert tokenizer is not None
    assert "the model has 99 more rows (101) than the tokenizer has tokens (2)" in identity.remarks[0]
    small["model"]["vocab"] |= {f"t{i}": i for i in range(2, 102)}
    (folder / "tokenizer.json").write_text(json.dumps(small))
    with pytest.raises(TokenizerError, match=r"up to id 101 \(102 rows\), and the model only 101 rows"):
        load(folder)


def test_gpt2s_vocabulary_by_name_or_a_remark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare rasbt file has GPT-2's vocabulary size and no tokenizer beside it."""
    weights = dialects.gpt2_raschka(dialects.gpt2_hf(vocab=50257, context=8, width=8, layers=1), masks=False)
    identity = open_source(write_torch(tmp_path / "g.pth", tensors_of(weights)))
    tokenizer = load_tokenizer_for(identity)
    assert tokenizer is not None
    assert tokenizer.encode("Hello world") == [15496, 995]
    monkeypatch.setattr("loadstone.tokenizer.gpt2_tokenizer", _unavailable)
    assert load_tokenizer_for(identity) is None
    assert identity.remarks == ["nowhere"]
    with pytest.raises(LoadstoneError, match=r"mine: no tokenizer lies beside .* nowhere Put the model's own"):
        require_tokenizer(None, "mine", identity.remarks)


def _unavailable(_: Any) -> Any:
    raise TokenizerError("nowhere")


def test_a_live_module_does_not_read_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{broken")
    monkeypatch.chdir(tmp_path)

    class Bare(torch.nn.Module):
        def state_dict(self, *_: Any, **__: Any) -> Any:
            return tensors_of(GPT2)

    assert open_source(Bare(), config={"n_heads": 4}).config_source.endswith("(inferred)")
