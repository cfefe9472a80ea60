"""Witnesses: sound models raise no alarm, random ones give no verdict, and each planted fault is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from loadstone.checks import Check
from loadstone.config import GPTConfig, Rope
from loadstone.diagnose import arrangement
from loadstone.diagnose.profile import PIECE, profile
from loadstone.diagnose.witness import witnesses
from loadstone.load import load_model, load_tokenizer_for, open_source
from loadstone.model import GPT
from loadstone.weightmap.ops import RotaryHalves, SplitQKV
from test_model import SWITCHES, hostile

LLAMA: dict[str, Any] = {
    "architecture": "llama", "norm": "rmsnorm", "activation": "silu", "gated_mlp": True, "qkv_bias": False,
    "attn_out_bias": False, "mlp_bias": False, "norm_bias": False,
}  # fmt: skip
SMALL = GPTConfig(300, 64, 128, 4, 8, d_ff=256)
SMALL_LLAMA = GPTConfig(300, 64, 128, 4, 8, n_kv_heads=4, d_ff=256, rope=Rope(), **LLAMA)


def trained(config: GPTConfig, seed: int = 0, mark: float = 0.5) -> GPT:
    """Random weights with the marks that training leaves: a scale per channel of the stream, of v, per frequency.

    `mark` is the sigma of those scales, as logarithms.
    """
    rng = torch.Generator().manual_seed(seed)

    def scale(*shape: int) -> Tensor:
        return (mark * torch.randn(shape, generator=rng)).exp()

    stream, dim, groups = scale(config.d_model), config.head_dim, config.n_heads // config.n_kv_heads
    model = hostile(config, seed)
    with torch.no_grad():
        model.tok_emb.weight *= stream
        for block in blocks(model):
            attention, mlp, values = block.attn, block.mlp, scale(config.n_kv_heads, dim)
            curve = torch.linspace(-1, 1, dim // 2).exp().repeat(2)
            for linear in (attention.q, attention.k, attention.v, mlp.up, *([mlp.gate] if mlp.gate else [])):
                linear.weight *= stream
            for linear in (attention.q, attention.k):
                linear.weight *= curve.repeat(len(linear.weight) // dim)[:, None]
            attention.v.weight *= values.flatten()[:, None]
            attention.out.weight *= stream[:, None] * values.repeat_interleave(groups, 0).flatten()
            mlp.down.weight *= stream[:, None]
    return model


def blocks(model: GPT) -> list[Any]:
    return list(model.blocks)


def judged(model: GPT, tokenizer: Any = None) -> dict[str, Check]:
    return {check.name: check for check in witnesses(open_source(model), model, tokenizer)}


def alarms(model: GPT, tokenizer: Any = None) -> dict[str, str]:
    return {name: check.detail for name, check in judged(model, tokenizer).items() if check.ok is False}


@torch.no_grad()
def transpose(linear: torch.nn.Linear) -> None:
    linear.weight.copy_(linear.weight.T.clone())


@pytest.mark.parametrize("config", [SMALL, SMALL_LLAMA], ids=["gpt2", "llama"])
def test_a_trained_model_is_confirmed(config: GPTConfig) -> None:
    found = judged(trained(config))
    assert [check for check in found.values() if check.ok is False] == []
    sure = {"orientation of square matrices", "which rows are values", "norm weights", "weights are trained",
            "layers differ", "rows of tok_emb", "matrices are filled"}  # fmt: skip
    assert {name for name, check in found.items() if check.ok} >= sure
    if config.rope:
        assert found["rotary layout"].ok


RANDOM = {
    name: replace(config, architecture="llama" if config.rope else "gpt2")
    for name, config in SWITCHES.items()
    if not (config.rope and config.qkv_bias)  # no architecture has these together
}


@pytest.mark.parametrize("name", sorted(RANDOM))
@pytest.mark.parametrize("seed", range(4))
def test_random_weights_raise_no_alarm(name: str, seed: int) -> None:
    model = hostile(RANDOM[name], seed)
    assert alarms(model) == {}
    assert judged(model)["orientation of square matrices"].ok is None


@pytest.mark.parametrize("kind", ["q", "k", "v", "out"])
def test_a_transposed_square_matrix_is_named(kind: str) -> None:
    model = trained(SMALL)
    transpose(getattr(blocks(model)[2].attn, kind))
    assert f"transposed: blocks.2.attn.{kind} (" in alarms(model)["orientation of square matrices"]
    for layer in (0, 1, 3):
        transpose(getattr(blocks(model)[layer].attn, kind))
    assert f"transposed: attn.{kind} of all 4 layers" in alarms(model)["orientation of square matrices"]


def test_marks_too_weak_in_one_layer_add_up_over_all() -> None:
    model = trained(SMALL, mark=0.04)
    transpose(blocks(model)[2].attn.out)
    assert alarms(model) == {}
    for layer in (0, 1, 3):
        transpose(blocks(model)[layer].attn.out)
    assert "transposed: attn.out of all 4 layers" in alarms(model)["orientation of square matrices"]


def test_only_square_matrices_are_asked() -> None:
    grouped = judged(trained(SMALL_LLAMA))["orientation of square matrices"].detail
    assert "attn.q" in grouped
    assert "attn.k" not in grouped
    config = replace(SMALL_LLAMA, head_dim=8)
    assert "there are none" in judged(trained(config))["orientation of square matrices"].detail


@pytest.mark.parametrize("alike", [1, 64], ids=["all but one", "half"])
def test_channels_that_are_alike_are_no_mark(alike: int) -> None:
    """Dead channels at the same indices in the stream and in the heads: a coincidence that no z may be made of."""
    model = hostile(SMALL)
    with torch.no_grad():
        model.tok_emb.weight[:, alike:] = 1.0
        for block in blocks(model):
            block.attn.out.weight[:, alike:] = 0.25
    assert "orientation of square matrices" not in alarms(model)


@pytest.mark.parametrize("config", [SMALL, SMALL_LLAMA], ids=["gpt2", "llama"])
def test_exchanged_k_and_v_are_seen_in_the_weights(config: GPTConfig) -> None:
    model = trained(config)
    for block in blocks(model):
        block.attn.k, block.attn.v = block.attn.v, block.attn.k
    assert "v is in the place of k" in alarms(model)["which rows are values"]


def test_rotary_pairs_taken_as_halves_are_seen_in_the_weights() -> None:
    model = trained(SMALL_LLAMA)
    permute_rotary(model, inverse=True)
    assert "were taken as halves" in alarms(model)["rotary layout"]


@torch.no_grad()
def permute_rotary(model: GPT, inverse: bool) -> None:
    for block in blocks(model):
        for linear, heads in ((block.attn.q, "n_heads"), (block.attn.k, "n_kv_heads")):
            op = RotaryHalves(heads)
            turn = op.inverse if inverse else op.forward
            linear.weight.copy_(torch.from_numpy(turn([linear.weight.numpy()], model.config)[0].copy()))


def test_exchanged_weight_and_bias_of_a_norm() -> None:
    model = trained(SMALL)
    norm = blocks(model)[1].norm2
    norm.weight, norm.bias = norm.bias, norm.weight
    assert "exchanged: the weights have both signs, the biases one: blocks.1.norm2" in alarms(model)["norm weights"]


def test_one_norm_of_both_signs_is_reported_and_most_of_them_is_an_alarm() -> None:
    model = trained(SMALL_LLAMA)
    with torch.no_grad():
        blocks(model)[0].norm1.weight -= 1
    check = judged(model)["norm weights"]
    assert check.ok is None
    assert "blocks.0.norm1" in check.detail
    with torch.no_grad():
        for block in blocks(model):
            block.norm2.weight -= 1
    assert "5 have about as many negative weights" in alarms(model)["norm weights"]


def test_a_norm_of_zeros() -> None:
    model = trained(SMALL)
    torch.nn.init.zeros_(model.norm.weight)
    assert "all zeros, so nothing passes: norm" in alarms(model)["norm weights"]


def test_rows_of_the_embedding() -> None:
    model = trained(SMALL)
    with torch.no_grad():
        model.tok_emb.weight[290:] = 0
        model.tok_emb.weight[5] = model.tok_emb.weight[4]
    check = judged(model)["rows of tok_emb"]
    assert check.ok
    assert "10 are zeros; 1 repeat an earlier row" in check.detail
    with torch.no_grad():
        model.tok_emb.weight[100:] = 0
    assert "most rows hold nothing of their own" in alarms(model)["rows of tok_emb"]
    with torch.no_grad():
        model.pos_emb.weight.fill_(0.5)  # type: ignore[union-attr]
    assert "every element is 0.5" in alarms(model)["rows of pos_emb"]


def test_a_row_of_uninitialised_memory() -> None:
    model = trained(SMALL)
    with torch.no_grad():
        model.tok_emb.weight[7, 3] = 1e30
    assert "row 7 is" in alarms(model)["rows of tok_emb"]


def test_unfilled_matrices_and_blocks_that_pass_x_through() -> None:
    model = trained(SMALL)
    with torch.no_grad():
        blocks(model)[3].attn.out.weight.zero_()
        blocks(model)[3].mlp.down.weight.zero_()
    check = judged(model)["matrices are filled"]
    assert check.ok is None
    assert "blocks.3.attn.out.weight, blocks.3.mlp.down.weight" in check.detail
    torch.nn.init.ones_(blocks(model)[3].attn.out.weight)
    assert "blocks.3.attn.out.weight (all 1)" in alarms(model)["matrices are filled"]
    torch.nn.init.zeros_(blocks(model)[3].attn.out.weight)
    torch.nn.init.ones_(blocks(model)[1].attn.q.weight)
    assert alarms(model)["matrices are filled"] == "one value throughout: blocks.1.attn.q.weight (all 1)"


def test_a_fresh_model_looks_untrained_and_a_fresh_part_was_never_loaded() -> None:
    torch.manual_seed(0)
    found = judged(GPT(SMALL))
    assert [check for check in found.values() if check.ok is False] == []  # equal norms and biases are no repetition
    fresh = found["weights are trained"]
    assert fresh.ok is None
    assert "looks untrained: all 25 matrices" in fresh.detail
    model = trained(SMALL)
    blocks(model)[1].mlp.up.weight.data.normal_(0, 0.02)
    blocks(model)[2].mlp.down.weight.data.copy_(torch.nn.Linear(256, 128).weight)
    detail = alarms(model)["weights are trained"]
    assert "blocks.1.mlp.up.weight is normal(0, 0.02)" in detail
    assert "blocks.2.mlp.down.weight is uniform" in detail


def test_a_layer_written_twice() -> None:
    model = trained(SMALL)
    blocks(model)[2].load_state_dict(blocks(model)[1].state_dict())
    assert alarms(model)["layers differ"] == "bit for bit the same in layers 1 and 2: everything"
    model = trained(SMALL)
    blocks(model)[3].mlp.up.load_state_dict(blocks(model)[0].mlp.up.state_dict())
    assert "layers 0 and 3: mlp.up.weight, mlp.up.bias" in alarms(model)["layers differ"]
    with torch.no_grad():
        blocks(model)[3].mlp.up.weight[-1, -1] += 1e-6
        blocks(model)[3].mlp.up.bias[-1] += 1e-6
    assert "layers differ" not in alarms(model)


def test_equal_statistics_are_not_equal_layers() -> None:
    """Signs, whose sums are exact, in a matrix of two pieces that differ in the second alone."""
    model = hostile(replace(SMALL, d_ff=PIECE // SMALL.d_model + 1))
    weights = [block.mlp.up.weight.data for block in blocks(model)[:2]]
    weights[0].copy_(weights[0].sign())
    weights[1].copy_(weights[0])
    assert "layers 0 and 1: mlp.up.weight" in alarms(model)["layers differ"]
    weights[1][-1] = weights[0][-1].roll(1)
    assert "layers differ" not in alarms(model)


def test_layers_stacked_on_purpose_are_no_alarm() -> None:
    model = trained(SMALL)
    for layer in (0, 1):
        blocks(model)[layer + 2].load_state_dict(blocks(model)[layer].state_dict())
    check = judged(model)["layers differ"]
    assert check.ok is None
    assert "merge" in check.detail


def test_layer_0_written_everywhere() -> None:
    model = trained(SMALL)
    for block in blocks(model)[1:]:
        block.load_state_dict(blocks(model)[0].state_dict())
    assert "layers 0 and 1: everything, layers 0 and 2" in alarms(model)["layers differ"]


def test_narrow_values_in_a_wide_container() -> None:
    model = trained(SMALL)
    assert "element type" not in judged(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    check = judged(model)["element type"]
    assert check.ok is None
    assert "bfloat16 values in a float32 container" in check.detail
    assert "element type" not in judged(model.bfloat16())


def test_nan_silences_the_witnesses() -> None:
    model = trained(SMALL)
    blocks(model)[0].norm1.weight.data[3] = torch.nan
    (check,) = judged(model).values()
    assert check.ok is None
    assert "NaN or infinity in blocks.0.norm1.weight" in check.detail


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_profile_is_the_same_in_pieces(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(PIECE // 100, 250).to(dtype)
    weight[17], weight[-1], weight[5] = weight[2000], weight[0], 0
    found, x = profile(weight), weight.double()
    torch.testing.assert_close(found.rows, x.norm(dim=1))
    torch.testing.assert_close(found.columns, x.norm(dim=0))
    assert (found.low, found.high) == (float(x.min()), float(x.max()))
    assert found.mean == pytest.approx(float(x.mean()))
    assert found.std == pytest.approx(float(x.std(unbiased=False)))
    assert found.kurtosis == pytest.approx(float(((x - x.mean()) ** 4).mean() / x.var(unbiased=False) ** 2))
    assert (found.zero_rows, found.repeated_rows) == (1, 2)
    assert found.positive == float((x > 0).double().mean())


def rows_of(name: str, config: GPTConfig) -> Tensor:
    return torch.cat(dict(arrangement.arrangements(config))[name])


@pytest.mark.parametrize(
    ("name", "wrote", "read"),
    [
        ("the file's order was kqv", SplitQKV(order="kqv"), SplitQKV()),
        ("the file's order was vqk", SplitQKV(order="vqk"), SplitQKV()),
        ("the file went head by head", SplitQKV(per_head=True), SplitQKV()),
        ("the file went in thirds, not head by head", SplitQKV(), SplitQKV(per_head=True)),
    ],
)
def test_an_arrangement_undoes_the_fault_that_it_names(name: str, wrote: SplitQKV, read: SplitQKV) -> None:
    right = np.split(np.arange(3 * SMALL.d_model), 3)
    misread = read.forward(wrote.inverse(right, SMALL), SMALL)
    assert (np.concatenate(misread)[rows_of(name, SMALL)] == np.concatenate(right)).all()


def test_every_arrangement_moves_rows_and_none_is_lost() -> None:
    for config in (*SWITCHES.values(), replace(SMALL, n_heads=1, n_kv_heads=1, head_dim=128)):
        everything = torch.arange((config.n_heads + 2 * config.n_kv_heads) * config.head_dim)
        for _, rows in arrangement.arrangements(config):
            assert not torch.equal(torch.cat(rows), everything)
            assert torch.equal(torch.cat(rows).sort().values, everything)


def test_rearranging_leaves_the_model_as_it_was() -> None:
    model, ids = hostile(SWITCHES["gpt2"]), torch.arange(9)[None]
    before, names = model(ids), list(dict(model.named_parameters()))
    _, rows = next(arrangement.arrangements(model.config))
    with arrangement.rearranged(model, rows):
        assert not torch.allclose(model(ids), before)
    assert torch.equal(model(ids), before)
    with pytest.raises(IndexError), arrangement.rearranged(model, rows):
        model(torch.arange(25)[None])  # beyond the context: what fails inside must not leave the rows behind
    assert torch.equal(model(ids), before)
    assert list(dict(model.named_parameters())) == names


class Letters:
    vocab_size = 97

    def encode(self, text: str) -> list[int]:
        return [ord(c) % 97 for c in text]


@pytest.mark.parametrize("name", ["gpt2", "llama, grouped"])
def test_loss_of_random_weights_decides_nothing(name: str) -> None:
    model = hostile(replace(RANDOM[name], context_length=128))
    assert judged(model, Letters())["arrangement of q, k and v"].ok is None
    assert "too short" in judged(hostile(RANDOM[name]), Letters())["arrangement of q, k and v"].detail


@pytest.mark.parametrize(
    ("loaded", "others", "ok"),
    [
        (4.5, 2.0, False),  # ln 97 is 4.6, and 0.8 of it 3.7
        (2.0, 4.5, True),
        (6.5, 4.0, None),  # better, but no trained model either
        (4.0, 6.5, None),
        (2.2, 2.0, None),  # by too little
    ],
)
def test_the_verdict_on_losses(monkeypatch: pytest.MonkeyPatch, loaded: float, others: float, ok: bool | None) -> None:
    means = iter([loaded, *[others] * 10])
    noise = torch.linspace(-0.1, 0.1, 127)
    monkeypatch.setattr(
        arrangement, "_losses", lambda model, ids: next(means) + (noise if loaded == 4.5 else 0 * noise)
    )
    model: Any = hostile(replace(RANDOM["gpt2"], context_length=128))
    assert arrangement.check_arrangement(model, Letters()).ok is ok  # type: ignore[arg-type]


def test_an_unsure_gain_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([torch.full((127,), 3.0), *[torch.linspace(-10, 15, 127) for _ in range(10)]])
    monkeypatch.setattr(arrangement, "_losses", lambda model, ids: next(losses))
    model = hostile(replace(RANDOM["gpt2"], context_length=128))
    check = arrangement.check_arrangement(model, Letters())  # type: ignore[arg-type]
    assert check.ok is None
    assert "3.00 nats a token as loaded, 2.50 if" in check.detail


@pytest.fixture(scope="module")
def stories(shared: Path) -> tuple[Any, GPT, Any]:
    identity = open_source(shared / "checkpoints/tinystories-656k-llama")
    return identity, load_model(identity), load_tokenizer_for(identity)


def test_a_real_checkpoint_is_sound(stories: tuple[Any, GPT, Any]) -> None:
    found = {check.name: check for check in witnesses(*stories)}
    assert [check for check in found.values() if check.ok is False] == []
    assert found["orientation of square matrices"].ok
    assert found["arrangement of q, k and v"].ok
    assert "bfloat16 values in a float32 container" in found["element type"].detail


@pytest.mark.parametrize("fault", ["pairs", "halves", "k and v", "q transposed", "out transposed"])
def test_faults_planted_in_a_real_checkpoint(stories: tuple[Any, GPT, Any], shared: Path, fault: str) -> None:
    identity, _, tokenizer = stories
    model = load_model(open_source(shared / "checkpoints/tinystories-656k-llama"))
    if fault in ("pairs", "halves"):
        permute_rotary(model, inverse=fault == "pairs")
    for block in blocks(model):
        if fault == "k and v":
            block.attn.k, block.attn.v = block.attn.v, block.attn.k
        elif fault.endswith("transposed"):
            transpose(getattr(block.attn, fault.split()[0]))
    found = {check.name: check.detail for check in witnesses(identity, model, tokenizer) if check.ok is False}
    expected = {
        "pairs": ("arrangement of q, k and v", "the rotary halves were pairs"),
        "halves": ("arrangement of q, k and v", "the rotary halves were permuted once too often"),
        "k and v": ("arrangement of q, k and v", "k and v were exchanged"),
        "q transposed": ("orientation of square matrices", "attn.q of all 2 layers"),
        "out transposed": ("orientation of square matrices", "attn.out of all 2 layers"),
    }
    name, words = expected[fault]
    assert words in found[name]
