"""What a plan says: prefixes, buffers, slots, ties, and each way in which a header can be wrong."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dialects
from loadstone.checkpoint.base import TensorInfo
from loadstone.config import GPTConfig, Rope
from loadstone.config.families import LLAMA_FIELDS
from loadstone.errors import ConfigError, LoadstoneError, PlanError
from loadstone.load import load_model, open_source
from loadstone.weightmap import identify, make_plan
from loadstone.weightmap.llama import HF as LLAMA_HF
from loadstone.weightmap.plan import unwrap
from memory import MemoryCheckpoint

GPT2 = dialects.gpt2_hf()
HEADS = {"n_heads": 4}


def plan_of(tensors: dialects.Tensors, **options: Any) -> Any:
    return open_source(MemoryCheckpoint(tensors), config=HEADS, **options).plan


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("wte.weight", "wte.weight"),
        ("transformer.wte.weight", "wte.weight"),
        ("_orig_mod.module.transformer.wte.weight", "wte.weight"),
        ("module._orig_mod.wte.weight", "wte.weight"),
        ("model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
        ("transformer.transformer.wte.weight", "wte.weight"),
        ("model.", "model."),
        ("modelling.weight", "modelling.weight"),
    ],
)
def test_wrappers_are_taken_off_in_any_order(name: str, stem: str) -> None:
    assert unwrap(name)[0] == stem
    assert "".join(reversed(unwrap(name))) == name


@pytest.mark.parametrize("prefix", ["", "transformer.", "module.", "_orig_mod.", "module._orig_mod.transformer."])
def test_prefixes_change_nothing_but_the_report(prefix: str) -> None:
    plan = plan_of({prefix + name: value for name, value in GPT2.items()})
    assert plan.clean
    assert plan.prefixes == ({prefix: len(GPT2)} if prefix else {})


def test_mask_buffers_are_set_aside_and_real_biases_kept() -> None:
    masks = {f"h.{i}.attn.bias": np.tril(np.ones((1, 1, 40, 40), np.float32)) for i in range(3)}
    masks |= {f"h.{i}.attn.masked_bias": np.array(-1e4, np.float32) for i in range(3)}
    plan = plan_of(GPT2 | masks)
    assert plan.clean
    assert set(plan.ignored) == set(masks)
    assert {target for step in plan.steps for target in step.targets} >= {f"blocks.{i}.attn.q.bias" for i in range(3)}


def test_a_parameter_under_a_buffers_name_is_not_dropped() -> None:
    assert plan_of(GPT2 | {"h.0.attn.bias": np.zeros(96, np.float32)}).unused == ["h.0.attn.bias"]


def test_optimizer_slots_of_tensorflow_are_set_aside() -> None:
    tensors = dialects.gpt2_openai(GPT2)
    slots = {f"{name}/{slot}": value for name, value in tensors.items() for slot in ("Adam", "Adam_1")}
    slots |= {"global_step": np.array(7), "beta1_power": np.array(0.9)}
    plan = plan_of(tensors | slots)
    assert plan.clean
    assert set(plan.ignored) == set(slots)
    assert plan_of(tensors | {"model/h0/attn/c_attn/w/Adam_7": np.zeros(1)}).unused == ["model/h0/attn/c_attn/w/Adam_7"]


def test_a_classifier_is_called_one() -> None:
    plan = plan_of(GPT2 | {"score.weight": np.zeros((2, 32), np.float32)})
    assert plan.unused == ["score.weight"]
    with pytest.raises(PlanError, match=r"last layer of a classifier: `loadstone classify` runs it"):
        plan.require_clean("somewhere")


def test_a_typo_is_one_missing_and_one_unused_with_a_hint() -> None:
    broken = {name.replace("h.1.mlp.c_fc.bias", "h.1.mlp.c_fx.bias"): value for name, value in GPT2.items()}
    plan = plan_of(broken)
    assert (list(plan.missing), plan.unused) == (["blocks.1.mlp.up.bias"], ["h.1.mlp.c_fx.bias"])
    with pytest.raises(PlanError, match=r"is h.1.mlp.c_fx.bias a misspelling of it\?.*Nothing was loaded"):
        load_model(open_source(MemoryCheckpoint(broken), config=HEADS))


def test_a_missing_layer_in_the_middle_is_missing_not_a_smaller_model() -> None:
    hole = {name: value for name, value in GPT2.items() if not name.startswith("h.1.")}
    problems = " ".join(plan_of(hole).problems())
    assert "unused 12" in problems


def test_two_tensors_for_one_parameter_are_named() -> None:
    with pytest.raises(PlanError, match=r"claimed twice: wte.weight by wte.weight and module.wte.weight"):
        load_model(open_source(MemoryCheckpoint(GPT2 | {"module.wte.weight": GPT2["wte.weight"]}), config=HEADS))


def test_wrong_shapes_are_named_and_transposition_suspected() -> None:
    """HuggingFace's names with every matrix but the square ones the other way: half a nanoGPT file."""
    turned = {n: v.T if n.endswith(("c_fc.weight", "mlp.c_proj.weight")) else v for n, v in GPT2.items()}
    with pytest.raises(PlanError, match=r"h.0.mlp.c_fc.weight should be \[32, 128\], is \[128, 32\].*transposed"):
        load_model(open_source(MemoryCheckpoint(turned), config=HEADS, dialect="hf"))


