"""The native engine against torch: families, instruction sets, threads, and every width beside torch's own rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loadstone.model import GPT
from loadstone.native import NativeEngine, available, levels
from native_models import (
    GPT2,
    MODELS,
    Floats,
    Rounding,
    bf16,
    decided,
    emulate,
    engine_of,
    ids_of,
    int8_groups,
    model_of,
    same,
    take_weights,
)
from small_gpt import LLAMA

LEVELS = levels() if available() else ["portable"]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", MODELS)
def test_float32_is_torch(name: str, level: str) -> None:
    model = model_of(MODELS[name])
    ids = ids_of(40)
    want = emulate(model, ids, same, same)
    for threads in (1, 2, 3):
        engine = engine_of(model, threads=threads, level=level)
        np.testing.assert_allclose(engine.scores(ids), want, rtol=0, atol=1e-4)
    cache = engine.new_cache()  # the same, token by token
    for end, token in enumerate(ids):
        np.testing.assert_allclose(engine.decode(cache, [token])[0], want[end], rtol=0, atol=1e-4)


ROUNDINGS: dict[str, Rounding] = {"bfloat16": same, "float16": same, "q8": int8_groups, "q4": int8_groups}


def roundings(engine: NativeEngine, length: int, width: str) -> tuple[Rounding, Rounding, Rounding]:
    """The engine's, as `emulate` takes them: of inputs of products, of keys and values, of attention's own factors."""
    if width in ("float32", "float16"):
        return same, same, same
    dot = engine.level in ("avx512bf16", "amx") and length > 4  # engine.h's DECODE
    return bf16 if dot and width == "bfloat16" else ROUNDINGS[width], bf16, bf16 if dot else same


def wanted(model: GPT, engine: NativeEngine, ids: list[int], width: str) -> Floats:
    """Torch's logits with the engine's roundings. The model's matrices become the engine's."""
    take_weights(model, engine)
    return emulate(model, ids, *roundings(engine, len(ids), width))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("width", ROUNDINGS)
@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "llama head 64", "gpt_neox", "llama biases, odd head", "relu, one head"]
)
def test_other_widths_are_torch_with_the_same_rounding(name: str, width: str, level: str) -> None:
    model = model_of(MODELS[name] | {"n_layers": 1})
    engine = engine_of(model, width, level=level)
    ids = ids_of(40)
    plain = emulate(model, ids, same, same)
    error = np.abs(engine.scores(ids) - wanted(model, engine, ids, width))
    # A number that lies between two steps may fall to either side, so a few are a step of the rounding apart.
    assert np.median(error) < 2e-5 * plain.std()
    assert error.mean() < 1e-3 * plain.std()
    assert error.max() < 0.1 * plain.std()


def test_a_text_is_the_same_alone_and_in_a_batch_token_by_token_and_at_once() -> None:
    """Exactly, but for attention's sums: products add in one order whatever the number of tokens."""
    engine = engine_of(model_of(MODELS["llama"]), "q4")
    texts = [ids_of(length, seed) for seed, length in enumerate((7, 1, 13, 30))]
    batch, slow = engine.new_cache(4), engine.new_cache(4)
    together = engine.prefill(batch, dict(enumerate(texts)))
    assert batch.lengths == [7, 1, 13, 30]
    for row in (2, 0, 3, 1):
        logits = engine.prefill(engine.new_cache(), {0: texts[row]})
        np.testing.assert_array_equal(logits[0], together[row])
        for token in texts[row]:
            steps = engine.prefill(slow, {row: [token]})
        np.testing.assert_allclose(steps[0], together[row], atol=0.3)
    next_ = engine.decode(batch, [5, 6, 7, 8])
    alone = engine.new_cache()
    engine.prefill(alone, {0: texts[1]})
    np.testing.assert_array_equal(engine.decode(alone, [6])[0], next_[1])


