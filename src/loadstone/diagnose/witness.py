"""Witnesses: was this model loaded right? Verdicts without any reference, each with its evidence.

`witnesses(identity, model, tokenizer)` takes what `open_source`, `load_model` and `load_tokenizer_for` gave, reads
every parameter once, piece by piece, and returns Checks. `ok` is False only on strong evidence, None where the weights
cannot tell (random ones never can), True where the evidence speaks for the load. What each asks, how its limits were
found and what it cannot see: docs/witnesses.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checkpoint.wording import few
from ..checks import Check
from ..config import GPTConfig
from ..model import GPT
from ..weightmap import Identity
from .arrangement import check_arrangement
from .axes import Profiles, check_orientation, check_rotary_layout, check_values
from .precision import ROUNDED_TO
from .profile import Profile, pieces, profile

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer


def witnesses(identity: Identity, model: GPT, tokenizer: Tokenizer | None = None) -> list[Check]:
    """Every verdict that the weights themselves, and a fixed English text, can give.

    Args:
        identity, model, tokenizer: what `open_source`, `load_model` and `load_tokenizer_for` gave. Without a tokenizer
            the order of q, k and v is judged by statistics alone.

    Time: about one reading of the weights, plus a forward pass of 128 tokens for each arrangement of q, k and v.
    Memory: a few MB, and one layer's q, k and v.
    """
    profiles = {name: profile(parameter) for name, parameter in model.named_parameters()}
    if broken := [name for name, found in profiles.items() if not math.isfinite(found.low + found.high)]:
        return [Check("witnesses", None, f"NaN or infinity in {few(broken)}: no statistic means anything")]
    config = model.config
    checks = [
        _siblings(identity),
        check_orientation(config, profiles),
        check_values(config, profiles),
        check_rotary_layout(config, profiles),
        _norms(config, profiles),
        *(_embedding(name, profiles[name]) for name in ("tok_emb.weight", "pos_emb.weight") if name in profiles),
        _filled(profiles),
        _trained(config, profiles),
        _repeated_layers(model, profiles),
        _container(identity, model),
        check_arrangement(model, tokenizer),
    ]
    return [check for check in checks if check is not None]


def _siblings(identity: Identity) -> Check:
    """The non-square matrices show by their shapes how the file stores all of them."""
    name, (agree, able) = "orientation of the file", identity.plan.orientation
    if not able:
        return Check(name, None, "every matrix is square, so no shape shows how they lie")
    stored = identity.weight_map.orientation
    return Check(name, agree == able, f"{agree} of {able} matrices that are not square lie {stored}")


def _norms(config: GPTConfig, profiles: Profiles) -> Check:
    """A norm's weights have one sign, its biases have both.

    One weight vector may be of both signs (the first of SmolLM2-135M's 61 is); exchanged ones show the opposite in
    weight and bias at once, and wrong ones (zero-centred weights, rows of something else) do so in most norms.
    """
    norms = (1,) if config.shared_norm else (1, 2)
    name, stems = "norm weights", ["norm", *(f"blocks.{i}.norm{n}" for i in range(config.n_layers) for n in norms)]
    if config.d_model < 16:
        return Check(name, None, f"a width of {config.d_model} is too small to tell")
    weights = {stem: profiles[f"{stem}.weight"] for stem in stems}
    mixed = [stem for stem, found in weights.items() if _mixed(found)]
    zero = [stem for stem, found in weights.items() if found.constant and not found.high]
    exchanged = [stem for stem in mixed if (bias := profiles.get(f"{stem}.bias")) and _one_sign(bias)]
    low, high = min(found.low for found in weights.values()), max(found.high for found in weights.values())
    medians = sorted(found.mean for found in weights.values())
    shown = f"{len(stems)} norms, values {low:.3g} to {high:.3g}, median of their means {medians[len(stems) // 2]:.3g}"
    if zero:
        return Check(name, False, f"all zeros, so nothing passes: {few(zero)} ({shown})")
    if exchanged:
        return Check(
            name, False, f"weight and bias exchanged: the weights have both signs, the biases one: {few(exchanged)}"
        )
    if len(mixed) >= 3 and 2 * len(mixed) > len(stems):
        return Check(
            name, False, f"{len(mixed)} have about as many negative weights as positive: {few(mixed)} ({shown})"
        )
    if not mixed:
        return Check(name, True, f"{shown}, each of one sign")
    ok = True if 10 * len(mixed) <= len(stems) else None
    return Check(name, ok, f"{shown}; of both signs, as trained ones seldom are: {few(mixed)}")


def _mixed(found: Profile) -> bool:
    return not found.constant and 0.25 < found.positive < 0.75


def _one_sign(found: Profile) -> bool:
    return found.positive > 0.95 or (found.high < 0 and found.positive < 0.05)


def _embedding(name: str, found: Profile) -> Check:
    """Rows of zeros and repeated rows are padding when few; when many, or when one is huge, rows were never filled."""
    title, count = f"rows of {name.split('.')[0]}", found.shape[0]
    largest, median = float(found.rows.max()), float(found.rows.median())
    scale = math.sqrt(found.mean**2 + found.std**2)
    shown = f"{count:,} rows, root mean square {scale:.3g}"
    if found.zero_rows:
        shown += f"; {found.zero_rows:,} are zeros"
    if repeated := found.repeated_rows - max(found.zero_rows - 1, 0):
        shown += f"; {repeated:,} repeat an earlier row (padding, or tokens that were never seen)"
    if found.constant:
        return Check(title, False, f"every element is {found.high:.3g}")
    if 2 * max(found.zero_rows, found.repeated_rows) > count:
        return Check(title, False, f"most rows hold nothing of their own: {shown}")
    if median and largest > 1e4 * median:
        row = int(found.rows.argmax())
        detail = f"row {row} is {largest / median:.1g} times as long as most: uninitialised memory? ({shown})"
        return Check(title, False, detail)
    return Check(title, True, shown)


def _filled(profiles: Profiles) -> Check:
    """A matrix of one value was never written. Zeros are legal where a block was added that starts as the identity."""
    flat = {name: found for name, found in profiles.items() if len(found.shape) == 2 and found.constant}
    silent = [n for n, found in flat.items() if not found.high and n.endswith(("attn.out.weight", ".down.weight"))]
    wrong = [f"{name} (all {found.high:.3g})" for name, found in flat.items() if name not in silent]
    if wrong:
        return Check("matrices are filled", False, f"one value throughout: {few(wrong)}")
    if silent:
        return Check(
            "matrices are filled",
            None,
            f"all zeros: {few(silent)}; meant, if these blocks were added to pass x through",
        )
    return Check("matrices are filled", True, "none is of one value throughout")


SMALLEST = 1 << 14  # elements below which a trained matrix can look like a drawn one


def _trained(config: GPTConfig, profiles: Profiles) -> Check:
    """Matrices that are still what usual initialisations draw, to the sampling error of mean, sigma and kurtosis."""
    name = "weights are trained"
    judged = {n: found for n, found in profiles.items() if len(found.shape) == 2 and found.size >= SMALLEST}
    fresh = {n: drawn for n, found in judged.items() if (drawn := _drawn_from(found, config))}
    if not judged:
        return Check(name, None, f"no matrix has {SMALLEST:,} elements, as it takes to tell")
    listed = few(f"{n} is {drawn}" for n, drawn in fresh.items())
    if len(fresh) == len(judged):
        return Check(name, None, f"looks untrained: all {len(judged)} matrices are as initialised: {listed}")
    if fresh:
        return Check(name, False, f"never loaded: {listed}, as initialised, while other matrices are trained")
    return Check(name, True, f"none of {len(judged)} matrices is as initialised")


def _drawn_from(found: Profile, config: GPTConfig) -> str | None:
    """The initialisation that a matrix agrees with within 5 standard errors (bf16 rounding adds less than 1e-3)."""
    normal, uniform, error = 3.0, 1.8, 5 / math.sqrt(found.size)
    residual = 0.02 / math.sqrt(2 * config.n_layers)
    for text, std, kurtosis, spread in (
        ("normal(0, 0.02)", 0.02, normal, math.sqrt(24)),
        (f"normal(0, {residual:.2g})", residual, normal, math.sqrt(24)),
        ("normal(0, 1)", 1.0, normal, math.sqrt(24)),
        ("uniform (torch's Linear)", 1 / math.sqrt(3 * found.shape[1]), uniform, 1.2),
    ):
        if (
            abs(found.mean) <= error * std
            and abs(found.std / std - 1) <= max(error * math.sqrt((kurtosis - 1) / 4), 1e-3)
            and abs(found.kurtosis - kurtosis) <= max(error * spread, 5e-3)
        ):
            return text
    return None


def _repeated_layers(model: GPT, profiles: Profiles) -> Check:
    """No two layers hold the same tensor; a converter that lost count writes one layer twice."""
    name, layers = "layers differ", model.config.n_layers
    if layers == 1:
        return Check(name, None, "there is one layer")
    equal: dict[tuple[int, int], list[str]] = {}
    stems = [n.removeprefix("blocks.0.") for n in profiles if n.startswith("blocks.0.")]
    for stem in stems:
        for pair in _equal_pairs(model, profiles, stem):
            equal.setdefault(pair, []).append(stem)
    telling = sum(any(not profiles[f"blocks.{i}.{stem}"].constant for i in range(layers)) for stem in stems)
    if not equal:
        return Check(name, True, f"no tensor is found in two of the {layers} layers")
    listed = few(
        f"layers {a} and {b}: {'everything' if len(found) == telling else few(found)}"
        for (a, b), found in sorted(equal.items())
    )
    whole = all(len(found) == telling for found in equal.values())
    runs = all(b - a > 1 and ((a - 1, b - 1) in equal or (a + 1, b + 1) in equal) for a, b in equal)
    if whole and runs:
        return Check(name, None, f"runs of layers are repeated, as in a merge that stacks models: equal are {listed}")
    return Check(name, False, f"bit for bit the same in {listed}")


def _equal_pairs(model: GPT, profiles: Profiles, stem: str) -> Iterator[tuple[int, int]]:
    """(layer, later layer that holds the same tensor); tensors of one value (untouched biases) say nothing."""
    first: dict[tuple[float, ...], int] = {}
    for layer in range(model.config.n_layers):
        name = f"blocks.{layer}.{stem}"
        found = profiles[name]
        earlier = first.setdefault((found.low, found.high, found.mean, found.std), layer)
        if earlier != layer and not found.constant:
            a, b = model.get_parameter(f"blocks.{earlier}.{stem}"), model.get_parameter(name)
            if all(torch.equal(x, y) for x, y in zip(pieces(a), pieces(b), strict=True)):
                yield earlier, layer


def _container(identity: Identity, model: GPT) -> Check | None:
    """float32 that holds values of a narrower type throughout takes more room than it needs. No fault: `ok` is None."""
    stored = {step.dtype for step in identity.plan.steps}
    if stored != {"float32"} or model.tok_emb.weight.dtype != torch.float32:
        return None
    left = dict(ROUNDED_TO)
    for piece in (piece for parameter in _matrices(model) for piece in pieces(parameter)):
        left = {name: fits for name, fits in left.items() if fits(piece)}
        if not left:
            return None
    coarsest = next(iter(left))
    return Check("element type", None, f"these are {coarsest} values in a float32 container; the file could be smaller")


def _matrices(model: GPT) -> Iterator[Tensor]:
    return (parameter.detach() for parameter in model.parameters() if parameter.dim() == 2)
