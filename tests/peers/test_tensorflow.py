"""Real TensorFlow against our tensor bundles, bit for bit: we read what it writes, it reads what our writer writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from bundle_checks import assert_reads, same_bits
from bundle_writer import gpt2_tensors, write_bundle
from loadstone.checkpoint.base import DTYPES
from loadstone.checkpoint.tensor_bundle import TensorBundle
from loadstone.errors import FormatError

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def tf() -> Any:
    return pytest.importorskip("tensorflow")


def every_dtype(tf: Any) -> Iterator[tuple[str, NDArray[Any]]]:
    """Two random tensors of odd sizes of each type that both sides know, so that many lie unaligned."""
    rng = np.random.default_rng(3)
    for name, dtype in DTYPES.items():
        if hasattr(tf.dtypes, name) or hasattr(tf.dtypes.experimental, name):
            raw = rng.integers(0, 2 if name == "bool" else 256, size=15 * dtype.itemsize, dtype=np.uint8)
            yield f"{name}/matrix", raw.view(dtype).reshape(3, 5)
            yield f"{name}/scalar", raw.view(dtype)[7].reshape(())


def test_a_gpt2_training_run_saved_by_the_saver(tf: Any, tmp_path: Path) -> None:
    tf1 = tf.compat.v1
    with tf.Graph().as_default(), tf1.Session() as session:
        for name, array in gpt2_tensors().items():
            if "Adam" not in name and name != "global_step":
                tf1.get_variable(name, initializer=array)
        loss = tf.add_n([tf.reduce_sum(v * v) for v in tf1.trainable_variables()])
        step = tf1.train.get_or_create_global_step()
        train = tf1.train.AdamOptimizer(0.1).minimize(loss, global_step=step)
        session.run(tf1.global_variables_initializer())
        session.run(train)
        tf1.train.Saver().save(session, str(tmp_path / "model.ckpt"), global_step=step)
        expected = {v.op.name: np.asarray(session.run(v)) for v in tf1.global_variables()}
    assert {"global_step", "beta1_power", "model/h0/attn/c_attn/w", "model/h1/ln_1/g/Adam_1"} <= set(expected)
    assert expected["global_step"] == 1
    assert_reads(tmp_path, expected)
    assert_reads(tmp_path / "model.ckpt-1", expected)


def initial(array: NDArray[Any]) -> Callable[..., NDArray[Any]]:
    """An initializer that gives each partition of a variable its part of `array`."""

    def part(shape: list[int], dtype: Any = None, partition_info: Any = None) -> NDArray[Any]:
        offsets = partition_info.var_offset if partition_info else [0] * len(shape)
        return array[tuple(slice(start, start + size) for start, size in zip(offsets, shape, strict=True))]

    return part


def test_several_shards_and_partitioned_variables(tf: Any, tmp_path: Path) -> None:
    tf1 = tf.compat.v1
    rng = np.random.default_rng(0)
    expected = {"wte": rng.normal(size=(301, 6)).astype("f4"), "w": rng.normal(size=(2, 20_000)), "b": np.ones(3, "f4")}
    parts = {"wte": tf1.fixed_size_partitioner(3, axis=0), "w": tf1.fixed_size_partitioner(2, axis=1), "b": None}
    config = tf1.ConfigProto(device_count={"CPU": 3})
    with tf.Graph().as_default(), tf1.Session(config=config) as session:
        for i, (name, array) in enumerate(expected.items()):
            with tf.device(f"/cpu:{i}"):
                tf1.get_variable(name, array.shape, array.dtype, initial(array), partitioner=parts[name])
        session.run(tf1.global_variables_initializer())
        tf1.train.Saver(sharded=True).save(session, str(tmp_path / "model.ckpt"))
    assert len(list(tmp_path.glob("*.data-*"))) == 3
    bundle = assert_reads(tmp_path, expected)
    assert len({bundle.info(name).file for name in expected}) == 3


def test_tf_train_checkpoint_with_every_dtype(tf: Any, tmp_path: Path) -> None:
    # TensorFlow has these two types, but no variables of them on a CPU.
    tensors = {name: array for name, array in every_dtype(tf) if "fnuz" not in name}
    assert {"bfloat16/matrix", "float16/scalar", "int64/scalar", "bool/matrix", "float8_e4m3fn/matrix"} <= set(tensors)
    checkpoint = tf.train.Checkpoint(**{name.replace("/", "_"): tf.Variable(a) for name, a in tensors.items()})
    checkpoint.save(str(tmp_path / "run"))
    expected = {f"{n.replace('/', '_')}/.ATTRIBUTES/VARIABLE_VALUE": a for n, a in tensors.items()}
    bundle = assert_reads(tmp_path, expected | {"save_counter/.ATTRIBUTES/VARIABLE_VALUE": np.array(1, np.int64)})
    assert bundle.notes == ["left out, as their type string holds no plain numbers: '_CHECKPOINTABLE_OBJECT_GRAPH'"]


def test_raw_ops_save_every_dtype_under_awkward_names(tf: Any, tmp_path: Path) -> None:
    """More names than one 4 KiB block holds, empty tensors, and names that are prefixes of each other."""
    tensors = dict(every_dtype(tf)) | {f"model/{'h' * i}": np.full(i % 3, i, np.float32) for i in range(1, 400)}
    tensors |= {"Größe/重み": np.zeros((0, 3), ml_dtypes.bfloat16), "a b\n'": np.arange(4, dtype=np.int16)}
    names, values = list(tensors), list(tensors.values())
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "m"), tensor_names=names, shape_and_slices=[""] * len(names), tensors=values
    )
    assert_reads(tmp_path, tensors)


def test_slices_with_open_extents(tf: Any, tmp_path: Path) -> None:
    """`-` is "all of this axis", which the keys of slices write as the length -1."""
    whole = np.arange(300 * 7, dtype=np.float16).reshape(300, 7)
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "m"),
        tensor_names=["w", "w", "all"],
        shape_and_slices=["300 7 200,100:-", "300 7 0,200:-", "300 7 -:-"],
        tensors=[whole[200:], whole[:200], whole],
    )
    assert_reads(tmp_path, {"w": whole, "all": whole})


def test_version_1_is_recognised(tf: Any, tmp_path: Path) -> None:
    tf1 = tf.compat.v1
    with tf.Graph().as_default(), tf1.Session() as session:
        tf1.get_variable("w", initializer=np.arange(5000, dtype=np.float32))
        session.run(tf1.global_variables_initializer())
        tf1.train.Saver(write_version=tf1.train.SaverDef.V1).save(session, str(tmp_path / "old.ckpt"))
    for path in (tmp_path, tmp_path / "old.ckpt"):
        with pytest.raises(FormatError, match=r"old\.ckpt: it is a TensorFlow checkpoint of version 1"):
            TensorBundle(path)


@pytest.mark.parametrize("options", [{}, {"shards": 3, "block_size": 200, "snappy": True}], ids=["plain", "hard"])
def test_tensorflow_reads_what_the_test_writer_writes(tf: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    tensors = gpt2_tensors() | dict(every_dtype(tf)) | {"none": np.zeros((0, 3), np.float32)}
    tensors["cut"] = np.arange(7 * 300, dtype=np.float32).reshape(7, 300)
    write_bundle(tmp_path / "model.ckpt", tensors, cuts={"cut": (1, [10, 150])}, **options)
    assert tf.train.latest_checkpoint(str(tmp_path)) == str(tmp_path / "model.ckpt")
    reader = tf.train.load_checkpoint(str(tmp_path))
    assert dict(tf.train.list_variables(str(tmp_path))) == {name: [*a.shape] for name, a in tensors.items()}
    for name, array in tensors.items():
        assert same_bits(np.asarray(reader.get_tensor(name)), array), name
    assert_reads(tmp_path, tensors)
