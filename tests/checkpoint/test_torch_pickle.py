"""The tensors of PyTorch files: what our reader says must be what torch saved, without a copy."""

from __future__ import annotations

import timeit
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hostile_pickle import mapping, number, pickled, storage, tensor, text, tuple_of, write_legacy, write_zip
from loadstone.checkpoint.torch_pickle import TorchPickle
from loadstone.errors import FormatError
from mapped import lies_in
from torch_files import FORMATS, TORCH_DTYPES, assert_same, bits, save

# -- tensors


@FORMATS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_dtype_shape_and_protocol(tmp_path: Path, is_zip: bool, protocol: int) -> None:
    torch.manual_seed(0)
    state = {}
    for key, dtype in TORCH_DTYPES.items():
        raw = torch.randint(0, 2 if dtype is torch.bool else 256, (7, 3, 16), dtype=torch.uint8)
        state[f"{key}.full"] = raw.view(dtype)
        state[f"{key}.scalar"] = raw.view(dtype)[2, 1, 0].clone()
        state[f"{key}.empty"] = torch.empty((3, 0, 2), dtype=dtype)
    checkpoint = save(tmp_path / "m.pt", state, is_zip, protocol)
    assert checkpoint.format == ("pytorch-zip" if is_zip else "pytorch-legacy")
    assert_same(checkpoint, state)
    assert not checkpoint.aliases
    assert not checkpoint.notes


@FORMATS
def test_views_stay_views(tmp_path: Path, is_zip: bool) -> None:
    base = torch.arange(60.0).reshape(3, 4, 5)
    state = {
        "base": base,
        "transposed": base.permute(2, 0, 1),
        "slice": base[1:, ::2, 3],
        "element": base[2, 3, 4],
        "expanded": base[:, :1, 0].expand(3, 7),
        "windows": base.reshape(-1).unfold(0, 8, 4),
        "one": base[:, 1:2].as_strided((1, 3), (999, 2), 5),
        "past_the_end": base.reshape(-1)[60:],
    }
    assert_same(save(tmp_path / "m.pt", state, is_zip), state)


def test_noncontiguous_tensors_are_not_copied(tmp_path: Path) -> None:
    base = torch.arange(60_000.0).reshape(12_000, 5)
    checkpoint = save(tmp_path / "m.pt", {"base": base, "t": base.T})
    t = checkpoint.read("t")
    assert t.strides == (4, 20)
    assert lies_in(t, tmp_path / "m.pt")


