"""train, finetune: a model from scratch, or from a checkpoint; from flags or a config file."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..checkpoint.wording import visible
from ..errors import LoadstoneError
from ..train.settings import Settings
from .options import Json, Many, Src, config_fields, print_json, progress_bar
from .progress import Reporter, introduction, try_it

if TYPE_CHECKING:
    from ..train.loop import Outcome
    from ..train.request import Request
    from ..train.world import World


def _settings_options() -> Any:
    """One option per field of `Settings`; None: not named on the command line."""
    options = []
    for f in fields(Settings):
        option = typer.Option(help=f.metadata["help"], show_default=str(f.default) or "empty")
        options.append((f.name, Annotated[type(f.default) | None, option], field(default=None)))
    return make_dataclass("SettingsOptions", options)


SettingsOptions = _settings_options()
RunFolder = Annotated[
    Path | None,
    typer.Option("--run", metavar="RUN", help="Folder of the run: checkpoints and figures. A --dry-run needs none."),
]
Data = Annotated[
    Many, typer.Option("--data", metavar="PATH", help="Text file, folder, JSONL, archive, hub:NAME, or prepared data.")
]
ValidationShare = Annotated[
    float | None, typer.Option("--validation", help="Share of the data to evaluate on; 0.05, or 0: none.")
]
ValidationData = Annotated[Many, typer.Option("--validation-data", metavar="PATH", help="Evaluate on this instead.")]
Config = Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="TOML or JSON file; flags win over it.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in RUN from its last checkpoint.")]


@dataclass
class PlanOptions:
    """`--dry-run` and what it reckons with."""

    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only plan: parameters, memory, tokens, FLOPs, time. Nothing is written.")
    ] = False
    devices: Annotated[int, typer.Option(help="Of the plan: how many devices.")] = 1
    on: Annotated[str | None, typer.Option(metavar="NAME", help="Of the plan: which, H100 for example.")] = None
    mfu: Annotated[float, typer.Option(help="Of the plan: share of their peak to reckon with; 0: the usual.")] = 0.0
    measure: Annotated[bool, typer.Option("--measure", help="Of the plan: time a few steps on this machine.")] = False


def train(
    settings: SettingsOptions,  # type: ignore[valid-type]
    plan: PlanOptions,
    run: RunFolder = None,
    config: Config = None,
    data: Data = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="For text: gpt2, char, bpe:8192 (trained on it), or a SRC with a tokenizer.")
    ] = None,
    validation: ValidationShare = None,
    validation_data: ValidationData = None,
    preset: Annotated[
        str | None, typer.Option(help="gpt2, gpt2-medium, gpt2-large, gpt2-xl; else a small one.")
    ] = None,
    sets: Annotated[Many, typer.Option("--set", metavar="FIELD=VALUE", help="Model config, e.g. n_layers=4.")] = None,
    device: Device = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train a GPT from scratch; Ctrl-C saves and leaves, --resume goes on as if nothing had happened."""
    data_values = {
        "sources": data, "tokenizer": tokenizer, "validation": validation, "validation_sources": validation_data,
    }  # fmt: skip
    model = {**({"preset": preset} if preset else {}), **config_fields(sets)}
    flags = {"data": named(data_values), "model": model, "settings": named(asdict(settings)), "device": device}

    def work(world: World) -> int:
        folder = folder_of(run, resume, plan)
        return execute(gathered(folder, config, named(flags), resume), folder, resume, plan, as_json, world)

    together(work)


