"""What the tests of tensor bundles check: every tensor of a file, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from loadstone.checkpoint.base import DTYPES
from loadstone.checkpoint.tensor_bundle import TensorBundle

Tensors = dict[str, NDArray[Any]]


def same_bits(found: NDArray[Any], expected: NDArray[Any]) -> bool:
    return (found.dtype, found.shape, found.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())


def assert_reads(path: Path, expected: Mapping[str, NDArray[Any]]) -> TensorBundle:
    bundle = TensorBundle(path)
    assert sorted(bundle.names()) == sorted(expected)
    for name, array in expected.items():
        info = bundle.info(name)
        assert (info.shape, DTYPES[info.dtype], info.nbytes) == (array.shape, array.dtype, array.nbytes), name
        assert same_bits(bundle.read(name), array), name
    return bundle


def read_all(path: Path) -> Tensors:
    bundle = TensorBundle(path)
    return {name: bundle.read(name) for name in bundle.names()}
