"""`save_model`: a live model as a folder that transformers reads; what `convert` does to files, for a module in memory.

Why not as others do it: `torch.save(model.state_dict())` is a pickle without config or tokenizer, litgpt needs a second
step to become a HuggingFace folder, and none of them looks at what it wrote.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import proof
from .config import GPTConfig
from .config.to_hf import to_hf
from .convert import HEADROOM, destination_for, element_type, fill, may_replace, opened
from .errors import ConfigError
from .hashing import describe_files
from .layouts import LAYOUTS, Job
from .weightmap import Translated, table_for

if TYPE_CHECKING:
    from .model import GPT
    from .tokenizer import Tokenizer


def save_model(
    model: GPT,
    destination: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: str = "keep",
    force: bool = False,
    beside: Callable[[Path], None] | None = None,
) -> dict[str, Any]:
    """Write a model atomically, read it back and certify it.

    A model that HuggingFace's config cannot express (GPT-2 without q/k/v biases, say) keeps our own names.

    Args:
        model: on any device; it is left as it is.
        destination: a new folder, or with `force` one that `convert` or `save_model` wrote.
        tokenizer: its files are written too.
        dtype: `keep`, `float32`, `float16`, `bfloat16`.
        beside: called with the folder before it takes its name, to add files, which are certified, and folders.

    Returns the certificate. Raises a LoadstoneError if it cannot be written; then nothing was changed.
    """
    identity, path = opened(model, {}), Path(destination)
    to = "hf" if _hf_can_say(identity.config) else "loadstone"
    translated = Translated(identity, table_for(identity.config.architecture, to), element_type(dtype, to))
    job = Job(identity, translated, tokenizer, dtype)
    may_replace(path, identity.checkpoint, LAYOUTS[to], force)
    with destination_for(path, LAYOUTS[to], LAYOUTS[to].nbytes(job) + HEADROOM) as places:
        fill(path, places, job, to)
        if beside:
            beside(places[0])
            _list_new_files(*places)
        return proof.read(places[1])


def _list_new_files(folder: Path, proof_file: Path) -> None:
    """Certify the files beside the model as well; folders are their owners' business."""
    values = proof.read(proof_file)
    listed = values["written"]["files"]
    files = (file for file in folder.iterdir() if file.is_file() and file != proof_file)
    new = [file for file in files if file.name not in listed]
    values["written"]["files"] = {**listed, **describe_files(new, folder)}
    proof.write(values, proof_file)


def _hf_can_say(config: GPTConfig) -> bool:
    try:
        to_hf(config)
    except ConfigError:
        return False
    return True