def finetune(
    source: Src,
    settings: SettingsOptions,  # type: ignore[valid-type]
    plan: PlanOptions,
    run: RunFolder = None,
    config: Annotated[Path | None, typer.Option("--config", help="TOML or JSON file; flags win over it.")] = None,
    data: Data = None,
    sft: Annotated[
        Many, typer.Option("--sft", metavar="PATH", help="Instructions or chats (JSON, JSONL); loss on the answers.")
    ] = None,
    classify: Annotated[
        Many, typer.Option("--classify", metavar="PATH", help="Labelled texts (TSV, CSV, JSONL): train a classifier.")
    ] = None,
    style: Annotated[str | None, typer.Option(help="Of --sft: chat (template), alpaca or plain; else auto.")] = None,
    balance: Annotated[bool | None, typer.Option("--balance", help="Of --classify: as many of each class.")] = None,
    validation: ValidationShare = None,
    validation_data: ValidationData = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            help="What is trained: full, freeze:K, last:K, head, gradual, or phases: 0:head;1ep:blocks.-3-;2ep:all."
        ),
    ] = None,
    layer_decay: Annotated[float | None, typer.Option(help="Learning rate of a layer, relative to the next.")] = None,
    untie: Annotated[bool | None, typer.Option("--untie", help="Give the head a matrix of its own first.")] = None,
    lora: Annotated[int | None, typer.Option(metavar="RANK", help="Train a low-rank adapter instead.")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Its weight; twice the rank if not given.")] = None,
    lora_targets: Annotated[Many, typer.Option("--lora-target", help="q, k, v, out, gate, up, down or head.")] = None,
    device: Device = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Go on training any checkpoint: on text, on instructions, or as a classifier; all of it or parts."""
    chosen = {kind: paths for kind, paths in (("text", data), ("sft", sft), ("classify", classify)) if paths}
    kind, paths = next(iter(chosen.items()), (None, None))
    data_values = {
        "sources": paths, "kind": kind, "validation": validation, "validation_sources": validation_data,
        "style": style, "balance": balance,
    }  # fmt: skip
    tuning = {
        "strategy": strategy, "layer_decay": layer_decay, "untie": untie, "lora": lora, "lora_alpha": lora_alpha,
        "lora_targets": lora_targets,
    }  # fmt: skip
    flags = {
        "source": source, "data": named(data_values), "tuning": named(tuning), "settings": named(asdict(settings)),
        "device": device,
    }  # fmt: skip
    defaults: dict[str, Any] = {"settings": {"lr": 5e-5}}
    if kind == "classify":
        defaults["data"] = {"validation": 0.1}

    def work(world: World) -> int:
        if len(chosen) > 1:
            raise LoadstoneError("one of --data, --sft and --classify says what is learnt; more than one were given.")
        folder = folder_of(run, resume, plan)
        return execute(gathered(folder, config, named(flags), resume, defaults), folder, resume, plan, as_json, world)

    together(work)


def folder_of(run: Path | None, resume: bool, plan: PlanOptions) -> Path:
    """The run's folder; a plan from scratch writes nothing and needs none. Raises LoadstoneError without one."""
    if run is None and (resume or not plan.dry_run):
        raise LoadstoneError("--run FOLDER says where the run is kept (checkpoints, figures, samples): name a new one.")
    return run or Path()


def together(work: Callable[[World], int]) -> None:
    """Do it in each of the processes that torchrun started, or in this one; it returns the exit status."""
    from ..train.world import joined

    with joined() as world:
        status = work(world)
    if status:
        raise typer.Exit(status)


def execute(request: Request, run: Path, resume: bool, plan: PlanOptions, as_json: bool, world: World) -> int:
    """Plan or train. A run that was interrupted has exit status 130."""
    if plan.dry_run:
        if world.main:
            show_plan(request, plan, as_json)
        return 0
    world.connect(request.device)
    outcome = carry_out(request, run, resume, as_json, world)
    if world.main:
        report(outcome, run, as_json)
    return 130 if outcome.why == "interrupted" else 0


def show_plan(request: Request, options: PlanOptions, as_json: bool) -> None:
    from ..train.dry_run import plan_request
    from ..train.plan import plan_lines

    plan, assumed = plan_request(
        request, devices=options.devices, on=options.on or "", mfu=options.mfu, measure=options.measure
    )
    if as_json:
        print_json({**asdict(plan), "assumed": assumed})
        return
    for line in plan_lines(plan):
        print(line)
    for line in assumed:
        print(f"assumed: {line}")


def named(values: dict[str, Any]) -> dict[str, Any]:
    """What was said on the command line."""
    return {name: value for name, value in values.items() if value is not None}


def gathered(
    run: Path, config: Path | None, flags: dict[str, Any], resume: bool, defaults: dict[str, Any] | None = None
) -> Request:
    """Defaults, then the run's own record (for a resume), then the config file, then flags."""
    from ..train.request import Request, read_request
    from ..train.state import Run

    request = Request().merged(defaults or {}, "defaults")
    if resume:
        record = Run(run)
        request = request.merged(record.read().get("request", {}), f"{record.record}: request")
    if config is not None:
        request = request.merged(read_request(config), str(config))
    request = request.merged(flags, "the command line")
    request.require_sense()
    return request


def carry_out(request: Request, run: Path, resume: bool, quiet: bool, world: World) -> Outcome:
    from ..train.begin import begin

    command = shlex.join(["loadstone", *sys.argv[1:]])
    with progress_bar("reading text") if world.main else nullcontext() as progress:
        trainer = begin(request, run, resume=resume, command=command, world=world, progress=progress)
    quiet = quiet or not world.main
    for line in [] if quiet else introduction(trainer):
        print(visible(line), file=sys.stderr)
    with Reporter(trainer.total, trainer.progress.step, quiet) as reporter:
        trainer.listeners = [*trainer.listeners, reporter]
        return trainer.run_to_end()


def report(outcome: Outcome, run: Path, as_json: bool) -> None:
    """Say how the run ended."""
    progress = outcome.progress
    best = "" if progress.best is None else f"; best validation loss {progress.best:.4f} at step {progress.best_step}"
    if as_json:
        print_json({"run": str(run), "why": outcome.why, **asdict(progress), "metrics": outcome.metrics})
    elif outcome.why == "interrupted":
        print(f"interrupted after step {progress.step}; all is saved. Go on: the same command with --resume")
    else:
        early = " (no better for as many evaluations as --patience allows)" if outcome.why == "no better" else ""
        print(f"{progress.step} steps, {progress.tokens:,} tokens in {progress.seconds:,.0f} s{early}{best}")
        print(f"try it: {try_it(run)}")
