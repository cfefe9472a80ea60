"""torch.compile as judge of our training step, and the other way round; here, because compiling takes long."""

from __future__ import annotations

import pytest
import torch

from loadstone.config import GPTConfig
from loadstone.data.batch import Batch
from loadstone.kernels import speed_up
from loadstone.model import GPT
from loadstone.train.task import LanguageModel


@pytest.mark.filterwarnings("ignore")  # of torch about itself
def test_a_compiled_step_has_the_gradients_of_a_plain_one() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(97, 32, 48, 2, 4)).train()
    speed_up(model)
    ids, targets = torch.randint(97, (2, 3, 32))
    targets[0, :9] = -100
    batch = Batch(ids, targets, None, torch.full((3,), 32))
    found = []
    for compiled in (False, True):
        model.zero_grad()
        loss, count = LanguageModel(compile=compiled).loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        assert count == 3 * 32 - 9
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for plain, other in zip(*found, strict=True):
        assert plain is not None
        assert other is not None
        torch.testing.assert_close(plain, other, rtol=1e-4, atol=1e-5)
    assert all(float(grad.abs().max()) > 0 for grad in found[0] if grad is not None)
