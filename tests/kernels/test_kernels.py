"""The training kernels: gradients of a whole model against plain torch in float64, and inference untouched."""

from __future__ import annotations

import copy
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from loadstone.config import GPTConfig
from loadstone.config.families import GPT_NEOX_FIELDS
from loadstone.data.batch import IGNORED
from loadstone.kernels import attention as attention_file
from loadstone.kernels import keep_freed_memory, speed_up
from loadstone.kernels import linear as linear_file
from loadstone.kernels.attention import attention
from loadstone.model import GPT
from loadstone.train.losses import head_loss
from small_gpt import LLAMA

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "untied": {"tied": False},
    "llama": LLAMA,
    "neox": dict(GPT_NEOX_FIELDS),
}
CASES = [(name, recompute) for name in FAMILIES for recompute in (False, True)]


def model_of(fields: dict[str, Any]) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(61, 160, 32, 2, 4, **fields)).train()


def rows() -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 61, (2, 151), generator=torch.Generator().manual_seed(1))
    targets = ids[:, 1:].clone()
    targets[0, :9] = IGNORED
    return ids[:, :-1], targets


def gradients(model: GPT, fused: bool, autocast: bool = False) -> dict[str, Tensor]:
    ids, targets = rows()
    weight = model.tok_emb.weight if model.head is None else model.head.weight
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = model.hidden(ids)
        if fused:
            loss = head_loss(hidden, weight, targets)
        else:
            logits = F.linear(hidden, weight)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def relative(found: Tensor, expected: Tensor) -> float:
    # Against the whole gradient's size where it is zero but for rounding (the bias of keys).
    return float((found.double() - expected.double()).norm() / (expected.double().norm() + 1e-2))


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == expected.keys()
    return {name: relative(found[name], expected[name]) for name in found}


@pytest.mark.parametrize(("family", "recompute"), CASES)
def test_gradients_of_every_parameter(family: str, recompute: bool) -> None:
    model = model_of(FAMILIES[family])
    exact = gradients(copy.deepcopy(model).double(), fused=False)
    speed_up(model)
    model.recompute = recompute
    worst = max(errors(gradients(model, fused=True), exact).values())
    assert worst < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_exact_as_plain_autocast(family: str) -> None:
    model = model_of(FAMILIES[family])
    exact = gradients(copy.deepcopy(model).double(), fused=False)
    usual = errors(gradients(model, fused=False, autocast=True), exact)
    speed_up(model)
    found = errors(gradients(model, fused=True, autocast=True), exact)
    assert max(found.values()) < 1.5 * max(usual.values())
    assert sum(found.values()) < 1.2 * sum(usual.values())


def test_the_kernels_are_what_was_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    if linear_file.ONEDNN is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("this build of torch has no oneDNN, or this is no x86 machine: torch's own functions are called")
    calls: Counter[str] = Counter()
    for function in (linear_file._Linear, attention_file._Causal):
        monkeypatch.setattr(function, "apply", counted(function.apply, function.__name__, calls))
    model = model_of({})
    gradients(model, fused=True)
    assert not calls
    speed_up(model)
    gradients(model, fused=True)
    assert calls == {"_Linear": 2 * 6}
    gradients(model, fused=True, autocast=True)
    assert calls == {"_Linear": 2 * 6, "_Causal": 2}


def counted(function: Any, name: str, calls: Counter[str]) -> Any:
    def call(*arguments: Any) -> Any:
        calls[name] += 1
        return function(*arguments)

    return call


def test_frozen_parameters_get_no_gradient_and_the_others_the_same() -> None:
    model = model_of({})
    expected = gradients(model, fused=True)
    speed_up(model)
    frozen = {name for name, _ in model.named_parameters() if name.startswith(("blocks.0", "pos")) or "mlp.up" in name}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    found = gradients(model, fused=True)
    assert found.keys() == expected.keys() - frozen
    assert max(relative(found[name], expected[name]) for name in found) < 1e-5


def test_a_frozen_weight_costs_no_product() -> None:
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(6, 8)
    y = linear_file.linear(x, weight, None)
    products: list[str] = []

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "mm" in str(func) or "linear" in str(func):
                products.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():  # type: ignore[no-untyped-call]
        y.sum().backward()  # type: ignore[no-untyped-call]
    assert len(products) == 1
    torch.testing.assert_close(x.grad, torch.ones(5, 6) @ weight)


