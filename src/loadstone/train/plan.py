"""`plan_run`: what a training run will need and take, from the config alone, before it is paid for.

Memory is derived (`footprint.py`), operations are counted (`flops.py`), time is measured here on real
steps, or rests on a device's peak and an assumed share of it, which the plan states (`speed.py`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..checkpoint.wording import size_text
from ..config import GPTConfig
from ..errors import ConfigError
from ..weightmap.canonical import parameter_count, parameter_shapes
from .devices import Device, local_device, named_device, rate_text
from .flops import count, palm_per_token
from .footprint import Memory, Step, memory
from .speed import ASSUMED_MFU, assumed_rate, measured_rate

# Tokens per parameter at which a given amount of compute gives the best model: Hoffmann et al. 2022
# (arXiv:2203.15556), table 3. Smaller models are trained on far more, because that pays when they are used.
CHINCHILLA = 20
FEWEST = CHINCHILLA / 100  # below, a model learns its text by heart
MOST_EPOCHS = 4  # repeated data are nearly as good as new ones up to here: Muennighoff et al. 2023 (arXiv:2305.16264)
MOST_BLOCKS = 100_000  # each is walked; what has more is a slip of the finger
# What a process needs beside its tensors: the program, and a factor for what the allocator cannot use again. The CPU's
# are fitted to real runs (docs/plan-a-run.md); a GPU's are not measured.
OVERHEAD = {"cpu": (380_000_000, 1.25), "gpu": (700_000_000, 1.1)}


@dataclass(frozen=True)
class RunPlan:
    """A run before it begins. Counts are of parameters, tokens and operations; memory is per device, in bytes.

    Attributes:
        parameters, trainable, embedding: in all (LoRA's too), ever trained, in the tables of ids and positions.
        micro_batches: forward and backward passes of one step on one device.
        tokens_per_parameter: of all tokens seen, repeated ones too.
        epochs: passes over the data, where their size is known.
        process: the memory's peak, with the program and what its allocator cannot use again.
        flops: computed in the whole run, recomputation included.
        flops_per_token: PaLM's convention, on which MFU rests.
        device, device_memory, device_peak: what it runs on, and that many of it (`world`).
        mfu: share of the peak that was measured or assumed; None without a peak.
        tokens_per_second, seconds: of all devices together; None where neither measured nor known.
        basis: what the time rests on.
        warnings: what is off, and what to do about it.
    """

    parameters: int
    trainable: int
    embedding: int
    steps: int
    batch_size: int
    micro_batch: int
    micro_batches: int
    length: int
    world: int
    dtype: str
    recompute: bool
    tokens: int
    tokens_per_parameter: float
    epochs: float | None
    memory: Memory
    process: int
    flops: float
    flops_per_token: float
    device: str
    device_memory: int
    device_peak: float | None
    mfu: float | None
    tokens_per_second: float | None
    seconds: float | None
    basis: str
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def plan_run(
    config: GPTConfig,
    *,
    batch_size: int,
    length: int,
    micro_batch: int = 0,
    steps: int = 0,
    tokens: int = 0,
    data_tokens: int = 0,
    world: int = 1,
    sharded: bool = True,
    dtype: str = "float32",
    recompute: bool = False,
    dropout: float = 0.0,
    trainable: Collection[str] | float | None = None,
    lora: int = 0,
    pretrained: bool = False,
    device: str = "cpu",
    mfu: float = 0.0,
    measure: bool = False,
) -> RunPlan:
    """Plan a run.

    Args:
        config: the model.
        batch_size, micro_batch: sequences per step over all devices, and at once on one device (0: all of its share).
        length: tokens per sequence.
        steps, tokens: how long; one of them is given.
        data_tokens: size of the training data; 0: unknown.
        world: devices.
        sharded: parameters, gradients and moments are divided over them (FSDP2); False: each has all.
        dtype: `float32`, or `bfloat16` (autocast over float32 weights).
        recompute, dropout: see `GPT`.
        trainable: names of the parameters that are ever trained (`Strategy.ever_trainable`), or a share of them; None:
            all, or with LoRA none of the model's own.
        lora: parameters that adapters add.
        pretrained: the run does not begin from random weights, so few tokens are no fault.
        device: `cpu` and `cuda` are this machine's; else a name such as `H100`.
        mfu: share of the peak to reckon with; 0: what is usual, see ASSUMED_MFU.
        measure: take the time of a few real steps on this machine instead (a few seconds).

    Raises ConfigError for a request that contradicts itself, or a device that is not known.
    """
    rows = _rows_per_device(config, batch_size, length, steps, tokens, world)
    micro = min(micro_batch or rows, rows)
    hardware, kind = _device(device, dtype, measure), "cpu" if device == "cpu" else "gpu"
    parts = _Parts.of(config, trainable, lora)
    step = Step(micro, length, rows > micro, dtype == "bfloat16", recompute, dropout, cuda=kind == "gpu")
    trained, ranks = parts.trained + lora, world if sharded else 1
    needed = memory(config, step, trained=trained, added=lora, ranks=ranks, live_from=parts.live_from)
    fixed, factor = OVERHEAD[kind]
    process = fixed + round(needed.peak * factor)
    found = [] if process <= hardware.memory else [_too_large(needed, process, hardware, step)]
    per_token = parts.operations(config, length, recompute) / length + 6 * lora
    each: float | None
    if measure and found:
        raise ConfigError(found[0] + " Nothing was measured.")
    if measure:
        each, basis = measured_rate(config, step, device, parts.names or None), f"measured on {hardware.name}"
    else:
        each, basis = assumed_rate(hardware, dtype, mfu or ASSUMED_MFU[kind, dtype], per_token)
    steps = steps or math.ceil(tokens / (batch_size * length))
    total, parameters = steps * batch_size * length, parameter_count(config) + lora
    convention, peak = palm_per_token(config, length), hardware.peak(dtype)
    plan = RunPlan(
        parameters=parameters,
        trainable=trained,
        embedding=parts.embedding,
        steps=steps,
        batch_size=batch_size,
        micro_batch=micro,
        micro_batches=-(-rows // micro),
        length=length,
        world=world,
        dtype=dtype,
        recompute=recompute,
        tokens=total,
        tokens_per_parameter=total / parameters,
        epochs=total / data_tokens if data_tokens else None,
        memory=needed,
        process=process,
        flops=per_token * total,
        flops_per_token=convention,
        device=hardware.name,
        device_memory=hardware.memory,
        device_peak=peak,
        mfu=each * convention / peak if each and peak else None,
        tokens_per_second=each * world if each else None,
        seconds=total / (each * world) if each else None,
        basis=basis + (f"; {world} of them, with nothing lost between them" if world > 1 else ""),
        warnings=(),
    )
    return _with_warnings(plan, config, found, pretrained or lora > 0, on_gpu=kind == "gpu")


def plan_lines(plan: RunPlan) -> Iterator[str]:
    """The plan for a terminal."""
    p, m = plan, plan.memory
    share = (
        "all trained" if p.trainable == p.parameters else f"{p.trainable:,} trained ({p.trainable / p.parameters:.2%})"
    )
    yield f"Model   {p.parameters:,} parameters ({p.embedding:,} in embeddings), {share}"
    yield f"Run     {p.steps:,} steps x {p.batch_size:,} sequences x {p.length:,} tokens = {_count(p.tokens)} tokens"
    yield (
        f"        on {f'each of {p.world} devices' if p.world > 1 else '1 device'}: {p.micro_batches} "
        f"micro-batch{'es' * (p.micro_batches > 1)} of {p.micro_batch} sequence{'s' * (p.micro_batch > 1)} a step"
    )
    epochs = f"; {p.epochs:,.1f} passes over the data" if p.epochs is not None else ""
    yield f"        {p.tokens_per_parameter:,.2g} tokens per parameter (about {CHINCHILLA} is compute-optimal){epochs}"
    kept, divided = f"{p.micro_batch} x {p.length:,} tokens", m.optimizer < 8 * p.trainable
    yield f"Memory  {size_text(m.peak, tenths_below=1000)} of tensors at the peak, per device:"
    for name, nbytes, what in (
        ("weights", m.weights, "float32" + ", this device's part, and what is gathered to compute" * divided),
        ("gradients", m.gradients, "float32, of what is trained"),
        ("optimizer", m.optimizer, "AdamW's two moments, float32"),
        ("copies", m.copies, "of the matrices in bfloat16, made by autocast" + "; not divided" * divided),
        ("activations", m.activations, f"kept for the gradients of {kept}" + ", the rest recomputed" * p.recompute),
        ("loss", m.head, "gradients of the head, one chunk of logits"),
        ("data", m.data, "token ids and targets"),
    ):
        if nbytes:
            yield f"  {name:<12} {size_text(nbytes, tenths_below=1000):>9}  {what}"
    if m.peak < m.weights + m.gradients + m.optimizer + m.copies + m.activations + m.head:
        yield "  (gradients and activations are not all there at one moment)"
    process, there = size_text(p.process, tenths_below=1000), size_text(p.device_memory)
    yield f"  about {process} with the program and its allocator; {p.device} has {there}"
    again = ", blocks computed twice" if p.recompute else ""
    yield f"Work    {p.flops:.2e} FLOPs{again}; {_count(p.flops_per_token)} per token as MFU counts (PaLM, appendix B)"
    if p.seconds is None or p.tokens_per_second is None:
        yield f"Time    unknown: {p.basis}"
    else:
        yield f"Time    {_duration(p.seconds)} at {p.tokens_per_second:,.0f} tokens/s"
        yield f"        {p.basis}"
        if p.mfu and p.device_peak and p.basis.startswith("measured"):
            yield f"        MFU {p.mfu:.0%} of {rate_text(p.device_peak)}"
    for warning in p.warnings:
        yield f"Warning {warning}"


@dataclass(frozen=True)
class _Parts:
    """What of the model is trained: how many parameters, by which names, from which block on gradients are needed."""

    trained: int
    embedding: int
    names: frozenset[str] | None
    share: float
    live_from: int

    @classmethod
    def of(cls, config: GPTConfig, trainable: Collection[str] | float | None, lora: int) -> _Parts:
        sizes = {name: math.prod(shape) for name, shape in parameter_shapes(config).items()}
        total, embedding = sum(sizes.values()), sum(n for name, n in sizes.items() if "_emb." in name)
        if trainable is None:
            trainable = 0.0 if lora else 1.0
        if isinstance(trainable, (int, float)):
            if not 0 <= trainable <= 1:
                raise ConfigError(f"the share of trained parameters must be from 0 to 1, found {trainable}.")
            return cls(round(trainable * total), embedding, None, float(trainable), 0)
        names = frozenset(trainable) & sizes.keys()
        if not names and not lora:
            raise ConfigError("no parameter of the model is trained: nothing would be learnt.")
        live = 0 if lora else _first_live_block(names, config.n_layers)
        return cls(sum(sizes[name] for name in names), embedding, names, len(names) / len(sizes), live)

    def operations(self, config: GPTConfig, length: int, recompute: bool) -> float:
        """Of one sequence. By names exactly; by a share, gradients flow everywhere and reach that share of weights."""
        if self.names is not None and self.live_from:
            return count(config, length, recompute=recompute, trainable=self.names).total
        whole = count(config, length, recompute=recompute)
        return whole.forward * (2 + self.share) + whole.again


def _first_live_block(names: Collection[str], n_layers: int) -> int:
    if any(name.startswith(("tok_emb.", "pos_emb.")) for name in names):
        return 0
    return min((int(name.split(".")[1]) for name in names if name.startswith("blocks.")), default=n_layers)


def _rows_per_device(config: GPTConfig, batch_size: int, length: int, steps: int, tokens: int, world: int) -> int:
    """Sequences of one step on one device. Raises ConfigError."""
    for good, problem in (
        (
            1 <= length <= config.context_length,
            f"length {length} must be from 1 to the context {config.context_length}",
        ),
        (world >= 1 and batch_size >= 1, f"batch_size {batch_size} and devices {world} must be 1 or more"),
        (
            world >= 1 and batch_size % max(world, 1) == 0,
            f"batch_size {batch_size} must be a multiple of {world} devices",
        ),
        (bool(steps > 0) != bool(tokens > 0), "either steps or tokens must be given"),
        (config.n_layers <= MOST_BLOCKS, f"n_layers {config.n_layers} is more than {MOST_BLOCKS:,}, a slip surely"),
    ):
        if not good:
            raise ConfigError(f"plan: {problem}.")
    return batch_size // world


def _device(name: str, dtype: str, measure: bool) -> Device:
    """The device to reckon with. Raises ConfigError."""
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"dtype {dtype!r} is none of float32, bfloat16.")
    if name.partition(":")[0] in ("cpu", "cuda", "mps"):
        return local_device(name, dtype)
    if measure:
        raise ConfigError(f"{name} is not here, so nothing can be measured on it; leave out what asks for measuring.")
    return named_device(name)


def _with_warnings(plan: RunPlan, config: GPTConfig, found: list[str], pretrained: bool, *, on_gpu: bool) -> RunPlan:
    if plan.tokens_per_parameter < FEWEST and not pretrained:
        found.append(
            f"{plan.tokens_per_parameter:.2g} tokens per parameter: below about {FEWEST:g} a model learns its text by "
            f"heart. Take a smaller model (under {_count(plan.tokens / FEWEST)} parameters) or more tokens, or begin "
            "from pretrained weights (loadstone finetune)."
        )
    if plan.epochs is not None and plan.epochs > MOST_EPOCHS:
        found.append(
            f"{plan.epochs:,.1f} passes over the same data: after about {MOST_EPOCHS} they teach little more "
            "(arXiv:2305.16264). Watch the validation loss (--patience), or find more data."
        )
    if on_gpu and not pretrained and config.vocab_size % 64:
        up = -(-config.vocab_size // 64) * 64
        found.append(
            f"the vocabulary {config.vocab_size:,} is no multiple of 64, which makes the head slow on a GPU: "
            f"--set vocab_size={up} costs {(up - config.vocab_size) * config.d_model:,} unused parameters."
        )
    return replace(plan, warnings=tuple(found))


def _too_large(needed: Memory, process: int, device: Device, step: Step) -> str:
    ways = [
        *([f"a smaller --micro-batch (now {step.micro_batch})"] if step.micro_batch > 1 else []),
        *(["--recompute"] if not step.recompute else []),
        *(["--dtype bfloat16"] if not step.half else []),
        "more devices", "a shorter --length",
    ]  # fmt: skip
    return (
        f"a process needs about {size_text(process, tenths_below=1000)}, of which "
        f"{size_text(needed.peak, tenths_below=1000)} are tensors ({size_text(needed.activations, tenths_below=1000)} "
        f"activations), and {device.name} has {size_text(device.memory)}. Ways out: {', '.join(ways)}."
    )


def _count(number: float) -> str:
    """`65.5M`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:,.3g}{unit}"
    return f"{number:,.0f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} s"
    minutes = seconds / 60
    hours, days = minutes / 60, minutes / 1440
    return f"{minutes:,.0f} min" if hours < 2 else f"{hours:,.1f} h" if days < 2 else f"{days:,.1f} days"
