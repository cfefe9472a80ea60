"""Did it load right? First structure (every parameter equals its source), then numbers (loss, logits of a reference).

The structure check goes backwards: it takes the model's parameters, undoes the table's ops, and compares with a fresh
reading of the file, bit for bit. So an op that is not the inverse of its inverse, a parameter that was filled twice or
not at all, and a file that changed in between are all seen.

A reference answers what no structure can: is this how the model was meant? Where its logits differ, `diagnose` says
why. Without a reference, witnesses inside the weights give verdicts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from .checkpoint import open_checkpoint
from .checkpoint.wording import shown
from .checks import Check
from .config import GPTConfig
from .config.losses import differences
from .diagnose import explain
from .diagnose.compare import compare, failed, model_logits, require_comparable, usual_text
from .diagnose.points import Parameters
from .diagnose.precision import loosest, precision, stored_type
from .diagnose.reference import Reference, find_reference
from .diagnose.search import diagnose, float32_logits
from .diagnose.selftest import self_test
from .diagnose.trace import Trace
from .diagnose.witness import witnesses
from .load import ModuleCheckpoint, to_tensor
from .model import GPT
from .weightmap import Identity, apply

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

# Plain English, our own words, so that no model has learnt it by heart.
ENGLISH = (
    "The old clock in the kitchen had stopped again, so nobody knew exactly when the rain began. By the time the "
    "children came back from school, water was running down the street and the cat had moved to the top of the stairs. "
    "Their mother put a pot of soup on the stove and asked them to set the table. After dinner they sat by the window "
    "and watched the lights of the cars go past, one after another, until it was time to go to bed."
)


@dataclass
class VerifyReport:
    """All checks of one source, and the counts. `ok` is False if any check failed.

    Attributes:
        usual: what differences are usual for the types that were compared.
        diagnosis: where the model leaves the reference and why, as data, if it does; `explanation` as lines of text.
    """

    checks: list[Check] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    loss: float | None = None
    usual: str = ""
    diagnosis: dict[str, Any] | None = None
    explanation: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(check.ok is not False for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ok": self.ok}


def verify(
    identity: Identity,
    model: GPT,
    tokenizer: Tokenizer | None = None,
    *,
    against: str | Reference | None = None,
    engine: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Verify a model that was loaded from an opened source.

    Args:
        identity, model, tokenizer: what `open_source`, `load_model` and `load_tokenizer_for` gave.
        against: a reference: `transformers` (the same source, read by transformers), `transformers:PATH`, a trace, or
            any other source. Without one, the witnesses inside the weights are asked.
        engine: compare this way of running the model (`WAYS` in `diagnose.selftest`), on its own device and in its
            own type, with the CPU in float32.
        progress: called with (steps done, steps in all) during the structure check.

    Raises LoadstoneError if the reference cannot be had, or is of another model.
    """
    reference = find_reference(against) if isinstance(against, str) else against
    report = VerifyReport(assumed=identity.assumed, counts=count_parameters(identity, model))
    report.checks += [_check_sources(identity, model, progress), _check_finite(model), _check_runs(model)]
    if tokenizer is None or identity.config.context_length < 2:
        reason = "no tokenizer was found" if tokenizer is None else "the context is 1"
        report.checks.append(Check("loss on English", None, f"{reason}, so no text can be scored"))
    else:
        report.loss = english_loss(model, tokenizer)
        report.checks.append(judge_loss(report.loss, identity.config.vocab_size))
    if reference:
        _compare(report, identity, model, reference.trace(identity))
    else:
        report.checks += witnesses(identity, model, tokenizer)
    if engine:
        report.checks += self_test(model, engine=engine, device=model.tok_emb.weight.device)
    return report


def _compare(report: VerifyReport, identity: Identity, model: GPT, trace: Trace) -> None:
    """Logits as the model gives them; and, where they differ by more than float32 arithmetic, the diagnosis.

    The diagnosis is asked even if the tolerance lets the difference pass: a fault can hide below that of a 16-bit type,
    and the diagnosis tells it from the rounding of weights, which is none.
    """
    require_comparable(trace, model)
    computed = str(model.tok_emb.weight.dtype).removeprefix("torch.")
    dtype, limit = loosest([stored_type(identity), trace.stored, computed]), model.config.context_length
    parities = compare(model_logits(model), trace, dtype=dtype, limit=limit)
    report.checks += [parity.check() for parity in parities]
    report.checks += _what_was_not_compared(model.config, trace, len(parities))
    report.usual = usual_text(dtype)
    exact = compare(float32_logits(model.config, Parameters.of(model)), trace, dtype="float32", limit=limit)
    if all(parity.relative <= precision("float32").usual[1] for parity in exact):
        if failed(parities):
            detail = (
                f"the same weights agree in float32 on the CPU: {computed} on {model.tok_emb.weight.device} does not"
            )
            report.checks.append(Check("modules against the reference", None, detail))
        return
    if (
        computed != stored_type(identity)
        and not failed(parities)
        and loosest([computed, stored_type(identity)]) == computed
    ):
        detail = f"not asked, as the weights were rounded to {computed} on loading; leave --dtype out for that"
        report.checks.append(Check("modules against the reference", None, detail))
        return
    if _check_finite(model).ok is False:
        detail = "not asked, as the weights hold NaN or infinity"
        report.checks.append(Check("modules against the reference", None, detail))
        return
    if not trace.has_activations:
        detail = f"{trace.origin} is a trace without activations, so nothing can tell where the difference begins"
        report.checks.append(Check("modules against the reference", None, detail))
        return
    found = diagnose(identity, model, trace)
    faults = [finding for finding in found.findings if finding.repair != "precision"]
    report.diagnosis = explain.as_dict(found, identity)
    report.explanation = list(explain.lines(found, identity)) if found.findings or failed(parities) else []
    places = len({finding.point for finding in found.findings})
    text = (
        f"{places} of {found.judged} differ although their inputs agree"
        if places
        else (f"all {found.judged} agree; what is left is rounding")
    )
    verdict = False if faults else (None if places else True)
    report.checks.append(Check("modules against the reference", verdict, text))


