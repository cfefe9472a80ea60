"""Recovery: a short fine-tune of a pruned model through the training loop, in which what is zero stays zero.

A hook on each pruned matrix sets the gradients of its zeros to zero. AdamW then has nothing to move them by (its
moments stay zero, and decay of 0 is 0), so no step needs to be undone, and the optimizer is the one of every run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from ..data.loader import Loader
from ..kernels import keep_freed_memory, speed_up
from ..model import GPT
from ..tokenizer import Tokenizer
from ..train.log import Listener
from ..train.loop import Outcome, Trainer
from ..train.materials import language, text_data
from ..train.request import DataRequest
from ..train.settings import Settings
from ..train.state import Run


def recover(
    model: GPT,
    tokenizer: Tokenizer,
    masks: Mapping[str, Tensor],
    sources: Sequence[str],
    settings: Settings,
    *,
    near: Path,
    listeners: Sequence[Listener] = (),
) -> Outcome:
    """Train a pruned model in place.

    Args:
        masks: parameter -> True where a weight may change; other parameters may everywhere.
        sources: text, as `loadstone finetune --data` takes it.
        near: a folder on whose disk the run may keep its files meanwhile.

    Raises a LoadstoneError for text that is missing or too short, and if the loss is no longer a number.
    """
    with TemporaryDirectory(dir=near, prefix=".recover-") as folder, holding_zeros(model, masks):
        dataset = text_data(DataRequest(sources=tuple(sources), validation=0.0), Path(folder), tokenizer)
        dataset.require_fits(model.config.vocab_size)
        material = language(dataset, settings)
        for parameter in model.parameters():  # memory of its own, row by row
            parameter.data = parameter.detach().clone(memory_format=torch.contiguous_format)
        keep_freed_memory()
        speed_up(model)
        torch.manual_seed(settings.seed)
        run = Run(Path(folder))
        run.begin({"command": "loadstone prune --recover"})
        loader = Loader(material.train, settings.batch_size, seed=settings.seed)
        outcome = Trainer(model, material.task, loader, settings, run, listeners=listeners).run_to_end()
    model.eval()
    return outcome


@contextmanager
def holding_zeros(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Meanwhile gradients of what is masked out are zero."""

    def hook(mask: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda gradient: gradient.masked_fill(~mask, 0.0)

    handles = [model.get_parameter(name).register_hook(hook(mask)) for name, mask in masks.items()]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
