"""Sizes explained: the parts add up to the real size of the files, to the byte, in every format."""

from __future__ import annotations

import functools
import json
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import dialects
from bundle_writer import of, write_bundle, write_raw
from gguf_files import STRING, U32, gguf_file, pair, strings, tensor
from gguf_files import text as gguf_text
from loadstone.checkpoint import open_checkpoint
from loadstone.checkpoint.layout import UNCLAIMED, layout
from loadstone.checkpoint.wording import size_text
from loadstone.checkpoint.write_torch import write_torch as streaming_writer
from loadstone.config import PRESETS
from loadstone.errors import FormatError, LoadstoneError
from loadstone.sizes import Sizes, why_size, why_size_lines
from loadstone.weightmap import identify, parameter_shapes
from memory import MemoryCheckpoint
from model_files import GPT2, tensors_of, write_gguf, write_hf, write_openai, write_torch
from torch_files import training_checkpoint


def explained(path: Path, *, recognised: bool = True, heads: int = 4) -> Sizes:
    """The explanation, after the law: the parts are the files, whole and once."""
    checkpoint = open_checkpoint(path)
    identity = identify(checkpoint, overrides={"n_heads": heads}) if recognised else None
    sizes = why_size(checkpoint, identity, folder=path if path.is_dir() else None)
    assert sum(part.nbytes for part in sizes.parts) == sizes.nbytes
    assert all(part.nbytes > 0 for part in sizes.parts)
    runs = layout(checkpoint)
    for file in {run.file for run in runs}:
        assert sum(run.nbytes for run in runs if run.file == file) == file.stat().st_size
    json.dumps(sizes.as_dict())
    assert str(path) in next(why_size_lines(sizes))
    return sizes


def parts(sizes: Sizes) -> dict[str, int]:
    return {part.what: part.nbytes for part in sizes.parts}


WEIGHTS = sum(array.nbytes for array in GPT2.values())


# -- every format


@pytest.mark.parametrize("name", ["hf", "zip", "legacy", "gguf", "bundle", "training"])
def test_every_format_adds_up(tmp_path: Path, name: str) -> None:
    write: dict[str, Callable[[Path], Path]] = {
        "hf": lambda path: write_hf(path),
        "zip": lambda path: write_torch(path, tensors_of(dialects.gpt2_raschka(GPT2))),
        "legacy": lambda path: write_torch(path, tensors_of(dialects.gpt2_raschka(GPT2)), legacy=True),
        "gguf": write_gguf,
        "bundle": write_openai,
        "training": lambda path: write_torch(path, {"model": tensors_of(GPT2), "step": 3}),
    }
    path = write[name](tmp_path / name)
    sizes = explained(path)
    assert sizes.groups["weights"] == WEIGHTS
    assert UNCLAIMED not in parts(sizes)
    assert explained(path, recognised=False).nbytes == sizes.nbytes


def test_the_structure_of_a_safetensors_file_is_its_header(tmp_path: Path) -> None:
    path = write_hf(tmp_path) / "model.safetensors"
    found = parts(explained(path))
    assert found["header: names, types, shapes and places"] == path.stat().st_size - WEIGHTS


def test_a_gguf_is_taken_apart_to_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "w.gguf"
    words = ["<s>", "hello", "Ġworld"]
    pairs = [
        pair("general.architecture", STRING, gguf_text("gpt2")),
        pair("general.alignment", U32, (64).to_bytes(4, "little")),
        pair("tokenizer.ggml.tokens", 9, strings(words)),
    ]
    infos = [tensor("a", [3], 0, 0), tensor("b", [2], 0, 64)]
    path.write_bytes(gguf_file(pairs, infos, bytes(64) + bytes(8), alignment=64) + b"?" * 100)
    found = parts(explained(path, recognised=False))
    assert (found["a"], found["b"]) == (12, 8)
    assert found["vocabulary and tokenizer"] == len(pairs[2])
    assert found["metadata"] == 24 + len(pairs[0]) + len(pairs[1])
    assert found["names, types, shapes and places of the tensors"] == sum(map(len, infos))
    header = 24 + sum(map(len, pairs)) + sum(map(len, infos))
    assert found["padding to multiples of 64 bytes"] == -header % 64 + (64 - 12) + (64 - 8)
    assert found[UNCLAIMED] == 100 - (64 - 8)