def _what_was_not_compared(ours: GPTConfig, trace: Trace, compared: int) -> list[Check]:
    """What differs beside the logits, or could not be held against the reference at all."""
    checks = []
    if left_out := [len(prompt.ids) for prompt in trace.prompts if len(prompt.ids) > ours.context_length]:
        lengths = ", ".join(map(str, left_out))
        detail = f"lengths {lengths} are beyond the context of {ours.context_length} here, and were not compared"
        checks.append(Check("lengths of the reference", None if compared else False, detail))
    if (lacking := trace.config.vocab_size - ours.vocab_size) > 0:
        detail = (
            f"{lacking} rows of the reference's vocabulary are not here: its padding, or lost; they were not compared"
        )
        checks.append(Check("vocabulary of the reference", None, detail))
    if different := {k: v for k, v in differences(ours, trace.config).items() if k not in ("bos_id", "eos_ids")}:
        detail = "; ".join(
            f"{name} is {shown(here)} here and {shown(there)} there" for name, (here, there) in different.items()
        )
        checks.append(Check("config against the reference", None, detail))
    if trace.assumed:
        detail = (
            f"of {trace.origin} this was only assumed: {'; '.join(trace.assumed)}. `loadstone trace --set` can tell it"
        )
        checks.append(Check("config of the reference", None, detail))
    return checks


def count_parameters(identity: Identity, model: GPT) -> dict[str, int]:
    """Elements, counted the three ways that people compare: 124M, 163M, and with the buffers of the file."""
    tied = sum(parameter.numel() for parameter in model.parameters())
    head = model.tok_emb.weight.numel() if identity.config.tied else 0
    tensors = identity.checkpoint.tensors
    buffers = sum(tensors[name].size for name in identity.plan.ignored if name in tensors)
    return {"parameters": tied, "parameters_with_untied_head": tied + head, "not_parameters_in_file": buffers}


def _check_sources(identity: Identity, model: GPT, progress: Callable[[int, int], None] | None) -> Check:
    """Undo the ops on the model's parameters and compare with the file, read afresh."""
    checkpoint = identity.checkpoint
    fresh = checkpoint if isinstance(checkpoint, ModuleCheckpoint) else open_checkpoint(checkpoint.path)
    parameters = dict(model.named_parameters())
    different = []
    for done, step in enumerate(identity.plan.steps, 1):
        arrays = [_numpy(parameters.pop(target)) for target in step.targets]
        (found,) = apply(step.ops, arrays, identity.config, inverse=True)
        expected = to_tensor(fresh.read(step.source)).to(model.tok_emb.weight.dtype)
        if not _same_bits(to_tensor(found), expected):
            different.append(step.source)
        if progress:
            progress(done, len(identity.plan.steps))
    if different or parameters:
        wrong = ", ".join((different + sorted(parameters))[:4])
        return Check("every parameter equals its source", False, f"{len(different) + len(parameters)} differ: {wrong}")
    tensors, count = len(identity.plan.steps), sum(len(step.targets) for step in identity.plan.steps)
    return Check("every parameter equals its source", True, f"{count} parameters from {tensors} tensors, bit for bit")


def _numpy(parameter: torch.Tensor) -> Any:
    import ml_dtypes

    tensor = parameter.detach().cpu()
    return (
        tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
    )


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the last bit; NaN equals the same NaN."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(integers), b.view(integers))


def _check_finite(model: GPT) -> Check:
    bad = [name for name, parameter in model.named_parameters() if not torch.isfinite(parameter).all()]
    if bad:
        return Check("all values finite", False, f"NaN or infinity in {', '.join(bad[:4])}")
    return Check("all values finite", True, "no NaN, no infinity")


@torch.inference_mode()
def _check_runs(model: GPT) -> Check:
    """Weights may be right and the config wrong: a few tokens must come through with finite scores."""
    ids = torch.arange(min(8, model.config.vocab_size, model.config.context_length))[None]
    if bool(torch.isfinite(model(ids.to(model.tok_emb.weight.device))).all()):
        return Check("runs", True, f"{ids.numel()} tokens give finite logits")
    return Check("runs", False, "logits are NaN or infinite")


@torch.inference_mode()
def english_loss(model: GPT, tokenizer: Tokenizer) -> float:
    """Mean cross-entropy in nats per token over a fixed English text (cut at the context, which must exceed 1)."""
    ids = torch.tensor([tokenizer.encode(ENGLISH)[: model.config.context_length]], device=model.tok_emb.weight.device)
    return float(F.cross_entropy(model(ids)[0, :-1].float(), ids[0, 1:]))


def judge_loss(loss: float, vocab_size: int) -> Check:
    """GPT-2 has about 3 to 4 here. ln(vocabulary) is what guessing gives; a model that is worse was loaded wrong."""
    guess = math.log(vocab_size)
    perplexity = math.exp(min(loss, 700))
    text = f"{loss:.2f} nats a token (perplexity {perplexity:.0f}; guessing gives ln {vocab_size} = {guess:.2f})"
    if not math.isfinite(loss) or loss > 1.05 * guess:
        return Check("loss on English", False, f"{text}: broken (worse than guessing), or not a model of English")
    if loss > 0.8 * guess:
        return Check("loss on English", None, f"{text}: untrained, or not a model of English")
    return Check("loss on English", True, f"{text}: a trained model")
