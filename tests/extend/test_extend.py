"""A model extended: old rows and logits to the last bit, and a report that says what the real model does."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from extendable import FAMILIES, KNOWN, TOKENIZERS, gpt2_like, hostile, padded_gguf
from loadstone.errors import LoadstoneError, TokenizerError
from loadstone.extend import METHODS, Report, extend, extend_tokenizer
from loadstone.extend.measure import TOKENS, compare_logits
from loadstone.extend.rows import COVARIANCE, TrainedRows
from loadstone.model import GPT
from loadstone.tokenizer import Tokenizer
from loadstone.verify import ENGLISH

NEW = ["<|ask|>", "<|answer|>", "<|stop|>"]


def real_loss(model: GPT, tokenizer: Tokenizer, text: str = ENGLISH) -> float:
    """Window by window, as anybody would: every token but the first is predicted once."""
    ids, size = tokenizer.encode(text), model.config.context_length
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, size):
            part = torch.tensor(ids[start : start + size + 1])
            total += float(F.cross_entropy(model(part[None, :-1])[0], part[1:], reduction="sum"))
    return total / (len(ids) - 1)


def logits(model: GPT, length: int) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(length)[None] * 7 % KNOWN)[0]


@pytest.mark.parametrize(("padded", "multiple"), [(0, None), (2, 64), (30, None)])
@pytest.mark.parametrize("family", FAMILIES)
def test_old_logits_are_bit_equal(family: str, padded: int, multiple: int | None) -> None:
    """Where the old matrix has a multiple of 16 rows: then no product treats its last rows in another way."""
    more = -(KNOWN + padded) % 16 + 16  # other tokens fill up to the padding
    tokenizer, _ = extend_tokenizer(gpt2_like(), [f"word{i}" for i in range(more)], special=False)
    model = hostile(KNOWN + more + padded, **FAMILIES[family])
    before = {n: logits(model, n) for n in (1, 7, 64)}
    larger, renewed, report = extend(model, tokenizer, NEW, pad_to_multiple=multiple)
    kept = torch.tensor([row for row in range(model.config.vocab_size) if row not in {t.id for t in report.tokens}])
    for length, old in before.items():
        assert torch.equal(logits(larger, length)[:, kept], old[:, kept])
    assert report.logits.equal
    assert report.logits.difference == {1: 0.0, 7: 0.0, 64: 0.0}
    assert "as are hidden states and logits at lengths 1, 7, 64" in dict(report.lines())["old rows"]
    assert [token.was for token in report.tokens] == ["padding"] * min(padded, 3) + ["none"] * (3 - min(padded, 3))
    assert larger.config.vocab_size % (multiple or 1) == 0
    assert renewed.vocab_size == tokenizer.vocab_size + 3


def test_old_logits_are_bit_equal_on_two_threads() -> None:
    torch.set_num_threads(2)
    test_old_logits_are_bit_equal("gpt2", 2, 64)


@pytest.mark.parametrize("rows", [401, 403, 410])
def test_other_sizes_are_equal_but_for_rounding(rows: int) -> None:
    model = hostile(rows)
    larger, _, report = extend(model, gpt2_like(), NEW[: 1 + rows % 2])
    assert report.logits.rows_equal
    assert report.logits.hidden_equal
    assert max(report.logits.difference.values()) < 1e-5
    kept = [row for row in range(rows) if row not in {token.id for token in report.tokens}]
    hidden = torch.randn(1, 64, 32)
    same_size = F.linear(hidden, larger.tok_emb.weight[:rows])
    assert torch.equal(same_size[..., kept], model.logits(hidden)[..., kept])


def test_a_model_that_changed_elsewhere_is_told() -> None:
    model, other = hostile(KNOWN), hostile(KNOWN)
    for parameter in (*model.parameters(), *other.parameters()):
        parameter.requires_grad_(False)
    same = compare_logits(model, other, list(range(20)), [])
    assert same.equal
    other.blocks[1].get_parameter("norm2.weight").mul_(1.5)
    found = compare_logits(model, other, list(range(20)), [])
    assert found.rows_equal
    assert not found.hidden_equal
    assert found.difference[7] > 1e-3
    other.tok_emb.weight[400, 31] += 1e-6
    assert not compare_logits(model, other, list(range(20)), []).rows_equal
    assert compare_logits(model, other, list(range(20)), [400]).rows_equal


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whatever_is_extended_only_new_rows_are_new(data: st.DataObject) -> None:
    family, init = data.draw(st.sampled_from(list(FAMILIES))), data.draw(st.sampled_from(list(METHODS)))
    padded, count = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 12))
    multiple = data.draw(st.none() | st.integers(1, 100))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    rows = KNOWN + padded
    model = hostile(rows, data.draw(st.integers(0, 99)), **FAMILIES[family]).to(dtype)
    frozen = {name for name, _ in model.named_parameters() if data.draw(st.booleans())}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    model.set_dropout(0.3)
    model.train(data.draw(st.booleans()))
    old = {name: parameter.clone() for name, parameter in model.named_parameters()}
    larger, renewed, report = extend(model, gpt2_like(), [f"<{i}>" for i in range(count)], init=init,
                                     pad_to_multiple=multiple)  # fmt: skip
    expected = max(rows, KNOWN + count)
    expected = -(-expected // multiple) * multiple if multiple else expected
    assert larger.config == replace(model.config, vocab_size=expected)
    assert model.config.vocab_size == rows
    assert report.rows == (rows, expected)
    assert report.padding == (padded, expected - KNOWN - count)
    assert (larger.head is None) == (model.head is None) == report.tied
    assert {name for name, p in larger.named_parameters() if not p.requires_grad} == frozen
    assert (larger.training, larger.dropout) == (model.training, 0.3)
    kept = [*range(KNOWN), *range(KNOWN + count, rows)]
    parameters = dict(larger.named_parameters())
    assert set(parameters) == set(old)
    for name, before in old.items():
        assert torch.equal(before, dict(model.named_parameters())[name])  # the given model stays as it is
        if name in ("tok_emb.weight", "head.weight"):
            assert parameters[name].shape == (expected, 32)
            assert torch.equal(parameters[name][kept], before[kept])
            assert bool(torch.isfinite(parameters[name]).all())
        else:
            assert parameters[name] is dict(model.named_parameters())[name]
    assert report.logits.rows_equal
    assert report.logits.hidden_equal
    assert renewed.encode("a<0>b", parse_special=True).count(KNOWN) == 1
    json.dumps(report.as_dict(), allow_nan=False)


@pytest.mark.parametrize("tied", [True, False])
def test_each_matrix_gets_rows_of_its_own(tied: bool) -> None:
    """From the tokens' rows alone: padding may hold anything."""
    model = hostile(KNOWN + 2, tied=tied)
    with torch.no_grad():
        model.tok_emb.weight[KNOWN:] = 1e4
        if model.head is not None:
            model.head.weight[KNOWN:] = 1e4
            model.head.weight.add_(3.0)
    larger, _, report = extend(model, gpt2_like(), NEW, init="mean", pad_to_multiple=64)
    for old, new in [(model.tok_emb, larger.tok_emb), *([] if tied else [(model.head, larger.head)])]:
        assert old is not None
        assert new is not None
        mean = old.weight[:KNOWN].double().mean(0).float()
        torch.testing.assert_close(new.weight[KNOWN:], mean.expand(448 - KNOWN, -1), rtol=1e-6, atol=1e-7)
    assert set(report.norms) == ({"embedding"} if tied else {"embedding", "head"})
    for name, norms in report.norms.items():
        weight = larger.tok_emb.weight if name == "embedding" else larger.head.weight  # type: ignore[union-attr]
        assert norms.old == pytest.approx(float(weight[:KNOWN].detach().norm(dim=1).mean()), rel=1e-5)
        greatest = float(weight[KNOWN].detach().norm())
        assert [norms.least, norms.new, norms.greatest] == pytest.approx([greatest] * 3, rel=1e-5)


