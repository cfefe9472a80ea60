"""A loaded source as a model that is served, with what is known about it."""

from __future__ import annotations

import time
from typing import Any

import torch

from ..checks import Check
from ..errors import LoadstoneError
from ..load import require_tokenizer
from ..model import GPT
from ..native import NativeEngine
from ..report import checkpoint_facts, identity_facts, plan_rows
from ..tokenizer import Tokenizer
from ..verify import ENGLISH, VerifyReport, verify
from ..weightmap import Identity
from .batch import Batch
from .served import Served

DEFAULT_CONTEXT = 4096  # tokens of a row of the cache, unless more are asked for
FARTHEST = 1.0  # nats that an engine may be away from the model; one that reads a tensor wrongly is several


def open_served(
    name: str, identity: Identity, model: GPT, tokenizer: Tokenizer | None, *, rows: int = 16,
    context: int | None = None, waiting: int = 64, proved: bool = True, engine: NativeEngine | None = None,
) -> Served:  # fmt: skip
    """Prove that the model loaded right and give it a batch.

    Args:
        name: as requests say it.
        rows, waiting: requests that run at the same time, and that may wait.
        context: tokens of a request, prompt and answer. Default: the model's, at most DEFAULT_CONTEXT.
        proved: verify it first, as `loadstone verify` does.
        engine: what answers, from weights of its own; the model then only looks inside (attention, surprisal, ...).

    Raises LoadstoneError if there is no tokenizer, or what was proved is that it did not load right.
    """
    tokenizer = require_tokenizer(tokenizer, name, identity.remarks)
    found = verify(identity, model, tokenizer) if proved else None
    if found and engine:
        found.checks.append(_agreement(model, engine, tokenizer))
    if found and not found.ok:
        wrong = "; ".join(f"{check.name}: {check.detail}" for check in found.checks if check.ok is False)
        raise LoadstoneError(
            f"{name}: not served, as it did not load right: {wrong}. `loadstone verify` says more; --no-verify "
            "serves it all the same."
        )
    length = min(context or DEFAULT_CONTEXT, model.config.context_length)
    n_tokens = min(tokenizer.vocab_size, model.config.vocab_size)
    batch = Batch(engine or model, rows=rows, length=length, waiting=waiting, n_tokens=n_tokens)
    return Served(name, model, tokenizer, batch, int(time.time()), report(identity, found))


@torch.inference_mode()
def _agreement(model: GPT, engine: NativeEngine, tokenizer: Tokenizer) -> Check:
    ids = tokenizer.encode(ENGLISH)[: model.config.context_length]
    wanted_TV = model(torch.tensor([ids], device=model.tok_emb.weight.device))[0].cpu().float().log_softmax(dim=-1)
    found_TV = torch.from_numpy(engine.scores(ids)).log_softmax(dim=-1)
    away = float((wanted_TV.exp() * (wanted_TV - found_TV)).sum(dim=-1).mean())
    said = f"{away:.1e} nats a token from the model, over {len(ids)} tokens of English (KL; at most {FARTHEST:g})"
    return Check("engine native", away <= FARTHEST, said)


def report(identity: Identity, found: VerifyReport | None) -> dict[str, Any]:
    """What the page shows: container, model, the plan tensor by tensor, the checks. No path of this machine."""
    container = checkpoint_facts(identity.checkpoint)
    container["name"] = identity.checkpoint.path.name
    del container["path"]
    return {
        "container": container, "model": identity_facts(identity),
        "plan": plan_rows(identity.plan, fold=False), "verify": found.as_dict() if found else None,
    }  # fmt: skip
