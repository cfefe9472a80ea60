"""The engine self-test: sound engines pass in every type, broken ones are caught and their border is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loadstone.checks import Check
from loadstone.diagnose import selftest
from loadstone.diagnose.selftest import LENGTHS, WAYS, Run, self_test
from loadstone.engines.protocol import EngineMissingError
from loadstone.errors import LoadstoneError
from loadstone.model import GPT
from test_model import SWITCHES, hostile

SHORT = (1, 2, 3, 4, 5, 8)
Break = Callable[[Tensor, GPT], Tensor]


@pytest.fixture
def model() -> GPT:
    return hostile(SWITCHES["llama, grouped"])


def register(monkeypatch: pytest.MonkeyPatch, broken: Break) -> None:
    """An engine `broken`: the model's logits [1, T, V], spoilt."""

    def build(model: GPT) -> Run:
        return lambda ids: broken(model(ids), model)

    monkeypatch.setitem(WAYS, "broken", build)


def verdicts(model: GPT, engine: str, **options: object) -> tuple[Check, Check]:
    values, stale = self_test(model, engine=engine, **options)  # type: ignore[arg-type]
    return values, stale


@pytest.mark.parametrize("name", sorted(SWITCHES))
@pytest.mark.parametrize("engine", ["eager", "cached", "batched", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_sound_engines_pass_in_every_type(name: str, engine: str, dtype: str) -> None:
    if SWITCHES[name].n_experts and "float16" in dtype:
        pytest.skip("rounding makes the router of a random model pick other experts, which no tolerance covers")
    checks = self_test(hostile(SWITCHES[name]), engine=engine, dtype=dtype, lengths=(1, 2, 5, 17))
    assert [check for check in checks if not check.ok] == []
    assert f"engine {engine} on cpu in {dtype}" == checks[0].name
    assert "4 lengths" not in checks[0].detail  # the context limit was added


def test_lengths_end_at_the_context_and_progress_is_told(model: GPT) -> None:
    told: list[tuple[int, int]] = []
    (values, _) = self_test(model, progress=lambda done, total: told.append((done, total)))
    count = sum(length <= 24 for length in LENGTHS) + 1
    assert told == [(i, count) for i in range(1, count + 1)]
    assert f"{count} lengths from 1 to 24" in values.detail


def test_wrong_beyond_length_3(monkeypatch: pytest.MonkeyPatch, model: GPT) -> None:
    register(monkeypatch, lambda logits, _: logits if logits.shape[1] <= 3 else logits.flip(-1))
    values, stale = verdicts(model, "broken", lengths=SHORT)
    assert values.ok is False
    assert values.detail.startswith("right up to length 3, wrong from 4 on: relative error ")
    assert "KL " in values.detail
    assert stale.ok


def test_wrong_at_one_length_or_at_all(monkeypatch: pytest.MonkeyPatch, model: GPT) -> None:
    register(monkeypatch, lambda logits, _: logits * (1.001 if logits.shape[1] == 4 else 1))
    assert verdicts(model, "broken", lengths=SHORT)[0].detail.startswith("wrong at length 4, right at 6 others")
    register(monkeypatch, lambda logits, _: -logits)
    assert verdicts(model, "broken", lengths=SHORT)[0].detail.startswith("wrong at every length")


@pytest.mark.parametrize("position", [0, -1])
def test_one_wrong_position_is_enough(monkeypatch: pytest.MonkeyPatch, model: GPT, position: int) -> None:
    def spoil(logits: Tensor, _: GPT) -> Tensor:
        logits = logits.clone()
        logits[:, position] = logits[:, position].roll(1, -1)
        return logits

    register(monkeypatch, spoil)
    for dtype in ("float32", "float16", "bfloat16"):
        assert verdicts(model, "broken", lengths=SHORT, dtype=dtype)[0].ok is False


def test_a_small_error_at_one_position_is_not_averaged_away(monkeypatch: pytest.MonkeyPatch, model: GPT) -> None:
    register(monkeypatch, lambda logits, _: torch.cat([logits[:, :1] * 1.0004, logits[:, 1:]], 1))
    (values, _) = verdicts(model, "broken", lengths=())
    assert values.ok is False
    assert "wrong at length 24: relative error 4.0e-04" in values.detail
    assert values.detail.endswith("worst at position 0")


def test_nan_in_one_of_the_prompts(monkeypatch: pytest.MonkeyPatch, model: GPT) -> None:
    calls = iter(range(1000))
    register(monkeypatch, lambda logits, _: logits / 0 if next(calls) % 2 else logits)
    assert "gives NaN or infinity" in verdicts(model, "broken", lengths=SHORT)[0].detail


def test_wrong_only_in_bfloat16(monkeypatch: pytest.MonkeyPatch, model: GPT) -> None:
    """As if a kernel kept too few bits: the tenth part of each logit is lost."""
    register(
        monkeypatch, lambda logits, _: logits + logits.roll(1, -1) * (0.5 if logits.dtype == torch.bfloat16 else 0)
    )
    assert verdicts(model, "broken", lengths=SHORT)[0].ok
    assert verdicts(model, "broken", lengths=SHORT, dtype="float16")[0].ok
    assert verdicts(model, "broken", lengths=SHORT, dtype="bfloat16")[0].ok is False


def test_a_mask_that_lets_the_future_in(monkeypatch: pytest.MonkeyPatch, model: GPT) -> None:
    def build(model: GPT) -> Run:
        return lambda ids: model(torch.cat([ids[:, 1:], ids[:, -1:]], 1)) if ids.shape[1] > 16 else model(ids)

    monkeypatch.setitem(WAYS, "broken", build)
    assert "right up to length 16, wrong from 17 on" in verdicts(model, "broken")[0].detail


def test_stale_results(monkeypatch: pytest.MonkeyPatch, model: GPT) -> None:
    """One gives the last answer of that length again; one writes each answer into the same memory."""

    def remembers(model: GPT) -> Run:
        seen: dict[int, Tensor] = {}
        return lambda ids: seen.setdefault(ids.shape[1], model(ids))

    monkeypatch.setitem(WAYS, "broken", remembers)
    assert verdicts(model, "broken", lengths=SHORT)[0].detail.startswith("wrong at every length")

    def one_buffer(model: GPT) -> Run:
        buffer = torch.zeros(1, 24, model.config.vocab_size)

        def run(ids: Tensor) -> Tensor:
            view = buffer[:, : ids.shape[1]]
            return view.copy_(model(ids))

        return run

    monkeypatch.setitem(WAYS, "broken", one_buffer)
    values, stale = verdicts(model, "broken", lengths=SHORT)
    assert values.ok
    assert stale.ok is False
    assert "overwritten when the engine ran again, at lengths 1, 2, 3" in stale.detail


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda x: x.masked_fill(x > x.mean(), torch.nan), "gives NaN or infinity"),
        (lambda x: x / 0, "gives NaN or infinity"),
        (lambda x: x[:, 1:], r"gives shape \[1, 3, 97\] instead of \[1, 4, 97\]"),
        (lambda x: x[..., :-1], r"gives shape \[1, 4, 96\]"),
        (lambda x: x[:, -9], "IndexError: index -9 is out of bounds"),
    ],
)
def test_nan_shapes_and_errors(
    monkeypatch: pytest.MonkeyPatch, model: GPT, spoil: Callable[[Tensor], Tensor], words: str
) -> None:
    import re

    register(monkeypatch, lambda logits, _: spoil(logits) if logits.shape[1] > 3 else logits)
    values, stale = verdicts(model, "broken", lengths=SHORT[:5])
    assert values.ok is False
    assert re.match(f"right up to length 3, wrong from 4 on: {words}", values.detail), values.detail
    assert stale.ok is None


