"""From "the logits differ" to findings: walk the points, find the repair that mends each, apply it, go on."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from ..config import GPTConfig
from ..model import GPT
from ..weightmap import Identity
from .bench import TIGHT, Bench, Error, State
from .candidate import Candidate, Suspect
from .compare import Logits, Parity, compare
from .finding import Finding, known_loss, lost_cause
from .points import Parameters, run, split
from .precision import loosest, stored_type
from .repairs import HEAD, NORM, REPAIRS, Repair
from .trace import Trace

ALL = frozenset(repair.name for repair in REPAIRS)
MOST_LOST = 4  # after so many modules that no pair of repairs restores, pairs are not tried again: they take long
IMPROVEMENT = 3.0  # a repair must make the error so many times smaller


@dataclass(frozen=True)
class Diagnosis:
    """All that was found.

    Attributes:
        findings: in the order of execution.
        restored: logits of the repaired model against the reference, per length; empty if nothing was repaired.
        judged: points that were compared.
    """

    findings: list[Finding]
    restored: list[Parity] = field(default_factory=list)
    judged: int = 0

    @property
    def complete(self) -> bool:
        """Whether the repairs restore the logits at all lengths."""
        return bool(self.restored) and all(parity.ok for parity in self.restored)


def diagnose(identity: Identity, model: GPT, trace: Trace) -> Diagnosis:
    """Find the modules of a model that do not compute what the reference does, and what is wrong with each.

    Each module is fed with the reference's inputs, so faults do not hide one another. A repair counts if it restores
    the module and harms no other; then the walk goes on with the repaired model.

    Args:
        identity, model: what `open_source` and `load_model` gave; computed in float32 whatever the model's type.
        trace: the reference, with activations and of a model of the same build (`require_comparable`).
    """
    bench = Bench(identity, trace)
    state = State(model.config, Parameters.of(model))
    findings, memory = list[Finding](), Memory()
    with torch.inference_mode():
        points = bench.points(state)
        for point in points:
            for _ in range(4):  # one point may have several faults one after the other
                found, state = _judge(bench, state, point, memory)
                findings += found
                if not found or not found[-1].mended:
                    break
        restored = _restored(state, bench) if any(f.mended for f in findings) else []
    return Diagnosis(findings, restored, len(points))


@dataclass
class Memory:
    """What the walk learnt: the repairs that helped so far, and how many modules none could help."""

    known: set[str] = field(default_factory=set)
    lost: int = 0


def _judge(bench: Bench, state: State, point: str, memory: Memory) -> tuple[list[Finding], State]:
    """What is wrong at a point, and the model with that repaired; nothing if it agrees."""
    suspect, error = Suspect(bench, state, point), bench.error(point, state)
    if bench.agrees(point, error, state):
        loss = known_loss(suspect, error) if bench.lost and error.worst > TIGHT else None
        return ([loss] if loss else []), state
    # What was wrong in one layer is usually wrong in the next: that is tried before anything else.
    fits = _fits(suspect, error, [()], memory.known) or _fits(suspect, error, [()])
    if not fits and (loss := known_loss(suspect, error)):
        bench.lost = loosest([loss.coarse, bench.lost or loss.coarse])
        return [loss], state
    if not fits and memory.lost < MOST_LOST:
        fits = _fits(suspect, error, _firsts(suspect, memory.known)) or _fits(suspect, error, _firsts(suspect))
    if not fits:
        memory.lost += 1
        return [lost_cause(suspect, error)], state
    best = min(fits, key=lambda fit: fit.rank)
    memory.known |= {repair.name for repair, _ in best.chain if not repair.estimates}
    return [best.finding(i, suspect, error) for i in range(len(best.chain))], best.state


Chain = tuple[tuple[Repair, Candidate], ...]


@dataclass(frozen=True)
class _Fit:
    """Repairs, one after the other, that together restore a point."""

    chain: Chain
    state: State
    error: float
    mended: int  # points that were wrong and are right

    @property
    def rank(self) -> tuple[float, ...]:
        """Least is best: more points mended, then a clearly smaller error, then the order of `REPAIRS`."""
        return (-self.mended, max(self.error, TIGHT))

    def finding(self, i: int, suspect: Suspect, before: Error) -> Finding:
        repair, candidate = self.chain[i]
        return Finding(suspect.point, repair.name, True, candidate.text, candidate.tensors, candidate.config,
                       before.worst, self.error)  # fmt: skip


def _candidates(
    suspect: Suspect, names: Container[str] = ALL, *, first: bool = False
) -> Iterator[tuple[Repair, Candidate]]:
    for repair in REPAIRS:
        if suspect.part in repair.points and (repair.first or not first) and repair.name in names:
            for candidate in repair.candidates(suspect):
                if candidate.parameters or candidate.config:
                    yield repair, candidate


def _firsts(suspect: Suspect, names: Container[str] = ALL) -> Iterator[Chain]:
    """Single repairs after which a second is tried."""
    for found in _candidates(suspect, names, first=True):
        yield (found,)


def _fits(suspect: Suspect, before: Error, starts: Iterable[Chain], names: Container[str] = ALL) -> list[_Fit]:
    """All chains that restore the point and break no other: the first start that can, followed by one more repair."""
    bench, found = suspect.bench, []
    for start in starts:
        state = _apply(suspect.state, start)
        for step in _candidates(replace(suspect, state=state), names):
            repaired = _apply(state, (step,))
            if not bench.screen(suspect.point, repaired):
                continue
            after = bench.error(suspect.point, repaired)
            if bench.agrees(suspect.point, after, repaired) and after.worst * IMPROVEMENT < before.worst:
                chain = (*start, step)
                complete = _complete(suspect.state, chain)
                mended, broken = _effect(suspect, complete, chain)
                if not broken:
                    found.append(_Fit(chain, complete, after.worst, mended))
        if found:
            break
    return found


def _apply(state: State, chain: Chain) -> State:
    for _, candidate in chain:
        state = state.repaired(candidate.parameters, candidate.config)
    return state


def _complete(state: State, chain: Chain) -> State:
    """With the repairs of other layers that belong to it."""
    for _, candidate in chain:
        more = candidate.others() if candidate.others else {}
        state = state.repaired({**candidate.parameters, **more}, candidate.config)
    return state


# Config field -> the parts of the model that it changes.
FIELDS: Mapping[str, frozenset[str]] = {
    "norm_eps": NORM,
    "norm": NORM,
    "activation": frozenset({"mlp.hidden"}),
    "parallel_residual": frozenset({"norm2"}),
    "tied": HEAD,
} | dict.fromkeys(("rope", "n_heads", "n_kv_heads", "head_dim"), frozenset({"attn.context"}))
OF_PARAMETER = {"tok_emb": "embedding", "pos_emb": "embedding", "head": "logits"}


def _effect(suspect: Suspect, after: State, chain: Chain) -> tuple[int, int]:
    """How many points the repairs mend, and how many they break."""
    bench, before = suspect.bench, suspect.state
    changed = {n for n, value in after.weights.repaired.items() if before.weights.repaired.get(n) is not value}
    stems = {name.rpartition(".")[0] for name in changed}
    points = {OF_PARAMETER.get(stem, stem) for stem in stems}
    if after.config.tied and "tok_emb.weight" in changed:
        points.add("logits")
    parts = frozenset().union(*(FIELDS[field] for _, candidate in chain for field in candidate.config))
    points |= {point for point in bench.points(after) if split(point)[1] in parts}
    mended = broken = 0
    for point in points & set(bench.points(after)):
        was, is_now = (bench.agrees(point, bench.error(point, state), state) for state in (before, after))
        mended, broken = mended + (is_now and not was), broken + (was and not is_now)
    return mended, broken


def _restored(state: State, bench: Bench) -> list[Parity]:
    logits = float32_logits(state.config, state.weights)
    return compare(
        logits,
        bench.trace,
        dtype=loosest([stored_type(bench.identity), bench.trace.stored]),
        limit=state.config.context_length,
    )


def float32_logits(config: GPTConfig, weights: Parameters) -> Logits:
    """A model as `compare` takes it, computed in float32 whatever its type is, without a copy of the whole model."""
    return lambda ids, positions: run(config, weights, ids, positions)["logits"]
