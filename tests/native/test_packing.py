"""What the packed matrices hold: rounded numbers as documented, and ggml's blocks to the bit."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize

from loadstone.load import load, open_source, parameters
from loadstone.native import available, levels, open_native
from loadstone.native.library import Packing, library
from loadstone.native.packing import has_own_mapping
from loadstone.save import save_model
from native_models import GPT2, MODELS, engine_of, ids_of, model_of
from small_gpt import LLAMA

LEVELS = levels() if available() else ["portable"]
EXACT = {"float32": np.float32, "float16": np.float16}


def rows_of(engine, model, name: str = "blocks.0.mlp.up.weight"):  # type: ignore[no-untyped-def]
    weight = model.get_parameter(name).detach().numpy()
    packed = np.stack([engine.weight_row(name, row)[: weight.shape[1]] for row in range(len(weight))])
    return weight, packed


@pytest.mark.parametrize("level", LEVELS)
def test_plain_types_are_rounded_as_numpy_and_torch_round(level: str) -> None:
    model = model_of(GPT2 | {"d_model": 44})
    extreme = [6.1e-5, 6e-8, 2.9e-8, 3e-8, 65504, 65519, 65520, 1e6, -1e-30, 0.0, -0.0, float("inf"), 1.0009765]
    model.get_parameter("blocks.0.mlp.up.weight").data[0, :13] = torch.tensor(extreme)
    for width, dtype in EXACT.items():
        weight, packed = rows_of(engine_of(model, width, level=level), model)
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(packed, weight.astype(dtype).astype(np.float32))
    weight, packed = rows_of(engine_of(model, "bfloat16", level=level), model)
    np.testing.assert_array_equal(packed, torch.from_numpy(weight).bfloat16().float().numpy())


@pytest.mark.parametrize("level", LEVELS)
def test_quantised_rows_lie_within_half_a_step(level: str) -> None:
    model = model_of(GPT2 | {"d_model": 80})  # the last group has 16 numbers
    model.get_parameter("blocks.0.mlp.up.weight").data[3] = 0
    weight, packed = rows_of(engine_of(model, "q8", level=level), model)
    groups = np.pad(weight, ((0, 0), (0, 16))).reshape(len(weight), 3, 32)
    step = (np.abs(groups).max(-1) / 127).repeat(32, -1)[:, :80]
    assert (np.abs(packed - weight) <= 0.51 * step + 1e-9).all()
    # 4 bits: ggml's Q4_0, but that q is chosen for the scale as it is stored
    weight, packed = rows_of(engine_of(model, "q4", level=level), model)
    whole = weight[:, :64].copy()
    ggml = dequantize(quantize(whole, gguf.GGMLQuantizationType.Q4_0), gguf.GGMLQuantizationType.Q4_0)
    assert (packed[:, :64] == ggml).mean() > 0.99
    assert ((packed[:, :64] - whole) ** 2).sum() <= 1.0001 * ((ggml - whole) ** 2).sum()
    assert not packed[3].any()


def test_levels_pack_alike_and_sources_may_be_turned_or_narrow(tmp_path: Path) -> None:
    model = model_of(MODELS["gpt2"])
    save_model(model, tmp_path / "hf")  # GPT-2's matrices are [in, out] in HuggingFace's dialect
    for width in ("float32", "bfloat16", "q8", "q4"):
        ids = ids_of(20)
        want = engine_of(model, width).scores(ids)
        turned = open_native(open_source(tmp_path / "hf"), width=width, threads=2)
        np.testing.assert_array_equal(turned.scores(ids), want)
    half = model_of(MODELS["gpt2"]).to(torch.float16)
    np.testing.assert_array_equal(
        engine_of(half, "auto").scores(ids_of(9)), engine_of(half.float(), "float16").scores(ids_of(9))
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tensors_that_are_mapped_and_given_back_while_they_are_read(dtype: str, tmp_path: Path) -> None:
    """Large enough to be mapped, views of one another (fused q, k and v), and read by several threads."""
    model = model_of(GPT2 | {"d_model": 160, "n_heads": 5, "vocab_size": 1100}).to(getattr(torch, dtype))
    save_model(model, tmp_path / "hf")
    identity, ids = open_source(tmp_path / "hf"), ids_of(20)
    arrays = dict(parameters(identity))
    mapped = ("tok_emb.weight", "blocks.0.attn.q.weight", "blocks.0.mlp.up.weight")
    assert all(has_own_mapping(arrays[name]) for name in mapped)
    assert not has_own_mapping(model.tok_emb.weight.detach().float().numpy())
    for width in ("auto", "q8"):
        want = engine_of(model, width).scores(ids)
        for threads in (1, 3):
            np.testing.assert_array_equal(open_native(identity, width=width, threads=threads).scores(ids), want)
    np.testing.assert_array_equal(arrays["tok_emb.weight"], dict(parameters(identity))["tok_emb.weight"])


def test_pages_behind_a_source_are_left_alone() -> None:
    """The last of some views of one tensor (as v is of a fused c_attn) ends before its last row's stride does."""
    width, page = 160, 4096
    model = model_of(GPT2 | {"d_model": width, "n_heads": 5})
    engine = engine_of(model, "float32")
    # Given back, its pages read as zeros.
    region = mmap.mmap(-1, 2**22, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    region[:] = b"\x7f" * len(region)
    end, parts = 2**21, 16  # a tensor that ends with a page
    fused = np.frombuffer(region, "<f4", parts * width**2, end - parts * width**2 * 4).reshape(width, parts * width)
    v = fused[:, -width:].T
    work = Packing(v.ctypes.data, *v.strides, 2, 0, 0, width, 1)
    assert library().ls_pack(engine.handle, ctypes.byref(work), 1) == 0
    assert region[end:] == b"\x7f" * (len(region) - end)
    assert region[end - 2 * page : end - page] == bytes(page)  # given back


def test_what_others_may_have_written_to_keeps_its_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond so many mappings, tensors share one of the whole file, and pages of it may have been written to."""
    save_model(model_of(GPT2 | {"d_model": 160, "n_heads": 5}), tmp_path / "hf")
    monkeypatch.setattr("loadstone.checkpoint.datafile.MAX_MAPPINGS", 0)
    identity = open_source(tmp_path / "hf")
    arrays = dict(parameters(identity))
    assert not any(has_own_mapping(array) for array in arrays.values())
    arrays["blocks.0.mlp.up.weight"][:] = 7
    engine = open_native(identity, threads=1)
    assert (arrays["blocks.0.mlp.up.weight"] == 7).all()
    assert (engine.weight_row("blocks.0.mlp.up.weight", 3)[:160] == 7).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "F16"])
def test_blocks_are_computed_on_as_stored(kind: str, level: str, tmp_path: Path) -> None:
    """Every packed row is what gguf's own decoder says, with q and k turned from rotary pairs to halves."""
    path = tmp_path / "model.gguf"
    write_llama_gguf(path, kind)
    engine = open_native(open_source(path), level=level, threads=2)
    model, _ = load(path, dtype="float32")
    for name in ("blocks.1.attn.q.weight", "blocks.0.attn.k.weight", "blocks.1.mlp.down.weight", "tok_emb.weight"):
        weight, packed = rows_of(engine, model, name)
        np.testing.assert_array_equal(packed, weight)
    np.testing.assert_allclose(engine.scores(ids_of(9)), model(torch.tensor([ids_of(9)]))[0].detach(), atol=0.5)


def write_llama_gguf(path: Path, kind: str) -> None:
    fields = LLAMA | {"n_heads": 4, "n_kv_heads": 2, "d_model": 64, "d_ff": 96, "n_layers": 2, "tied": True}
    model = model_of(fields)
    names = {"tok_emb": "token_embd", "norm": "output_norm"}
    inner = {"attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v", "attn.out": "attn_output"}
    inner |= {
        "mlp.gate": "ffn_gate",
        "mlp.up": "ffn_up",
        "mlp.down": "ffn_down",
        "norm1": "attn_norm",
        "norm2": "ffn_norm",
    }
    for layer in range(2):
        names |= {f"blocks.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in inner.items()}
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(40), writer.add_embedding_length(64), writer.add_block_count(2)
    writer.add_feed_forward_length(96), writer.add_head_count(4), writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5), writer.add_rope_dimension_count(16)
    quant = gguf.GGMLQuantizationType[kind]
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy()
        stored = f"{names[name.removesuffix('.weight')]}.weight"
        if array.ndim == 1:
            writer.add_tensor(stored, array)
        elif kind == "F16":
            writer.add_tensor(stored, array.astype(np.float16))
        else:
            writer.add_tensor(stored, quantize(array, quant), raw_dtype=quant)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
