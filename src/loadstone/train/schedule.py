"""The learning rate as a pure function of the step, so that there is no state to lose."""

from __future__ import annotations

import math

from .settings import Settings


def learning_rate(settings: Settings, step: int, total: int) -> float:
    """The rate of step `step` (from 0) of `total`: a linear rise, then cosine (or linear, or none) to lr * min_lr.

    Loshchilov & Hutter 2017 (arXiv:1608.03983) without restarts, with the warm-up of GPT-2's successors.
    """
    warmup = warmup_steps(settings, total)
    if step < warmup:
        return settings.lr * (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    share = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[settings.schedule]
    return settings.lr * (settings.min_lr + (1 - settings.min_lr) * share)


def warmup_steps(settings: Settings, total: int) -> int:
    return min(settings.warmup or total // 50, total)
