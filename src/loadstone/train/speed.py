"""How fast a device trains a model: measured on real steps, or assumed from its peak."""

from __future__ import annotations

import math
import time
from collections.abc import Collection

from ..config import GPTConfig
from ..errors import ConfigError
from .devices import Device, rate_text
from .footprint import Step

# Share of the peak that training reaches (MFU), where nobody measured. GPUs in bfloat16: rates published for GPT-2 124M
# on A100 come to 38% with torch.compile (137,000 to 142,000 tokens/s), nanochat's larger models to 41 to 46%, code that
# is not compiled to clearly less. CPUs: measured, see docs/plan-a-run.md.
ASSUMED_MFU = {("gpu", "bfloat16"): 0.3, ("gpu", "float32"): 0.5, ("cpu", "bfloat16"): 0.5, ("cpu", "float32"): 0.7}


def assumed_rate(device: Device, dtype: str, mfu: float, per_token: float) -> tuple[float | None, str]:
    """(tokens per second on one device, what that rests on); None if the device's peak is not known.

    Args:
        device, dtype: what computes, in which type.
        mfu: share of the peak that is reached.
        per_token: operations of one trained token.
    """
    if not 0 < mfu <= 1:
        raise ConfigError(f"the share of the peak must be above 0 and at most 1, found {mfu}.")
    peak = device.peak(dtype)
    if peak is None:
        return None, f"no peak is known of {device.name} in {dtype} ({device.source}); measure it there"
    return mfu * peak / per_token, f"assumed: {mfu:.0%} of {rate_text(peak)} ({device.name}, {dtype}; {device.source})"


def measured_rate(
    config: GPTConfig,
    step: Step,
    device: str = "cpu",
    trainable: Collection[str] | None = None,
    *,
    seconds: float = 2.0,
) -> float:
    """Tokens per second of real steps on one device, the optimizer's share included: the best after a first one.

    The best, because whatever else the machine does only slows a step down. `trainable`: parameters; None: all.
    """
    import torch

    from ..kernels import keep_freed_memory, speed_up
    from ..model import GPT
    from .losses import head_loss

    with torch.random.fork_rng(), torch.device(device):
        model = GPT(config).train()
        ids = torch.randint(0, config.vocab_size, (step.micro_batch, step.length))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable is None or name in trainable)
    if torch.device(device).type == "cpu":  # as the real run does
        keep_freed_memory()
        speed_up(model)
    model.set_dropout(step.dropout)
    model.recompute = step.recompute
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)
    (weight, bias), kind = model.output, torch.device(device).type
    best, begun, done = math.inf, time.perf_counter(), 0
    while done < 3 or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        with torch.autocast(kind, torch.bfloat16, enabled=step.half):
            loss = head_loss(model.hidden(ids), weight, ids, bias)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for the device
        best = min(best, time.perf_counter() - start) if done else best
        done += 1
    return step.tokens / best
