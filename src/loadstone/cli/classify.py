"""classify: which class a text belongs to, and how often a classifier is right."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import LoadstoneError, SourceError
from .options import Json, Many, need, print_json

if TYPE_CHECKING:
    from ..finetune.classifier import Classifier
    from ..tokenizer import Tokenizer


def classify(
    source: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A classifier: a folder of `finetune --classify`, or of transformers."),
    ],
    text: Annotated[Many, typer.Argument(metavar="[TEXT]...", help="Texts, each classified by itself.")] = None,
    file: Annotated[Path | None, typer.Option(help="Classify the lines of this file, too.")] = None,
    test: Annotated[
        Path | None, typer.Option(metavar="DATA", help="Labelled texts (TSV, CSV, JSONL): say how many are right.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16, float16 or float64.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")] = "cpu",
    batch_size: Annotated[int, typer.Option(min=1, help="Texts at once.")] = 16,
    as_json: Json = False,
) -> None:
    """Say which class each text belongs to and how likely each is; or how often that is right."""
    texts = [*(text or ()), *(_lines(file) if file else ())]
    if bool(texts) == bool(test):
        raise LoadstoneError(
            'give either texts, as in: classify MODEL "text" (or --file LINES), or --test with labelled ones.'
        )
    from ..finetune.classifier_files import load_classifier

    model, found = load_classifier(source, dtype=dtype, device=device)
    tokenizer = need(found, source)
    if test:
        _test(model, tokenizer, test, batch_size, as_json)
    else:
        _classify(model, tokenizer, texts, batch_size, as_json)


def _classify(model: Classifier, tokenizer: Tokenizer, texts: list[str], batch_size: int, as_json: bool) -> None:
    from ..checkpoint.wording import visible
    from ..finetune.classifier import classify

    found = classify(model, tokenizer, texts, batch_size=batch_size)
    if as_json:
        print_json(
            [
                {"text": content, "label": each.label, "probabilities": each.probabilities, "cut": each.cut}
                for content, each in zip(texts, found, strict=True)
            ]
        )
        return
    width = max(map(len, model.labels))
    for content, each in zip(texts, found, strict=True):
        others = ", ".join(f"{name} {share:.3f}" for name, share in each.probabilities.items() if name != each.label)
        cut = " (its beginning; it is longer than the context)" if each.cut else ""
        print(f"{each.label:<{width}}  {each.probabilities[each.label]:.3f}  ({others})  {visible(content)[:60]}{cut}")


def _test(model: Classifier, tokenizer: Tokenizer, data: Path, batch_size: int, as_json: bool) -> None:
    from ..data.labelled import rows_for
    from ..finetune.classifier import Classification

    rows = rows_for(data, tokenizer, model.labels, model.gpt.config.context_length)
    metrics: dict[str, Any] = Classification(model.labels).evaluate(model, rows, batch_size)
    if as_json:
        print_json(metrics)
        return
    print(f"{metrics['accuracy']:.2%} of {len(rows):,} right, loss {metrics['val_loss']:.4f}")
    for name in model.labels:
        of, right, said = (int(metrics[f"{what}.{name}"]) for what in ("of", "right", "said"))
        print(f"{name}: {right:,} of {of:,} found; {said:,} texts were called so")


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{file}: it cannot be read as UTF-8 text ({error}).") from None
