"""What the planner foretells is what happens: activations byte by byte, the peak of real steps, and clear warnings."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loadstone.cli import main
from loadstone.config import PRESETS, GPTConfig, Rope
from loadstone.config.families import GPT_NEOX_FIELDS, LLAMA_FIELDS
from loadstone.errors import ConfigError
from loadstone.kernels import speed_up
from loadstone.model import GPT
from loadstone.train.devices import Device, find_device, known_devices, local_device, measure_peak, named_device
from loadstone.train.flops import count, palm_per_token
from loadstone.train.footprint import Step, activations, block_bytes, memory
from loadstone.train.plan import plan_lines, plan_run

GPT2 = PRESETS["gpt2"]
LLAMA: dict[str, Any] = {"architecture": "llama", "rope": Rope(), "d_ff": 160} | LLAMA_FIELDS
CONFIGS = {
    "gpt2": GPTConfig(300, 64, 64, 2, 4),
    "relu": GPTConfig(300, 64, 64, 2, 4, activation="relu", tied=False),
    "llama": GPTConfig(300, 64, 64, 2, 4, **LLAMA),
    "groups": GPTConfig(300, 64, 64, 2, 4, n_kv_heads=2, **LLAMA),
    "one key head": GPTConfig(300, 64, 64, 3, 4, n_kv_heads=1, **LLAMA),
    "window": GPTConfig(300, 64, 64, 2, 4, window=9, **LLAMA),
    "qk norm": GPTConfig(300, 64, 64, 2, 4, n_kv_heads=2, qk_norm=True, **LLAMA),
    "gptj": GPTConfig(300, 64, 64, 2, 4, rope=Rope(dims=4), parallel_residual=True, shared_norm=True, tied=False),
    "experts": GPTConfig(300, 64, 64, 2, 4, n_experts=5, n_experts_used=2, **LLAMA),
    "experts of gpt2": GPTConfig(300, 64, 64, 2, 4, n_experts=4, n_experts_used=1),
    "neox": GPTConfig(300, 64, 64, 2, 4, architecture="gpt_neox", rope=Rope(dims=4), **GPT_NEOX_FIELDS),
}


def kept(config: GPTConfig, step: Step, frozen_blocks: int = 0) -> int:
    """Bytes of all storages that autograd keeps on the way to the last hidden states, and these; no weights."""
    torch.manual_seed(0)  # an expert with as many rows as a matrix has would pass for a copy of it
    model = GPT(config).train()
    speed_up(model)
    model.set_dropout(step.dropout)
    model.recompute = step.recompute
    if frozen_blocks:
        for part in (model.tok_emb, model.pos_emb, *model.blocks[:frozen_blocks]):
            if part is not None:
                part.requires_grad_(False)
    weights = {tuple(reversed(parameter.shape)) for parameter in model.parameters()}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        is_copy = tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in weights
        if not is_copy and tensor.untyped_storage().data_ptr() not in own:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(0, config.vocab_size, (step.micro_batch, step.length))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=step.half),
    ):
        last = model.hidden(ids)
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values()) + last.untyped_storage().nbytes()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_activations(name: str, half: bool, dropout: float) -> None:
    step = Step(2, 48, half=half, dropout=dropout)
    assert activations(CONFIGS[name], step) == pytest.approx(kept(CONFIGS[name], step), rel=0.01)


@pytest.mark.parametrize("name", CONFIGS)
def test_activations_above_frozen_blocks(name: str) -> None:
    step = Step(2, 48)
    found = kept(CONFIGS[name], step, frozen_blocks=1)
    assert activations(CONFIGS[name], step, live_from=1) == pytest.approx(found, rel=0.06)
    assert found < 0.75 * kept(CONFIGS[name], step)


def test_recomputation_keeps_a_residual_per_block_and_one_block() -> None:
    config = replace(CONFIGS["gpt2"], n_layers=12)
    whole, less = (activations(config, Step(2, 48, recompute=again)) for again in (False, True))
    assert less < 0.2 * whole
    step = Step(2, 48, recompute=True)
    assert kept(config, step) == pytest.approx(
        less - 2 * 48 * block_bytes(config, step), rel=0.05
    )  # before the first block is back


CHILD = """
import json, re, sys
from dataclasses import replace
import torch
from loadstone.config import GPTConfig
from loadstone.kernels import speed_up
from loadstone.model import GPT
from loadstone.train.losses import head_loss

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

