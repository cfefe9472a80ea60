"""The optimizer against torch's class, number by number, and what a start must not wait for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from loadstone.train.optimizer import Optimizer
from loadstone.train.settings import Settings

SETTINGS = Settings(lr=0.01, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.3, clip=0.5)
SCALES = {"0.weight": 0.1}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 7, bias=False))


def learn(net: nn.Module, step: int) -> None:
    """Gradients of a step; the second layer begins to learn at the third and rests at the fifth."""
    net.zero_grad()
    net(torch.arange(7) * (step + 1) % 7).square().sum().backward()
    if step < 2 or step == 4:
        net[1].weight.grad = net[1].bias.grad = None  # type: ignore[index]


def test_it_moves_as_torchs_class_does() -> None:
    ours, theirs = model(), model()
    optimizer = Optimizer(ours.named_parameters(), SETTINGS, lambda name: SCALES.get(name, 1.0))
    groups = [
        {"params": [p], "weight_decay": 0.3 if p.dim() > 1 else 0.0, "scale": SCALES.get(name, 1.0)}
        for name, p in theirs.named_parameters()
    ]
    judge = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-6, fused=True)
    for step in range(6):
        learn(ours, step)
        learn(theirs, step)
        assert optimizer.clip() == nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step(0.01 / (step + 1))
        for group in judge.param_groups:
            group["lr"] = 0.01 / (step + 1) * group["scale"]
        judge.step()
        for (name, mine), its in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert torch.equal(mine, its), (step, name)
            assert mine.grad is None
    state = optimizer.state()
    counts = {name: int(state[f"step.{name}"]) for name in optimizer.named}
    assert counts == {"0.weight": 6, "1.weight": 3, "1.bias": 3, "2.weight": 6, "2.bias": 6, "3.weight": 6}
    for name, parameter in theirs.named_parameters():
        for moment, value in judge.state[parameter].items():
            assert torch.equal(state[f"{moment}.{name}"], value)


@pytest.mark.parametrize("pause", [1, 3])
def test_it_goes_on_from_what_was_saved(pause: int) -> None:
    through, paused = model(), model()
    one = Optimizer(through.named_parameters(), SETTINGS, lambda _: 1.0)
    two = Optimizer(paused.named_parameters(), SETTINGS, lambda _: 1.0)
    for step in range(5):
        if step == pause:
            saved = {key: value.clone() for key, value in two.state().items()}
            two = Optimizer(paused.named_parameters(), SETTINGS, lambda _: 1.0)
            two.restore(saved.items(), lambda whole, _: whole.clone())
        for net, optimizer in ((through, one), (paused, two)):
            learn(net, step)
            optimizer.step(0.01)
    assert all(map(torch.equal, through.parameters(), paused.parameters()))
    assert all(torch.equal(value, two.state()[key]) for key, value in one.state().items())


def test_a_step_does_not_import_the_compiler(tmp_path: Path) -> None:
    """That takes two seconds, and torch's own optimizer classes do."""
    code = (
        "import sys; from pathlib import Path; from runs import trainer\n"
        f"trainer(Path({str(tmp_path)!r})).run_to_end()\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
