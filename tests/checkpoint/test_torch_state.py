"""Which tensors of a PyTorch file are the weights, what becomes of the rest, and what is refused."""

from __future__ import annotations

import argparse
import datetime
import pickle
import sys
import tarfile
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hostile_pickle import EMPTY_ORDERED, call, mapping, name, number, storage, tuple_of, write_zip
from loadstone.checkpoint.torch_pickle import TorchPickle
from loadstone.errors import FormatError, LoadstoneError
from torch_files import FORMATS, assert_same, save, training_checkpoint

# -- finding the weights


@FORMATS
@pytest.mark.parametrize("protocol", [2, 4])
def test_training_checkpoint(tmp_path: Path, is_zip: bool, protocol: int) -> None:
    model, saved = training_checkpoint()
    checkpoint = save(tmp_path / "ckpt.pt", saved, is_zip, protocol)
    assert_same(checkpoint, model.state_dict())
    assert checkpoint.metadata["model_args"] == saved["model_args"]
    assert checkpoint.metadata["iter_num"] == 5
    assert checkpoint.metadata["_metadata"][""] == {"version": 1}
    left = "'optimizer' (15 tensors), 'best_val_loss' (1 tensor), 'rng' (1 tensor)"
    assert checkpoint.notes == [f"weights found under 'model'; left aside: {left}"]
    assert "torch._utils._rebuild_tensor_v2" in checkpoint.globals_seen


@pytest.mark.parametrize(
    ("wrap", "where"),
    [
        (lambda w: {"state_dict": w, "ema": w}, "'state_dict'; left aside: 'ema' (8 tensors)"),
        (lambda w: {"ema": w, "model": w, "epoch": 1}, "'model'; left aside: 'ema' (8 tensors)"),
        (lambda w: {"checkpoint": {"model": w, "step": 3}}, "'checkpoint.model'"),
        (lambda w: {"payload": w, "optimizer_state_dict": {"a": w}}, "'payload'; left aside: 'optimizer_state_dict'"),
        (lambda w: {"payload": w, "step": torch.tensor(3), "rng_state": torch.zeros(9)}, "'payload'"),
        (lambda w: {"a": {"b": {"model": w}}}, "'a.b.model'"),
        (lambda w: {"module": {"module": w}}, "'module.module'"),
        (lambda w: {"payload": w, "loss": nn.CrossEntropyLoss(), "opt": torch.optim.SGD([w["0.weight"]])}, "'payload'"),
    ],
)
def test_wrapped_state_dicts(tmp_path: Path, wrap: Any, where: str) -> None:
    state = dict(training_checkpoint()[0].state_dict())
    checkpoint = save(tmp_path / "m.pt", wrap(state))
    assert_same(checkpoint, state)
    assert f"weights found under {where}" in checkpoint.notes[0]


def test_several_sets_of_weights_are_the_users_choice(tmp_path: Path) -> None:
    value = {"generator": {"w": torch.ones(2), "b": torch.ones(1)}, "discriminator": {"w": torch.ones(2)}, "epoch": 1}
    match = r"several sets of weights: 'generator' \(2 tensors\), 'discriminator' \(1 tensors\)\. Save the one"
    with pytest.raises(FormatError, match=match):
        save(tmp_path / "m.pt", value)


def test_entries_of_a_state_dict_that_are_no_tensors(tmp_path: Path) -> None:
    value = {"w": torch.ones(2), "_extra_state": {"scale": 2}, "steps": 3, 7: torch.ones(1), "none": None}
    checkpoint = save(tmp_path / "m.pt", value)
    assert checkpoint.names() == ["w"]
    assert checkpoint.metadata == {"_extra_state": {"scale": 2}, "steps": 3, "none": None}
    assert checkpoint.notes == ["left aside: 1 entries whose names are no text"]
    lists = {f"l{i}": [torch.ones(1)] for i in range(15)}
    names = ", ".join(f"'l{i}' (1 tensor)" for i in range(12))
    assert save(tmp_path / "l.pt", {"w": torch.ones(2)} | lists).notes == [f"left aside: {names}, and 3 more"]
    with pytest.raises(LoadstoneError, match=r"no tensor 'ww'.*nearest: w"):
        checkpoint.read("ww")


