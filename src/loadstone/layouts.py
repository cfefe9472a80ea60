"""What each dialect's own program finds on disk: which container holds the tensors, and which files lie beside them.

One entry of `LAYOUTS` per dialect. A layout first makes every text (a config that the dialect cannot express is refused
there), then streams the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint.base import Array, Checkpoint
from .checkpoint.links import leads_out
from .checkpoint.streaming import Progress, stored_nbytes
from .checkpoint.wording import few, size_text
from .config import GPTConfig
from .errors import ConfigError, LoadstoneError, TokenizerError
from .weightmap import Identity, Translated

if TYPE_CHECKING:
    from .checkpoint.write_gguf import Types
    from .tokenizer import Tokenizer

Texts = Mapping[str, "str | bytes"]
# What transformers writes for a tokenizer, in any of its versions: copied as it is.
HF_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_MAX_TEXT = 200_000_000  # bytes of a file that is copied beside the weights


@dataclass
class Job:
    """One conversion on its way out.

    Attributes:
        identity: the opened source.
        tensors: the weights in the target's dialect.
        tokenizer: the source's, if it has one.
        dtype: as the user said it, `keep` if not at all.
        shard_size: most bytes of tensors in one file, where the container can be split.
        accept: config fields whose change the user accepts.
        progress: called with (bytes done, bytes in all).
        remarks: what the user should know about the result, one sentence each.
        types: GGUF's types of some tensors, before what `dtype` says.
        encoded: GGUF's blocks of some tensors, made already, [rows, bytes].
    """

    identity: Identity
    tensors: Translated
    tokenizer: Tokenizer | None
    dtype: str = "keep"
    shard_size: int | None = None
    accept: tuple[str, ...] = ()
    progress: Progress | None = None
    remarks: list[str] = field(default_factory=list)
    types: Mapping[str, str] = field(default_factory=dict)
    encoded: Mapping[str, Array] = field(default_factory=dict)

    @property
    def config(self) -> GPTConfig:
        return self.identity.config


@dataclass(frozen=True)
class Layout:
    """Where one dialect's weights go.

    Attributes:
        write: writes everything to a path: the folder, or the file.
        file: for a single file, what it is usually called; empty for a folder.
        nbytes: what the disk must have room for, but for headers and texts.
    """

    write: Callable[[Job, Path], None]
    file: str = ""
    nbytes: Callable[[Job], int] = lambda job: stored_nbytes(job.tensors)


def _hf(job: Job, folder: Path) -> None:
    from .config.to_hf import generation_config, to_hf

    config = _said(job, partial(to_hf, dtype=most_used_dtype(job.tensors)))
    texts = {"config.json": _json(config), "generation_config.json": _json(generation_config(_with_ends(job)))}
    own = _copied(job, ("generation_config.json",)) if _is_hf(job) else {}
    _safetensors_folder(job, folder, {**texts, **own, **_hf_tokenizer(job)})


def _with_ends(job: Job) -> GPTConfig:
    """The config with the tokenizer's ends among its own: a chat model has more than one."""
    ends = (*job.config.eos_ids, *(job.tokenizer.eos_ids if job.tokenizer else ()))
    return job.config.with_overrides({"eos_ids": tuple(dict.fromkeys(ends))})


def _loadstone(job: Job, folder: Path) -> None:
    _safetensors_folder(job, folder, _hf_tokenizer(job))


def _safetensors_folder(job: Job, folder: Path, texts: Texts) -> None:
    from .checkpoint.write_safetensors import write_safetensors

    write_safetensors(job.tensors, folder, shard_size=job.shard_size, progress=job.progress)
    _write_texts(folder, texts)


def _openai(job: Job, folder: Path) -> None:
    from .checkpoint.write_bundle import write_bundle
    from .config.to_others import to_openai

    texts = {"hparams.json": _json(_said(job, to_openai)), **_tokenizer_texts(job, "openai")}
    write_bundle(job.tensors, folder / "model.ckpt", progress=job.progress)
    _write_texts(folder, texts)


def _meta(job: Job, folder: Path) -> None:
    from .checkpoint.write_torch import write_torch
    from .config.to_others import to_meta

    texts = {"params.json": _json(_said(job, to_meta)), **_copied(job, ("tokenizer.model",))}
    if "tokenizer.model" not in texts:
        _without_tokenizer(job)
    write_torch(job.tensors, folder / "consolidated.00.pth", progress=job.progress)
    _write_texts(folder, texts)


def _raschka(job: Job, file: Path) -> None:
    from .config.to_others import to_raschka

    job.remarks.append(f"for the book's GPTModel(cfg): cfg = {_said(job, to_raschka)}")
    _state_dict(job, file)


def _nanogpt(job: Job, file: Path) -> None:
    from .config.to_others import to_nanogpt

    arguments = _said(job, to_nanogpt)
    _state_dict(job, file, {"model_args": arguments, "iter_num": 0, "best_val_loss": 1e9, "config": {}})


