"""upcycle: a changed model that starts from a trained one's weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..checkpoint.wording import visible
from ..errors import LoadstoneError
from .options import Json, Many, RunOptions, Src, config_fields, print_json

if TYPE_CHECKING:
    from ..model import GPT


def upcycle(
    source: Src,
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write.")],
    options: RunOptions,
    kv_heads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Key/value heads, each the mean of those it stands for.")
    ] = None,
    experts: Annotated[int | None, typer.Option(min=1, metavar="E", help="Experts, each a copy of the MLP.")] = None,
    experts_used: Annotated[
        int | None,
        typer.Option(min=1, metavar="A", help="Experts that the router picks for a token. [default: 2, if there are]"),
    ] = None,
    change: Annotated[
        Many,
        typer.Option(metavar="FIELD=VALUE", help="Another config field; refused, with the reason, if it cannot start."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the routers. Same seed, same weights.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace what Loadstone wrote to DST earlier.")] = False,
    as_json: Json = False,
) -> None:
    """Change SRC's attention or MLP, start from its weights, and write a model to train further (`finetune DST`).

    DST is HuggingFace's folder where a family has the new form (Llama's experts are a Mixtral), else our own.
    """
    experts_used = experts_used or (min(2, experts) if experts else None)
    named = {"n_kv_heads": kv_heads, "n_experts": experts, "n_experts_used": experts_used}
    changes = config_fields(change) | {field: value for field, value in named.items() if value is not None}
    if not changes:
        raise LoadstoneError("nothing is to be changed: --kv-heads N, or --experts E.")
    from ..convert import may_replace
    from ..layouts import LAYOUTS
    from ..save import save_model
    from ..upcycle import upcycle as run

    identity, model, tokenizer = options.load(source)
    may_replace(destination, identity.checkpoint, LAYOUTS["hf"], force)  # before any work
    changed = run(model, changes, seed=seed)
    report = {"source": source, "changes": changes, "seed": seed, **_compared(model, changed)}
    certificate = save_model(changed, destination, tokenizer, force=force)
    report["dialect"], report["remarks"] = certificate["written"]["dialect"], certificate["remarks"]
    if as_json:
        print_json(report)
        return
    for name in ("parameters", "active"):
        print(f"{name:<10} {report[name][0]:,} before, {report[name][1]:,} now")
    print(f"{'logits':<10} changed by at most {report['logits_changed']:.2g}; the largest is {report['largest']:.3g}")
    own = " (only loadstone reads it: no family has this form)" if report["dialect"].endswith("/loadstone") else ""
    for remark in report["remarks"]:
        print(f"{'note':<10} {visible(remark)}")
    print(f"{'written':<10} {visible(str(destination))}, {report['dialect']}{own}")


def _compared(model: GPT, changed: GPT) -> dict[str, Any]:
    """Sizes, and what the change does to the logits of some ids at random."""
    import torch

    from ..weightmap.canonical import active_count, parameter_count

    models, config, draw = (model.eval(), changed), model.config, torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, min(64, config.context_length)), generator=draw)
    with torch.no_grad():
        before, after = (each(ids.to(each.tok_emb.weight.device)).double() for each in models)
    return {
        "parameters": [parameter_count(each.config) for each in models],
        "active": [active_count(each.config) for each in models],
        "logits_changed": float((before - after).abs().max()),
        "largest": float(before.abs().max()),
    }