@pytest.mark.parametrize("init", METHODS)
@pytest.mark.parametrize(("rows", "family"), [(401, "gpt2"), (402, "gpt2 untied"), (432, "llama")])
def test_the_report_says_what_the_real_model_does(init: str, rows: int, family: str) -> None:
    model, tokenizer = hostile(rows, sigma=0.1, **FAMILIES[family]), gpt2_like()
    larger, _, report = extend(model, tokenizer, NEW, init=init, pad_to_multiple=16)
    assert report.before.nats == pytest.approx(real_loss(model, tokenizer), rel=1e-5)
    assert report.after[init].nats == pytest.approx(real_loss(larger, tokenizer), rel=1e-5)
    ids = torch.tensor(tokenizer.encode(ENGLISH))
    with torch.no_grad():
        mass = larger(ids[None, :72]).softmax(-1)[0][:, [401, 402, 403]].sum(1)
    assert report.after[init].most >= float(mass.max()) * (1 - 1e-4)
    assert report.text == {
        "name": "built-in English",
        "tokens": len(tokenizer.encode(ENGLISH)) - 1,
        "bytes": len(ENGLISH) - len("The"),
    }
    bits = report.before.nats * report.text["tokens"] / math.log(2) / report.text["bytes"]
    assert report.before.bits_per_byte == pytest.approx(bits)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 40), padded=st.integers(0, 20), tied=st.booleans())
