"""verify and trace: did it load right, does it compute what it should, and what would another program compare with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..checkpoint.wording import size_text, visible
from ..checks import Check
from ..errors import LoadstoneError
from .options import Json, OpenOptions, RunOptions, Src, print_json, progress_bar

AGAINST = (
    "Compare logits with a reference, and say why they differ: any other SRC, a file that `loadstone trace` wrote, "
    "transformers (reading the same SRC), or transformers:PATH."
)


def verify(
    source: Src,
    options: RunOptions,
    against: Annotated[str | None, typer.Option(metavar="REF", help=AGAINST)] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="Compare this way of running the model (an engine: torch, compile, max, native; or eager, cached, "
            "batched), with the given --device and --dtype, with float32 on the CPU."
        ),
    ] = None,
    self_test: Annotated[bool, typer.Option("--self-test", help="The same, with --engine eager if none is given.")] = (
        False
    ),
    certificate: Annotated[
        bool, typer.Option("--certificate", help="Only compare it with the certificate of its conversion (no load).")
    ] = False,
    as_json: Json = False,
) -> None:
    """Load it and prove it: every parameter equals its source, counts, loss on English, and parity with a reference.

    Without a reference, witnesses inside the weights are asked. Where a reference differs, the first module that does
    is named, and the repair that restores it. Status 1 if anything is wrong.
    """
    if certificate and (against or engine or self_test):
        raise LoadstoneError("--certificate compares hashes only; leave --against, --engine and --self-test out.")
    if certificate:
        _check_certificate(source, options, as_json)
        return
    from ..diagnose import find_reference
    from ..verify import verify as run

    reference = find_reference(against) if against is not None else None  # before anything is loaded
    identity, model, tokenizer = options.load(source)
    with progress_bar("verifying") as progress:
        engine = engine or ("eager" if self_test else None)
        report = run(identity, model, tokenizer, against=reference, engine=engine, progress=progress)
    if as_json:
        print_json(report.as_dict())
    else:
        _print_checks(report.checks)
        if report.usual:
            print(f"     {report.usual}")
        if report.explanation:
            print(f"\ndiagnosis, against {against}")
            for line in report.explanation:
                print(f"  {visible(line)}")
            print()
        counts, untied = report.counts, "parameters_with_untied_head"
        print(f"     {counts['parameters']:,} parameters; {counts[untied]:,} if the head were a copy of the embedding")
        if others := counts["not_parameters_in_file"]:
            print(f"     {others:,} elements in the file are no parameters")
        print(("verified" + (", with assumptions" if report.assumed else "")) if report.ok else "NOT verified")
    if not report.ok:
        raise typer.Exit(1)


def _print_checks(checks: Iterable[Check]) -> None:
    for check in checks:
        mark = {True: "ok  ", False: "FAIL", None: "-   "}[check.ok]
        print(f"{mark} {check.name}: {visible(check.detail)}")


def _check_certificate(source: str, options: RunOptions, as_json: bool) -> None:
    from ..certificate import check
    from ..checkpoint.hub import resolve

    with progress_bar("hashing") as progress:
        checks = check(resolve(source, revision=options.revision), progress)
    ok = all(check.ok for check in checks)
    if as_json:
        print_json({"ok": ok, "checks": [asdict(check) for check in checks]})
    else:
        _print_checks(checks)
        print("as certified" if ok else "NOT as certified")
    if not ok:
        raise typer.Exit(1)


def trace(
    source: Annotated[str, typer.Argument(metavar="SRC", help="As for the other commands, or transformers:PATH.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write, for example trace.safetensors.")],
    options: OpenOptions,
    lengths: Annotated[
        str | None, typer.Option(help="Tokens of each prompt, for example 1,7,64. Default: 1, 7, 64 and the context.")
    ] = None,
    no_activations: Annotated[
        bool, typer.Option("--no-activations", help="Keep logits alone: they show that models differ, but not where.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write down what a model computes, so that others can be verified against it without its program or its weights.

    One file: logits of fixed prompts (at 64 positions of a long one), and what every module gives for prompts of up to
    64 tokens, in float32. GPT-2 of 124M takes 75 MB (27 MB without activations), a Llama of 7B some 700 MB (17 MB).
    """
    from ..diagnose.reference import TRANSFORMERS, trace_source
    from ..diagnose.trace import is_trace, save_trace

    identity = None if source.partition(":")[0] == TRANSFORMERS else options.open(source)
    if output.exists() and not is_trace(output):
        raise LoadstoneError(f"{output}: it is there already and is no trace, so it is left alone. Choose a new name.")
    found = trace_source(source, identity, _numbers(lengths), activations=not no_activations)
    save_trace(found, output)
    sizes, modules = [len(prompt.ids) for prompt in found.prompts], max(len(p.activations) for p in found.prompts)
    size = output.stat().st_size
    if as_json:
        print_json({"path": str(output), "bytes": size, "lengths": sizes, "modules": modules, "stored": found.stored})
    else:
        print(f"{output}: {size_text(size)}, prompts of {', '.join(map(str, sizes))} tokens, {modules} modules")


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise LoadstoneError(f"--lengths {text}: expected whole numbers, for example --lengths 1,7,64.") from None
