"""What test_distributed.py has several processes do: jobs from a JSON file, one by one.

A script for torchrun; or, with their number behind the file, for itself: then one process imports torch, and the others
are forked from it, which is 20 seconds of a processor less for five of them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loadstone.data.batch import IGNORED, Sample
from loadstone.data.windows import Windows
from loadstone.errors import LoadstoneError
from loadstone.train.begin import begin
from loadstone.train.loop import Trainer
from loadstone.train.request import Request
from loadstone.train.world import World, joined
from server_load import free_port
from train.runs import ids, small_model, trainer

# 12 rows a step, for 1, 2, 3 and 4 processes, three at a time and then what is left; validation ends with a batch of
# one row. AdamW makes steps of full length out of gradients that are mere rounding, unless its epsilon is above them.
SETTINGS = {
    "steps": 12,
    "batch_size": 12,
    "micro_batch": 3,
    "clip": 0.5,
    "eps": 1e-6,
    "weight_decay": 0.3,
    "eval_every": 0,
    "keep": 9,
}
VALIDATION = Windows(ids(3000)[2000 : 2000 + 25 * 16 + 1], 16)


class Killed(Exception):  # noqa: N818
    """Nothing of the loop runs after it."""


class Uneven:
    """Rows of which most targets are ignored, each row another number, so that processes have unequally many."""

    def __len__(self) -> int:
        return 120

    def __getitem__(self, index: int, /) -> Sample:
        row = Windows(ids(), 16, 8)[index]
        targets = np.where(np.arange(16) < index * 7 % 17, IGNORED, row.targets)
        return Sample(row.ids, targets)


def run_job(job: dict[str, Any], world: World) -> None:
    """One run, of which metrics.jsonl and the checkpoints tell.

    Keys: folder; model: config fields; trainer: arguments of `runs.trainer` and settings; request: for `begin`, instead
    of both; stop: the step before which all processes die; fail: the process that raises an error.
    """
    folder = Path(job["folder"])
    if "request" in job:
        made = begin(Request().merged(job["request"], "job"), folder, resume=job.get("resume", False), world=world)
    else:
        options = {**SETTINGS, **job.get("trainer", {})}
        model = small_model(**job.get("model", {}))
        made = trainer(folder, model, rows=Uneven(), validation=VALIDATION, world=world, **options)
    _plant(made, job.get("stop"), job.get("fail"))
    try:
        made.run_to_end()
    except Killed:
        return


def _plant(made: Trainer, stop: int | None, fail: int | None) -> None:
    step = made._step

    def stepping() -> None:
        if made.progress.step == stop:
            raise Killed
        if made.world.rank == fail:
            raise LoadstoneError("the planted error of one process.")
        step()

    made._step = stepping  # type: ignore[method-assign]


def work() -> None:
    torch.set_num_threads(1)
    try:
        with joined() as world:
            world.connect("cpu")
            for job in json.loads(Path(sys.argv[1]).read_text()):
                run_job(job, world)
    except LoadstoneError as error:
        sys.exit(f"loadstone: {error}")


def rank_of(count: int, rank: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
    work()


def fork(count: int) -> None:
    import torch.distributed.checkpoint
    import torch.distributed.fsdp  # noqa: F401

    forking, port = multiprocessing.get_context("fork"), free_port()
    ranks = [forking.Process(target=rank_of, args=(count, rank, port), daemon=True) for rank in range(count)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))


if __name__ == "__main__":
    fork(int(sys.argv[2])) if len(sys.argv) > 2 else work()
