"""The training loop, for training from scratch and for fine-tuning alike.

One step: a global batch in micro-batches -> the sum of losses over the number of targets -> gradients, clipped ->
AdamW. Everything that a step depends on (rate, frozen parameters, order of the data) is a pure function of the step, or
is in the checkpoint; so a resumed run is the run.

Why not as others do it: nanoGPT's loop is as short, but loses the data position and averages micro-batches of unequal
target counts wrongly; transformers' Trainer has every feature in 5,000 lines.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.batch import IGNORED, Batch, Samples
from ..data.loader import Loader
from ..errors import LoadstoneError
from ..generate import stream_text
from .log import Listener
from .optimizer import Optimizer
from .schedule import learning_rate
from .settings import Settings
from .shards import group
from .signals import polite_signals
from .state import WHOLE_MODEL, Progress, Run, Weights
from .task import Task, counted
from .updates import UpdateTracker, learning
from .world import World

if TYPE_CHECKING:
    from ..finetune.strategy import Strategy
    from ..tokenizer import Tokenizer


# What a rank computes, and does not count, where others still have rows of an evaluation.
_ONE = torch.ones(1, 1, dtype=torch.int64)
NOTHING = Batch(0 * _ONE, IGNORED * _ONE, None, _ONE[0])


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `done`, `interrupted`, or `no better` (early stop)."""

    why: str
    progress: Progress
    metrics: dict[str, float]  # of the last evaluation


