"""The fused head and loss: values and gradients of the plain way, without its memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from loadstone.data.batch import IGNORED
from loadstone.kernels.linear import product
from loadstone.train import losses
from loadstone.train.losses import head_loss, perplexity


def plain(hidden_BTC: Tensor, weight_VC: Tensor, targets_BT: Tensor) -> Tensor:
    logits = F.linear(hidden_BTC, weight_VC).float().flatten(0, -2)
    return F.cross_entropy(logits, targets_BT.flatten(), ignore_index=IGNORED, reduction="sum")


def inputs(vocabulary: int = 61, seed: int = 0, ignored: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    hidden, weight = torch.randn(3, 7, 16, requires_grad=True), torch.randn(vocabulary, 16, requires_grad=True)
    targets = torch.randint(0, vocabulary, (3, 7))
    return hidden, weight, torch.where(torch.rand(3, 7) < ignored, IGNORED, targets)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def gradients(loss: Tensor, *of: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss * 0.37, of)]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 999),
    vocabulary=st.integers(2, 80),
    ignored=st.sampled_from([0.0, 0.3, 0.9]),
    chunk=st.integers(1, 2000),
)
def test_loss_and_gradients_are_those_of_the_plain_way(seed: int, vocabulary: int, ignored: float, chunk: int) -> None:
    hidden, weight, targets = inputs(vocabulary, seed, ignored)
    targets[0, 0] = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "CHUNK", chunk)
        found = gradients(head_loss(hidden, weight, targets), hidden, weight)
    expected = gradients(plain(hidden.double(), weight.double(), targets), hidden, weight)
    assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) < 1e-5


def test_the_loss_is_a_float32_sum_without_gradient_under_no_grad() -> None:
    hidden, weight, targets = inputs()
    with torch.no_grad():
        loss = head_loss(hidden, weight, targets)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(hidden, weight, targets).detach())


def test_rows_without_a_target_have_no_gradient_and_nothing_but_them_is_nothing() -> None:
    hidden, weight, targets = inputs()
    found, _ = torch.autograd.grad(head_loss(hidden, weight, targets), (hidden, weight))
    assert torch.equal(found.abs().sum(-1) == 0, targets == IGNORED)
    loss = head_loss(hidden, weight, torch.full_like(targets, IGNORED))
    for gradient in torch.autograd.grad(loss, (hidden, weight)):
        assert not gradient.any()
    assert loss == 0


def test_what_is_frozen_gets_no_gradient_and_costs_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = inputs()
    head_loss(hidden, weight.detach(), targets).backward()  # type: ignore[no-untyped-call]
    assert weight.grad is None
    expected = torch.autograd.grad(plain(hidden, weight, targets), hidden)[0]
    assert hidden.grad is not None
    assert relative(hidden.grad, expected) < 1e-5
    calls: list[Tensor] = []

    def counted(a: Tensor, b: Tensor) -> Tensor:
        calls.append(a)
        return product(a, b)

    monkeypatch.setattr(losses, "product", counted)
    head_loss(hidden.detach(), weight, targets).backward()  # type: ignore[no-untyped-call]
    assert len(calls) == 1  # the logits; not the gradient of hidden


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.full((1, 2, 4), 300.0, requires_grad=True)
    weight = torch.tensor([[300.0] * 4, [-300.0] * 4, [0.0] * 4], requires_grad=True)
    found = gradients(head_loss(hidden, weight, torch.tensor([[0, 1]])), hidden, weight)
    assert float(found[0]) == pytest.approx(720000.0)
    assert all(bool(tensor.isfinite().all()) for tensor in found)


def test_autocast_is_as_exact_as_the_plain_way_under_autocast() -> None:
    hidden, weight, targets = inputs(vocabulary=500)
    exact = gradients(plain(hidden, weight, targets), hidden, weight)
    with torch.autocast("cpu", torch.bfloat16):
        fused, usual = head_loss(hidden, weight, targets), plain(hidden, weight, targets)
    found, plainly = gradients(fused, hidden, weight), gradients(usual, hidden, weight)
    assert fused.dtype == torch.float32
    for ours, theirs, right in zip(found, plainly, exact, strict=True):
        assert ours.dtype == torch.float32
        assert relative(ours, right) < 1.2 * relative(theirs, right) + 1e-3


def test_a_model_in_bfloat16_gets_gradients_of_its_type() -> None:
    hidden, weight, targets = inputs()
    low = hidden.detach().bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_()
    found = torch.autograd.grad(head_loss(low[0], low[1], targets), low)
    assert [gradient.dtype for gradient in found] == [torch.bfloat16] * 2


def test_all_logits_never_exist() -> None:
    """Memory: the largest tensor made is one chunk, not rows x vocabulary."""
    hidden, weight, targets = inputs(vocabulary=3000, ignored=0.0)
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.numel() != weight.numel():
                largest = max(largest, out.numel())
            return out

    with pytest.MonkeyPatch.context() as patch, Watch():
        patch.setattr(losses, "CHUNK", 2 * 3000)
        head_loss(hidden, weight, targets).backward()  # type: ignore[no-untyped-call]
    assert 3000 <= largest <= 2 * 3000


def test_perplexity_is_infinite_only_where_no_float_holds_it() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(699.0) == math.exp(699.0)
    assert perplexity(710.0) == math.inf