def test_a_zip_is_taken_apart_to_its_records(tmp_path: Path) -> None:
    path = write_torch(tmp_path / "m.pth", tensors_of(GPT2))
    found = parts(explained(path))
    with zipfile.ZipFile(path) as archive:
        infos = {info.filename.split("/", 1)[1]: info.file_size for info in archive.infolist()}
    assert found["pickle: names, types, shapes and plain values"] == infos.pop("data.pkl")
    assert found["small zip records"] == sum(size for name, size in infos.items() if not name.startswith("data/"))
    assert UNCLAIMED not in found


def test_what_no_record_of_a_zip_describes_is_called_that(tmp_path: Path) -> None:
    path = write_torch(tmp_path / "m.pth", tensors_of(GPT2))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("note.txt", b"x" * 1000)
    before = explained(path)
    raw = path.read_bytes()
    start = raw.rindex(b"PK\1\2", 0, raw.index(b"PK\1\2") + 4)  # the directory moves down by ten bytes of nothing
    end = raw.rindex(b"PK\5\6")
    offset = int.from_bytes(raw[end + 16 : end + 20], "little") + 10
    path.write_bytes(raw[:start] + bytes(10) + raw[start : end + 16] + offset.to_bytes(4, "little") + raw[end + 20 :])
    assert parts(explained(path)) == parts(before) | {UNCLAIMED: 10}


def test_a_compressed_zip_costs_what_it_stores(tmp_path: Path) -> None:
    plain, packed = write_torch(tmp_path / "m.pth", tensors_of(GPT2)), tmp_path / "packed.pth"
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info))
    sizes = explained(packed)
    assert 0 < sizes.groups["weights"] < WEIGHTS


def test_optimizer_states_are_twice_the_weights(tmp_path: Path) -> None:
    _, state = training_checkpoint()
    path = write_torch(tmp_path / "ckpt.pt", state)
    found = parts(explained(path, recognised=False))
    model = sum(t.numel() * 4 for name, t in state["model"].items() if "running" not in name and "num" not in name)
    assert found["optimizer state: exp_avg"] == found["optimizer state: exp_avg_sq"] == model
    assert found["optimizer state: step"] == 4 * 5
    assert found["tensors under 'rng'"] == state["rng"]["torch"].numel()
    (saving,) = [s for s in explained(path, recognised=False).savings if "training state" in s.what]
    assert saving.nbytes == 2 * model + 20


@pytest.mark.parametrize("legacy", [False, True])
def test_storages_that_are_larger_than_their_tensors(tmp_path: Path, legacy: bool) -> None:
    """The pitfall of torch.save: a slice is saved with the whole that it was cut from. Views of one cost once."""
    whole, shared = torch.arange(1000.0), torch.arange(600.0).reshape(20, 30)
    state = {"slice": whole[:10], "left": shared[:, :10], "right": shared[:, 10:], "all": shared, "same": shared}
    found = parts(explained(write_torch(tmp_path / "m.pth", state, legacy), recognised=False))
    assert found["slice"] == 40
    assert found["parts of storages that no tensor uses"] == 3960
    assert (found["left"], found["right"]) == (800, 1600)
    assert "all" not in found
    assert "same" not in found


def test_optimizer_slots_of_tensorflow(tmp_path: Path) -> None:
    arrays = dialects.gpt2_openai(GPT2)
    slots = {f"{name}/{slot}": np.zeros_like(value) for name, value in arrays.items() for slot in ("Adam", "Adam_1")}
    write_bundle(tmp_path / "model.ckpt", arrays | slots | {"global_step": np.array(7)}, shards=2)
    sizes = explained(tmp_path)
    assert sizes.groups["training state"] == 2 * WEIGHTS + 8
    assert sizes.groups["weights"] == WEIGHTS