def test_gradients_accumulate() -> None:
    model = model_of({})
    speed_up(model)
    single = gradients(model, fused=True)
    single = {name: gradient.clone() for name, gradient in single.items()}
    ids, targets = rows()
    model.zero_grad()
    for row in (slice(0, 1), slice(1, 2)):
        head_loss(model.hidden(ids[row]), model.tok_emb.weight, targets[row]).backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert max(errors(found, single).values()) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_and_generation_are_untouched_bit_for_bit(family: str) -> None:
    model = model_of(FAMILIES[family]).eval()
    ids, _ = rows()
    quick = copy.deepcopy(model)
    speed_up(quick)
    with torch.no_grad():
        assert torch.equal(model(ids), quick(ids))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(ids), quick(ids))


@pytest.mark.parametrize(
    "options",
    [{"is_causal": False}, {"is_causal": True, "dropout_p": 1.0}, {"attn_mask": torch.ones(9, 9).tril().bool()}],
    ids=["all", "dropout", "mask"],
)
def test_what_the_attention_kernel_is_not_made_for_goes_to_torch(options: dict[str, Any]) -> None:
    q, k, v = torch.randn(3, 2, 4, 9, 8).bfloat16().requires_grad_()
    assert torch.equal(attention(q, k, v, **options), F.scaled_dot_product_attention(q, k, v, **options))


@pytest.mark.parametrize("tokens", [1, 2, 127, 128, 129, 300, 600])
def test_attention_at_block_edges(tokens: int) -> None:
    torch.manual_seed(tokens)
    q, k, v = (torch.randn(1, 2, tokens, 8).bfloat16().requires_grad_() for _ in range(3))
    found, doubles = attention(q, k, v, is_causal=True), torch.stack((q, k, v)).detach().double().requires_grad_()
    expected = F.scaled_dot_product_attention(doubles[0], doubles[1], doubles[2], is_causal=True)
    d_y = torch.randn(found.shape).bfloat16()
    pairs = zip(
        [found, *torch.autograd.grad(found, (q, k, v), d_y)],
        [expected, *torch.autograd.grad(expected, doubles, d_y.double())[0]],
        strict=True,
    )
    assert max(relative(a.detach(), b.detach()) for a, b in pairs) < 2e-2


def test_the_kernels_can_be_compiled() -> None:
    """Under torch.compile inductor has its own products: the layers call torch's functions."""
    model = model_of({})
    speed_up(model)
    expected = gradients(model, fused=True)
    found = torch.compile(model.hidden, backend="eager")
    loss = head_loss(found(rows()[0]), model.tok_emb.weight, rows()[1])
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    assert max(errors({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected).values()) < 1e-5


def test_freed_memory_is_kept_on_glibc() -> None:
    code = """
import resource, torch
from loadstone.kernels import keep_freed_memory
assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
torch.ones(64 << 20)
faults()
print(faults())
"""
    if not keep_is_possible():
        assert not keep_freed_memory()
        return
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 1000  # 64 MB are 16,384 pages


def keep_is_possible() -> bool:
    return sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc"


@pytest.mark.parametrize("compute", [linear_file.linear, linear_file.scoring_linear])
@pytest.mark.parametrize("rows", [3, 300])
def test_a_part_of_a_wider_matrix_is_left_to_torch_or_copied(
    compute: Callable[[Tensor, Tensor, Tensor | None], Tensor], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN would take a thousand times as long for the q of a fused c_attn."""
    asked: list[Tensor] = []

    def onednn(x: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> Tensor:
        asked.append(weight)
        return F.linear(x, weight, bias)

    monkeypatch.setattr(linear_file, "X86", True)
    monkeypatch.setattr(linear_file, "ONEDNN", onednn)
    fused = torch.randn(16, 48, requires_grad=True)
    x = torch.randn(rows, 16)
    for part, whole in ((fused.T[:16], False), (fused[:, :16].T, False), (fused.T, True), (torch.randn(8, 16), True)):
        asked.clear()
        weight = part.detach().requires_grad_()
        with torch.set_grad_enabled(compute is linear_file.linear):
            torch.testing.assert_close(compute(x, weight, None), x @ weight.T)
        copied = compute is linear_file.scoring_linear and rows == 300
        same = not copied or part.is_contiguous()
        assert [each.data_ptr() == weight.data_ptr() for each in asked if whole] == [same] * whole
        assert bool(asked) == (whole or copied)
        assert all(each.is_contiguous() or (each.mT.is_contiguous() and not copied) for each in asked)