class Trainer:
    """A run.

    Args:
        model: what is trained, on its device, in float32.
        task: what is learnt.
        train: the training data; its position is part of the run.
        settings: see there.
        run: where everything is written.
        validation: what is evaluated on; None: nothing.
        strategy: which parameters are trained when, and how fast; None: all.
        tokenizer: saved with each checkpoint, and needed for samples.
        world: the processes that train together.
        listeners: who hears of events, in this process.
        weights: how the model is saved and loaded.
        flops: of one trained token, and of the device per second, for the share of its peak that is used (MFU).
    """

    def __init__(
        self,
        model: Any,
        task: Task,
        train: Loader,
        settings: Settings,
        run: Run,
        *,
        validation: Samples | None = None,
        strategy: Strategy | None = None,
        tokenizer: Tokenizer | None = None,
        world: World | None = None,
        listeners: Sequence[Listener] = (),
        weights: Weights = WHOLE_MODEL,
        flops: tuple[float, float] | None = None,
    ) -> None:
        self.model, self.task, self.train, self.settings, self.run = model, task, train, settings, run
        self.validation, self.strategy, self.tokenizer = validation, strategy, tokenizer
        self.world, self.listeners, self.flops = world or World(), listeners, flops
        self.weights = weights
        self.progress = Progress()
        self.total = settings.steps or math.ceil(settings.epochs * train.batches_per_epoch)
        self.last_metrics: dict[str, float] = {}
        self._pending = (0, 0.0)  # tokens and seconds since the last line
        self._gpt = getattr(model, "gpt", model)
        self._gpt.set_dropout(settings.dropout)
        self._gpt.recompute = settings.recompute
        self.world.shard(model)
        self.device = next(model.parameters()).device
        self.optimizer = Optimizer(self._ever_trained(), settings, self._lr_scale)
        self.tracker = UpdateTracker(model, self.world) if settings.updates_every else None
        self._phase: int | None = None

    # -- the run

    def run_to_end(self) -> Outcome:
        """Train until the last step, an early stop, or a polite signal (Ctrl-C, SIGTERM), after which all is saved.

        Raises LoadstoneError if the loss is no longer a number; the last checkpoint is then as it was.
        """
        if self.progress.step == 0:
            torch.manual_seed(self.settings.seed + self.world.rank)  # each drops other values
        with polite_signals(insist=self.world.size == 1) as asked:
            while True:
                why = self._why_stop(asked)
                if why == "interrupted":  # and nothing more: the resumed run will look, as if nothing had happened
                    break
                self._look(last=why == "done")
                if why := why or self._why_stop(asked):
                    break
                self._step()
        self._save()
        self._tell("stop", why=why)
        return Outcome(why, self.progress, self.last_metrics)

    def _why_stop(self, asked: list[int]) -> str:
        if self.progress.step >= self.total:
            return "done"
        if self.world.agree(bool(asked)):
            return "interrupted"
        return "no better" if 0 < self.settings.patience <= self.progress.waited else ""

    def _step(self) -> None:
        step, begun = self.progress.step, time.perf_counter()
        self._set_phase(step)
        self.model.train()
        batch = self.train.next_batch()
        n_targets, n_tokens = self.world.sums([counted(batch), float(batch.lengths.sum())])
        micro = self.settings.micro_batch or len(batch)
        loss = torch.zeros((), device=self.device)
        for start in range(0, len(batch), micro):
            with self._autocast():
                rows = batch.rows(start, start + micro).to(self.device)
                part, _ = self.world.call(self.task.loss, self.model, rows)
            # FSDP averages gradients over the ranks; the mean over all targets is wanted.
            (part * (self.world.size / max(1.0, n_targets))).backward()  # type: ignore[no-untyped-call]
            loss += part.detach()
        (total,) = self.world.sums([float(loss)])
        mean, norm = total / max(1.0, n_targets), float(self.world.whole(self.optimizer.clip()))
        self._require_finite(mean, norm)
        lr = learning_rate(self.settings, step, self.total)
        self.optimizer.step(lr)
        seconds = time.perf_counter() - begun
        self.progress.step, self.progress.tokens = step + 1, self.progress.tokens + int(n_tokens)
        self.progress.seconds += seconds
        self._pending = (self._pending[0] + int(n_tokens), self._pending[1] + seconds)
        if self.progress.step % self.settings.log_every == 0 or self.progress.step == self.total:
            self._tell_step(mean, norm, lr)

    def _look(self, last: bool) -> None:
        """Whatever is due between two steps: evaluation, sample, update norms, checkpoint."""
        step, settings = self.progress.step, self.settings
        if self.tracker and step and (last or step % settings.updates_every == 0):
            self._tell_updates(self.tracker)
        better = False
        if (
            self.validation is not None
            and self.progress.evaluated != step
            and (last or _due(step, settings.eval_every))
        ):
            better = self._evaluate(self.validation)
        if self.tokenizer is not None and _due(step, settings.sample_every) and step:
            self._sample(self.tokenizer)
        # At step 0 too: what cannot be saved is found out before it has cost hours, and a fine-tuned model may never
        # be better than the one it came from.
        if not last and (better or step == 0 or _due(step, settings.save_every or settings.eval_every)):
            self._save()

    # -- its parts

    def _evaluate(self, samples: Samples) -> bool:
        """Figures on the validation data; True if the loss is the lowest so far."""
        metrics = self.last_metrics = self.task.metrics(self.evaluate(samples))
        better = self.progress.best is None or metrics["val_loss"] < self.progress.best
        if better:
            self.progress.best, self.progress.best_step = metrics["val_loss"], self.progress.step
        self.progress.waited = 0 if better else self.progress.waited + 1
        self.progress.evaluated = self.progress.step
        self._tell("eval", **metrics, tokens=self.progress.tokens, seconds=round(self.progress.seconds, 3))
        return better

    @torch.no_grad()
    def evaluate(self, samples: Samples) -> dict[str, float]:
        """The task's sums over some data (or the first `eval_batches` of it), over all ranks."""
        ranks = {"rank": self.world.rank, "world": self.world.size}
        loader = Loader(samples, self.settings.batch_size, shuffle=False, drop_last=False, **ranks)
        n = loader.batches_per_epoch
        n = min(n, self.settings.eval_batches) if self.settings.eval_batches else n
        self.model.eval()
        sums: dict[str, float] = {}
        for _ in range(n):
            batch = loader.next_batch()
            longest = self.world.most(len(batch))
            micro = self.settings.micro_batch or longest
            for start in range(0, longest, micro):  # as often on every rank, since all of them share the weights
                rows = batch.rows(start, start + micro)
                given = (rows if len(rows) else NOTHING).to(self.device)
                with self._autocast():
                    found = self.world.call(self.task.score, self.model, given)
                sums = {key: sums.get(key, 0.0) + value * bool(len(rows)) for key, value in found.items()}
        return dict(zip(sums, self.world.sums(list(sums.values())), strict=True))

    def _sample(self, tokenizer: Tokenizer) -> None:
        """By the main process alone: where weights are divided, each token would be one round of all processes."""
        whole = self.world.full(self.model)
        gpt, prompt, settings = getattr(whole, "gpt", whole), self.settings.sample_prompt, self.settings
        ids = tokenizer.encode(prompt) if prompt else [tokenizer.bos_id or 0]
        options = {
            "max_new_tokens": min(settings.sample_tokens, gpt.config.context_length - 1),
            "seed": settings.seed,
            "overflow": "window",
            "temperature": 0.8,
            "top_k": 50,
        }

        def write() -> None:
            whole.eval()
            with self._autocast():
                self._tell("sample", prompt=prompt, text="".join(stream_text(gpt, tokenizer, ids, **options)))

        self.world.alone(write)

    def _save(self) -> None:
        tensors: dict[str, Tensor] = {f"optimizer.{name}": value for name, value in self.optimizer.state().items()}
        tensors |= {f"rng.{name}": state for name, state in self.world.rng(self.device).items()}
        if self.tracker:
            tensors |= {f"updates.{name}": value for name, value in self.tracker.state_dict(self.model).items()}
        path = self.run.save(
            self.model, self.tokenizer, self.progress, tensors, self.train.state(), keep=self.settings.keep,
            weights=self.weights, world=self.world,
        )  # fmt: skip
        self._tell("save", path=str(path))

    def resume(self) -> None:
        """Go on from the last checkpoint. Raises LoadstoneError if there is none, or it is of another run."""
        self.progress, saved, data = self.run.restore(self.model, self.weights, self.world)
        self.optimizer.restore(group(saved, "optimizer."), self.world.part)
        self.train.restore(data)
        seed = self.settings.seed + self.world.rank + self.progress.step
        self.world.restore_rng(dict(group(saved, "rng.")), self.device, seed)
        if self.tracker:
            self.tracker.load_state_dict(self.model, dict(group(saved, "updates.")))

    def _set_phase(self, step: int) -> None:
        if self.strategy is None:
            return
        self.strategy.apply(self.model, step, self.train.batches_per_epoch)
        phase = self.strategy.phase(step, self.train.batches_per_epoch)
        if phase != self._phase:
            self._phase = phase
            self._tell("phase", phase=phase, trainable=self._trainable(), learns=learning(self.model))

    def _ever_trained(self) -> list[tuple[str, nn.Parameter]]:
        named = list(self.model.named_parameters())
        if self.strategy is None:
            return named
        ever = self.strategy.ever_trainable(self.model)
        return [(name, parameter) for name, parameter in named if name in ever]

    def _lr_scale(self, name: str) -> float:
        return 1.0 if self.strategy is None else self.strategy.lr_scale(self.model, name)

    def _trainable(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.settings.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.settings.dtype))

    def _require_finite(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what = "the loss" if not math.isfinite(loss) else "the gradient"
        last = self.run.steps()
        kept = f"the checkpoint of step {last[-1]} is kept" if last else "no checkpoint had been written yet"
        raise LoadstoneError(
            f"{self.run.folder}: {what} is no longer a finite number at step {self.progress.step + 1}; {kept}, and the "
            f"weights were not moved by it. A lower --lr (now {self.settings.lr:g}), a longer --warmup or --clip 1 "
            "usually help; --dtype float32 if it was bfloat16."
        )

    # -- telling

    def _tell(self, kind: str, **record: Any) -> None:
        if self.world.main:
            for listener in self.listeners:
                listener(kind, {"step": self.progress.step, **record})

    def _tell_step(self, loss: float, norm: float, lr: float) -> None:
        tokens, seconds = self._pending
        self._pending = (0, 0.0)
        rate = tokens / max(seconds, 1e-9)
        used: Mapping[str, float] = (
            {"mfu": rate * self.flops[0] / self.flops[1] / self.world.size} if self.flops else {}
        )
        epoch = self.progress.step / max(1, self.train.batches_per_epoch)
        self._tell(
            "step", loss=loss, lr=lr, grad_norm=norm, tokens=self.progress.tokens, tokens_per_s=rate, **used,
            seconds=round(self.progress.seconds, 3), epoch=epoch, trainable=self._trainable(), phase=self._phase or 0,
            of=self.total,
        )  # fmt: skip

    def _tell_updates(self, tracker: UpdateTracker) -> None:
        step, every = self.progress.step, self.settings.updates_every
        self._tell("updates", since=(step - 1) // every * every, updates=tracker.measure(self.model))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