def test_orientation_is_decided_by_the_matrices_that_can_tell() -> None:
    hf, nano = plan_of(GPT2), plan_of(dialects.gpt2_nanogpt(GPT2))
    assert (hf.weight_map.dialect, hf.orientation) == ("hf", (9, 9))
    assert (nano.weight_map.dialect, nano.orientation) == ("nanogpt", (9, 9))


def test_a_broadcastable_tensor_is_a_mismatch() -> None:
    plan = plan_of(GPT2 | {"h.0.ln_1.weight": np.ones(1, np.float32)})
    assert [m.source for m in plan.mismatched] == ["h.0.ln_1.weight"]


def test_names_that_the_caller_gives_up_are_not_unused() -> None:
    extra = GPT2 | {"value_head.weight": np.zeros((1, 32), np.float32)}
    assert plan_of(extra).unused == ["value_head.weight"]
    assert plan_of(extra, ignore=["value_head.weight"]).clean


def test_foreign_names_are_refused_with_examples() -> None:
    with pytest.raises(PlanError, match=r"the 2 tensor names \(conv1.weight, fc.bias\) belong to no known dialect"):
        identify(MemoryCheckpoint({"conv1.weight": np.zeros((2, 2)), "fc.bias": np.zeros(2)}))
    with pytest.raises(PlanError, match="no dialect is called 'klingon'"):
        identify(MemoryCheckpoint(GPT2), dialect="klingon")


def test_an_embedding_that_is_no_matrix_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"token embedding wte.weight is not there as a matrix"):
        identify(MemoryCheckpoint(GPT2 | {"wte.weight": np.zeros(3, np.float32)}))


# --- ties


def test_equal_copies_become_one_parameter_and_different_ones_two() -> None:
    equal = load_model(
        open_source(MemoryCheckpoint(GPT2 | {"lm_head.weight": GPT2["wte.weight"].copy()}), config=HEADS)
    )
    assert equal.head is None
    other = load_model(open_source(MemoryCheckpoint(GPT2 | {"lm_head.weight": GPT2["wte.weight"] + 1}), config=HEADS))
    assert other.head is not None
    assert np.array_equal(other.head.weight.detach().numpy(), GPT2["wte.weight"] + 1)


def test_an_alias_is_a_tie_without_reading() -> None:
    checkpoint = MemoryCheckpoint(GPT2, aliases={"lm_head.weight": "wte.weight"})
    checkpoint.tensors["lm_head.weight"] = checkpoint.tensors["wte.weight"]
    identity = open_source(checkpoint, config=HEADS)
    assert identity.config.tied
    assert "one storage" in identity.plan.tie
    assert identity.plan.clean