def test_prompts_longer_than_a_chunk_and_caches_longer_than_a_block() -> None:
    model = model_of(MODELS["llama"] | {"context_length": 700, "n_layers": 2})
    engine, ids = engine_of(model), ids_of(690)
    want = emulate(model, ids, same, same)
    np.testing.assert_allclose(engine.scores(ids), want, rtol=0, atol=1e-4)
    cache = engine.new_cache(2)
    engine.prefill(cache, {1: ids[:530], 0: ids[:5]})
    np.testing.assert_allclose(engine.prefill(cache, {1: ids[530:]})[0], want[-1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("level", LEVELS)
def test_long_prompts_in_bfloat16_are_torch_with_the_same_rounding(level: str) -> None:
    model = model_of(MODELS["llama head 64"] | {"context_length": 300, "n_layers": 1})
    engine, ids = engine_of(model, "bfloat16", level=level), ids_of(297)
    want = wanted(model, engine, ids, "bfloat16")
    error = np.abs(engine.scores(ids) - want)
    assert np.median(error) < 2e-5 * want.std()
    assert error.mean() < 1e-3 * want.std()


@pytest.mark.skipif("avx512vnni" not in LEVELS, reason="this processor has no AVX-512 VNNI")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("width", ["q8", "q4"])
def test_whole_numbers_are_the_same_to_the_bit_whatever_multiplies_them(width: str, family: str) -> None:
    """Rows of one token each: attention is its value, so all that instruction sets may differ in is the products."""
    model, tokens = model_of(MODELS["llama head 64" if family == "llama" else "gpt2"] | {"d_ff": 80}), ids_of(21)
    with torch.no_grad():
        for name, bias in model.named_parameters():
            if name.endswith("up.bias"):
                bias.fill_(-15)  # its GELU's are some -1e-37, so that 127 over a group's largest is infinite
    found = {}
    for level in LEVELS[LEVELS.index("avx512vnni") :]:
        engine = engine_of(model, width, level=level)
        found[level] = engine.decode(engine.new_cache(21), tokens)
        np.testing.assert_array_equal(found[level], found["avx512vnni"])
        alone = engine.new_cache()
        np.testing.assert_array_equal(engine.decode(alone, tokens[:1])[0], found[level][0])


def engine_without_seven(width: str, level: str) -> NativeEngine:
    """Whatever follows token 7 is no number."""
    model = model_of(MODELS["llama head 64"])
    with torch.no_grad():
        model.tok_emb.weight[7] = torch.nan
    return engine_of(model, width, level=level)


def ids_without_seven(length: int) -> list[int]:
    return [8 if token == 7 else token for token in ids_of(length, seed=length)]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("width", ["bfloat16", "q8"])
def test_what_was_no_number_is_forgotten(width: str, level: str) -> None:
    """Products of many tokens read whole steps of slots, also those that nobody has written since."""
    engine = engine_without_seven(width, level)
    cache, texts = engine.new_cache(2), {0: ids_without_seven(9), 1: ids_without_seven(10)}
    assert np.isnan(engine.prefill(cache, dict.fromkeys(texts, [7] * 40))).all()
    engine.reset(cache, [0, 0])
    found = engine.prefill(cache, texts)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, engine.prefill(engine.new_cache(2), texts))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("width", ["bfloat16", "q8"])
def test_a_copied_prefix_hides_what_was_there(width: str, level: str) -> None:
    """An odd number of tokens, half a step of values, over a row that held no numbers."""
    engine = engine_without_seven(width, level)
    prefix, rest = map(ids_without_seven, (9, 12))
    cache = engine.new_cache(2)
    engine.prefill(cache, {0: prefix, 1: [7] * 40})
    engine.copy(cache, 0, 1, len(prefix))
    engine.reset(cache, [len(prefix)] * 2)
    found = engine.prefill(cache, {0: rest, 1: rest})
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("width", ["float32", "bfloat16", "q8"])
def test_long_prompts_of_two_rows_are_each_alone_to_the_bit(width: str, level: str) -> None:
    """600 tokens are more than a chunk, so the second text is cut, and its queries lie otherwise in tiles."""
    model = model_of(MODELS["llama head 64"] | {"context_length": 310, "n_layers": 2})
    engine, texts = engine_of(model, width, level=level), {0: ids_of(303, seed=2), 1: ids_of(297, seed=3)}
    together = engine.prefill(engine.new_cache(2), texts)
    for row, text in texts.items():
        np.testing.assert_array_equal(together[row], engine.prefill(engine.new_cache(), {0: text})[0])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("width", ["bfloat16", "float16"])
def test_the_head_does_not_see_how_many_texts_there_are(width: str, level: str) -> None:
    engine = engine_of(model_of(MODELS["llama head 64"]), width, level=level)
    texts = [ids_of(length, seed=length) for length in (7, 9, 13, 30, 5, 11)]
    alone = [engine.prefill(engine.new_cache(), {0: text})[0] for text in texts]
    for count in (2, 4, 6):
        together = engine.prefill(engine.new_cache(count), dict(enumerate(texts[:count])))
        np.testing.assert_array_equal(together, alone[:count])
    np.testing.assert_array_equal(engine.scores(texts[3])[-1], alone[3])


@pytest.mark.parametrize("d_model", [52, 64])
@pytest.mark.parametrize("level", LEVELS)
def test_matrices_of_different_types_read_the_same_tokens(level: str, d_model: int) -> None:
    """q, k and v of three types, and rows that end within a group of 32, or do not."""
    model = model_of(GPT2 | {"d_model": d_model, "n_layers": 2})
    types = {"attn.k": torch.bfloat16, "attn.v": torch.float16, "mlp.up": torch.bfloat16}
    for name, module in model.named_modules():
        module.to(types.get(name.split(".", 2)[-1]))  # None: as it is
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32, *types.values()}
    engine = engine_of(model, "auto", level=level)
    model.float()
    for ids, limit in ((ids_of(3), 0.01), (ids_of(21), 0.05)):  # keys and values are rounded, then inputs too
        want = emulate(model, ids, same, bf16)
        assert np.abs(engine.scores(ids) - want).max() < limit * want.std()