def test_mean_rows_cost_next_to_nothing(seed: int, count: int, padded: int, tied: bool) -> None:
    """Jensen: the mean row's logit is the mean logit, so K of them take at most K/N of the softmax's sum."""
    model = hostile(KNOWN + padded, seed, tied=tied)
    new = [f"<{i}>" for i in range(count)]
    _, _, report = extend(model, gpt2_like(), new, init="mean", pad_to_multiple=8)
    added = report.rows[1] - KNOWN - max(padded - count, 0)
    assert report.after["mean"].nats <= report.before.nats + math.log1p(added / KNOWN) + 1e-5
    assert report.after["mean"].most <= count / KNOWN + 1e-6


def offset(model: GPT, logit: float) -> GPT:
    """The same model to the last probability: every logit of it is moved by about as much, which softmax cannot see."""
    assert model.head is not None
    with torch.no_grad():
        hidden = model.hidden(torch.arange(64)[None] * 5 % KNOWN)[0].mean(0)
        model.head.weight += logit * hidden / hidden.square().sum()
    return model


def test_random_rows_wreck_a_model_whose_logits_share_an_offset() -> None:
    """As GPT-2's of 124M do (transformers#8039): new rows around 0 stand far above all others."""
    model = hostile(KNOWN, sigma=0.05, tied=False)
    with torch.no_grad():
        model.get_parameter("norm.bias").add_(1.0)  # so that hidden states have a common part at all
    before, tokenizer = real_loss(model, gpt2_like()), gpt2_like()
    model = offset(model, -60.0)
    larger, _, report = extend(model, tokenizer, NEW, init="random")
    assert report.before.nats == pytest.approx(before, rel=1e-4)
    assert report.after["random"].nats > before + 10
    assert report.after["random"].mass > 0.9
    assert real_loss(larger, tokenizer) == pytest.approx(report.after["random"].nats, rel=1e-4)
    for good in ("mean", "mean_cov"):
        assert report.after[good].nats < before + 0.05
        assert report.after[good].mass < 0.05


