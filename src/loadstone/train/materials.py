"""What a run learns from: text, instructions or labelled texts, as rows to train and to evaluate on, and a task."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.batch import Samples
from ..data.corpus import Corpus
from ..data.labelled import load_labelled, write_labelled
from ..data.prepare import prepare
from ..data.prompts import alpaca_template
from ..data.sft import load_instructions
from ..data.shards import SIDECAR, Dataset
from ..data.tokenizer_training import tokenizer_from
from ..data.windows import Packed, RandomCrops, Windows
from ..errors import ConfigError
from ..finetune.classifier import Classification
from .request import DataRequest
from .settings import Settings
from .state import make_folder
from .task import LanguageModel, Task

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

Bytes = Callable[[int, int], None]  # done, in all


@dataclass(frozen=True)
class Material:
    """All that a trainer needs besides the model.

    Attributes:
        train, validation: rows; None: nothing to evaluate on.
        task: what is learnt from them.
        record: for run.json.
        notes: what the user should know about the data, one sentence each.
        labels: of a classifier.
        chat_template: the form in which a model that learns this is to be asked; None: as before.
    """

    train: Samples
    validation: Samples | None
    task: Task
    record: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)
    labels: tuple[str, ...] = ()
    chat_template: str | None = None


def text_data(
    wanted: DataRequest, run: Path, tokenizer: Tokenizer | None, progress: Bytes | None = None, *, anew: bool = False
) -> Dataset:
    """Prepared data as they are, or text prepared into the run's folder (where a resumed run finds it).

    Args:
        tokenizer: the model's, for fine-tuning; None: the one that the request names.
        anew: what lies in the run's folder is of an attempt that failed, perhaps on other text, and is replaced.
    """
    if not wanted.sources:
        raise ConfigError("no data: name text files, folders, JSONL, an archive, or what `loadstone prepare` made.")
    prepared, own = [Path(source) for source in wanted.sources if (Path(source) / SIDECAR).is_file()], run / "data"
    if prepared:
        return _as_prepared(wanted, prepared[0])
    if (own / SIDECAR).is_file() and not anew:
        return Dataset.open(own)
    if tokenizer is None:
        tokenizer = tokenizer_from(wanted.tokenizer or "gpt2", lambda: _texts(wanted))
    make_folder(run)
    validation: Any = wanted.validation_sources or wanted.validation
    return prepare(
        wanted.sources, own, tokenizer, validation=validation, field=wanted.text_field, force=anew, progress=progress
    )


def _as_prepared(wanted: DataRequest, folder: Path) -> Dataset:
    """Raises ConfigError if something is asked for that `loadstone prepare` has settled otherwise."""
    if len(wanted.sources) > 1:
        raise ConfigError(
            f"{folder}: prepared data are a run's only source, and {len(wanted.sources)} are named. Prepare all texts "
            "together: loadstone prepare SOURCE... DST."
        )
    dataset, usual = Dataset.open(folder), DataRequest()
    share = dataset.info.made_from.get("validation")
    for name, other in (
        ("tokenizer", bool(wanted.tokenizer)),
        ("validation", wanted.validation not in (usual.validation, share)),
        ("validation-data", bool(wanted.validation_sources)),
    ):
        if other:
            raise ConfigError(
                f"{folder}: these data are prepared, and --{name} says how text is to be. Leave it out, or give it to "
                "`loadstone prepare`."
            )
    return dataset


def language(dataset: Dataset, settings: Settings) -> Material:
    """Next tokens of prepared text; the rows to evaluate on never overlap."""
    train, length = dataset.tokens("train"), settings.length
    rows: Samples
    if settings.sampling == "crops":
        wanted = settings.steps * settings.batch_size or math.ceil(settings.epochs * len(train) / length)
        rows = RandomCrops(train, length, wanted, settings.seed)
    elif settings.sampling == "packed":
        rows = Packed(train, length)
    else:
        rows = Windows(train, length, settings.stride or length)
    held, evaluated, rate = None, None, None
    if "validation" in dataset.info.splits:
        held = dataset.tokens("validation")
        rate = held.nbytes_of_text / len(held) if len(held) else None
        try:
            evaluated = Windows(held, length)
        except ConfigError as error:
            raise ConfigError(
                f"{dataset.folder}: what is held back for validation is too short. {error} Or set aside a larger "
                "--validation share, or none (0)."
            ) from None
    record = {"folder": str(dataset.folder), "identity": dataset.identity, **json.loads(dataset.info.to_json())}
    return Material(rows, evaluated, LanguageModel(rate, compile=settings.compile), record)


def instructions(wanted: DataRequest, tokenizer: Tokenizer, settings: Settings) -> Material:
    """Answers to instructions and chats; the loss is theirs alone."""
    found = load_instructions(
        wanted.sources, tokenizer, settings.length, validation=wanted.validation_sources or wanted.validation,
        seed=settings.seed, style=wanted.style,
    )  # fmt: skip
    task, held = LanguageModel(compile=settings.compile), found.validation if len(found.validation) else None
    said, learnt = found.report.lines(), found.report.style == "alpaca" and tokenizer.chat_template is None
    template = alpaca_template(tokenizer) if learnt else None
    return Material(found.train, held, task, {"report": said}, said, chat_template=template)


def labelled(wanted: DataRequest, tokenizer: Tokenizer, settings: Settings, run: Path) -> Material:
    """Texts with their class; the test part goes to RUN/test.jsonl, for `loadstone classify --test`."""
    if wanted.validation_sources:
        raise ConfigError("labelled texts are split by shares: --validation, not --validation-data.")
    found = load_labelled(
        wanted.sources, tokenizer, settings.length, validation=wanted.validation, seed=settings.seed,
        balance=wanted.balance,
    )  # fmt: skip
    make_folder(run)
    write_labelled(run / "test.jsonl", found.test_texts)
    held = found.validation if len(found.validation) else None
    return Material(
        found.train, held, Classification(found.labels), {"notes": found.notes}, found.notes, tuple(found.labels)
    )


def _texts(wanted: DataRequest) -> Iterator[str]:
    """The texts that a tokenizer is made from; those of the validation sources too, or a character might be missing."""
    for document in Corpus((*wanted.sources, *wanted.validation_sources), field=wanted.text_field):
        yield document.text