def train(config, micro, length, accumulated, half, recompute):
    model = GPT(config).train()
    speed_up(model)
    model.recompute = recompute
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for rows, tokens in ((1, 8), (micro, length)):  # the first step makes the optimizer's moments
        for _ in range(accumulated):
            ids = torch.randint(0, config.vocab_size, (rows, tokens))
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = head_loss(model.hidden(ids), (model.head or model.tok_emb).weight, ids)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

tasks = json.loads(sys.argv[1])
train(GPTConfig(64, 32, 32, 1, 2), 2, 8, 1, False, False)  # loads what torch loads at its first steps
train(GPTConfig(64, 32, 32, 1, 2), 2, 8, 1, True, True)
for config, *how in tasks:
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM counts from here
    before = peak()
    train(GPTConfig(**config), *how)
    print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_of_real_steps() -> None:
    """In a process whose allocator gives freed blocks back; what a run's own does is in docs/plan-a-run.md."""
    common = {"vocab_size": 16_384, "context_length": 256, "n_heads": 8}
    tasks: list[tuple[dict[str, Any], int, int, int, bool, bool]] = [
        (common | {"d_model": 512, "n_layers": 8}, 2, 256, 1, False, False),  # 34M parameters
        (common | {"d_model": 384, "n_layers": 6, "tied": False}, 2, 256, 2, True, False),  # 23M
        (common | {"d_model": 384, "n_layers": 6}, 2, 256, 1, False, True),  # 17M
    ]
    env = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(tasks)],
        env=os.environ | env, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    for (fields, micro, length, accumulated, half, recompute), found in zip(tasks, done.stdout.split(), strict=True):
        config, step = GPTConfig(**fields), Step(micro, length, accumulated > 1, half, recompute)
        parameters = sum(parameter.numel() for parameter in _meta(config).parameters())
        assert memory(config, step, trained=parameters).peak == pytest.approx(int(found), rel=0.15), fields


def _meta(config: GPTConfig) -> GPT:
    with torch.device("meta"):
        return GPT(config)


def test_gpt2_on_eight_gpus() -> None:
    plan = plan_run(
        GPT2, batch_size=512, micro_batch=16, length=1024, tokens=10 * 10**9, world=8, dtype="bfloat16", device="H100",
        sharded=False,
    )  # fmt: skip
    assert (plan.parameters, plan.trainable) == (124_439_808, 124_439_808)
    assert plan.embedding == (50_257 + 1024) * 768
    assert (plan.steps, plan.micro_batches, plan.tokens) == (19_074, 4, 19_074 * 512 * 1024)
    assert plan.memory.weights == plan.memory.gradients == 4 * plan.parameters
    assert plan.memory.optimizer == 8 * plan.parameters
    assert plan.memory.copies == 2 * 12 * 12 * 768 * 768
    assert plan.flops == plan.tokens // 1024 * count(GPT2, 1024).total
    assert plan.flops_per_token == palm_per_token(GPT2, 1024)
    assert plan.mfu == pytest.approx(0.3, rel=0.01)  # PaLM's count differs by norms and biases
    assert plan.tokens_per_second == pytest.approx(0.3 * 8 * 989.4e12 / (count(GPT2, 1024).total / 1024))
    assert plan.tokens_per_second
    assert plan.seconds == pytest.approx(plan.tokens / plan.tokens_per_second)
    assert "assumed: 30% of 989 TFLOP/s" in plan.basis
    assert "nothing lost between them" in plan.basis
    text = "\n".join(plan_lines(plan))
    for shown in (
        "124,439,808 parameters",
        "all trained",
        "19,074 steps x 512 sequences x 1,024 tokens = 10B tokens",
        "on each of 8 devices: 4 micro-batches of 16 sequences a step",
        "H100 SXM has 80 GB",
        "AdamW",
        "assumed",
    ):
        assert shown in text
    assert json.loads(json.dumps(plan.as_dict()))["memory"]["peak"] == plan.memory.peak


