"""Files that torch writes, opened by our reader, and the comparison of what both say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from loadstone.checkpoint.base import DTYPES, Array
from loadstone.checkpoint.torch_pickle import TorchPickle

FORMATS = pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
TORCH_DTYPES = {name: getattr(torch, name) for name in DTYPES}


def save(path: Path, value: Any, is_zip: bool = True, protocol: int = 2) -> TorchPickle:
    torch.save(value, path, _use_new_zipfile_serialization=is_zip, pickle_protocol=protocol)
    return TorchPickle(path)


def bits(value: torch.Tensor | Array) -> bytes:
    """The values, in order, as bytes: NaNs and fp8 compare too."""
    if isinstance(value, torch.Tensor):
        fresh = torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())
        return fresh.reshape(-1).view(torch.uint8).numpy().tobytes()
    return np.ascontiguousarray(value).tobytes()


def assert_same(checkpoint: TorchPickle, state: dict[str, torch.Tensor]) -> None:
    assert checkpoint.names() == list(state)
    for key, expected in state.items():
        info, array = checkpoint.info(key), checkpoint.read(key)
        assert info.shape == array.shape == tuple(expected.shape)
        assert DTYPES[info.dtype] == array.dtype
        assert TORCH_DTYPES[info.dtype] == expected.dtype
        assert info.nbytes == expected.numel() * expected.element_size()
        assert info.file == checkpoint.path.name
        assert bits(array) == bits(expected), key


def training_checkpoint() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3, bias=False))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return model, {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": {"n_layer": 12, "bias": False, "dropout": 0.1, "vocab": None},
        "iter_num": 5,
        "best_val_loss": torch.tensor(2.5),
        "rng": {"torch": torch.get_rng_state(), "python": (3, (1, 2), None)},
    }