def test_a_head_that_differs_though_said_to_be_tied_is_refused() -> None:
    checkpoint = MemoryCheckpoint(GPT2 | {"lm_head.weight": GPT2["wte.weight"] + 1})
    with pytest.raises(PlanError, match=r"lm_head.weight differs from wte.weight.*--set tied=false"):
        load_model(open_source(checkpoint, config=HEADS | {"tied": True}))


def test_only_the_head_is_stored() -> None:
    tensors = {("lm_head.weight" if name == "wte.weight" else name): value for name, value in GPT2.items()}
    identity = open_source(MemoryCheckpoint(tensors), config=HEADS)
    model = load_model(identity)
    assert "stored once, as lm_head.weight" in identity.plan.tie
    assert np.array_equal(model.tok_emb.weight.detach().numpy(), GPT2["wte.weight"])


# --- inference from a bare file


def test_inferred_values_are_reported_as_such() -> None:
    identity = open_source(MemoryCheckpoint(GPT2))
    assert identity.config_source == "the tensors' shapes (inferred)"
    assert [line.split(" ")[0] for line in identity.assumed] == ["n_heads", "activation"]
    known = HEADS | {"activation": "gelu_tanh"}
    assert open_source(MemoryCheckpoint(GPT2), config=known).assumed == []
    raschka = MemoryCheckpoint(dialects.gpt2_raschka(GPT2))
    assert [line.split(" ")[0] for line in open_source(raschka).assumed] == ["n_heads"]


def test_published_widths_know_their_head_counts() -> None:
    wide = dialects.gpt2_hf(vocab=11, context=8, width=1280, layers=1)
    identity = open_source(MemoryCheckpoint(wide))
    assert identity.config.n_heads == 20
    assert "n_heads = 20" in identity.assumed[0]  # still a guess: the width alone proves nothing


def test_raschka_without_query_biases() -> None:
    tensors = {n: v for n, v in dialects.gpt2_raschka(GPT2).items() if not ("W_" in n and n.endswith("bias"))}
    config = open_source(MemoryCheckpoint(tensors), config=HEADS).config
    assert (config.qkv_bias, config.attn_out_bias, config.norm_bias) == (False, True, True)


def test_a_70b_header_is_planned_in_a_blink() -> None:
    """From names and shapes alone: 80 layers, 723 tensors."""
    config = GPTConfig(
        128_256, 8192, 8192, 80, 64, n_kv_heads=8, d_ff=28_672, architecture="llama", rope=Rope(), tied=False,
        **LLAMA_FIELDS,
    )  # fmt: skip
    from loadstone.weightmap import apply_shapes, parameter_shapes

    shapes = parameter_shapes(config)
    tensors = {}
    for rule in LLAMA_HF.needed(config, shapes):
        (shape,) = apply_shapes(rule.ops, [shapes[t] for t in rule.target], config, inverse=True)
        tensors[f"model.{rule.source}"] = TensorInfo(shape, "bfloat16", 0)
    began = time.perf_counter()
    plan = make_plan(config, tensors, LLAMA_HF)
    assert time.perf_counter() - began < 2
    assert plan.clean
    assert len(plan.steps) == 723


# --- configs and headers that contradict each other


def test_a_refused_config_is_not_hidden_behind_another_dialect(tmp_path: Path) -> None:
    """nanoGPT's table has HuggingFace's names: it must not take over a file whose config.json is refused."""
    config = {"model_type": "gpt2", "vocab_size": 101, "n_positions": 40, "n_embd": 32, "n_layer": 3, "n_head": 4}
    checkpoint = MemoryCheckpoint(GPT2, path=tmp_path / "model.safetensors")
    for extra, text in (
        ({"alibi": True, "b": 1}, "alibi = True, b = 1.*--ignore-config alibi --ignore-config b"),
        ({"n_head": 5}, r"config.json: d_model 32 is not a multiple of n_heads 5"),
        ({"n_layer": 10**9}, "config.json says 1,000,000,000 layers, but the file has only 40 tensors"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | extra))
        with pytest.raises(ConfigError, match=text):
            identify(checkpoint)
    assert identify(checkpoint, ignore_config=["alibi"], overrides={"n_layers": 3}).plan.clean is True
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="expected a JSON object, found list"):
        identify(checkpoint)


