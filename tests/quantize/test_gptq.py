"""GPTQ: less error on the calibration's inputs than rounding to nearest, by an independent formula; hostile moments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from loadstone.errors import LoadstoneError
from loadstone.quantize import gptq as module
from loadstone.quantize.blocks import SIZE, TYPES, BlockType
from loadstone.quantize.gptq import gptq, inverse_factor
from loadstone.quantize.grid import Grid, Rounded, best_grid, nearest


def inputs(K: int, N: int = 400, seed: int = 0) -> Tensor:
    """Inputs that go together, with a few large ones, as a network's are."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(N, K // 4, generator=generator) @ torch.randn(K // 4, K, generator=generator)
    x = mixed + 0.3 * torch.randn(N, K, generator=generator)
    x[:, :3] *= 20
    return x


def output_error(weight: Tensor, values: Tensor, x: Tensor) -> float:
    return float((x @ (values - weight).T).square().sum() / (x @ weight.T).square().sum())


@pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize(("M", "K"), [(1, 32), (24, 96), (17, 256), (40, 160)])
def test_it_is_better_than_nearest_on_what_it_saw(kind: BlockType, M: int, K: int) -> None:
    weight, x = torch.randn(M, K, generator=torch.Generator().manual_seed(1)), inputs(K)
    found = gptq(weight, x.T @ x, kind)
    ours, plain = (output_error(weight, each.values(), x) for each in (found, nearest(weight, kind)))
    assert ours < (0.7 if K > SIZE else 1.0) * plain


def test_it_is_what_the_definition_says() -> None:
    """The textbook form: round an input, solve the least squares of all later ones anew, go on. No Cholesky."""
    K, kind = 64, TYPES["Q4_0"]
    weight, x = torch.randn(3, K, generator=torch.Generator().manual_seed(1)), inputs(K)
    gram = (x.T @ x).double()
    found = gptq(weight, x.T @ x, kind)
    order = gram.diagonal().argsort(descending=True)
    damped = gram + module.DAMPING * gram.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    left, values, costs = weight.double().clone(), found.values().double(), torch.zeros(K, dtype=torch.float64)
    for place, k in enumerate(order.tolist()):
        scale = found.grid.scales[:, k // SIZE].double()
        wrong = left[:, k] - values[:, k]
        assert (wrong.abs() <= 0.5001 * scale.abs() + clipped(left[:, k], scale)).all(), k
        # What is known to be wrong so far is made up for by the later inputs as well as it can be.
        rest = order[place + 1 :]
        made_up = torch.linalg.solve(damped[rest][:, rest], damped[rest, k])
        costs[k] = damped[k, k] - damped[k, rest] @ made_up  # of an error of 1, after all that can be made up
        left[:, rest] += torch.outer(wrong, made_up)
    grid = best_grid(weight.view(3, -1, SIZE), kind, costs.float().view(-1, SIZE))
    assert torch.equal(grid.scales, found.grid.scales)


def test_it_makes_up_for_the_errors_of_the_layers_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that least squares say, and eight bits, what comes out is nearer to what the layer once computed."""
    weight, once = torch.randn(9, 64, generator=torch.Generator().manual_seed(1)), inputs(64)
    now = once + 0.4 * once.std(0) * torch.randn(once.shape, generator=torch.Generator().manual_seed(5))
    gram, shift, kind = now.T @ now, (once - now).T @ now, TYPES["Q8_0"]
    wrong = {}
    for share in (0.0, 0.5, 1.0):
        monkeypatch.setattr(module, "SHARE", share)
        wrong[share] = float((now @ gptq(weight, gram, kind, shift).values().T - once @ weight.T).norm())
    damped = gram + module.DAMPING * gram.diagonal().mean() * torch.eye(64)
    best = weight + torch.linalg.solve(damped, (weight @ shift).T).T
    assert wrong[1.0] == pytest.approx(float((now @ best.T - once @ weight.T).norm()), rel=0.01)
    assert wrong[1.0] < 0.85 * wrong[0.0]
    assert wrong[1.0] < wrong[0.5] < wrong[0.0]


def test_without_a_shift_nothing_is_made_up_for() -> None:
    weight, x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2)), inputs(64)
    plain, zero = (gptq(weight, x.T @ x, TYPES["Q4_0"], shift).values() for shift in (None, torch.zeros(64, 64)))
    assert torch.equal(plain, zero)


def clipped(weight: Tensor, scale: Tensor) -> Tensor:
    """How far beyond the codes' range a weight lies."""
    code = weight / scale
    return ((code - 7).clamp(min=0) + (-8 - code).clamp(min=0)) * scale.abs()


def test_without_correlation_it_is_rounding_to_nearest() -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    assert torch.equal(gptq(weight, torch.eye(64), TYPES["Q4_0"]).values(), nearest(weight, TYPES["Q4_0"]).values())


@pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
def test_what_is_on_the_grid_already_stays(kind: BlockType) -> None:
    """As another program wrote it, with a code at either end of each block: SmolLM2's file of Q4_1, say."""
    codes = torch.randint(kind.low, kind.high + 1, (8, 2, SIZE), generator=torch.Generator().manual_seed(3))
    codes[..., 4], codes[..., 9] = kind.low, kind.high
    scales = (0.1 * torch.rand(8, 2, generator=torch.Generator().manual_seed(4)) + 0.01).half().float()
    minima = -7.5 * scales.half().float() if kind.minimum else torch.zeros(8, 2)
    weight = Rounded(kind, codes.to(torch.int8), Grid(scales, minima.half().float())).values()
    x = inputs(64)
    assert torch.equal(nearest(weight, kind).values(), weight)
    assert torch.equal(gptq(weight, x.T @ x, kind).values(), weight)


def _no_inputs(gram: Tensor) -> None:
    gram[:8], gram[:, :8] = 0, 0


def _one_token(gram: Tensor) -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    gram.copy_(torch.outer(x, x))


def _nothing(gram: Tensor) -> None:
    gram.zero_()


def _massive(gram: Tensor) -> None:
    gram[5] *= 1e5
    gram[:, 5] *= 1e5


@pytest.mark.parametrize("spoil", [_no_inputs, _one_token, _nothing, _massive])
def test_hostile_moments(spoil: Callable[[Any], None]) -> None:
    x = inputs(64)
    weight, gram = torch.randn(6, 64, generator=torch.Generator().manual_seed(1)), x.T @ x
    spoil(gram)
    values = gptq(weight, gram, TYPES["Q4_0"]).values()
    assert bool(torch.isfinite(values).all())
    assert float((values - weight).norm() / weight.norm()) < 0.5


def test_moments_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(LoadstoneError, match="NaN or infinite"):
        inverse_factor(torch.full((32, 32), torch.nan))


def test_blocks_of_columns_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.randn(9, 256, generator=torch.Generator().manual_seed(1)), inputs(256)
    whole = gptq(weight, x.T @ x, TYPES["Q4_0"]).values()
    monkeypatch.setattr(module, "COLUMNS", 32)
    parts = gptq(weight, x.T @ x, TYPES["Q4_0"]).values()
    assert float((whole != parts).float().mean()) < 0.01  # another order of adding
