"""Packed weights: the same logits as the model by itself, never those of weights that are no longer there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine_contract import check_generation, play
from loadstone.config import GPTConfig
from loadstone.engines import engine_of, start_engine
from loadstone.engines.eager import TorchEngine
from loadstone.finetune.lora import LoRA, add_lora
from loadstone.kernels import free_memory, pack_for_inference
from loadstone.kernels import linear as linear_file
from loadstone.kernels import packed as packed_file
from loadstone.kernels.packed import PackedProduct
from loadstone.model import GPT
from loadstone.serve.caches import slots_of
from small_gpt import LLAMA, small_gpt, small_llama, small_neox, train_plainly, trained

needed = pytest.mark.skipif(
    not packed_file._types(), reason="this build of torch has no oneDNN, or this is no x86 machine: nothing is packed"
)
MODELS: dict[str, Callable[[], GPT]] = {
    "gpt2": small_gpt,
    "llama": small_llama,
    "neox": small_neox,
    "odd": lambda: GPT(GPTConfig(50_257, 40, 144, 3, 3)),  # heads of 48
    "odd llama": lambda: GPT(GPTConfig(101, 40, 192, 3, 4, **LLAMA)),
    "experts": lambda: small_llama(n_experts=3, n_experts_used=2),
}


def started(model: GPT) -> TorchEngine:
    """Whose weights are packed."""
    engine = start_engine("torch", model.eval())
    assert isinstance(engine, TorchEngine)
    assert engine._packed.products
    return engine


def of(engine: TorchEngine, rows: int = 2) -> Tensor:
    """Logits of a prompt, then of a token, which stand at other places in each row: [2, rows, V]."""
    cache = engine.new_cache(rows)
    first: Tensor = engine.prefill(cache, {row: [row % 7, *range(1, 4 + row % 3)] for row in range(rows)})
    return torch.stack([first, engine.decode(cache, [row % 11 for row in range(rows)])])


def packed_copies(engine: TorchEngine) -> int:
    return sum(product._packed is not None for product in engine._packed.products.values())


@needed
@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("family", MODELS)
def test_the_logits_are_the_models(family: str, rows: int) -> None:
    model = MODELS[family]()
    engine, expected = started(model), of(TorchEngine(model.eval()), rows)
    n_layers = len([m for m in model.blocks.modules() if isinstance(m, torch.nn.Linear)])
    assert packed_copies(engine) == n_layers + 1  # the head, tied or not
    torch.testing.assert_close(of(engine, rows), expected, atol=1e-5, rtol=1e-5)
    assert packed_copies(engine) == n_layers + 1


@needed
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_bfloat16_is_as_exact_as_torchs_own(family: str) -> None:
    exact = of(TorchEngine(MODELS[family]().bfloat16().double().eval()))
    model = MODELS[family]().bfloat16()
    usual = (of(TorchEngine(model.eval())) - exact).norm()
    assert 0 < (of(started(model)) - exact).norm() < 1.3 * usual


@needed
@pytest.mark.parametrize("family", ["gpt2", "llama", "neox"])
def test_it_keeps_the_contract(family: str) -> None:
    model = MODELS[family]().eval()
    play(started(model), model)
    check_generation(started(model), model)


@needed
def test_the_model_itself_is_left_alone() -> None:
    """Its bits, its attributes, its gradients; views of a wider or mapped matrix are packed from a copy."""
    model = small_gpt(2).eval()
    fused = torch.randn(16, 48)
    model.get_submodule("blocks.0.attn.q").weight = torch.nn.Parameter(fused.T[16:32])
    ids, names = torch.tensor([[1, 2, 3]]), {name: list(vars(m)) for name, m in model.named_modules()}
    before, expected = model(ids), of(TorchEngine(model))
    engine = started(model)
    torch.testing.assert_close(of(engine), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(ids), before)
    assert {name: list(vars(m)) for name, m in model.named_modules()} == names
    assert copy.deepcopy(model).state_dict().keys() == model.state_dict().keys()
    model(ids).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p is not model.tok_emb.weight)


def optimizer_step(model: GPT) -> None:
    train_plainly(model, 1)


def other_weights(assign: bool) -> Callable[[GPT], None]:
    return lambda model: model.load_state_dict(small_gpt(2, seed=5).state_dict(), assign=assign) and None


@torch.no_grad()
def one_number(model: GPT) -> None:
    model.get_parameter("blocks.1.mlp.up.weight")[3, 4] += 1


def fused_step(model: GPT) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.tensor([[1, 2]])).sum().backward()
    optimizer.step()


def new_data(model: GPT) -> None:
    model.tok_emb.weight.data = model.tok_emb.weight.data * 2


def an_adapter(model: GPT) -> None:
    trained(model, LoRA(rank=2))


def uncounted(model: GPT) -> None:
    model.get_parameter("blocks.1.attn.v.weight").data[5] = 0


def in_numpy(model: GPT) -> None:
    model.get_parameter("blocks.0.mlp.down.weight").detach().numpy()[:] *= 2


CHANGES: dict[str, Callable[[GPT], Any]] = {
    "optimizer": optimizer_step, "fused optimizer": fused_step, "copied in": other_weights(False),
    "assigned": other_weights(True), "one number": one_number, "new data": new_data, "adapter": an_adapter,
    "double": lambda model: model.double(), "a row, uncounted": uncounted, "numpy": in_numpy,
}  # fmt: skip


@needed
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_answers_with_its_new_weights(change: str) -> None:
    model = small_gpt(2)
    engine = started(model)
    before, copies = of(engine), packed_copies(engine)
    CHANGES[change](model)
    expected = of(TorchEngine(model))
    assert change == "double" or (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(of(engine), expected, atol=1e-5, rtol=1e-5)
    if change != "adapter":  # which stands beside the weights that are packed
        assert packed_copies(engine) < copies


@needed
def test_training_mode_gives_the_memory_back() -> None:
    model = small_gpt(2)
    engine = started(model)
    model.train()
    of(engine)
    assert not engine._packed.products
    assert not pack_for_inference(model).products


@needed
def test_a_product_that_may_need_gradients_is_torchs() -> None:
    weight = torch.nn.Parameter(torch.randn(6, 8))
    product, x = PackedProduct(weight), torch.randn(2, 8)
    product(x, weight, None).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(weight.grad, x.sum(0).expand(6, 8))
    with torch.inference_mode():
        assert product(x.to(torch.float64), weight.double(), None).dtype == torch.float64


@needed
def test_adapters_and_what_is_no_plain_parameter_are_left_out() -> None:
    model = small_llama(2)
    add_lora(model, LoRA(rank=2, targets=("q", "head")))
    packed = pack_for_inference(model.eval()).products
    assert model not in packed
    assert not {model.get_submodule(f"blocks.{i}.attn.q") for i in range(2)} & packed.keys()
    assert len(packed) == 2 * 6
    assert not pack_for_inference(small_gpt(1).eval().half()).products
    with torch.inference_mode():  # such parameters do not count their versions
        assert not pack_for_inference(small_gpt(1).eval()).products


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        (packed_file, "ONEDNN", None),
        (packed_file, "_PACK", None),
        (packed_file, "X86", False),
        (packed_file, "free_memory", lambda: 0),
        (torch.backends.mkldnn, "is_available", lambda: False),
    ],
)
def test_without_onednn_or_memory_torch_answers(
    where: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, value)
    model = small_gpt(2).eval()
    engine = start_engine("torch", model)
    assert isinstance(engine, TorchEngine)
    assert not engine._packed.products
    assert torch.equal(of(engine), of(TorchEngine(model)))


@needed
def test_who_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A started engine and a served model; a model that is passed to `generate` is run as it is."""
    model, calls = small_gpt(2).eval(), []

    def counted(*arguments: Any) -> Tensor:
        calls.append(arguments)
        found: Tensor = linear_file.ONEDNN(*arguments)  # type: ignore[misc]
        return found

    monkeypatch.setattr(packed_file, "ONEDNN", counted)
    expected = engine_of(model).prefill(model.new_cache(1), {0: [1, 2, 3]})
    assert not calls
    slots = slots_of(model, 2, 24)
    slots.admit([1, 2, 3])
    torch.testing.assert_close(torch.from_numpy(slots.read(0, 1, [[1, 2, 3]])), expected, atol=1e-5, rtol=1e-5)
    assert len(calls) == 2 * 6 + 1


def test_free_memory(tmp_path: Path) -> None:
    assert free_memory(tmp_path) == 0
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\nHugePages_Free:  0\n")
    assert free_memory(tmp_path) == 4000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.stat").write_text("anon 700\nfile 90000\n")
    for limit, free in (("max", 4000 * 1024), ("1000", 300), ("500", 0), ("99999999999", 4000 * 1024)):
        (group / "memory.max").write_text(f"{limit}\n")
        assert free_memory(tmp_path) == free
