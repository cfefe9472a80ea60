"""Self-test of an engine: another way of running the same model (device, compiler, half precision, cache, batch).

`self_test(model, engine=..., device=..., dtype=...)` compares it with plain float32 on the CPU, at many lengths: back
ends that are silently wrong are often right for the shortest inputs. The weights are the same on both sides: those of a
half-precision model are widened, not read anew, so what is seen is the engine and not the loss of precision.

All engines of the package's table (`loadstone.engines`) are here under their names, besides three ways to call the
model itself. A new way is one entry: `WAYS["mine"] = build`, where `build(model)` returns a function from token ids
[1, T] (int64, on the CPU) to logits [1, T, V] of any type on any device. `EngineMissingError` says that this machine
cannot run it.

Tolerances: what was measured on sound models is in docs/witnesses.md; they allow three times the worst of it or more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoint.wording import few
from ..checks import Check
from ..engines import ENGINES, EngineMissingError, start_engine
from ..errors import LoadstoneError
from ..model import GPT

Run = Callable[[Tensor], Tensor]
LENGTHS = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64)
LONGEST = 256  # the context limit is tested as far as this, which takes seconds on a CPU
SINGLE = 8  # tokens that the cached engine takes one at a time, at the end of each prompt
ROWS = 4  # of an engine's batch


class Tolerance(NamedTuple):
    """Allowed and usual differences, at the worst position.

    `error` is the root mean square difference of the centred logits of a position over that of the logits themselves;
    `kl` the divergence of the next-token distribution in nats. `usual` is the range of `error` in sound engines.
    """

    error: float
    kl: float
    usual: str


TOLERANCES: Mapping[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(2e-4, 1e-5, "1e-7 to 1e-5"),
    torch.float32: Tolerance(2e-4, 1e-5, "1e-7 to 1e-5"),
    torch.float16: Tolerance(0.03, 0.02, "0.002 to 0.01"),
    torch.bfloat16: Tolerance(0.25, 0.3, "0.01 to 0.08"),
}


def _eager(model: GPT) -> Run:
    device = model.tok_emb.weight.device
    return lambda ids: model(ids.to(device))


def _cached(model: GPT) -> Run:
    """Through the key/value cache as generation does it: a prompt at once, then token by token."""
    device = model.tok_emb.weight.device

    def run(ids: Tensor) -> Tensor:
        length = ids.shape[1]
        cache = model.new_cache(length=length)
        start = max(length - SINGLE, 0)
        steps = [ids[:, :start]] if start else []
        steps += [ids[:, at : at + 1] for at in range(start, length)]
        return torch.cat([model(step.to(device), cache) for step in steps], dim=1)

    return run


def _batched(model: GPT) -> Run:
    """In one batch with two other rows, each at positions of its own, in two calls."""
    device = model.tok_emb.weight.device

    def run(ids: Tensor) -> Tensor:
        rows = torch.cat([ids, ids.flip(1), ids.roll(1, 1)]).to(device)
        length = ids.shape[1]
        first = (length + 1) // 2
        cache = model.new_cache(batch=3, length=length)
        logits = [model(rows[:, :first], cache)]
        if rest := length - first:
            cache.lengths = [first, first // 2, 0]  # the other rows forget some, and so stand elsewhere
            logits.append(model(rows[:, -rest:], cache))
        return torch.cat([part[:1] for part in logits], dim=1)

    return run


def _on_engine(name: str, model: GPT) -> Run:
    """Through the engine's own calls. Each position is the end of one: of a prompt, or of a token after it.

    Where the length is a multiple of `ROWS`, so many rows each read the prompt as far as their share, one after the
    other's, and then take that share token by token: in one batch, at unequal positions. Else one row does all of it.
    """
    engine = start_engine(name, model)

    def run(ids: Tensor) -> Tensor:
        tokens = ids[0].tolist()
        rows = 1 if len(tokens) % ROWS else ROWS
        share = len(tokens) // rows
        cache = engine.new_cache(rows, len(tokens))
        parts = [engine.prefill(cache, {row: tokens[: row * share + 1] for row in range(rows)})]
        parts += [engine.decode(cache, tokens[at::share]) for at in range(1, share)]
        return torch.stack([torch.as_tensor(part) for part in parts], dim=1).flatten(0, 1)[None]

    return run


WAYS: dict[str, Callable[[GPT], Run]] = {"eager": _eager, "cached": _cached, "batched": _batched}
WAYS |= {name: partial(_on_engine, name) for name in ENGINES}


def self_test(
    model: GPT,
    *,
    engine: str = "eager",
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    lengths: Sequence[int] = LENGTHS,
    progress: Callable[[int, int], None] | None = None,
) -> list[Check]:
    """Run the model another way and compare with CPU float32 eager at many lengths, two prompts each.

    Args:
        model: any model; it is not changed.
        engine: a name in `WAYS`.
        device, dtype: where and in what the engine runs; dtype None keeps the model's.
        lengths: those beyond the context are left out, and the context limit (256 at most) is added.
        progress: called with (lengths done, lengths in all).

    Memory: the reference costs 4 bytes a parameter unless the model is float32 on the CPU, when it costs nothing; a
    device or dtype other than the model's costs one copy there.

    Returns one check of the values, and one on whether results stay what they are when the engine runs again.
    ok is None if the engine cannot run on this machine. Raises LoadstoneError for an engine, device or dtype that
    does not exist.
    """
    if engine not in WAYS:
        raise LoadstoneError(f"no engine is called {engine!r}; known: {', '.join(WAYS)}.")
    wanted = _dtype(model, dtype)
    candidate = _moved(model, device, wanted)
    reference = _moved(candidate, "cpu", torch.float32)
    name = f"engine {engine} on {device} in {str(wanted).removeprefix('torch.')}"
    limit = min(model.config.context_length, LONGEST)
    chosen = sorted({length for length in (*lengths, limit) if 0 < length <= model.config.context_length})
    prompts = _prompts(model.config.vocab_size, chosen[-1])
    with torch.inference_mode():
        expected = [reference(prompt)[0] for prompt in prompts]
        try:
            run = WAYS[engine](candidate)
            results = []
            for done, length in enumerate(chosen, 1):
                results.append(_try(run, prompts, expected, length))
                if progress:
                    progress(done, len(chosen))
        except EngineMissingError as error:
            return [Check(name, None, str(error))]
    return [_judge(name, results, TOLERANCES[wanted]), _judge_stale(name, results)]


@dataclass(frozen=True)
class _Result:
    """How the two prompts of one length came out.

    Attributes:
        fault: why there are no numbers to compare, if so: an error, a wrong shape, NaN.
        error, kl: see `Tolerance`; the worst position and prompt.
        position: of the largest `error`.
        changed: the first prompt's result was another after the second prompt had run.
    """

    length: int
    fault: str = ""
    error: float = 0.0
    kl: float = 0.0
    position: int = 0
    changed: bool = False


def _try(run: Run, prompts: Sequence[Tensor], expected: Sequence[Tensor], length: int) -> _Result:
    held = []
    for prompt in prompts:
        try:
            logits = run(prompt[:, :length])
        except EngineMissingError:
            raise
        except Exception as error:  # a back end may raise anything, and all of it is a verdict
            reason = (str(error).strip() or "no message").splitlines()[0]
            return _Result(length, f"{type(error).__name__}: {reason}")
        shape = (1, length, expected[0].shape[1])
        if tuple(logits.shape) != shape:
            return _Result(length, f"gives shape {list(logits.shape)} instead of {list(shape)}")
        held.append((logits, logits.detach().clone()))
    changed = not torch.equal(held[0][0].nan_to_num(), held[0][1].nan_to_num())
    measured = [
        _measure(copy[0].float().cpu(), logits[:length]) for (_, copy), logits in zip(held, expected, strict=True)
    ]
    finite = [found for found in measured if found]
    if len(finite) < len(measured):
        return _Result(length, "gives NaN or infinity", changed=changed)
    worst, _, position = max(finite)
    return _Result(length, "", worst, max(kl for _, kl, _ in finite), position, changed)


def _measure(ours: Tensor, theirs: Tensor) -> tuple[float, float, int] | None:
    """(error, KL, position of the error) at the worst position; None if a value is not finite."""
    if not bool(torch.isfinite(ours).all()):
        return None
    centred = theirs - theirs.mean(-1, keepdim=True)
    difference = ours - theirs
    difference = difference - difference.mean(-1, keepdim=True)
    scale = centred.square().mean(-1).sqrt().clamp_min(1e-6)
    errors = difference.square().mean(-1).sqrt() / scale
    p, q = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).max().clamp_min(0))  # below 0 only by rounding
    return float(errors.max()), kl, int(errors.argmax())


def _judge(name: str, results: Sequence[_Result], allowed: Tolerance) -> Check:
    wrong = [r for r in results if r.fault or not (r.error <= allowed.error and r.kl <= allowed.kl)]
    limits = f"allowed {allowed.error:g} and {allowed.kl:g}; usual {allowed.usual}"
    if not wrong:
        error, kl = max(r.error for r in results), max(r.kl for r in results)
        lengths = f"{len(results)} lengths from {results[0].length} to {results[-1].length}"
        detail = f"equals CPU float32 at {lengths}: relative error {error:.1e}, KL {kl:.1e} nats ({limits})"
        return Check(name, True, detail)
    first = wrong[0]
    what = first.fault or (
        f"relative error {first.error:.1e}, KL {first.kl:.1e} nats ({limits}), worst at position {first.position}"
    )
    return Check(name, False, f"{_where(results, wrong)}: {what}")


def _where(results: Sequence[_Result], wrong: Sequence[_Result]) -> str:
    """`right up to length 3, wrong from 4 on`, or which lengths if there is no such border."""
    bad, tried = [r.length for r in wrong], [r.length for r in results]
    if len(bad) == len(tried):
        return "wrong at every length" if len(tried) > 1 else f"wrong at length {bad[0]}"
    right = [length for length in tried if length < bad[0]]
    if bad == tried[len(right) :]:
        return f"right up to length {right[-1]}, wrong from {bad[0]} on"
    return (
        f"wrong at length{'s' if len(bad) > 1 else ''} {few(map(str, bad), 8)}, right at {len(tried) - len(bad)} others"
    )


def _judge_stale(name: str, results: Sequence[_Result]) -> Check:
    title = f"{name}: results stay"
    if changed := [result.length for result in results if result.changed]:
        detail = f"a result was overwritten when the engine ran again, at lengths {few(map(str, changed), 8)}"
        return Check(title, False, f"{detail}; copy each result before the next call")
    if any(result.fault for result in results):
        return Check(title, None, "not every length gave a result")
    return Check(title, True, "each is the same after the next call")


def _prompts(vocab: int, length: int) -> list[Tensor]:
    """Two of the same length that differ at every position (if the vocabulary allows), spread over the vocabulary."""
    places = torch.arange(1, length + 1)[None]
    return [(places * 7919 + shift) % vocab for shift in (0, 1)]


def _dtype(model: GPT, wanted: str | torch.dtype | None) -> torch.dtype:
    if wanted is None:
        return model.tok_emb.weight.dtype
    found = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
    if not isinstance(found, torch.dtype) or found not in TOLERANCES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in TOLERANCES)
        raise LoadstoneError(f"dtype {wanted} cannot be tested; use {names}.")
    return found


def _moved(model: GPT, device: str | torch.device, dtype: torch.dtype) -> GPT:
    """The model itself if it is there already, else a copy; parameters that need no change are shared."""
    try:
        state = {n: p.detach().to(device=device, dtype=dtype) for n, p in model.named_parameters()}
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise LoadstoneError(f"device {str(device)!r} cannot be used here: {reason} `cpu` always can.") from None
    if all(state[name].data_ptr() == parameter.data_ptr() for name, parameter in model.named_parameters()):
        return model
    with torch.device("meta"):
        copy = GPT(model.config)
    copy.load_state_dict(state, assign=True)
    return copy.eval()
