"""`extend`: tokenizer and model grow by the same tokens; the old rows stay as they are, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checkpoint.wording import shown
from ..errors import LoadstoneError
from ..model import GPT, Embedding, Linear
from ..tokenizer import Tokenizer, check_tokenizer
from .measure import Candidate, OldText, compare_logits, in_evaluation, losses
from .report import Added, Logits, Loss, Norms, Report
from .rows import METHODS, TrainedRows, grown
from .tokens import extend_tokenizer, tokens_of

MOST_PADDING = 65_536


@dataclass(frozen=True)
class _Places:
    """Where the new tokens' rows are: `ids`, in a matrix of `before` rows that gets `after`."""

    ids: list[int]
    before: int
    after: int

    @property
    def taken(self) -> list[int]:
        """Old rows, of padding, that give way to new tokens."""
        return [number for number in self.ids if number < self.before]

    @property
    def spare(self) -> int:
        """New rows that are padding."""
        return self.after - self.before - (len(self.ids) - len(self.taken))


def extend(
    model: GPT,
    tokenizer: Tokenizer,
    tokens: Sequence[str],
    *,
    init: str = "mean_cov",
    pad_to_multiple: int | None = None,
    seed: int = 0,
    special: bool = True,
    text: str | None = None,
) -> tuple[GPT, Tokenizer, Report]:
    """New tokens for a model and its tokenizer.

    New tokens first take over rows that no token has (padding): these are initialised anew, as nothing trained them.
    The matrix grows only when they are used up. New padding is the mean row. Positions stay as they are.

    Args:
        model, tokenizer: a pair from `load`.
        tokens: texts of the new tokens.
        init: their rows (see `TrainedRows.start`): `mean_cov`, `mean` or `random`.
        pad_to_multiple: round the number of rows up to a multiple of this.
        seed: of what is random.
        special: they are found only where special text is parsed (markers of a chat, say); if False, in every text.
        text: the old text whose loss is reported for every `init`; the built-in English if None.

    Returns a new model, which shares every parameter but embedding and head with the old one, a new tokenizer, and the
    report. Tie, `requires_grad`, dropout and modes are kept; what was given stays as it is.

    Raises a LoadstoneError for tokens that cannot be added (`extend_tokenizer`), options out of range, a tokenizer of
    another model, and rows that are not finite.
    """
    _check(model, tokenizer, init, pad_to_multiple, seed)
    texts = [tokens] if isinstance(tokens, str) else list(tokens)
    old_text = OldText.of(tokenizer, text)
    extended_tokenizer, ids = extend_tokenizer(tokenizer, texts, special=special)
    known, before = torch.tensor(sorted(tokens_of(tokenizer))), model.config.vocab_size
    after = max(before, max(ids) + 1)
    places = _Places(ids, before, after + -after % (pad_to_multiple or 1))
    rows = {name: TrainedRows(module.weight, known) for name, module in _matrices(model).items()}
    starts = {method: _starts(rows, method, len(ids), seed) for method in METHODS}
    extended = _extended(model, places, rows, starts[init])
    first, by_method, logits = _measured(model, extended, old_text, places, rows, starts)
    norms = {name: _norms(module.weight, rows[name], ids) for name, module in _matrices(extended).items()}
    report = Report(
        tokens=tuple(Added(t, n, "padding" if n < before else "none") for t, n in zip(texts, ids, strict=True)),
        special=special,
        init=init,
        seed=seed,
        tied=model.head is None,
        rows=(before, places.after),
        padding=(before - len(known), places.after - len(known) - len(ids)),
        logits=logits,
        text=old_text.as_dict(),
        before=first,
        after=by_method,
        norms=norms,
        remarks=[] if special else _remarks(old_text, tokenizer, texts),
    )
    return extended, extended_tokenizer, report


def _check(model: GPT, tokenizer: Tokenizer, init: str, multiple: int | None, seed: int) -> None:
    if init not in METHODS:
        raise LoadstoneError(f"init {shown(init)} is not known; choose {', '.join(METHODS)}.")
    if multiple is not None and not 1 <= multiple <= MOST_PADDING:
        raise LoadstoneError(f"pad_to_multiple {shown(multiple)}: expected a number from 1 to {MOST_PADDING}.")
    if not 0 <= seed < 2**63:
        raise LoadstoneError(f"seed {shown(seed)}: expected a number from 0 to 2^63 - 1.")
    if type(model.tok_emb) is not Embedding or type(model.head) not in (Linear, type(None)):
        raise LoadstoneError("an adapter is in the place of the model's embedding or head: merge it, then extend.")
    if model.config.head_bias:
        raise LoadstoneError("the head has a bias, as GPT-J's, and what a new token's should be is not known here.")
    check_tokenizer(tokenizer, vocab_size=model.config.vocab_size)


def _matrices(model: GPT) -> dict[str, Embedding | Linear]:
    """Embedding and, where it is a matrix of its own, head."""
    return {"embedding": model.tok_emb} | ({} if model.head is None else {"head": model.head})


def _starts(rows: Mapping[str, TrainedRows], method: str, count: int, seed: int) -> dict[str, Tensor]:
    """New rows [K, C] of every matrix."""
    generator = torch.Generator().manual_seed(seed)
    return {name: trained.start(method, count, generator) for name, trained in rows.items()}


def _extended(model: GPT, places: _Places, rows: Mapping[str, TrainedRows], start: Mapping[str, Tensor]) -> GPT:
    """A GPT over the same modules, but for embedding and head."""
    extended = copy.copy(model)
    extended._modules = dict(model._modules)
    extended.config = model.config.with_overrides({"vocab_size": places.after})
    for name, module in _matrices(model).items():
        larger = copy.copy(module)
        weight_VC = grown(module.weight, places.after, places.ids, start[name], rows[name].mean)
        larger._parameters = {**module._parameters}
        larger._parameters["weight"] = nn.Parameter(weight_VC, requires_grad=module.weight.requires_grad)
        if isinstance(larger, Embedding):
            larger.num_embeddings, extended.tok_emb = places.after, larger
        else:
            larger.out_features, extended.head = places.after, larger
    return extended


def _measured(
    model: GPT,
    extended: GPT,
    text: OldText,
    places: _Places,
    rows: Mapping[str, TrainedRows],
    starts: Mapping[str, Mapping[str, Tensor]],
) -> tuple[Loss, dict[str, Loss], Logits]:
    """The old text's loss before and with each method's rows, and the old logits."""
    *_, head = rows  # the matrix that gives logits comes last
    padding_C = rows[head].mean.to(rows[head].weight)
    candidates = {method: Candidate(start[head], padding_C, places.spare) for method, start in starts.items()}
    with in_evaluation(model, extended):
        before, after = losses(model, text, candidates, places.taken)
        return before, after, compare_logits(model, extended, text.ids, places.taken)


def _norms(weight_VC: Tensor, rows: TrainedRows, ids: list[int]) -> Norms:
    total = sum(float(piece.norm(dim=1).sum()) for piece in rows.pieces())
    new = weight_VC.detach()[ids].double().norm(dim=1)
    return Norms(total / len(rows.known), float(new.min()), float(new.mean()), float(new.max()))


def _remarks(old_text: OldText, tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    scored = tokenizer.decode(old_text.ids)
    found = [new for new in texts if new in scored]
    told = "the old text holds {}: its losses are those of the old tokens, in both models."
    return [told.format(", ".join(map(shown, found)))] if found else []