@FORMATS
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_whole_modules_are_walked_without_their_classes(tmp_path: Path, is_zip: bool) -> None:
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict(
        {
            "blocks": nn.ModuleList([nn.Sequential(shared, nn.LayerNorm(3)), nn.Sequential(shared, nn.Dropout())]),
            "list": nn.ParameterList([torch.randn(2), torch.randn(3)]),
            "norm": nn.BatchNorm1d(2),
            "wrapped": nn.DataParallel(nn.Linear(2, 2, bias=False)),
        }
    )
    model.register_buffer("mask", torch.ones(3), persistent=False)
    model.register_buffer("kept", torch.ones(2))
    model.register_module("off", None)
    checkpoint = save(tmp_path / "m.pt", model, is_zip)
    assert_same(checkpoint, model.state_dict())
    assert "kept" in checkpoint.names()
    assert checkpoint.aliases["blocks.1.0.weight"] == "blocks.0.0.weight"
    assert checkpoint.notes[0].startswith("a whole pickled module (torch.nn.modules.container.ModuleDict)")
    inside = save(tmp_path / "m.pt", {"model": model, "epoch": 3}, is_zip)
    assert_same(inside, model.state_dict())
    assert inside.metadata == {"epoch": 3}


# -- metadata


class Config:
    """A class that the reader must not need."""

    def __init__(self) -> None:
        self.n_layer, self.act = 12, "gelu"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_metadata_is_plain(tmp_path: Path, protocol: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, Config.__module__, argparse.Namespace(Config=Config))
    value = {
        "model": {"w": torch.ones(2)},
        "args": argparse.Namespace(lr=1e-3, out=Path("a/b"), device=torch.device("cuda", 1), config=Config()),
        "config": Config(),
        "when": datetime.date(2024, 2, 3),
        "loss": np.float32(0.5),
        "count": np.int64(-3),
        "curve": np.arange(6, dtype=">f4").reshape(2, 3).T,
        "flags": np.array([True, False]),
        "bytes": (b"\xff\x00", bytearray(b"ab"), b""),
        "containers": [OrderedDict(a=1), defaultdict(list, {"k": [2]}), Counter("aab"), {3}, frozenset({4}), 1 + 2j],
        "dtype": torch.bfloat16,
        "shape": torch.Size([2, 3]),
        "function": torch.relu,
        "big": 1 << 200,
        "objects": np.array([None, "x"], dtype=object),
    }
    metadata = save(tmp_path / "m.pt", value, protocol=protocol).metadata
    config = {"__class__": f"{Config.__module__}.Config", "n_layer": 12, "act": "gelu"}
    assert metadata["args"] == {"lr": 1e-3, "out": "a/b", "device": "cuda:1", "config": config}
    assert metadata["config"] == config
    assert metadata["when"].startswith("datetime.date(")
    assert (metadata["loss"], metadata["count"]) == (0.5, -3)
    assert metadata["curve"] == [[0, 3], [1, 4], [2, 5]]
    assert metadata["flags"] == [True, False]
    assert metadata["bytes"] == [b"\xff\x00", b"ab", b""]
    assert metadata["containers"] == [{"a": 1}, {"k": [2]}, {"a": 2, "b": 1}, [3], [4], 1 + 2j]
    assert (metadata["dtype"], metadata["shape"], metadata["big"]) == ("torch.bfloat16", [2, 3], 1 << 200)
    assert "relu" in metadata["function"]
    assert "object" not in str(type(metadata["objects"]))


# -- what is refused


REBUILD = name("torch._utils", "_rebuild_tensor_v2")
ARGS = [storage(), number(0), tuple_of(number(2)), tuple_of(number(1)), b"\x89", EMPTY_ORDERED]


def quantised() -> torch.Tensor:
    return torch._empty_affine_quantized((2, 2), scale=0.1, zero_point=3, dtype=torch.qint8)


