"""quantize: a model's matrices in 4, 5 or 8 bits, as GGUF, with a report of what each lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..checkpoint.wording import size_text, visible
from ..errors import LoadstoneError
from .options import Json, Src, print_json, progress_bar
from .shrink import ShrinkOptions, comparison, described
from .write import parse_size

if TYPE_CHECKING:
    from ..calibrate.measure import Change
    from ..quantize.run import Progress, Quantised

_SHOWN = 8  # tensors that lose most


def quantize(
    source: Src,
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="The folder to write: model.gguf, its certificate, quantize.json.")
    ],
    options: ShrinkOptions,
    bits: Annotated[
        int | None,
        typer.Option(help="4, 5 or 8, of the linear layers. By itself 8; with a budget 4, and this is the fewest."),
    ] = None,
    minimum: Annotated[
        bool, typer.Option("--minimum", help="4 bits with a minimum beside each scale (Q4_1): 5 bits per weight.")
    ] = False,
    group: Annotated[int, typer.Option(help="Weights that share a scale: 32, as GGUF's blocks have it.")] = 32,
    method: Annotated[str, typer.Option(help="rtn (round to nearest) or gptq (calibrated).")] = "rtn",
    embedding: Annotated[
        str,
        typer.Option(help="q8_0, q5_0, q4_1, q4_0 or f16: the token embedding (a tied head is the same) and the head."),
    ] = "q8_0",
    budget_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Most bytes of all matrices (80MB): bits go where they help.")
    ] = None,
    budget_loss: Annotated[
        float | None,
        typer.Option(metavar="NATS", help="Most nats per token lost by estimate (0.01 is 1% of perplexity)."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what Loadstone wrote to DST earlier.")] = False,
    as_json: Json = False,
) -> None:
    """Quantise the weights of SRC, say what each layer lost and the perplexity before and after.

    DST opens like any source (`loadstone generate DST`), and llama.cpp runs its model.gguf (docs/quantize.md).
    """
    if group != 32:
        raise LoadstoneError(f"--group {group}: GGUF's blocks are groups of 32, and DST is a GGUF. Leave it out.")
    from ..quantize.run import Settings
    from ..quantize.run import quantize as run
    from ..quantize.units import units_of
    from ..quantize.write import require_place, write_quantised

    size = None if budget_size is None else parse_size(budget_size, "--budget-size")
    settings = Settings(_type(bits, minimum), method, embedding.upper(), size, budget_loss)
    identity, model, tokenizer = options.load_float32(source)
    units_of(identity.config)  # an architecture that GGUF has no names for is refused here
    require_place(destination, identity.checkpoint, force=force)
    what = options.examined(model, tokenizer)
    rows = options.calibration_of(model, tokenizer, settings.needs_rows)
    compare = comparison(model, what)
    with _stages() as progress:
        done = run(model, settings, rows, progress)
    change = compare(model)
    report = {"source": source, **done.as_dict(), "evaluation": change.as_dict()}
    certificate = write_quantised(
        model, done, destination, tokenizer, report, source=identity.checkpoint.path, force=force
    )
    report["remarks"] = certificate["remarks"]
    if as_json:
        print_json(report)
        return
    for label, line in _lines(destination, done, change, report["remarks"]):
        print(f"{label:<11} {visible(line)}")


def _type(bits: int | None, minimum: bool) -> str | None:
    """GGUF's type. Raises LoadstoneError for bits that there are not."""
    known = {(None, False): None, (None, True): "Q4_1", (4, True): "Q4_1", (4, False): "Q4_0"}
    known |= {(5, False): "Q5_0", (8, False): "Q8_0"}
    if (bits, minimum) not in known:
        asked = f"--bits {bits}" + (" --minimum" if minimum else "")
        raise LoadstoneError(f"{asked}: there are 4, 5 and 8 bits, and --minimum goes with 4.")
    return known[bits, minimum]


def _lines(destination: Path, done: Quantised, change: Change, remarks: list[str]) -> Iterator[tuple[str, str]]:
    kinds: dict[str, int] = {}
    for unit in done.units:
        kinds[unit.type] = kinds.get(unit.type, 0) + 1
    shares = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
    yield "method", f"{done.settings.method}; {len(done.units)} matrices: {shares}"
    if done.rows:
        yield "calibrated", f"{done.rows.source}, {done.rows.ids.shape[0]} rows of {done.rows.ids.shape[1]} tokens"
    yield "size", f"{size_text(done.nbytes)} of matrices, {done.bits_per_weight:.2f} bits per weight"
    yield "perplexity", str(change)
    yield "measured on", described(change)
    yield from zip(["by tensor"] + [""] * _SHOWN, table(done), strict=False)
    for remark in remarks:
        yield "note", remark
    yield "written", f"{destination}; all tensors: {destination / 'quantize.json'}"
    if done.rows:
        yield "picture", f"loadstone plot {destination}"


def table(done: Quantised) -> Iterator[str]:
    """The tensors that lose most, or are most wrong where nothing was estimated."""
    width = max(len(unit.name) for unit in done.units)
    yield f"{'':<{width}}  type   |Q-W|/|W|  |(Q-W)X|/|WX|  estimated loss, nats/token"
    for unit in sorted(done.units, key=lambda unit: -(unit.weight_error if unit.loss is None else unit.loss))[:_SHOWN]:
        output, loss = (
            "-" if value is None else form.format(value)
            for value, form in ((unit.output_error, "{:.4f}"), (unit.loss, "{:.2e}"))
        )
        yield f"{unit.name:<{width}}  {unit.type:<5}  {unit.weight_error:>9.4f}  {output:>13}  {loss:>8}"


@contextmanager
def _stages() -> Iterator[Progress | None]:
    """One bar for both: estimating the losses, and rounding."""
    with progress_bar("quantising") as advance:
        if advance is None:
            yield None
        else:
            yield lambda stage, done, total: advance(done + (total if stage == "rounding" else 0), 2 * total)