def test_nanogpt_arguments_with_an_unknown_key_say_so() -> None:
    arguments = {"n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 40, "vocab_size": 101, "moe": 8}
    checkpoint = MemoryCheckpoint(dialects.gpt2_nanogpt(GPT2), metadata={"model_args": arguments})
    with pytest.raises(ConfigError, match="model_args: moe = 8"):
        identify(checkpoint)
    assert identify(checkpoint, ignore_config=["moe"]).config.activation == "gelu"


@pytest.mark.parametrize(
    ("name", "shape"),
    [("wte.weight", (5, 0)), ("wpe.weight", ()), ("h.0.mlp.c_fc.weight", (0, 7)), ("h.0.ln_1.bias", ())],
)
def test_shapes_that_cannot_be_are_problems_not_crashes(name: str, shape: tuple[int, ...]) -> None:
    checkpoint = MemoryCheckpoint(GPT2 | {name: np.zeros(shape, np.float32)})
    with pytest.raises(LoadstoneError):
        open_source(checkpoint).plan.require_clean("file")


@pytest.mark.parametrize("name", ["layers.0.attention.wq.weight", "tok_embeddings.weight"])
def test_scalars_in_a_llama_are_problems_not_crashes(name: str) -> None:
    checkpoint = MemoryCheckpoint(dialects.llama_meta() | {name: np.zeros((), np.float32)})
    with pytest.raises(LoadstoneError):
        open_source(checkpoint).plan.require_clean("file")


def test_a_tied_models_head_of_another_shape_is_a_mismatch() -> None:
    tensors = GPT2 | {"lm_head.weight": np.zeros((50, 32), np.float32)}
    plan = open_source(MemoryCheckpoint(tensors), config=HEADS | {"tied": True}).plan
    assert [(m.source, m.found) for m in plan.mismatched] == [("lm_head.weight", (50, 32))]


def test_another_dialects_names_are_told() -> None:
    with pytest.raises(PlanError, match="the names are not raschka's; they are those of gpt2/hf, gpt2/nanogpt"):
        identify(MemoryCheckpoint(GPT2), dialect="raschka")
    with pytest.raises(PlanError, match="a LoRA adapter"):
        identify(MemoryCheckpoint({"base.q.lora_A.weight": np.zeros((2, 2)), "base.q.lora_B.weight": np.zeros((2, 2))}))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_our_own_state_dict_and_our_own_model_are_read_back(kind: str) -> None:
    tensors = GPT2 if kind == "gpt2" else dialects.llama_meta()
    options = HEADS if kind == "gpt2" else {"n_heads": 6, "head_dim": 8, "n_kv_heads": 2}
    model = load_model(open_source(MemoryCheckpoint(tensors), config=options))
    parameters = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    saved = open_source(MemoryCheckpoint(parameters), config=options)
    assert saved.weight_map.name == f"{kind}/loadstone"
    assert saved.config == model.config
    live = open_source(model)
    assert (live.config, live.config_source) == (model.config, "the model itself")
    again = load_model(live)
    assert all(np.array_equal(parameters[name], p.detach().numpy()) for name, p in again.named_parameters())


def test_our_own_untied_model_stays_untied_though_its_values_are_equal() -> None:
    options = {"n_heads": 6, "head_dim": 8, "n_kv_heads": 2}
    model = load_model(open_source(MemoryCheckpoint(dialects.llama_meta()), config=options))
    assert model.head is not None
    with torch.no_grad():
        model.head.weight.copy_(model.tok_emb.weight)
    assert load_model(open_source(model)).head is not None
