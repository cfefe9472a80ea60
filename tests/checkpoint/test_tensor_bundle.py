"""TensorFlow checkpoints: what is read, and how they are found. `peers/test_tensorflow.py` asks TensorFlow itself."""

from __future__ import annotations

import base64
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bundle_checks import Tensors, assert_reads
from bundle_writer import DATA_TYPES, entry, gpt2_tensors, of, write_bundle, write_raw
from loadstone.checkpoint.base import DTYPES
from loadstone.checkpoint.tensor_bundle import TensorBundle
from loadstone.errors import FormatError, LoadstoneError, SourceError
from mapped import lies_in

# An index by TensorFlow 2.21 (`tf.raw_ops.SaveV2`): bool, string, float32, and a float16 partitioned at column 66.
TENSORFLOW_INDEX = base64.b85decode(
    "000IE0U81b0RR&g0Bvt%Wo$2ZbY%bm0Rn)6fWSfs6A}m#0tf;U0tiAN0Vs$9HJW0vR1gCez(Rxw6A}m#0tf;U0tf^ki2^7PHJ<BOk^lq?W^7?+2"
    "nrGaC;>GED=0$%2_kK8WMynGcXVY46A}m#0tf;U0tiMr2nqra0tx~ULOKcx0uTZU1PDS91ONmMbY*yS2nP}XAejOv3N`HDz$pL&7I$!E2mulZ5&"
    "{SU5&{SVAfo~(7&XA#Jr@7~0003100022l~X|g0000100000!1AH6009Gd0LlRX0000100000tWk8w&jASB0S^EG000000000000000000000000"
    "0000000000000000SNnjABy~sI"
)


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "124M" / "model.ckpt", gpt2_tensors(), shards=2, block_size=500)
    return tmp_path / "124M"


# --- honest files


def test_reads_what_tensorflow_wrote(tmp_path: Path) -> None:
    wte = np.arange(140, dtype=np.float16).reshape(2, 70)
    wpe = np.arange(6, dtype=np.float32).reshape(2, 3)
    data: list[bytes | NDArray[Any]] = [
        np.array(True),
        wte[:, :66],
        wte[:, 66:],
        b"\5" + bytes.fromhex("d9c69c43") + b"hello",
        wpe,
    ]
    (tmp_path / "m.index").write_bytes(TENSORFLOW_INDEX)
    (tmp_path / "m.data-00000-of-00001").write_bytes(b"".join(d if isinstance(d, bytes) else d.tobytes() for d in data))
    bundle = assert_reads(tmp_path, {"flag": np.array(True), "model/wte": wte, "wpe": wpe})
    assert bundle.notes == ["left out, as their type string holds no plain numbers: 'text'"]
    assert bundle.format == "tensor-bundle"


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda name: name[0] != "\0")
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@st.composite
def tensors(draw: st.DrawFn) -> Tensors:
    def array() -> NDArray[Any]:
        dtype, shape = DTYPES[draw(st.sampled_from(sorted(DATA_TYPES)))], draw(shapes)
        size = int(np.prod(shape)) * dtype.itemsize
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        return rng.integers(0, 2 if dtype.name == "bool" else 256, size, dtype=np.uint8).view(dtype).reshape(shape)

    return {name: array() for name in draw(st.lists(names, max_size=8, unique=True))}


@given(tensors(), st.integers(1, 3), st.sampled_from([1, 100, 5000]), st.booleans())
@settings(max_examples=100, deadline=None)
def test_reads_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, tensors: Tensors, shards: int, block_size: int, snappy: bool
) -> None:
    folder = tmp_path_factory.mktemp("bundle")
    write_bundle(folder / "model.ckpt", tensors, shards=shards, block_size=block_size, snappy=snappy)
    assert_reads(folder, tensors)


@given(st.lists(st.integers(1, 99), min_size=1, max_size=3), st.data())
@settings(max_examples=60, deadline=None)
def test_partitioned_variables_are_put_together(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], data: st.DataObject
) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(shape[axis] - 1, 1)), max_size=4)) - {shape[axis]})
    array = np.random.default_rng(0).normal(size=shape).astype(np.float16)
    folder = tmp_path_factory.mktemp("bundle")
    write_bundle(folder / "m", {"a": array, "w": array, "w/Adam": array}, shards=2, cuts={"w": (axis, cuts)})
    assert_reads(folder, {"a": array, "w": array, "w/Adam": array})


