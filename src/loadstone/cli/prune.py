"""prune: weights to zero, or heads and layers out, with the perplexity before and after, and a fine-tune to recover."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..checkpoint.wording import visible
from ..errors import LoadstoneError
from .options import Json, Many, Src, need, print_json, progress_bar
from .shrink import ShrinkOptions, comparison, described

if TYPE_CHECKING:
    from ..calibrate.measure import Change
    from ..prune.run import Pruned
    from ..tokenizer import Tokenizer

REPORT = "prune.json"


def prune(
    source: Src,
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write, as transformers reads it.")],
    options: ShrinkOptions,
    sparsity: Annotated[float, typer.Option(help="The share that goes: of weights, of heads, or of layers.")],
    method: Annotated[
        str, typer.Option(help="magnitude (weights alone) or wanda (weights times what they are multiplied with).")
    ] = "wanda",
    structure: Annotated[
        str, typer.Option(help="none (single weights), 2:4, heads (whole key/value groups) or layers.")
    ] = "none",
    recover: Annotated[int, typer.Option(min=0, metavar="STEPS", help="Fine-tune so long; zeros stay zeros.")] = 0,
    data: Annotated[Many, typer.Option("--data", metavar="PATH", help="Of --recover: text, as finetune takes it.")] = (
        None
    ),
    lr: Annotated[float, typer.Option(help="Of --recover: the highest learning rate.")] = 1e-4,
    batch_size: Annotated[int, typer.Option(min=1, help="Of --recover: rows of a step.")] = 8,
    length: Annotated[int, typer.Option(min=0, help="Of --recover: tokens of a row; 0: 512, or the context.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of DST: float32, float16 or bfloat16.")] = "float32",
    force: Annotated[bool, typer.Option("--force", help="Replace what Loadstone wrote to DST earlier.")] = False,
    as_json: Json = False,
) -> None:
    """Prune SRC, say what that does to its perplexity, and write an ordinary model folder.

    Zeros leave the file as large as it was; heads and layers make a smaller model with a config to match.
    """
    if bool(recover) != bool(data):
        raise LoadstoneError("--recover STEPS and --data PATH go together: how long to fine-tune, and on what.")
    from ..prune.run import Settings
    from ..prune.run import prune as run
    from ..save import save_model

    settings = Settings(sparsity, method, structure)
    identity, model, tokenizer = options.load_float32(source)
    _require_place(destination, identity.checkpoint)
    what = options.examined(model, tokenizer)
    rows = options.calibration_of(model, tokenizer, settings.needs_rows)
    compare = comparison(model, what)
    with progress_bar("pruning") as progress:
        done = run(model, settings, rows, progress)
    report: dict[str, Any] = {"source": source, **done.as_dict()}
    changes = {"pruned": compare(done.model)}
    if data:
        _recover(done, need(tokenizer, source), data, (recover, lr, batch_size, length), destination, as_json)
        changes["recovered"] = compare(done.model)
        report["recovery"] = {"steps": recover, "lr": lr, "batch_size": batch_size, "data": data}
    report["evaluation"] = {name: change.as_dict() for name, change in changes.items()}

    def beside(folder: Path) -> None:
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    certificate = save_model(done.model, destination, tokenizer, dtype=dtype, force=force, beside=beside)
    report["remarks"] = [*certificate["remarks"], *_own_names(done, certificate)]
    if as_json:
        print_json(report)
        return
    for label, line in _lines(destination, done, changes, report["remarks"]):
        print(f"{label:<11} {visible(line)}")


def _require_place(destination: Path, source: Any) -> None:
    """Raises SourceError, before any work, if the source lies there."""
    from ..convert import may_replace
    from ..layouts import LAYOUTS

    may_replace(destination, source, LAYOUTS["hf"], True)


def _recover(
    done: Pruned, tokenizer: Tokenizer, data: list[str], wanted: tuple[int, float, int, int], destination: Path,
    quiet: bool,
) -> None:  # fmt: skip
    from ..prune.recover import recover
    from ..train.settings import Settings
    from .progress import Reporter

    steps, lr, batch_size, length = wanted
    length = length or min(512, done.model.config.context_length)
    settings = Settings(steps=steps, lr=lr, batch_size=batch_size, length=length, eval_every=0, save_every=steps)
    near = next(parent for parent in destination.resolve().parents if parent.is_dir())
    with Reporter(steps, 0, quiet) if sys.stderr.isatty() else nullcontext() as reporter:
        listeners = [reporter] if reporter else []
        recover(done.model, tokenizer, done.masks, data, settings, near=near, listeners=listeners)


def _own_names(done: Pruned, certificate: dict[str, Any]) -> Iterator[str]:
    """Why a model could not be written as HuggingFace's."""
    from ..config.to_hf import to_hf
    from ..errors import ConfigError

    if certificate["written"]["dialect"].endswith("/loadstone"):
        try:
            to_hf(done.model.config)
        except ConfigError as error:
            yield f"written under our own names, which loadstone alone reads: {error}"


def _lines(
    destination: Path, done: Pruned, changes: dict[str, Change], remarks: list[str]
) -> Iterator[tuple[str, str]]:
    yield "method", f"{done.settings.method}, structure {done.settings.structure}"
    if done.rows:
        yield "calibrated", f"{done.rows.source}, {done.rows.ids.shape[0]} rows of {done.rows.ids.shape[1]} tokens"
    gone = done.parameters_before - done.parameters
    smaller = f"{done.parameters:,} left ({-gone / done.parameters_before:+.1%})" if gone else "none gone"
    zeros = f"; {done.zeros:,} are zero ({done.zeros / done.parameters:.1%})" if done.masks else ""
    yield "parameters", f"{done.parameters_before:,} before, {smaller}{zeros}"
    if done.kept_layers:
        yield "layers", f"kept {', '.join(map(str, done.kept_layers))}"
    for block, groups in done.kept_heads.items():
        yield "heads" if block == 0 else "", f"block {block}: kept groups {', '.join(map(str, groups))}"
    for name, change in changes.items():
        yield "perplexity", f"{name}: {change}"
    yield "measured on", described(next(iter(changes.values())))
    yield from zip(["by layer"] + [""] * 8, _table(done), strict=False)
    for remark in remarks:
        yield "note", remark
    yield "written", str(destination)


def _table(done: Pruned) -> Iterator[str]:
    """The layers whose output has changed most; magnitude does not look at outputs."""
    known = {name: part["output_error"] for name, part in done.parts.items() if part["output_error"] is not None}
    if known:
        width = max(map(len, known))
        yield f"{'':<{width}}  |(W-W')X|/|WX|, correlations left out"
        yield from (f"{name:<{width}}  {known[name]:.4f}" for name in sorted(known, key=lambda n: -known[n])[:7])