def test_what_a_bundle_shares_holds_besides_numbers_and_leaves_unsaid(tmp_path: Path) -> None:
    values = np.ones(2, np.float32)
    entries = {b"head": of(values), b"wte": of(values), b"graph": of(b"object graph", 7, (), offset=8)}
    write_raw(tmp_path, entries, values.tobytes() + b"object graph" + bytes(5))
    sizes = explained(tmp_path / "m.index", recognised=False)
    found = parts(sizes)
    assert (found["head"], found["string values, which are no numbers"], found[UNCLAIMED]) == (8, 12, 5)
    assert "wte" not in found
    assert sizes.free == (1, 8)


# -- several files


def shards(folder: Path, arrays: Mapping[str, Any], **metadata: str) -> None:
    names = sorted(arrays)
    files = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, held in files.items():
        save_file({name: arrays[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in files.items() for name in held}
    index = {"metadata": metadata, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_and_their_index(tmp_path: Path) -> None:
    shards(tmp_path, GPT2, **{"lm_head.weight": "wte.weight"})
    write_hf(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    sizes = explained(tmp_path)
    assert sizes.nbytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert parts(sizes)["index of the shards"] == (tmp_path / "model.safetensors.index.json").stat().st_size
    assert parts(sizes)["config.json"] == (tmp_path / "config.json").stat().st_size
    assert sizes.free == (1, GPT2["wte.weight"].nbytes)


def test_a_folder_with_other_weights_and_folders(tmp_path: Path) -> None:
    write_hf(tmp_path)
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(bytes(777))
    write_torch(tmp_path / "pytorch_model.bin", tensors_of(GPT2))
    (tmp_path / "again.safetensors").hardlink_to(tmp_path / "model.safetensors")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    sizes = explained_folder(tmp_path)
    found = parts(sizes)
    assert found["onnx/model.onnx"] == 777
    assert found["pytorch_model.bin"] == (tmp_path / "pytorch_model.bin").stat().st_size
    assert not {"again.safetensors", "loop", "gone"} & found.keys()
    assert sizes.nbytes == sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file() and f.name[0] != "a")


def explained_folder(path: Path) -> Sizes:
    checkpoint = open_checkpoint(path)
    return why_size(checkpoint, identify(checkpoint), folder=path)


def test_the_hubs_cache_of_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    write_hf(tmp_path / "plain")
    for number, file in enumerate(sorted((tmp_path / "plain").iterdir())):
        shutil.move(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    sizes = explained(snapshot)
    assert sizes.nbytes == sum(blob.stat().st_size for blob in blobs.iterdir())


def test_split_ggufs(tmp_path: Path) -> None:
    for number in range(2):
        keys = [pair("split.no", U32, number.to_bytes(4, "little")), pair("split.count", U32, b"\2\0\0\0")]
        raw = gguf_file(keys, [tensor(f"w{number}", [8], 0, 0)], bytes(32))
        (tmp_path / f"m-0000{number + 1}-of-00002.gguf").write_bytes(raw)
    sizes = explained(tmp_path, recognised=False)
    assert sizes.nbytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert parts(sizes)["w#"] == 64


# -- what it says


def test_masks_copies_types_and_what_could_be_saved(tmp_path: Path) -> None:
    arrays = dialects.gpt2_raschka(GPT2)
    sizes = explained(write_torch(tmp_path / "m.pth", tensors_of(arrays)))
    head, masks = GPT2["wte.weight"].nbytes, 3 * 40 * 40 * 4
    assert sizes.groups["second copy of the embedding"] == head
    assert sizes.groups["buffers"] == masks
    assert [(s.nbytes, s.exact) for s in sizes.savings] == [(masks, True), (head, True), (WEIGHTS // 2, False)]
    lines = list(why_size_lines(sizes))
    left = sizes.nbytes - sum(saving.nbytes for saving in sizes.savings)
    assert lines[-1].endswith(f"leaves {size_text(left, tenths_below=1000)}")
    other = arrays | {"out_head.weight": arrays["out_head.weight"] * 2}
    sizes = explained(write_torch(tmp_path / "untied.pth", tensors_of(other)))
    assert "second copy of the embedding" not in sizes.groups
    assert parts(sizes)["head"] == head


def test_a_tied_storage_costs_nothing(tmp_path: Path) -> None:
    state = tensors_of(GPT2)
    sizes = explained(write_torch(tmp_path / "m.pth", state | {"lm_head.weight": state["wte.weight"]}))
    assert sizes.groups["weights"] == WEIGHTS
    assert sizes.free == (1, GPT2["wte.weight"].nbytes)
    assert any("free: 1 x another name" in line for line in why_size_lines(sizes))


def test_an_alias_that_is_stored_under_the_heads_name(tmp_path: Path) -> None:
    """safetensors keeps the one and records the other; which of them is up to the writer."""
    arrays = {("lm_head.weight" if name == "wte.weight" else name): value for name, value in GPT2.items()}
    write_hf(tmp_path, arrays)
    save_file(arrays, tmp_path / "model.safetensors", {"wte.weight": "lm_head.weight"})
    assert explained(tmp_path).groups["weights"] == WEIGHTS


def test_types_are_apart_and_leftovers_named(tmp_path: Path) -> None:
    mixed = {name: value.astype(ml_dtypes.bfloat16) if value.ndim > 1 else value for name, value in GPT2.items()}
    write_hf(tmp_path, mixed | {"adapter.3.weight": np.zeros(500, np.float32)})
    sizes = explained(tmp_path)
    kinds = {(part.what, part.dtype) for part in sizes.parts if part.group == "weights"}
    assert {("attention", "bfloat16"), ("attention", "float32")} <= kinds
    assert sizes.groups["unused"] == 2000
    assert any("nothing uses" in saving.what for saving in sizes.savings)
    checkpoint = open_checkpoint(tmp_path)
    given_up = why_size(checkpoint, identify(checkpoint, ignore=["adapter.3.weight"]))
    assert given_up.groups["unused"] == 2000


def test_a_checkpoint_in_memory_has_no_size() -> None:
    with pytest.raises(LoadstoneError, match="lies in no file"):
        why_size(MemoryCheckpoint(GPT2))


# -- document 000's file, and its siblings


GPT2_124M = parameter_shapes(PRESETS["gpt2"])
RASCHKA = {
    "blocks": "trf_blocks", "norm1.weight": "norm1.scale", "norm1.bias": "norm1.shift", "norm2.weight": "norm2.scale",
    "norm2.bias": "norm2.shift", "attn.q": "att.W_query", "attn.k": "att.W_key", "attn.v": "att.W_value",
    "attn.out": "att.out_proj", "mlp.up": "ff.layers.0", "mlp.down": "ff.layers.2",
}  # fmt: skip


def raschka_124m() -> dict[str, Any]:
    """The tensors of the file that document 000 downloads, all zeros, which take no memory before they are touched."""
    shapes = {}
    for name, shape in GPT2_124M.items():
        for old, new in RASCHKA.items():
            name = name.replace(old, new)
        if name.startswith("norm."):
            name = "final_norm." + {"weight": "scale", "bias": "shift"}[name[5:]]
        shapes[name] = shape
    shapes |= {f"trf_blocks.{i}.att.mask": (1024, 1024) for i in range(12)}
    return {name: np.zeros(shape, np.float32) for name, shape in (shapes | {"out_head.weight": (50257, 768)}).items()}


def test_why_document_000s_file_has_703_mb(tmp_path: Path) -> None:
    """497.8 MB of weights, 154.4 MB of a duplicated head, 50.3 MB of causal masks."""
    path = tmp_path / "gpt2_124M.pth"
    streaming_writer(MemoryCheckpoint(raschka_124m()), path)  # leaves holes for zeros
    checkpoint = open_checkpoint(path)
    sizes = why_size(checkpoint, identify(checkpoint))
    assert sizes.nbytes == path.stat().st_size
    assert sizes.groups["weights"] == 124_439_808 * 4
    assert sizes.groups["second copy of the embedding"] == 38_597_376 * 4
    assert sizes.groups["buffers"] == 12 * 1024 * 1024 * 4
    first, second, *lines = why_size_lines(sizes)
    assert f"702.5 MB, {sizes.nbytes:,} bytes" in first
    assert second.startswith("= 497.8 MB weights + 154.4 MB second copy of the embedding + 50.3 MB buffers + ")
    assert sum(line.startswith("could be saved") for line in lines) == 3
    assert lines[-1].endswith("leaves 248.9 MB")


def sparse_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A file of zeros that takes no room on the disk, its header as the library pads it."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * int(np.prod(shape))
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps({"__metadata__": {"format": "pt"}} | entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return path


@pytest.mark.parametrize(("masks", "megabytes"), [(12, "548.1 MB"), (0, "497.8 MB")])
def test_the_sizes_of_huggingfaces_gpt2(tmp_path: Path, masks: int, megabytes: str) -> None:
    tiny = dialects.gpt2_hf(vocab=50257, context=1024, width=2, layers=12, d_ff=8)
    wide = {2: 768, 6: 2304, 8: 3072}
    shapes: dict[str, tuple[int, ...]] = {
        name: tuple(wide.get(dim, dim) for dim in map(int, array.shape)) for name, array in tiny.items()
    }
    shapes |= {f"h.{i}.attn.bias": (1, 1, 1024, 1024) for i in range(masks)}
    sizes = explained(sparse_safetensors(tmp_path / "model.safetensors", shapes), heads=12)
    assert sizes.groups["weights"] == 124_439_808 * 4
    assert sizes.groups.get("buffers", 0) == masks * 1024 * 1024 * 4
    assert f": {megabytes}, " in next(why_size_lines(sizes))


# -- hostile files


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["safetensors", "zip", "legacy", "gguf"]), st.data())
def test_damaged_files_add_up_too_or_are_refused(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    raw = bytearray(damageable(kind, tmp_path_factory.getbasetemp()))
    for _ in range(data.draw(st.integers(1, 4))):
        near_an_end = data.draw(st.integers(0, min(1500, len(raw) - 1)))
        raw[-1 - near_an_end if data.draw(st.booleans()) else near_an_end] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / f"damaged.{kind}"
    path.write_bytes(raw)
    try:
        checkpoint = open_checkpoint(path)
        sizes = why_size(checkpoint)
    except LoadstoneError:
        return
    assert sizes.nbytes == len(raw)
    assert all(part.nbytes > 0 for part in sizes.parts)
    list(why_size_lines(sizes))


@functools.cache
def damageable(kind: str, folder: Path) -> bytes:
    path = folder / f"whole.{kind}"
    arrays: dialects.Tensors = {"a.weight": np.arange(30, dtype=np.float32), "b": np.ones((3, 4), np.float16)}
    if kind == "safetensors":
        save_file(arrays, path)
    elif kind == "gguf":
        infos = [tensor("a.weight", [30], 0, 0), tensor("b", [4, 3], 1, 128)]
        path.write_bytes(gguf_file([pair("tokenizer.x", STRING, gguf_text("y"))], infos, bytes(128 + 24)))
    else:
        optimizer = {"state": {0: {"exp_avg": torch.zeros(30)}}}
        write_torch(path, {"model": tensors_of(arrays), "optimizer": optimizer}, legacy=kind == "legacy")
    return path.read_bytes()


def test_records_that_overlap_are_refused(tmp_path: Path) -> None:
    path = write_torch(tmp_path / "m.pth", tensors_of(GPT2))
    raw = bytearray(path.read_bytes())
    entry = raw.rindex(b"PK\1\2", 0, raw.index(b"/version", raw.index(b"PK\1\2")))
    raw[entry + 20 : entry + 28] = (100_000).to_bytes(4, "little") * 2
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=r"its parts overlap: together they have 99,9\d\d bytes more than the file"):
        layout(open_checkpoint(path))