def test_sharding_divides_what_it_divides() -> None:
    options: dict[str, Any] = {"batch_size": 64, "length": 1024, "steps": 10, "device": "H100", "world": 8}
    whole, parts = plan_run(GPT2, sharded=False, **options), plan_run(GPT2, **options)
    assert parts.memory.optimizer == pytest.approx(whole.memory.optimizer / 8, rel=1e-6)
    assert parts.memory.gradients == pytest.approx(whole.memory.gradients / 8, rel=1e-6)
    assert parts.memory.activations == whole.memory.activations
    assert whole.memory.weights / 8 < parts.memory.weights < whole.memory.weights
    assert parts.memory.peak < whole.memory.peak


def test_frozen_parameters_cost_no_gradient_no_moment_and_less_work() -> None:
    options: dict[str, Any] = {"batch_size": 8, "length": 512, "steps": 10, "device": "H100"}
    names = [name for name, _ in _meta(GPT2).named_parameters()]
    last = [name for name in names if name.startswith(("blocks.11.", "norm."))]
    full, some = plan_run(GPT2, **options), plan_run(GPT2, trainable=last, **options)
    assert full == replace(plan_run(GPT2, trainable=names, **options), flops=full.flops)
    assert some.trainable == 12 * 768 * 768 + 13 * 768 + 2 * 768
    assert some.memory.gradients == 4 * some.trainable
    assert some.memory.optimizer == 8 * some.trainable
    assert some.memory.activations < full.memory.activations / 6
    assert some.flops == 10 * 8 * count(GPT2, 512, trainable=last).total < 0.5 * full.flops
    assert f"{some.trainable:,} trained (" in "\n".join(plan_lines(some))
    half = plan_run(GPT2, trainable=0.5, **options)
    assert half.trainable == full.trainable // 2
    assert full.flops > half.flops > some.flops


def test_lora() -> None:
    options: dict[str, Any] = {"batch_size": 8, "length": 512, "steps": 10, "device": "H100"}
    plan = plan_run(GPT2, lora=1_327_104, **options)
    assert (plan.parameters, plan.trainable) == (124_439_808 + 1_327_104, 1_327_104)
    assert plan.memory.optimizer == 8 * 1_327_104
    assert plan.memory.head < plan_run(GPT2, **options).memory.head  # the head's matrix has no gradient
    assert plan.flops == pytest.approx(2 / 3 * plan_run(GPT2, **options).flops, rel=0.02)
    assert not plan.warnings


def test_recomputation_costs_work_and_spares_memory() -> None:
    options: dict[str, Any] = {"batch_size": 8, "length": 1024, "steps": 10, "device": "H100"}
    plain, again = plan_run(GPT2, **options), plan_run(GPT2, recompute=True, **options)
    assert again.memory.activations < 0.2 * plain.memory.activations
    assert again.memory.peak < plain.memory.peak
    assert 1.15 < again.flops / plain.flops < 1.34
    assert again.flops_per_token == plain.flops_per_token
    assert "blocks computed twice" in "\n".join(plan_lines(again))


