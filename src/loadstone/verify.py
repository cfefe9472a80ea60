"""Did it load right? First structure (every parameter equals its source), then numbers (loss, logits of a reference).

The structure check goes backwards: it takes the model's parameters, undoes the table's ops, and compares with a fresh
reading of the file, bit for bit. So an op that is not the inverse of its inverse, a parameter that was filled twice or
not at all, and a file that changed in between are all seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from .checkpoint import open_checkpoint
from .checks import Check
from .errors import LoadstoneError
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
# Usual float32 differences between two right implementations are 1e-6 to 2e-5 on logits of this size.
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 0.15, torch.float16: 0.02}


@dataclass
class VerifyReport:
    """All checks of one source, and the counts. `ok` is False if any check failed."""

    checks: list[Check] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    loss: float | None = None

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
    against: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Verify a model that was loaded from an opened source.

    Args:
        identity, model, tokenizer: what `open_source`, `load_model` and `load_tokenizer_for` gave.
        against: `transformers` (the same source, read by transformers) or `transformers:PATH`; needs that package.
        progress: called with (steps done, steps in all) during the structure check.
    """
    reference = _reference(identity, model, against) if against else None
    report = VerifyReport(assumed=identity.assumed, counts=count_parameters(identity, model))
    report.checks += [_check_sources(identity, model, progress), _check_finite(model), _check_runs(model)]
    if tokenizer is None or identity.config.context_length < 2:
        reason = "no tokenizer was found" if tokenizer is None else "the context is 1"
        report.checks.append(Check("loss on English", None, f"{reason}, so no text can be scored"))
    else:
        report.loss = english_loss(model, tokenizer)
        report.checks.append(judge_loss(report.loss, identity.config.vocab_size))
    if reference:
        report.checks += compare_logits(model, reference, check_lengths(identity.config.context_length))
    return report


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


def compare_logits(
    model: GPT, reference: Callable[[torch.Tensor], torch.Tensor], lengths: Sequence[int]
) -> list[Check]:
    """Logits of fixed token ids against a reference, one check per length.

    Length 1 alone hides faults of rotary embedding and mask. Tolerance by the model's type, relative to the scale of
    the logits where that is above 1.
    """
    tolerance = TOLERANCES.get(model.tok_emb.weight.dtype, 1e-4)
    checks = []
    for length in lengths:
        ids = torch.arange(1, length + 1)[None] * 7919 % model.config.vocab_size  # spread over the vocabulary
        with torch.inference_mode():
            ours, theirs = model(ids).float(), reference(ids).float()
        if ours.shape != theirs.shape:
            detail = f"the reference gives {list(theirs.shape)}, ours {list(ours.shape)}"
            checks.append(Check(f"logits at length {length}", False, detail))
            continue
        difference = float((ours - theirs).abs().max())
        scale = max(1.0, float(theirs.abs().max()))
        agree = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
        ok = difference <= tolerance * scale
        detail = f"max difference {difference:.1e} (allowed {tolerance * scale:.1e}), same top token {agree:.1%}"
        checks.append(Check(f"logits at length {length}", ok, detail))
    return checks


def check_lengths(context_length: int) -> list[int]:
    """1, 7, 64 and the context limit, as far as the context goes; the limit is capped so that a CPU can do it."""
    limit = min(context_length, 2048)
    return sorted({length for length in (1, 7, 64, limit) if length <= limit})


def check_reference(against: str) -> None:
    """Raise LoadstoneError for a reference that cannot be had; called before anything is loaded."""
    if against.partition(":")[0] != "transformers":
        raise LoadstoneError(f"--against {against}: this version compares with transformers or transformers:PATH.")
    if find_spec("transformers") is None:
        raise LoadstoneError('--against transformers: the package is not installed (pip install "transformers>=5").')


def _reference(identity: Identity, model: GPT, against: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same source, or the named one, as transformers loads it. Raises LoadstoneError if it cannot."""
    check_reference(against)
    from transformers import AutoModelForCausalLM

    named = against.partition(":")[2]
    path = Path(named) if named else identity.checkpoint.path
    is_gguf = path.is_file() and path.suffix == ".gguf" if named else identity.checkpoint.format == "gguf"
    options = {"gguf_file": path.name} if is_gguf else {}
    try:
        reference = AutoModelForCausalLM.from_pretrained(
            path if path.is_dir() else path.parent, dtype=model.tok_emb.weight.dtype, local_files_only=True, **options
        ).eval()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise LoadstoneError(f"{path}: transformers cannot read it, so there is nothing to compare: {reason}") from None
    return lambda ids: reference(ids).logits