def test_mean_cov_has_the_mean_and_the_covariance_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadstone.extend.rows.PIECE", 100)  # in pieces of a few rows each
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(300, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 5
    weight[250:] = 1e6
    rows = TrainedRows(weight, torch.arange(250))
    known = weight[:250].double()
    torch.testing.assert_close(rows.mean, known.mean(0), rtol=1e-12, atol=1e-12)
    assert len(list(rows.pieces())) == math.ceil(250 / 16)
    sample = rows.start("mean_cov", 40_000, torch.Generator().manual_seed(2)).double()
    spread = torch.cov(known.T, correction=0)
    # float32 keeps about 6e-7 of rows around 5, whose deviations are some 0.01
    found = torch.cov(sample.T) / COVARIANCE
    torch.testing.assert_close(found, spread, rtol=0.03, atol=0.03 * float(spread.diag().max()))
    torch.testing.assert_close(sample.mean(0), known.mean(0), rtol=0, atol=2e-4)


def test_random_is_gpt2s_and_seeds_count() -> None:
    model = hostile(KNOWN)
    new = [f"<{i}>" for i in range(400)]
    one, two, three = (
        extend(model, gpt2_like(), new, init="random", seed=seed)[0].tok_emb.weight[KNOWN:].detach()
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    assert float(one.std()) == pytest.approx(0.02, rel=0.03)
    assert abs(float(one.mean())) < 0.001


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_kind_of_tokenizer(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    model = hostile(416, bos_id=None, eos_ids=())
    larger, renewed, report = extend(model, tokenizer, NEW, special=False)
    assert larger.config.vocab_size == 416
    assert all(token.was == "padding" for token in report.tokens)
    assert report.padding[0] - report.padding[1] == 3
    again, _, _ = extend(larger, renewed, ["<|more|>"])
    assert torch.equal(again.tok_emb.weight[: report.tokens[-1].id + 1],
                       larger.tok_emb.weight[: report.tokens[-1].id + 1])  # fmt: skip


def test_old_text_of_your_own() -> None:
    model, tokenizer = hostile(KNOWN), gpt2_like()
    text = "The cat sat.\n" * 30
    _, _, report = extend(model, tokenizer, ["cat s", "<x>"], special=False, text=text)
    assert report.before.nats == pytest.approx(real_loss(model, tokenizer, text), rel=1e-5)
    assert report.text == {
        "name": "the text given",
        "tokens": len(tokenizer.encode(text)) - 1,
        "bytes": len(text) - len("The"),
    }
    assert report.remarks == ["the old text holds 'cat s': its losses are those of the old tokens, in both models."]
    _, _, long = extend(model, tokenizer, NEW, text="Ä" * 20_000)
    assert long.text["tokens"] == TOKENS
    _, _, short = extend(replace_context(model, 1), tokenizer, NEW)
    assert list(short.logits.difference) == [1]


def replace_context(model: GPT, length: int) -> GPT:
    config = model.config.with_overrides({"context_length": length})
    other = GPT(config)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(dict(model.named_parameters())[name][:length] if name == "pos_emb.weight" else
                            dict(model.named_parameters())[name])  # fmt: skip
    return other


def test_lines_of_the_report() -> None:
    _, _, report = extend(hostile(402), gpt2_like(), NEW, init="mean")
    labels = [label for label, _ in report.lines()]
    text = "\n".join(line for _, line in report.lines())
    assert labels[:3] == ["tokens", "rows", "old rows"]
    assert "'<|ask|>' is 401, '<|answer|>' is 402, '<|stop|>' is 403" in text
    assert "402 -> 404; 1 of the new tokens took over padding rows, initialised anew; head tied" in text
    assert next(line for line in text.splitlines() if "<- written" in line).startswith("mean ")
    broken = replace(report, logits=replace(report.logits, rows_equal=False))
    assert dict(broken.lines())["old rows"] == "NOT what they were"
    assert isinstance(report, Report)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "zeros"}, "init 'zeros' is not known; choose random, mean, mean_cov"),
        ({"pad_to_multiple": 0}, "pad_to_multiple 0: expected a number from 1 to 65536"),
        ({"pad_to_multiple": 10**9}, "pad_to_multiple 1000000000: expected"),
        ({"seed": -1}, "seed -1: expected a number from 0"),
        ({"seed": 2**63}, "seed 9223372036854775808: expected"),
        ({"text": ""}, "the old text has 0 tokens, and a loss needs two or more"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LoadstoneError, match=message):
        extend(hostile(KNOWN), gpt2_like(), NEW, **options)


def test_models_that_cannot_be_extended() -> None:
    with pytest.raises(TokenizerError, match=r"401 rows\), and the model only 400 rows: it is another model's"):
        extend(hostile(400), gpt2_like(), NEW)
    with pytest.raises(TokenizerError, match="the model only 402 rows"):
        extend(hostile(402), padded_gguf(), NEW)
    model = hostile(KNOWN)
    with torch.no_grad():
        model.tok_emb.weight[7, 3] = math.nan
    with pytest.raises(LoadstoneError, match="holds NaN or infinity in the row of a token"):
        extend(model, gpt2_like(), NEW)
    model = hostile(KNOWN)
    with torch.no_grad():
        model.norm.weight[3] = math.nan
    with pytest.raises(LoadstoneError, match="loss on the old text is no number"):
        extend(model, gpt2_like(), NEW)
    model.tok_emb = torch.nn.Embedding(KNOWN, 32)  # type: ignore[assignment]
    with pytest.raises(LoadstoneError, match="an adapter is in the place"):
        extend(model, gpt2_like(), NEW)


def test_one_text_is_one_token() -> None:
    _, _, report = extend(hostile(KNOWN), gpt2_like(), "<|ask|>")
    assert [token.text for token in report.tokens] == ["<|ask|>"]