def test_a_broken_cache_is_the_cached_engines_business(monkeypatch: pytest.MonkeyPatch, model: GPT) -> None:
    from loadstone.positions import KVCache

    update = KVCache.update

    def forgets(self: KVCache, layer: int, k: Tensor, v: Tensor, positions: object) -> tuple[Tensor, Tensor]:
        keys, values = update(self, layer, k, v, positions)  # type: ignore[arg-type]
        return keys.clone().index_fill_(2, torch.tensor([0]), 0.0), values

    monkeypatch.setattr(KVCache, "update", forgets)
    assert verdicts(model, "eager", lengths=SHORT)[0].ok
    assert verdicts(model, "cached", lengths=SHORT)[0].detail.startswith("right up to length 1, wrong from 2 on")
    assert verdicts(model, "batched", lengths=SHORT)[0].ok is False


def test_rows_that_stand_apart_are_the_batched_engines_business(monkeypatch: pytest.MonkeyPatch, model: GPT) -> None:
    from loadstone.positions import Positions

    plan = Positions.__init__

    def sees_everything(self: Positions, *arguments: object, **like: object) -> None:
        plan(self, *arguments, **like)  # type: ignore[arg-type]
        if not self.uniform:
            self.mask = None

    monkeypatch.setattr(Positions, "__init__", sees_everything)
    assert verdicts(model, "eager", lengths=SHORT)[0].ok
    assert verdicts(model, "cached", lengths=SHORT)[0].ok
    assert verdicts(model, "batched", lengths=SHORT)[0].ok is False


