"""A classifier as a folder that transformers reads too: `save_model`'s, with one tensor more, sealed like any other.

Why not as others do it: transformers loads a folder whose head is missing with random numbers in its place and a
warning, and notices no damaged file; its config names the classes, and nothing checks that they are as many.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import certificate
from ..checkpoint import open_checkpoint, proof
from ..checkpoint.base import DTYPES, Array, Checkpoint, TensorInfo
from ..checkpoint.hub import resolve
from ..checkpoint.wording import few, shown
from ..checkpoint.write_safetensors import write_safetensors
from ..errors import ConfigError, FormatError
from ..hashing import describe_files, hash_tensor
from ..load import ModuleCheckpoint, load_model, load_tokenizer_for, open_source, to_tensor
from ..model import GPT
from ..save import save_model
from .classifier import Classifier

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

SCORE = "score.weight"
# transformers' classes: a language model's name says which one classifies.
_ENDINGS = ("LMHeadModel", "ForCausalLM")


def save_classifier(
    model: Classifier,
    destination: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: str = "keep",
    force: bool = False,
    beside: Callable[[Path], None] | None = None,
) -> dict[str, Any]:
    """Write a folder for transformers' GPT2ForSequenceClassification (Llama's, GPT-NeoX's), sealed like any other.

    Arguments and errors are those of `save_model`; ConfigError for a score layer with a bias.
    """
    if model.score.bias is not None:
        raise ConfigError(
            "this classifier's score layer has a bias, and transformers' classes, which ignore it without a word, have "
            "none. Train one with bias=False to save it."
        )
    pad = padding_token(model.gpt, tokenizer)
    if tokenizer is not None and tokenizer.pad_id != pad and pad is not None and pad < tokenizer.vocab_size:
        tokenizer = replace(
            tokenizer, pad_id=pad, special={**tokenizer.special, "pad_token": tokenizer.token_text(pad)}
        )

    def finish(folder: Path) -> None:
        _add_score(model, folder, dtype)
        _say(folder / "config.json", model.labels, pad)
        _certify(folder, model.labels)
        if beside:
            beside(folder)

    save_model(model.gpt, destination, tokenizer, dtype=dtype, force=force, beside=finish)
    return proof.read(proof.beside(Path(destination)))


def padding_token(gpt: GPT, tokenizer: Tokenizer | None) -> int | None:
    """A token that no text ends with: transformers reads the last one that is not this.

    The tokenizer's own, else one that ends or begins texts, else a row of the embedding that has no token; None if
    there is none of these, and then transformers takes one text at a time.
    """
    if tokenizer is None:
        return next(iter(gpt.config.eos_ids), gpt.config.bos_id)
    ends, unknown = tokenizer.encode("a")[-1:], tokenizer.special.get("unk_token")
    text_of = tokenizer.token_text
    for token in (tokenizer.pad_id, *tokenizer.eos_ids, tokenizer.bos_id):
        # Plain text becomes no special token, but the tokenizer may end it with one, or say one for what is unknown.
        if token is not None and tokenizer.is_special(token) and token not in ends and text_of(token) != unknown:
            return token
    return tokenizer.vocab_size if tokenizer.vocab_size < gpt.config.vocab_size else None


class _WithScore(Checkpoint):
    """A model's tensors and the head's."""

    def __init__(self, model: Checkpoint, score: Array) -> None:
        super().__init__(model.path, model.format, dict(model.tensors), model.aliases, model.metadata)
        self._model, self._score = model, score
        self.tensors[SCORE] = TensorInfo(score.shape, score.dtype.name, score.nbytes)

    def read(self, name: str) -> Array:
        return self._score if name == SCORE else self._model.read(name)


def _add_score(model: Classifier, folder: Path, dtype: str) -> None:
    score = ModuleCheckpoint(model.score).read("weight")
    whole = _WithScore(open_checkpoint(folder), score if dtype == "keep" else score.astype(DTYPES[dtype]))
    (temporary := folder / "with-score").mkdir()
    (file,) = write_safetensors(whole, temporary)
    file.replace(folder / file.name)
    temporary.rmdir()


def _say(path: Path, labels: Sequence[str], pad: int | None) -> None:
    """config.json, where there is one (our own dialect has none), for a classifier."""
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    for ending in _ENDINGS:
        config["architectures"] = [
            name.replace(ending, "ForSequenceClassification") for name in config["architectures"]
        ]
    config["id2label"] = {str(number): name for number, name in enumerate(labels)}
    config["label2id"] = {name: number for number, name in enumerate(labels)}
    config["problem_type"] = "single_label_classification"
    config["pad_token_id"] = pad
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _certify(folder: Path, labels: Sequence[str]) -> None:
    """The certificate of the whole, in place of that of the model alone; what was written is read back."""
    values = proof.read(folder / proof.NAME)
    score = open_checkpoint(folder).read(SCORE)
    entry = {
        "shape": [*score.shape],
        "dtype": score.dtype.name,
        "sha256": hash_tensor(score),
        "from": [SCORE],
        "ops": [],
    }
    values["tensors"][SCORE] = entry
    values["counts"] = {key: values["counts"][key] + more for key, more in (("parameters", score.size), ("tensors", 1))}
    values["labels"] = list(labels)
    files = [file for file in folder.iterdir() if file.name != proof.NAME]
    values["written"]["files"] = describe_files(files, folder)
    proof.write(values, folder / proof.NAME)
    if failed := [check.detail for check in certificate.check(folder) if not check.ok]:
        raise FormatError(folder, f"what was read back is not what was written: {few(failed)}.", "Check the disk.")


def load_classifier(
    source: str | Path, *, dtype: str = "auto", device: str = "cpu", revision: str | None = None
) -> tuple[Classifier, Tokenizer | None]:
    """A classifier that `save_classifier` or transformers wrote, in eval mode, and its tokenizer.

    Raises FormatError if the folder was changed since it was certified, or holds no classifier.
    """
    checkpoint = open_checkpoint(resolve(source, revision=revision))
    certified = _unchanged(checkpoint)
    if SCORE not in checkpoint.tensors:
        raise FormatError(
            checkpoint.path,
            f"it holds no classifier: there is no tensor {SCORE!r}.",
            "`loadstone finetune SRC --classify DATA` makes one of a language model.",
        )
    identity = open_source(checkpoint, ignore=[SCORE])
    if [*identity.plan.missing] == ["head.weight"]:  # transformers' classifiers have none, and no use for one
        identity = open_source(checkpoint, ignore=[SCORE], config={"tied": True})
    gpt = load_model(identity, dtype=dtype, device=device)
    score = to_tensor(checkpoint.read(SCORE))
    if score.dim() != 2 or len(score) < 2 or score.shape[1] != gpt.config.d_model:
        raise FormatError(
            checkpoint.path,
            f"{SCORE} has the shape {[*score.shape]}, expected was [2 or more, {gpt.config.d_model}].",
            "Regression heads, of one row, are not supported.",
        )
    labels = certified.get("labels") or _labels(checkpoint, len(score))
    model = Classifier(gpt, labels)
    if len(labels) != len(score):
        raise FormatError(checkpoint.path, f"{len(score)} classes have {len(labels)} names: {few(labels)}.")
    model.score.weight = nn.Parameter(score.to(model.score.weight))
    return model.eval(), load_tokenizer_for(identity)


@torch.no_grad()
def fill_classifier(model: Classifier, folder: Path) -> None:
    """Copy the weights of a saved classifier into this one. Raises FormatError if it is of another model."""
    saved = dict(load_classifier(folder)[0].named_parameters())
    for name, parameter in model.named_parameters():
        if name not in saved or saved[name].shape != parameter.shape:
            raise FormatError(folder, f"it is of another model: {name} is missing or has another shape.")
        parameter.copy_(saved[name])


def _unchanged(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The certificate, if there is one; all files that it names are as they were."""
    folder = checkpoint.folder
    if folder is None or not (folder / proof.NAME).is_file():
        return {}
    values = proof.read(folder / proof.NAME)
    if changed := certificate.changed_files(folder, values["written"]["files"]):
        raise FormatError(folder, f"it is not as it was written: {few(changed)}.", "Get it again, or train it again.")
    return values


def _labels(checkpoint: Checkpoint, count: int) -> list[str]:
    """transformers' `id2label`; it leaves its own names for two classes out."""
    path = (checkpoint.folder or Path()) / "config.json"
    try:
        names = json.loads(path.read_text(encoding="utf-8")).get("id2label")
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise FormatError(path, f"it names no classes ({error}).", "Put the model's own config.json there.") from None
    if names is None:
        return [f"LABEL_{number}" for number in range(count)]
    wanted = [str(number) for number in range(count)]
    if not isinstance(names, dict) or sorted(names) != sorted(wanted):
        raise FormatError(path, f"id2label is {shown(names)}, and the classes are numbered 0 to {count - 1}.")
    return [str(names[number]) for number in wanted]