def test_warnings() -> None:
    def warned(config: GPTConfig = CONFIGS["gpt2"], **options: Any) -> str:
        common: dict[str, Any] = {"batch_size": 8, "length": 64, "steps": 10_000, "device": "A100-80GB"}
        return "\n".join(plan_run(config, **(common | options)).warnings)

    padded = replace(CONFIGS["gpt2"], vocab_size=320)
    assert warned(padded) == ""
    assert re.search("300 is no multiple of 64, .* --set vocab_size=320 costs 1,280", warned())
    assert warned(pretrained=True) == ""
    assert "tokens per parameter: below about 0.2 a model learns its text by heart" in warned(padded, steps=10)
    assert warned(padded, data_tokens=5_120_000) == ""
    assert "5.1 passes over the same data" in warned(padded, data_tokens=1_000_000)
    huge = replace(GPT2, vocab_size=50_304, d_model=8192, n_layers=80, n_heads=64, d_ff=0, head_dim=0, n_kv_heads=0)
    found = warned(huge, steps=10**7, batch_size=16, length=1024)
    assert re.search(r"a process needs about 1\.\d TB", found)
    assert "a smaller --micro-batch (now 16), --recompute" in found
    assert "A100 80 GB has 80 GB" in found


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"config": replace(GPT2, n_layers=10**8)}, "n_layers 100000000 is more than 100,000, a slip surely"),
        ({"length": 65}, "length 65 must be from 1 to the context 64"),
        ({"length": 0}, "length 0 must be"),
        ({"batch_size": 0}, "must be 1 or more"),
        ({"world": 0}, "must be 1 or more"),
        ({"world": 3}, "batch_size 8 must be a multiple of 3 devices"),
        ({"steps": 0}, "either steps or tokens"),
        ({"tokens": 5}, "either steps or tokens"),
        ({"dtype": "float16"}, "dtype 'float16' is none of"),
        ({"device": "H900"}, "no device is called 'H900'; known: cpu, cuda .this machine's., B200, H200 SXM"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here"),
        ({"device": "cuda:x"}, "device 'cuda:x' cannot be used here"),
        ({"device": "H100", "measure": True}, "H100 is not here, so nothing can be measured"),
        ({"mfu": 1.5}, "above 0 and at most 1"),
        ({"trainable": 1.5}, "from 0 to 1"),
        ({"trainable": ["blocks.9.nonsense"]}, "nothing would be learnt"),
    ],
)
def test_requests_that_make_no_sense(options: dict[str, Any], problem: str) -> None:
    common: dict[str, Any] = {
        "config": CONFIGS["gpt2"], "batch_size": 8, "length": 64, "steps": 10, "device": "L4",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=problem):
        plan_run(**(common | options))


# --- the command


def dry(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["loadstone", *arguments, "--dry-run"])
        try:
            main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
    return status, *capsys.readouterr()


LLAMA_7B = """
[model]
architecture = "llama"
vocab_size = 32000
d_model = 4096
n_layers = 32
n_heads = 32
d_ff = 11008
context_length = 4096
norm = "rmsnorm"
norm_bias = false
activation = "silu"
gated_mlp = true
qkv_bias = false
attn_out_bias = false
mlp_bias = false
tied = false
rope = {}
[settings]
steps = 10000
batch_size = 1024
micro_batch = 1
dtype = "bfloat16"
"""


def test_a_7b_llama_on_eight_h100(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "llama.toml").write_text(LLAMA_7B)
    request = ["train", str(tmp_path / "llama.toml"), "--devices", "8", "--on", "H100"]
    status, out, _ = dry(capsys, *request)
    assert status == 0
    assert "6,738,415,616 parameters" in out  # Llama 2 7B's
    assert "on each of 8 devices: 128 micro-batches of 1 sequence a step" in out
    assert re.search(r"weights +6\.0 GB  float32, this device's part, and what is gathered to compute", out)
    assert "H100 SXM has 80 GB" in out
    plan = json.loads(dry(capsys, *request, "--json")[1])
    outside, block = 2 * 32_000 * 4096 + 4096, 4 * 4096**2 + 3 * 4096 * 11_008 + 2 * 4096
    assert plan["parameters"] == outside + 32 * block
    assert plan["memory"]["optimizer"] == 2 * plan["memory"]["gradients"] == 8 * plan["parameters"] // 8
    assert plan["memory"]["weights"] == 4 * plan["parameters"] // 8 + 4 * (outside + 2 * block)
    assert plan["memory"]["copies"] == 2 * 32 * (block - 2 * 4096)
    # By hand: 2 operations for each weight of a matrix, and scores and values of all pairs; three times with gradients.
    products = 32 * (block - 2 * 4096) + 32_000 * 4096
    assert plan["flops"] == pytest.approx(3 * (2 * products + 32 * 4 * 4096 * 4096) * plan["tokens"])
    assert plan["tokens_per_second"] == pytest.approx(8 * 0.3 * 989.4e12 * plan["tokens"] / plan["flops"])
    assert plan["seconds"] == pytest.approx(plan["tokens"] / plan["tokens_per_second"])
    assert plan["memory"]["peak"] < plan["process"] < plan["device_memory"] == 80e9
    alone = json.loads(dry(capsys, *request, "--json", "--devices", "1")[1])
    assert alone["memory"]["optimizer"] == 8 * alone["parameters"]
    assert alone["seconds"] == pytest.approx(8 * plan["seconds"])
    assert "a process needs about" in alone["warnings"][0]
    assert "micro-batch" not in alone["warnings"][0]  # it is 1, so that is no way out
    assert "--dtype" not in alone["warnings"][0]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ([], "cannot be reckoned, since no --data are named: say --steps"),
        (["--data", "hub:owner/name"], "since their size is not known before they are read: say --steps"),
        (["--data", "nothing.txt"], "nothing.txt: there is no such file"),
        (["--resume"], "--run FOLDER says where the run is kept"),
        (["--steps", "9" * 330], r"steps must not be negative or infinite, or 2\^53 and more; found 999"),
        (["--steps", "5", "--epochs", "inf"], "epochs must not be .* found inf"),
        (["--steps", "5", "--devices", "3"], "batch_size 16 must be a multiple of 3 devices"),
        (["--steps", "5", "--on", "abacus"], "no device is called 'abacus'"),
        (["--steps", "5", "--mfu", "nan"], "must be above 0 and at most 1, found nan"),
    ],
)
def test_bad_requests_are_one_paragraph(capsys: pytest.CaptureFixture[str], flags: list[str], problem: str) -> None:
    status, out, err = dry(capsys, "train", *flags)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert re.search(problem, err)