@st.composite
def strided(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Up to six views, of any strides, of one or two storages."""
    storages = [torch.randn(draw(st.integers(1, 50))) for _ in range(draw(st.integers(1, 2)))]
    state = {}
    for key in draw(st.lists(st.text(min_size=1), min_size=1, max_size=6, unique=True)):
        base = draw(st.sampled_from(storages))
        offset = draw(st.integers(0, len(base) - 1))
        shape, stride, room = [], [], len(base) - 1 - offset
        for _ in range(draw(st.integers(0, 4))):
            step = draw(st.integers(0, 6))
            size = draw(st.integers(0, 1 + (min(room // step, 4) if step else 4)))
            room -= max(0, size - 1) * step
            shape.append(size)
            stride.append(step)
        state[key] = base.as_strided(shape, stride, offset)
    return state


@settings(max_examples=60, deadline=None)
@given(state=strided(), is_zip=st.booleans(), protocol=st.integers(2, 5))
def test_any_strided_view_round_trips(
    tmp_path_factory: pytest.TempPathFactory, state: dict[str, torch.Tensor], is_zip: bool, protocol: int
) -> None:
    checkpoint = save(tmp_path_factory.mktemp("s") / "m.pt", {"model": state}, is_zip, protocol)
    assert_same(checkpoint, state)
    for tied, owner in checkpoint.aliases.items():
        assert state[tied].data_ptr() == state[owner].data_ptr()
        assert state[tied].shape == state[owner].shape


@FORMATS
def test_ties_are_told_and_half_ties_are_not(tmp_path: Path, is_zip: bool) -> None:
    w = torch.randn(4, 4)
    state = {"wte": w, "head": w, "again": w.view(4, 4), "equal": w.clone(), "turned": w.T, "flat": w.view(16)}
    checkpoint = save(tmp_path / "m.pt", state, is_zip)
    assert checkpoint.aliases == {"head": "wte", "again": "wte"}


@FORMATS
def test_parameters_and_buffers_with_attributes(tmp_path: Path, is_zip: bool) -> None:
    parameter, plain = nn.Parameter(torch.randn(2, 3)), torch.randn(4)
    parameter.note = plain.note = "kept by torch as Python state"  # type: ignore[attr-defined]
    state = {"p": parameter, "q": nn.Parameter(torch.randn(1), requires_grad=False), "t": plain}
    state["b"] = nn.Buffer(torch.randn(3))
    assert_same(save(tmp_path / "m.pt", state, is_zip), state)


def test_reading_maps_and_never_writes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"w": torch.zeros(4 << 20), "b": torch.zeros(1)}, path)
    before = path.read_bytes()
    tracemalloc.start()
    checkpoint = TorchPickle(path)
    first, second = checkpoint.read("w"), checkpoint.read("w")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20, "16 MiB of weights were copied"
    assert lies_in(first, path)
    first[:] = 7  # as training does
    assert second[-1] == 0
    assert path.read_bytes() == before
    assert TorchPickle(path).read("w")[0] == 0
    torch.from_numpy(first).mul_(2)


def test_opening_is_fast(tmp_path: Path) -> None:
    """1500 tensors take 45 ms, 500 take 15 ms; the bounds leave room for a loaded one."""
    for count, bound in ((500, 0.2), (1500, 0.6)):
        torch.save({f"transformer.h.{i}.attn.weight": torch.zeros(2, 3) for i in range(count)}, tmp_path / "m.pt")
        assert min(timeit.repeat(lambda: TorchPickle(tmp_path / "m.pt"), number=1, repeat=3)) < bound


# -- the container


def rezip(
    source: Path, target: Path, compression: int = zipfile.ZIP_STORED, replaced: dict[str, bytes] | None = None
) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for entry in old.namelist():
            new.writestr(entry, (replaced or {}).get(entry.split("/", 1)[1], old.read(entry)))
    return target


def test_a_rezipped_compressed_file_reads_the_same(tmp_path: Path) -> None:
    base = torch.arange(600.0).reshape(20, 30)
    state = {"base": base, "t": base.T, "half": torch.randn(5).half(), "none": torch.empty(0)}
    torch.save(state, tmp_path / "m.pt")
    checkpoint = TorchPickle(rezip(tmp_path / "m.pt", tmp_path / "z.pt", zipfile.ZIP_DEFLATED))
    assert_same(checkpoint, state)
    checkpoint.read("base")[0, 0] = 7  # writeable as all others are


def test_damage_inside_a_compressed_storage_is_found(tmp_path: Path) -> None:
    torch.save({"w": torch.randn(100)}, tmp_path / "m.pt")
    path = rezip(tmp_path / "m.pt", tmp_path / "z.pt", zipfile.ZIP_DEFLATED)
    raw = bytearray(path.read_bytes())
    raw[raw.rindex(b"m/data/0") - 46 + 16] ^= 1  # the checksum, in the directory
    path.write_bytes(raw)
    with pytest.raises(FormatError, match="does not decompress to its declared 400 bytes"):
        TorchPickle(path).read("w")


def test_zip_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickled(mapping(w=tensor(storage(numel=1 << 20), 0, (1 << 20,), (1,)))))
        archive.writestr("archive/data/0", bytes(1 << 26))
    tracemalloc.start()
    with pytest.raises(FormatError, match="storage '0' has 67,108,864 bytes; its pickle says 4,194,304"):
        TorchPickle(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    monkeypatch.setattr("loadstone.checkpoint.torch_archive.MAX_INFLATED", 1 << 20)
    weights = pickled(mapping(w=tensor(storage(numel=1 << 18), 0, (1,), (1,))))
    for name in ("data.pkl", "data/0"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for entry, content in ({"data.pkl": weights} | {name: bytes((1 << 20) + 1)}).items():
                archive.writestr(f"archive/{entry}", content)
        with pytest.raises(FormatError, match=f"its entry archive/{name} declares 1,048,577 bytes and stores 1,"):
            TorchPickle(path)


def test_unaligned_storages_are_copied_not_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(5.0)}, tmp_path / "m.pt")
    path = rezip(tmp_path / "m.pt", tmp_path / "longer-name.pt")
    assert_same(TorchPickle(path), {"w": torch.arange(5.0)})


def test_checksums_that_torch_was_told_to_leave_out(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        assert_same(save(tmp_path / "m.pt", {"w": torch.ones(3)}), {"w": torch.ones(3)})
    finally:
        torch.serialization.set_crc32_options(True)


@pytest.mark.parametrize("key", ["float32", "bfloat16", "int64", "complex64", "uint8", "bool", "float64"])
def test_big_endian_files(tmp_path: Path, key: str) -> None:
    value = torch.arange(6).to(TORCH_DTYPES[key])
    torch.save({"w": value, "t": value.reshape(2, 3).T}, tmp_path / "m.pt")
    width = value.element_size() // (2 if value.is_complex() else 1)
    turned = np.frombuffer(bits(value), np.uint8).reshape(-1, width)[:, ::-1].tobytes()
    path = rezip(tmp_path / "m.pt", tmp_path / "big.pt", replaced={"byteorder": b"big", "data/0": turned})
    expected = torch.load(path, weights_only=True)
    assert torch.equal(expected["w"], value)
    assert_same(TorchPickle(path), expected)


def test_views_of_storages_that_torch_wrote_long_ago(tmp_path: Path) -> None:
    """The sixth field of a persistent id: (key, first element, elements) of a view of the storage."""
    pid = storage(view=tuple_of(text("v"), number(2), number(3)))
    path = write_legacy(tmp_path / "m.pt", mapping(w=tensor(pid, 1, (2,), (1,))))
    assert TorchPickle(path).read("w").tolist() == [4, 5]
    assert torch.load(path, weights_only=True)["w"].tolist() == [4, 5]
    longer = write_legacy(tmp_path / "m.pt", mapping(w=tensor(pid, 1, (3,), (1,))))
    with pytest.raises(FormatError, match=r"tensor 'w': it ends at byte 16 of storage '0', which has 12 bytes"):
        TorchPickle(longer)


def test_a_zip_by_hand_reads_as_torch_reads_it(tmp_path: Path) -> None:
    """The hostile tests bend this file; straight, it is a good checkpoint."""
    for path in (
        write_zip(tmp_path / "z.pt", mapping(w=tensor())),
        write_legacy(tmp_path / "l.pt", mapping(w=tensor(storage(view=b"N")))),
    ):
        assert_same(TorchPickle(path), torch.load(path, weights_only=True))
