"""Log-probabilities: those of a loop that computes one token at a time, whatever the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loadstone.errors import LoadstoneError
from loadstone.evaluate.scoring import Request, Scores, batches, score
from loadstone.finetune.lora import LoRA, add_lora
from loadstone.model import GPT
from loadstone.train import losses
from small_gpt import small_gpt, small_llama, small_neox

LENGTHS = (2, 3, 24, 25, 25, 7, 7, 12, 25, 2)


def requests(seed: int = 0) -> list[Request]:
    random = np.random.default_rng(seed)
    return [Request(random.integers(0, 61, n), int(random.integers(1, n))) for n in LENGTHS]


def one_by_one(model: GPT, request: Request) -> Scores:
    """The judge: a forward pass per target, float64 softmax."""
    logprobs, greedy = [], []
    for at in range(len(request.ids) - request.targets, len(request.ids)):
        with torch.no_grad():
            logits = model(torch.tensor(request.ids[:at])[None])[0, -1].double()
        logprobs.append(float(torch.log_softmax(logits, -1)[request.ids[at]]))
        greedy.append(int(logits.argmax()) == request.ids[at])
    return Scores(np.array(logprobs, dtype=np.float32), np.array(greedy))


def all_scores(model: GPT, asked: list[Request], batch_size: int | None = None) -> list[Scores]:
    found = dict(score(model, asked, batch_size=batch_size))
    assert len(found) == len(asked)
    return [found[index] for index in range(len(asked))]


def with_adapter() -> GPT:
    model = small_gpt()
    add_lora(model, LoRA(rank=4))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def with_erf() -> GPT:
    return small_gpt(activation="gelu")


MODELS = {
    "gpt2": small_gpt, "gpt2 with an adapter": with_adapter, "gpt2 with erf": with_erf, "llama": small_llama,
    "neox": small_neox,
}  # fmt: skip


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("batch_size", [None, 1, 3, 100])
def test_scores_are_those_of_one_token_at_a_time(
    family: str, batch_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK", 61 * 5)  # five rows of logits at a time
    model, asked = MODELS[family](), requests()
    for request, found in zip(asked, all_scores(model, asked, batch_size), strict=True):
        expected = one_by_one(model, request)
        assert found.logprobs.dtype == np.float32
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)
        assert (found.greedy == expected.greedy).all()


def test_some_targets_are_the_likeliest_and_some_not() -> None:
    model = small_gpt()
    ids = [1, 2, 3]
    for _ in range(5):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    (found,) = all_scores(model, [Request([*ids, (ids[-1] + 1) % 61], 7)])
    assert found.greedy[1:6].all()
    assert not found.greedy[6]


def test_of_equal_logits_the_lowest_id_is_the_likeliest() -> None:
    model = small_gpt()
    best = int(model(torch.tensor([[1, 2, 3]]))[0, -1].argmax())
    other = 0 if best else 60
    with torch.no_grad():
        model.tok_emb.weight[other] = model.tok_emb.weight[best]
        if model.head is not None:
            model.head.weight[other] = model.head.weight[best]
    found = all_scores(model, [Request([1, 2, 3, best], 1), Request([1, 2, 3, other], 1)])
    assert [bool(each.greedy[0]) for each in found] == [best < other, other < best]
    assert found[0].logprobs == found[1].logprobs


def test_bfloat16_is_near_float32_and_the_model_is_left_as_it_was() -> None:
    model = small_gpt(layers=2).train()
    model.set_dropout(0.5)
    mlp = model.blocks[0].mlp
    before = (mlp.up.product, mlp.activation)  # type: ignore[union-attr]
    exact = all_scores(model, requests())
    assert model.training
    assert (mlp.up.product, mlp.activation) == before  # type: ignore[union-attr]
    rough = all_scores(model.to(torch.bfloat16), requests(), 4)
    errors = np.concatenate([a.logprobs - b.logprobs for a, b in zip(exact, rough, strict=True)])
    assert 0 < np.abs(errors).mean() < 0.2


def test_no_more_logits_than_a_chunk_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    original = torch.Tensor.amax

    def spy(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        rows.append(len(self))
        return original(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.Tensor, "amax", spy)
    monkeypatch.setattr(losses, "CHUNK", 61 * 4)
    asked = requests()
    all_scores(small_gpt(layers=1), asked)
    assert sum(rows) == sum(request.targets for request in asked)  # none for a token that nobody asked for
    assert max(rows) <= 4


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=60), st.one_of(st.none(), st.integers(1, 9)))
def test_batches_hold_every_row_once_and_stay_within_bounds(lengths: list[int], size: int | None) -> None:
    found = list(batches(lengths, size, torch.device("cpu")))
    assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
    order = [lengths[index] for batch in found for index in batch]
    assert order == sorted(lengths, reverse=True)
    for batch in found:
        padded = len(batch) * lengths[batch[0]]
        assert len(batch) <= size if size else padded <= 2048 or len(batch) == 1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([1], 1), "first cannot be"),
        (Request([1, 2], 2), "first cannot be"),
        (Request([1, 2], 0), "0 of 2"),
        (Request([1] * 26, 1), "26 tokens, and the model's context is 24"),
        (Request([1, 61], 1), "token 61 .* 61 rows"),
        (Request([61, 1], 1), "token 61 .* 61 rows"),
        (Request([1, -1], 1), "token -1 .* 61 rows"),
    ],
)
def test_what_cannot_be_scored_is_refused(request_: Request, message: str) -> None:
    with pytest.raises(LoadstoneError, match=message):
        all_scores(small_gpt(layers=1), [request_])


def test_nan_is_an_error_and_no_figure() -> None:
    model = small_gpt(layers=1)
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    with pytest.raises(LoadstoneError, match="NaN"):
        all_scores(model, requests())
