"""Real TensorFlow reads the tensor bundles that Loadstone writes, bit for bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bundle_checks import same_bits
from bundle_writer import gpt2_tensors
from loadstone.checkpoint.base import DTYPES, Array
from loadstone.checkpoint.write_bundle import write_bundle
from writer_cases import aliased

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def tf() -> Any:
    return pytest.importorskip("tensorflow")


def every_dtype(tf: Any) -> dict[str, Array]:
    rng = np.random.default_rng(3)
    tensors = {}
    for name, dtype in DTYPES.items():
        if hasattr(tf.dtypes, name) or hasattr(tf.dtypes.experimental, name):
            raw = rng.integers(0, 2 if name == "bool" else 256, size=15 * dtype.itemsize, dtype=np.uint8)
            tensors[f"{name}/matrix"] = raw.view(dtype).reshape(3, 5).T
            tensors[f"{name}/scalar"] = raw.view(dtype)[7].reshape(())
    return tensors


def test_tensorflow_reads_every_dtype_name_and_tie(tf: Any, tmp_path: Path) -> None:
    """More names than one block holds, in an order that is not the sorted one."""
    tensors = (
        gpt2_tensors() | every_dtype(tf) | {f"model/{'h' * i}": np.full(i % 3, i, "f4") for i in range(400, 0, -1)}
    )
    tensors |= {"Größe/重み": np.zeros((0, 3), ml_dtypes.bfloat16), "a b\n'": np.arange(4, dtype=np.int16)}
    tensors |= {"zeros": np.zeros((5000, 1000), np.float32), "large": np.arange(3e6).reshape(1000, 3000).T}
    source = aliased(tensors, {"tie": "large", "a/tie": "model/wte"})
    write_bundle(source, tmp_path / "model.ckpt")
    assert tf.train.latest_checkpoint(str(tmp_path)) == str(tmp_path / "model.ckpt")
    listed = dict(tf.train.list_variables(str(tmp_path)))
    assert listed == {name: [*info.shape] for name, info in source.tensors.items()}
    reader = tf.train.load_checkpoint(str(tmp_path))
    types = reader.get_variable_to_dtype_map()
    for name, info in source.tensors.items():
        assert types[name].name == info.dtype
        assert same_bits(np.asarray(reader.get_tensor(name)), source.read(name)), name


def test_a_session_restores_it(tf: Any, tmp_path: Path) -> None:
    tensors = {name: array for name, array in gpt2_tensors().items() if "Adam" not in name}
    write_bundle(aliased(tensors, {}), tmp_path / "model.ckpt")
    tf1 = tf.compat.v1
    with tf.Graph().as_default(), tf1.Session() as session:
        variables = {n: tf1.get_variable(n, a.shape, a.dtype) for n, a in tensors.items()}
        tf1.train.Saver().restore(session, str(tmp_path / "model.ckpt"))
        for name, array in tensors.items():
            assert same_bits(np.asarray(session.run(variables[name])), array)


@pytest.mark.parametrize("prefix", ['a "b"', "back\\slash", "Größe-重み", "100%"])
def test_the_state_file_names_any_prefix(tf: Any, tmp_path: Path, prefix: str) -> None:
    write_bundle(aliased({"w": np.ones(2)}, {}), tmp_path / prefix)
    assert tf.train.get_checkpoint_state(str(tmp_path)).model_checkpoint_path == str(tmp_path / prefix)


def test_an_empty_checkpoint(tf: Any, tmp_path: Path) -> None:
    write_bundle(aliased({"none": np.zeros((0, 3), np.float32)}, {}), tmp_path / "m")
    assert tf.train.load_checkpoint(str(tmp_path)).get_tensor("none").shape == (0, 3)