def test_forgotten_tokens_leave_no_trace() -> None:
    engine, ids = engine_of(model_of(MODELS["gpt2"])), ids_of(30)
    cache = engine.new_cache()
    engine.prefill(cache, {0: ids})
    engine.reset(cache, [11])
    again = engine.prefill(cache, {0: ids_of(9, seed=2)})
    fresh = engine.new_cache()
    engine.prefill(fresh, {0: ids[:11]})
    np.testing.assert_array_equal(again, engine.prefill(fresh, {0: ids_of(9, seed=2)}))


@settings(max_examples=15, deadline=None)
@given(
    heads=st.integers(1, 5), group=st.integers(1, 3), head_dim=st.integers(1, 20) | st.sampled_from([32, 64]),
    d_model=st.integers(2, 70), d_ff=st.integers(1, 70), vocab=st.integers(1, 70), length=st.integers(1, 40),
    llama=st.booleans(),
    width=st.sampled_from(["float32", "bfloat16", "float16", "q8", "q4"]), level=st.sampled_from(LEVELS),
)  # fmt: skip
def test_any_shape(
    heads: int, group: int, head_dim: int, d_model: int, d_ff: int, vocab: int, length: int, llama: bool,
    width: str, level: str,
) -> None:  # fmt: skip
    fields = {"n_heads": heads * group, "n_kv_heads": heads, "d_model": d_model, "d_ff": d_ff, "vocab_size": vocab}
    fields |= {"n_layers": 1, "head_dim": head_dim + head_dim % 2 * llama}
    model = model_of((LLAMA if llama else {}) | fields)
    ids = ids_of(length, vocab=vocab)
    engine = engine_of(model, width, level=level)
    found, want = engine.scores(ids), wanted(model, engine, ids, width)
    # A number between two steps may fall to either side, and be a step away from torch's: what follows is then a
    # hundredth away, or more in a small model. Before the first such number only the order of sums differs.
    count, own = decided(model, ids, *roundings(engine, length, width))
    limit = 1e-4 * max(np.abs(want).max(), 1) + 16 * own
    assert (np.abs(found - want) <= limit)[:count].all()