def test_metadata_that_unfolds_without_end_is_left_aside(tmp_path: Path) -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    laughs: list[Any] = ["ha"]
    for _ in range(60):
        laughs = [laughs, laughs]
    value = {"model": {"w": torch.ones(2)}, "loop": loop, "laughs": laughs, "long": list(range(300_000)), "n": 1}
    checkpoint = save(tmp_path / "m.pt", value)
    assert checkpoint.metadata == {"n": 1}
    assert checkpoint.notes == ["weights found under 'model'; left aside: 'loop', 'laughs', 'long'"]


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (torch.zeros(2), "it holds one tensor without a name"),
        ([torch.zeros(2)], "it holds a list"),
        ({}, r"a dictionary without tensors \(keys: none\)"),
        (
            {"epoch": 1, "lr": 2},
            r"a dictionary without tensors \(keys: 'epoch', 'lr'\)\. Save weights with torch\.save",
        ),
        ({"w": torch.zeros(2).to_sparse()}, r"tensor 'w' would be made by calling torch._utils._rebuild_sparse_tensor"),
        ({"w": torch.zeros(2, device="meta")}, r"'w' would be made by calling torch._utils._rebuild_meta_tensor"),
        ({"w": torch.zeros(2, dtype=torch.complex64).conj()}, "tensor 'w': its element type is conj, which Loadstone"),
        ({"w": torch.empty(2, dtype=torch.float4_e2m1fn_x2)}, "tensor 'w': its element type is float4_e2m1fn_x2"),
    ],
    ids=["tensor", "list", "empty", "no-tensors", "sparse", "meta", "conj", "float4"],
)
def test_what_holds_no_readable_weights(tmp_path: Path, value: Any, match: str) -> None:
    with pytest.raises(FormatError, match=match):
        save(tmp_path / "m.pt", value)


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        (
            call("torch._utils", "_rebuild_tensor_v3", *ARGS, name("torch", "float32"), mapping(neg=b"\x88")),
            "type is neg",
        ),
        (call("torch._tensor", "_rebuild_from_type_v2", REBUILD, name("torch", "Tensor"), tuple_of(*ARGS), b"}"), ""),
        (
            call("torch._tensor", "_rebuild_from_type_v2", REBUILD, name("my", "Int4"), tuple_of(*ARGS), b"}"),
            r"would be made by calling torch\._tensor\._rebuild_from_type_v2\(\.\.\.\)\. Save weights",
        ),
    ],
    ids=["negative", "tensor", "subclass"],
)
def test_bytes_that_are_not_the_values(tmp_path: Path, entry: bytes, match: str) -> None:
    """Lazy math and subclasses (quantised ones, say) give the same bytes another meaning."""
    path = write_zip(tmp_path / "m.pt", mapping(w=entry))
    if not match:
        assert TorchPickle(path).read("w").tolist() == [1, 2]
        return
    with pytest.raises(FormatError, match=f"tensor 'w'.*{match}"):
        TorchPickle(path)


@pytest.mark.filterwarnings("ignore")
def test_quantised_tensors_are_refused_only_among_the_weights(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"tensor 'w' would be made by calling torch._utils._rebuild_qtensor\(...\)"):
        save(tmp_path / "m.pt", {"w": quantised()})
    checkpoint = save(tmp_path / "m.pt", {"model": {"w": torch.ones(2)}, "other": [quantised()]})
    assert checkpoint.notes == ["weights found under 'model'; left aside: 'other' (1 tensor)"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_is_refused(tmp_path: Path) -> None:
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "m.pt"))  # type: ignore[no-untyped-call]
    with pytest.raises(FormatError, match=r"a TorchScript program \(torch\.jit\.save\), not a checkpoint\. Save its"):
        TorchPickle(tmp_path / "m.pt")


def test_other_files_are_named_for_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    for content, match in [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html>", "neither of the formats of torch.save"),
        (b"PK\x03\x04 and then nothing", "its directory cannot be read"),
        (pickle.dumps({"w": [1.0]}), "a plain pickle, which torch.save did not write"),
        (pickle.dumps(5, 0), "a plain pickle"),
    ]:
        path.write_bytes(content)
        with pytest.raises(FormatError, match=match):
            TorchPickle(path)
    np.savez(tmp_path / "m.npz", w=np.zeros(2))
    with pytest.raises(FormatError, match=r"0 data.pkl entries, where a PyTorch checkpoint has one; it holds w\.npy"):
        TorchPickle(tmp_path / "m.npz")
    with tarfile.open(path, "w") as archive:
        archive.add(tmp_path / "m.npz", "storages")
    with pytest.raises(FormatError, match=r"a tar archive, the format of PyTorch 0\.1"):
        TorchPickle(path)
