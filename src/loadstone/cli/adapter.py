"""merge: a base and an adapter become an ordinary model."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from ..checkpoint.wording import visible
from .options import Json, OpenOptions, RunOptions, Src, print_json


def merge(
    source: Src,
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A folder that a LoRA run, or PEFT, wrote.")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="A folder, as HuggingFace has it.")],
    options: OpenOptions,
    dtype: Annotated[
        str,
        typer.Option(help="Of the result: keep (the base's), float32 (all of the update stays), float16, bfloat16."),
    ] = "keep",
    force: Annotated[bool, typer.Option("--force", help="Replace what Loadstone wrote to DST earlier.")] = False,
    as_json: Json = False,
) -> None:
    """Make an ADAPTER part of its base SRC: the result loads, converts and runs everywhere."""
    from ..finetune.adapter import around, load_adapter
    from ..finetune.classifier import Classifier
    from ..finetune.classifier_files import save_classifier
    from ..finetune.lora import merge as run
    from ..save import save_model

    # As stored: the adapter's record knows the base's values.
    _, gpt, tokenizer = RunOptions(**vars(options)).load(source)
    model = around(gpt, adapter)
    found = load_adapter(model, adapter)
    if dtype == "float32":
        model.float()
    done = run(model)
    if isinstance(model, Classifier):
        save_classifier(model, destination, tokenizer, dtype=dtype, force=force)
    else:
        save_model(model, destination, tokenizer, dtype=dtype, force=force)
    kind = str(gpt.tok_emb.weight.dtype).removeprefix("torch.")
    if as_json:
        print_json(
            {"layers": done.layers, "update": done.update, "lost": done.lost, "dtype": kind}
            | {"rank": found.lora.rank, "alpha": found.lora.alpha, "base_checked": found.weights is not None}
        )
        return
    print(f"base       {visible(source)}" + ("" if found.weights else _unknown(found.source)))
    print(f"adapter    {visible(adapter)}: rank {found.lora.rank}, alpha {found.lora.alpha:g}, {done.layers} layers")
    print(f"update     {done.update:.2%} of the weights' norm; rounding to {kind} lost {done.lost:.1%} of it")
    if done.lost > 0.05:
        print("note       --dtype float32 keeps all of it")
    print(f"written    {visible(destination)}")
    print(f"check it   loadstone verify --certificate {visible(shlex.quote(destination))}")


def _unknown(recorded: str) -> str:
    return visible(f" (not checked: PEFT records a base by name alone, here {recorded})")