def _lesson(job: Job, file: Path) -> None:
    from .config.to_others import require_lesson

    _said(job, require_lesson)
    _state_dict(job, file)


def _state_dict(job: Job, file: Path, around: Mapping[str, Any] | None = None) -> None:
    from .checkpoint.write_torch import write_torch

    _without_tokenizer(job)
    write_torch(job.tensors, file, around=around, progress=job.progress)


def _gguf(job: Job, file: Path) -> None:
    from .checkpoint.write_gguf import write_gguf
    from .config.to_gguf import gguf_tensors, to_gguf
    from .tokenizer.export import gguf_vocabulary

    doubles = [name for name, info in job.tensors.tensors.items() if info.dtype == "float64"]
    if doubles and job.dtype == "keep":
        raise LoadstoneError(
            f"{job.identity.checkpoint.path}: GGUF has no float64, and {few(doubles)} would be rounded. If you accept "
            "that: --dtype float32"
        )
    metadata = {**_said(job, to_gguf), "general.name": _name(job)}
    if job.tokenizer is not None:
        try:
            metadata |= gguf_vocabulary(job.tokenizer, job.config)
        except TokenizerError as error:
            job.remarks.append(f"written without a vocabulary, so llama.cpp cannot turn text into tokens: {error}")
    extra = gguf_tensors(job.config)
    write_gguf(
        job.tensors, file, metadata, types=_gguf_types(job), extra=extra, encoded=job.encoded, progress=job.progress
    )


def _gguf_nbytes(job: Job) -> int:
    from .checkpoint.write_gguf import planned_nbytes

    return planned_nbytes(job.tensors, _gguf_types(job))


def _gguf_types(job: Job) -> Types:
    from .checkpoint.write_gguf import default_types

    usual = default_types(job.dtype)
    return lambda name, info: job.types.get(name) or usual(name, info)


LAYOUTS: Mapping[str, Layout] = {
    "hf": Layout(_hf),
    "openai": Layout(_openai),
    "raschka": Layout(_raschka, "model.pth"),
    "nanogpt": Layout(_nanogpt, "ckpt.pt"),
    "lesson": Layout(_lesson, "model.pth"),
    "meta": Layout(_meta),
    "gguf": Layout(_gguf, "model.gguf", _gguf_nbytes),
    "loadstone": Layout(_loadstone),
}


def most_used_dtype(checkpoint: Checkpoint) -> str:
    """The element type of most bytes."""
    share: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        share[info.dtype] = share.get(info.dtype, 0) + info.nbytes
    return max(share, key=share.__getitem__)


def _said(job: Job, write: Callable[..., Any]) -> Any:
    """What a config writer says. A change that the user accepts is told all the same."""
    try:
        return write(job.config)
    except ConfigError as error:
        said = write(job.config, accept=job.accept)
        job.remarks.append(f"accepted: {str(error).partition(' If you accept')[0]}")
        return said


def _is_hf(job: Job) -> bool:
    return job.identity.weight_map.dialect in ("hf", "loadstone")


def _hf_tokenizer(job: Job) -> Texts:
    """The source's own files where it is HuggingFace's (nothing is lost), else made from the tokenizer."""
    return (_copied(job, HF_FILES) if _is_hf(job) else {}) or _tokenizer_texts(job, "hf")


def _without_tokenizer(job: Job) -> None:
    if job.tokenizer is not None:
        job.remarks.append("the tokenizer is not written: this dialect's program brings its own")


def _name(job: Job) -> str:
    """What to call the model: its file, or its folder where the file is called like everybody's."""
    path = job.identity.checkpoint.path
    return path.parent.resolve().name if path.stem.startswith(("model", "consolidated", "pytorch_model")) else path.stem


def _tokenizer_texts(job: Job, style: str) -> Texts:
    from .tokenizer.export import tokenizer_files

    if job.tokenizer is None:
        return {}
    try:
        return dict(tokenizer_files(job.tokenizer, style))
    except TokenizerError as error:
        job.remarks.append(f"written without a tokenizer: {error}")
        return {}


def _copied(job: Job, names: tuple[str, ...]) -> Texts:
    """Files of the source's folder, as they are; not those that are links out of it, which may be anybody's."""
    folder, found = job.identity.checkpoint.folder, {}
    for file in [folder / name for name in names] if folder else []:
        if not file.is_file():
            continue
        if elsewhere := leads_out(file):
            job.remarks.append(f"{file.name} is not copied: it is a link out of its folder, to {elsewhere}")
        elif file.stat().st_size > _MAX_TEXT:
            job.remarks.append(f"{file.name} is not copied: it has {size_text(file.stat().st_size)}")
        else:
            found[file.name] = file.read_bytes()
    return found


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"


def _write_texts(folder: Path, texts: Texts) -> None:
    for name, text in texts.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