@pytest.mark.parametrize(
    "path", ["", "checkpoint", "model.ckpt", "model.ckpt.index", "model.ckpt.data-00001-of-00002"], ids=str
)
def test_any_of_its_paths_opens_it(gpt2: Path, path: str) -> None:
    bundle = assert_reads(gpt2 / path, gpt2_tensors())
    assert bundle.path == gpt2 / path
    assert bundle.info("global_step").file == "model.ckpt.data-00001-of-00002"
    assert bundle.notes == []


def test_a_folder_of_links_to_blobs_opens_as_the_hub_stores_it(gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / "snapshot").mkdir()
    for i, file in enumerate(sorted(gpt2.iterdir())):
        (tmp_path / "snapshot" / file.name).symlink_to(file.rename(tmp_path / f"blob{i}"))
    for path in ("", "checkpoint", "model.ckpt.index"):
        assert_reads(tmp_path / "snapshot" / path, gpt2_tensors())


def test_the_format_is_found_from_the_bytes_not_from_the_name(gpt2: Path, tmp_path: Path) -> None:
    """An index called like a state file, and a state file called like nothing."""
    shutil.copy(gpt2 / "checkpoint", gpt2 / "state")
    assert_reads(gpt2 / "state", gpt2_tensors())
    for file in gpt2.glob("model.ckpt.*"):
        file.rename(tmp_path / file.name.replace("model.ckpt", "checkpoint").removesuffix(".index"))
    assert_reads(tmp_path / "checkpoint", gpt2_tensors())


def test_what_is_read_is_a_view_that_may_be_written_and_never_reaches_the_file(tmp_path: Path) -> None:
    expected = {"b": np.arange(8, dtype=np.float32), "w": np.arange(40_000, dtype=np.float32).reshape(200, 200)}
    write_bundle(tmp_path / "m", expected)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    bundle = TensorBundle(tmp_path)
    for name in expected:
        array = bundle.read(name)
        assert lies_in(array, tmp_path / "m.data-00000-of-00001") == (name == "w")
        array += 1
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert_reads(tmp_path, expected)


def test_unaligned_tensors_are_aligned_copies(tmp_path: Path) -> None:
    expected = {"a_step": np.array(3, np.int64), "flag": np.array(True), "w": np.ones(20_000, np.float32)}
    write_bundle(tmp_path / "m", expected)
    bundle = assert_reads(tmp_path, expected)
    assert bundle.read("w").flags.aligned
    assert bundle.read("w").flags.owndata


def test_nothing_but_empty_tensors(tmp_path: Path) -> None:
    empty = np.zeros((2, 0), np.int8)
    expected: Tensors = {"a": np.zeros((0, 3), np.float32), "b": empty, "c": empty}
    write_bundle(tmp_path / "m", expected)
    assert (tmp_path / "m.data-00000-of-00001").stat().st_size == 0
    assert assert_reads(tmp_path, expected).aliases == {}


def test_strings_and_other_types_are_left_out_and_noted(tmp_path: Path) -> None:
    strings = {f"s{i}".encode(): entry(7, (1,), offset=8 + i, size=1) for i in range(5)}
    index = write_raw(tmp_path, {b"w": of(np.ones(2, "f4"))} | strings | {b"v": entry(21, ())}, bytes(8) + b"abcde")
    bundle = TensorBundle(index)
    assert bundle.names() == ["w"]
    assert bundle.notes == [
        "left out, as their type string holds no plain numbers: 's0', 's1', 's2' and 2 more",
        "left out, as their type variant holds no plain numbers: 'v'",
    ]
    with pytest.raises(LoadstoneError, match="no tensor 's0' among its 1"):
        bundle.read("s0")


def test_names_that_share_all_their_bytes_are_aliases(tmp_path: Path) -> None:
    ones = np.ones(2, "f4")
    index = write_raw(tmp_path, {b"head": of(ones), b"wte": of(ones), b"x": of(ones, offset=8)}, ones.tobytes() * 2)
    bundle = assert_reads(index, {"head": ones, "wte": ones, "x": ones})
    assert bundle.aliases == {"wte": "head"}


# --- hparams.json


def test_hparams_beside_it_are_metadata(gpt2: Path) -> None:
    assert TensorBundle(gpt2).metadata == {}
    hparams = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
    (gpt2 / "hparams.json").write_text(json.dumps(hparams))
    assert TensorBundle(gpt2).metadata == {"hparams": hparams}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b'{"n_vocab": 50257,', "not valid JSON: Expecting"),
        (b"", "not valid JSON"),
        (b"\xff\xfe\xff", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"n":' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[1]", "should be one JSON object"),
        (b" " * (1 << 20) + b"{}", "should be one JSON object of at most 1048576 bytes"),
    ],
)
def test_broken_hparams_are_named(gpt2: Path, text: bytes, problem: str) -> None:
    (gpt2 / "hparams.json").write_bytes(text)
    with pytest.raises(FormatError, match=rf"hparams\.json: it .*{problem}"):
        TensorBundle(gpt2)