def test_measured_here() -> None:
    config = CONFIGS["groups"]
    state = torch.get_rng_state()
    plan = plan_run(config, batch_size=4, micro_batch=2, length=64, steps=1000, measure=True)
    assert torch.equal(state, torch.get_rng_state())  # a run that is planned first is the same run
    assert plan.basis == f"measured on {plan.device}"
    assert plan.tokens_per_second
    assert plan.seconds == pytest.approx(1000 * 4 * 64 / plan.tokens_per_second)
    assert plan.mfu
    assert plan.device_peak
    assert plan.mfu == pytest.approx(plan.tokens_per_second * plan.flops_per_token / plan.device_peak)
    assert "MFU " in "\n".join(plan_lines(plan))


def test_nothing_is_measured_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadstone.train.devices._memory", lambda: 10**9)
    huge = replace(GPT2, n_layers=1000)
    with pytest.raises(ConfigError, match=r"a process needs about .*this CPU .* has 1\.0 GB\. .* Nothing was measured"):
        plan_run(huge, batch_size=8, length=64, steps=10, measure=True)


def test_a_device_without_the_type_has_no_time() -> None:
    plan = plan_run(GPT2, batch_size=8, length=64, steps=10, dtype="bfloat16", device="T4")
    assert plan.seconds is plan.mfu is plan.tokens_per_second is None
    assert "Time    unknown: no peak is known of T4 in bfloat16" in "\n".join(plan_lines(plan))


# What torch.cuda.get_device_name() says, and what people write.
@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H100 NVL", "H100 NVL"),
        ("h100", "H100 SXM"), ("NVIDIA H200", "H200 SXM"), ("NVIDIA H200 NVL", "H200 NVL"), ("NVIDIA B200", "B200"),
        ("NVIDIA A100-SXM4-80GB", "A100 80 GB"), ("NVIDIA A100 80GB PCIe", "A100 80 GB"), ("a100", "A100 80 GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40 GB"), ("NVIDIA A100-SXM4-40GB", "A100 40 GB"), ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"), ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("4090", "RTX 4090"), ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100 SXM 16 GB"), ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA L40", None),
        ("NVIDIA A100X", None), ("", None),
    ],
)  # fmt: skip
def test_names_of_devices(name: str, found: str | None) -> None:
    device = find_device(name)
    assert (device and device.name) == found


def test_the_table_of_devices() -> None:
    for name in known_devices():
        device = named_device(name)
        assert device.name == name
        assert device.source
        assert 8e9 < device.memory < 1e12
        peaks = [peak for peak in (device.peak("float32"), device.peak("bfloat16")) if peak]
        assert peaks == sorted(peaks)
        assert all(5e12 < peak < 5e15 for peak in peaks)


def test_the_peak_of_a_cpu_is_measured_and_said_to_be() -> None:
    device = local_device("cpu", "float32")
    assert device.peak("bfloat16") is None
    assert "measured" in device.source
    again = measure_peak("float32", seconds=0.3)
    assert device.float32
    assert 0.2 < again / device.float32 < 5
    assert isinstance(device, Device)