def test_the_model_is_not_changed(model: GPT) -> None:
    before = {name: (p.data_ptr(), p.dtype, p.detach().clone()) for name, p in model.named_parameters()}
    for options in ({"dtype": "bfloat16"}, {"dtype": torch.float16}, {"engine": "cached"}):
        self_test(model, lengths=(1, 4), **options)
    for name, parameter in model.named_parameters():
        pointer, dtype, values = before[name]
        assert (parameter.data_ptr(), parameter.dtype) == (pointer, dtype)
        assert torch.equal(parameter, values)


def test_a_half_precision_model_is_compared_with_its_own_weights(model: GPT) -> None:
    (values, _) = self_test(model.bfloat16(), lengths=SHORT)
    assert values.ok
    assert values.name == "engine eager on cpu in bfloat16"
    (again, _) = self_test(model, lengths=SHORT, dtype="float32")
    assert again.ok


def test_a_missing_compiler_is_no_verdict(monkeypatch: pytest.MonkeyPatch, model: GPT) -> None:
    class InvalidCompilerError(RuntimeError):
        __module__ = "torch._inductor.exc"

    def compiled(*inputs: object) -> Tensor:
        raise InvalidCompilerError("No working C++ compiler found\nin three places")

    monkeypatch.setattr(torch, "compile", lambda model, **options: compiled)
    (check,) = self_test(model, engine="compile")
    assert check.ok is None
    assert check.detail == "torch.compile does not work here (it needs a C++ compiler): No working C++ compiler found"


def test_an_error_of_the_model_under_compile_is_a_verdict(monkeypatch: pytest.MonkeyPatch, model: GPT) -> None:
    def compiled(*inputs: object) -> Tensor:
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(torch, "compile", lambda model, **options: compiled)
    (values, _) = self_test(model, engine="compile", lengths=(1, 2))
    assert values.ok is False
    assert "RuntimeError: illegal instruction" in values.detail


def test_an_engine_may_say_that_it_is_missing(monkeypatch: pytest.MonkeyPatch, model: GPT) -> None:
    def build(model: GPT) -> Run:
        raise EngineMissingError("needs the package max")

    monkeypatch.setitem(WAYS, "max", build)
    assert self_test(model, engine="max") == [Check("engine max on cpu in float32", None, "needs the package max")]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine": "metal"}, "no engine is called 'metal'; known: eager, cached, batched, torch, compile, max"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here"),
        ({"device": "toaster"}, "device 'toaster' cannot be used here"),
        ({"dtype": "int8"}, "dtype int8 cannot be tested; use float64, float32, float16, bfloat16"),
        ({"dtype": "nn"}, "dtype nn cannot be tested"),
    ],
)
def test_what_does_not_exist_is_refused(model: GPT, options: dict[str, str], words: str) -> None:
    with pytest.raises(LoadstoneError, match=words):
        self_test(model, **options)  # type: ignore[arg-type]


def test_long_contexts_are_capped(monkeypatch: pytest.MonkeyPatch, model: GPT) -> None:
    monkeypatch.setattr(selftest, "LONGEST", 11)
    (values, _) = self_test(model, lengths=(1, 3))
    assert "3 lengths from 1 to 11" in values.detail