# --- finding it


def point(folder: Path, target: str) -> None:
    (folder / "checkpoint").write_text(f'model_checkpoint_path: "{target}"\nall_model_checkpoint_paths: "x"\n')


@pytest.mark.parametrize(
    "target",
    [
        "model.ckpt",
        "./model.ckpt",
        "/home/someone/gpt2/models/124M/model.ckpt",
        r"C:\\Users\\someone\\models\\model.ckpt",
        r"\\\\server\\share\\model.ckpt",
        r"model\056ckpt",
        r"m\o\del.ckpt",
    ],
)
def test_the_state_file_is_followed_within_its_folder(gpt2: Path, target: str) -> None:
    point(gpt2, target)
    assert_reads(gpt2, gpt2_tensors())


def test_the_state_file_chooses_among_several_and_in_subfolders(gpt2: Path) -> None:
    newer = {"w": np.ones(3, np.float32)}
    write_bundle(gpt2 / "run" / "größe-2", newer)
    for target in ("run/größe-2", r"run/gr\303\266\303\237e-2"):
        point(gpt2, target)
        assert_reads(gpt2, newer)


@pytest.mark.parametrize(
    "target", ["../124M/model.ckpt", "x/../../124M/model.ckpt", "..", r"..\\model", "", "/", ".", r"C:\\", r"a\0b"]
)
def test_the_state_file_never_leads_out(gpt2: Path, target: str) -> None:
    """`../124M/model.ckpt` would be found; it is refused all the same."""
    point(gpt2, target)
    with pytest.raises(FormatError, match=r"checkpoint: its model_checkpoint_path '.*' names no file in this folder"):
        TensorBundle(gpt2)


def test_an_absolute_path_elsewhere_is_not_followed(gpt2: Path, tmp_path: Path) -> None:
    write_bundle(tmp_path / "elsewhere" / "secret", {"w": np.ones(3, np.float32)})
    point(gpt2, str(tmp_path / "elsewhere" / "secret"))
    with pytest.raises(
        SourceError, match=r"it names the checkpoint '.*/elsewhere/secret', and there is no secret\.index"
    ):
        TensorBundle(gpt2)


def test_an_escape_that_is_no_number_stands_for_itself(gpt2: Path) -> None:
    point(gpt2, r"model\8.ckpt")
    with pytest.raises(SourceError, match=r"names the checkpoint 'model8\.ckpt', and there is no model8\.ckpt\.index"):
        TensorBundle(gpt2)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 500,
        b"no path here",
        b'all_model_checkpoint_paths: "m"',
        b'model_checkpoint_path: "broken',
        b'model_checkpoint_path: "\xff"',
        b'model_checkpoint_path: "' + b"\\8" * 10**5,
        b"\n" * 10**6,
        b" " * 10**6 + b"model",
    ],
    ids=range(9),
)
def test_a_file_that_is_no_checkpoint_is_refused_soon(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "checkpoint").write_bytes(content)
    start = time.process_time()
    with pytest.raises(FormatError, match="checkpoint: it is neither the index of a TensorFlow checkpoint nor a text"):
        TensorBundle(tmp_path)
    assert time.process_time() - start < 2


def test_a_folder_without_a_state_file(gpt2: Path) -> None:
    (gpt2 / "checkpoint").unlink()
    assert_reads(gpt2, gpt2_tensors())
    shutil.copy(gpt2 / "model.ckpt.index", gpt2 / "model-2.index")
    with pytest.raises(
        SourceError, match=r"holds 2 TensorFlow checkpoints .*: model-2\.index, model\.ckpt\.index\. Name"
    ):
        TensorBundle(gpt2)


@pytest.mark.parametrize("name", ["nothing", "x" * 5000, "a\0b", "124M/model", "124M/checkpoint/x"])
def test_what_is_not_there_is_said(gpt2: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(SourceError, match=r"there is no such file or folder|cannot be opened"):
        TensorBundle(tmp_path / name)
    with pytest.raises(SourceError, match="this folder holds no TensorFlow checkpoint"):
        TensorBundle(tmp_path)
