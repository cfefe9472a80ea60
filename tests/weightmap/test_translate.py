"""Translated: every dialect of a model from every other, bit for bit, judged by dialects written down by hand."""

from __future__ import annotations

from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import dialects
from loadstone.errors import LoadstoneError, PlanError
from loadstone.load import open_source, settle_tie
from loadstone.weightmap import TABLES, Identity, Translated, table_for
from memory import MemoryCheckpoint
from small_models import CHECKPOINTS, CONFIGS, GPT2, NEOX

DIALECTS = {arch: dict.fromkeys(t.dialect for t in TABLES if t.architecture == arch) for arch in CHECKPOINTS}
PAIRS = [(arch, a, b) for arch, names in DIALECTS.items() for a, b in product(names, names)]


def opened(architecture: str, dialect: str) -> Identity:
    """One dialect, written by hand where there is a hand-written form; our own comes from another."""
    checkpoint: Any
    if dialect == "loadstone":
        source = opened(architecture, "hf")
        checkpoint = memory(Translated(source, table_for(architecture, "loadstone")))
    else:
        checkpoint = CHECKPOINTS[architecture](dialect)
    identity = open_source(checkpoint, config=CONFIGS[architecture])
    settle_tie(identity)
    return identity


def memory(translated: Translated) -> MemoryCheckpoint:
    """All of it, as if it had been written and read again."""
    arrays = {name: np.ascontiguousarray(translated.read(name)) for name in translated.tensors}
    return MemoryCheckpoint(arrays, aliases=translated.aliases)


@pytest.mark.parametrize(("architecture", "a", "b"), PAIRS)
def test_every_ordered_pair_is_exact(architecture: str, a: str, b: str) -> None:
    translated = Translated(opened(architecture, a), table_for(architecture, b))
    expected = opened(architecture, b).checkpoint
    assert isinstance(expected, MemoryCheckpoint)
    prefix = table_for(architecture, b).prefix
    for name, info in translated.tensors.items():
        array = translated.read(name)
        assert (array.shape, array.dtype.name) == (info.shape, info.dtype), name
        assert info.nbytes == array.nbytes
        if name not in translated.aliases:
            known = expected.arrays.get(name, expected.arrays.get(name.removeprefix(prefix)))
            assert known is not None, name
            assert np.array_equal(array, known), name
    written = {name.removeprefix(prefix) for name in translated.tensors}
    assert written == {name.removeprefix(prefix) for name in expected.tensors}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("dialect", ["hf", "openai", "raschka"])
def test_a_cast_rounds_each_value_once(dialect: str, dtype: str) -> None:
    kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    exact = Translated(opened("gpt2", "hf"), table_for("gpt2", dialect))
    cast = Translated(opened("gpt2", "hf"), table_for("gpt2", dialect), dtype)
    for name in cast._rules:
        assert cast.info(name).dtype == dtype
        assert np.array_equal(cast.read(name), exact.read(name).astype(kind)), name


def test_a_value_beyond_the_type_is_refused_not_made_infinite() -> None:
    big = GPT2 | {"h.1.mlp.c_fc.bias": GPT2["h.1.mlp.c_fc.bias"] * np.float32(1e6)}
    big["h.1.mlp.c_fc.bias"][3] = np.inf  # one that was there before does not hide the others
    identity = open_source(MemoryCheckpoint(big), config={"n_heads": 4})
    translated = Translated(identity, table_for("gpt2", "nanogpt"), "float16")
    with pytest.raises(LoadstoneError, match=r"transformer\.h\.1\.mlp\.c_fc\.bias: .* beyond the range of float16"):
        translated.read("transformer.h.1.mlp.c_fc.bias")


def test_infinities_and_nan_of_the_source_stay() -> None:
    odd = GPT2["h.1.mlp.c_fc.bias"].copy()
    odd[:2] = np.inf, np.nan
    identity = open_source(MemoryCheckpoint(GPT2 | {"h.1.mlp.c_fc.bias": odd}), config={"n_heads": 4})
    found = Translated(identity, table_for("gpt2", "lesson"), "bfloat16").read("blocks.1.mlp.fc1.bias")
    assert np.isinf(found[0])
    assert np.isnan(found[1])


def test_parts_of_different_types_are_joined_in_the_wider() -> None:
    mixed = dialects.gpt2_raschka(GPT2)
    mixed["trf_blocks.0.att.W_query.weight"] = mixed["trf_blocks.0.att.W_query.weight"].astype(ml_dtypes.bfloat16)
    identity = open_source(MemoryCheckpoint(mixed), config={"n_heads": 4})
    settle_tie(identity)
    fused = Translated(identity, table_for("gpt2", "hf"))
    assert fused.info("transformer.h.0.attn.c_attn.weight").dtype == "float32"
    apart = Translated(identity, table_for("gpt2", "raschka"))
    assert apart.info("trf_blocks.0.att.W_query.weight").dtype == "bfloat16"


def test_a_dialect_without_a_name_for_a_parameter_is_refused() -> None:
    untied = open_source(MemoryCheckpoint(GPT2 | {"lm_head.weight": GPT2["wte.weight"] + 1}), config={"n_heads": 4})
    settle_tie(untied)
    assert not untied.config.tied
    with pytest.raises(PlanError, match=r"gpt2/openai has no name for head\.weight"):
        Translated(untied, table_for("gpt2", "openai"))


def test_an_unknown_dialect_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(PlanError, match="no dialect 'raschka' of llama; its dialects: hf, meta, gguf, loadstone"):
        table_for("llama", "raschka")


def test_masks_are_one_tensor_and_right() -> None:
    translated = Translated(opened("gpt2", "hf"), table_for("gpt2", "raschka"))
    masks = [name for name in translated.tensors if name.endswith("att.mask")]
    assert [translated.aliases.get(name) for name in masks] == [None, masks[0], masks[0]]
    assert np.array_equal(translated.read(masks[2]), np.triu(np.ones((40, 40), np.float32), 1))


def test_a_fused_source_is_read_once_for_its_three_parts() -> None:
    identity = opened("gpt_neox", "hf")
    reads: list[str] = []
    read = identity.checkpoint.read
    identity.checkpoint.read = lambda name: (reads.append(name), read(name))[1]  # type: ignore[method-assign,func-returns-value]
    translated = Translated(identity, table_for("gpt_neox", "loadstone"))
    for name in translated.tensors:
        translated.read(name)
    assert all(reads.count(name) == 1 for name in NEOX if name.endswith(".weight"))
    assert set(reads) == set(NEOX)
