"""Sharded checkpoints and split GGUF files: the index and the shards must agree, both ways."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub import save_torch_state_dict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from gguf_files import STRING, U16, gguf_file, pair, tensor, text
from loadstone.checkpoint import open_checkpoint
from loadstone.checkpoint.gguf import Gguf
from loadstone.errors import FormatError, LoadstoneError

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_index(folder: Path, weight_map: Any, metadata: Any = None) -> Path:
    path = folder / INDEX
    path.write_text(json.dumps({"metadata": metadata or {"total_size": 12}, "weight_map": weight_map}))
    return path


def pair_of_shards(folder: Path) -> Path:
    save_file({"a": np.ones(2, np.float32), "b": np.zeros(1, np.float32)}, folder / ONE, {"format": "pt"})
    save_file({"c": np.full(3, 3, np.float32)}, folder / TWO, {"format": "pt", "of": "two"})
    return write_index(folder, {"a": ONE, "b": ONE, "c": TWO})


def test_shards_read_as_one(tmp_path: Path) -> None:
    index = pair_of_shards(tmp_path)
    for path in (index, tmp_path):
        found = open_checkpoint(path)
        assert found.path == index
        assert found.format == "safetensors"
        assert {name: found.read(name).tolist() for name in found.names()} == {"a": [1, 1], "b": [0], "c": [3, 3, 3]}
        assert [found.info(name).file for name in "abc"] == [ONE, ONE, TWO]
        assert found.metadata == {"format": "pt", "of": "two", "total_size": 12}
        assert (found.aliases, found.notes) == ({}, [])
    with pytest.raises(LoadstoneError, match=r"index.json: there is no tensor 'd' among its 3"):
        found.read("d")


def test_what_huggingface_hub_writes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {f"layer.{i}.weight": torch.randn(8, 8) for i in range(6)}
    state["head.weight"] = state["layer.0.weight"]
    for folder, safe in ((tmp_path / "safe", True), (tmp_path / "torch", False)):
        folder.mkdir()
        save_torch_state_dict(dict(state), folder, max_shard_size=600, safe_serialization=safe)
        found = open_checkpoint(folder)
        assert len({info.file for info in found.tensors.values()}) > 1
        assert set(found.names()) == set(state)
        for name, weight in state.items():
            assert np.array_equal(found.read(name), weight.numpy()), name
        assert list(found.aliases.items()) in ([("head.weight", "layer.0.weight")], [("layer.0.weight", "head.weight")])


def test_an_alias_of_one_shard_may_be_stored_in_another(tmp_path: Path) -> None:
    save_file({"a": np.ones(1, np.float32)}, tmp_path / ONE, {"b": "a", "z": "a"})
    save_file({"b": np.zeros(1, np.float32)}, tmp_path / TWO)
    found = open_checkpoint(write_index(tmp_path, {"a": ONE, "b": TWO}))
    assert found.aliases == {"z": "a"}
    assert (found.read("b").tolist(), found.read("z").tolist()) == ([0], [1])
    assert "z" in open_checkpoint(write_index(tmp_path, {"a": ONE, "b": TWO, "z": ONE})).tensors
    with pytest.raises(FormatError, match=rf"1 tensors are listed but are not in their shard: 'z' \({TWO}\)"):
        open_checkpoint(write_index(tmp_path, {"a": ONE, "b": TWO, "z": TWO}))


def test_writing_never_reaches_the_files(tmp_path: Path) -> None:
    found = open_checkpoint(pair_of_shards(tmp_path))
    before = (tmp_path / TWO).read_bytes()
    found.read("c")[:] = 7
    assert found.read("c").tolist() == [3, 3, 3]
    assert (tmp_path / TWO).read_bytes() == before


def test_links_as_in_huggingfaces_cache(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    pair_of_shards(blobs)
    for number, name in enumerate((INDEX, ONE, TWO)):
        (blobs / name).rename(blobs / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    assert open_checkpoint(snapshot / INDEX).read("c").tolist() == [3, 3, 3]
    assert open_checkpoint(snapshot).names() == ["a", "b", "c"]
    assert open_checkpoint(snapshot).notes == []


def test_an_index_leads_nowhere_else(tmp_path: Path) -> None:
    """Not through a link either, but for links to where a link to the index itself leads."""
    private, folder = tmp_path / "private", tmp_path / "folder"
    private.mkdir()
    folder.mkdir()
    pair_of_shards(private)
    for name in (INDEX, ONE, TWO):
        (folder / name).symlink_to(private / name)
    assert open_checkpoint(folder).read("c").tolist() == [3, 3, 3]
    assert open_checkpoint(folder).notes == [f"{INDEX} is a link to {private / INDEX}"]
    (folder / INDEX).unlink()
    shutil.copy(private / INDEX, folder / INDEX)
    where = rf"index.json: it names '{ONE}', which is a link out of its folder, to {private / ONE}, and Loadstone does"
    with pytest.raises(FormatError, match=where):
        open_checkpoint(folder)
    (folder / ONE).unlink()
    (folder / "inside").mkdir()
    shutil.copy(private / ONE, folder / "inside" / "x")
    (folder / ONE).symlink_to("inside/x")
    with pytest.raises(FormatError, match=f"it names '{TWO}'"):
        open_checkpoint(folder)
    (folder / TWO).unlink()
    (folder / TWO).symlink_to("/dev/zero")
    with pytest.raises(FormatError, match="which is a link out of its folder, to /dev/zero"):
        open_checkpoint(folder)
    (folder / TWO).unlink()
    (folder / TWO).symlink_to(TWO)  # a loop
    with pytest.raises(FormatError, match="1 of its 2 shards are missing"):
        open_checkpoint(folder)


def test_a_link_that_the_user_has_is_followed_and_told(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "folder").mkdir()
    save_file({"a": np.ones(1, np.float32)}, tmp_path / "disk" / "x.safetensors")
    (tmp_path / "folder" / "model.safetensors").symlink_to(tmp_path / "disk" / "x.safetensors")
    found = open_checkpoint(tmp_path / "folder")
    assert found.read("a").tolist() == [1]
    assert found.notes == [f"model.safetensors is a link to {tmp_path / 'disk' / 'x.safetensors'}"]


def test_all_disagreements_are_listed_at_once(tmp_path: Path) -> None:
    pair_of_shards(tmp_path)
    missing = {f"m{i}": f"gone-{i}.safetensors" for i in range(9)}
    index = write_index(tmp_path, {"a": ONE, "x": ONE, "b": TWO, "c": TWO} | missing)
    with pytest.raises(FormatError) as caught:
        open_checkpoint(index)
    text = str(caught.value)
    assert "9 of its 11 shards are missing: 'gone-0.safetensors', " in text
    assert "'gone-3.safetensors' and 5 more; " in text
    assert f"2 tensors are listed but are not in their shard: 'x' ({ONE}), 'b' ({TWO}); " in text
    assert f"1 tensors are in a shard but are not listed there: 'b' ({ONE}), which is listed in {TWO}." in text
    assert text.endswith("Download the missing or changed files again, index included.")


def test_a_name_in_two_shards(tmp_path: Path) -> None:
    index = pair_of_shards(tmp_path)
    shutil.copy(tmp_path / ONE, tmp_path / TWO)
    with pytest.raises(FormatError, match=rf"2 tensors are in a shard .*: 'a' \({TWO}\), which is listed in {ONE}"):
        open_checkpoint(index)


def test_a_tensor_that_the_index_does_not_list(tmp_path: Path) -> None:
    pair_of_shards(tmp_path)
    with pytest.raises(FormatError, match=rf"1 tensors are in a shard but are not listed there: 'b' \({ONE}\)\."):
        open_checkpoint(write_index(tmp_path, {"a": ONE, "c": TWO}))


def test_shards_of_different_formats(tmp_path: Path) -> None:
    pair_of_shards(tmp_path)
    torch.save({"c": torch.ones(3)}, tmp_path / TWO)
    with pytest.raises(FormatError, match=r"its shards have different formats: pytorch-zip, safetensors"):
        open_checkpoint(tmp_path / INDEX)


def test_a_broken_shard_is_named(tmp_path: Path) -> None:
    index = pair_of_shards(tmp_path)
    (tmp_path / TWO).write_bytes((tmp_path / TWO).read_bytes()[:-1])
    with pytest.raises(FormatError, match=rf"{TWO}: it is truncated by 1 bytes, at tensor 'c'"):
        open_checkpoint(index)
    (tmp_path / TWO).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n")
    with pytest.raises(FormatError, match=rf"{TWO}: this is a git-LFS pointer"):
        open_checkpoint(index)


def test_a_shard_is_never_an_index(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="this is the index of a sharded checkpoint"):
        open_checkpoint(write_index(tmp_path, {"a": INDEX}))


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "C:\\x", "x\0y", "./x", "sub/../x", "\n/../x"]
)
def test_a_shards_name_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    save_file({"a": np.ones(1, np.float32)}, tmp_path / "x")
    with pytest.raises(FormatError, match=r"a shard is a plain file name in the index's own folder. Do not trust it"):
        open_checkpoint(write_index(folder, {"a": name}))


BROKEN = {
    "empty map": ('{"weight_map": {}}', 'has a "weight_map" from tensor names to file names'),
    "a list": ('{"weight_map": ["a"]}', 'has a "weight_map"'),
    "numbers": ('{"weight_map": {"a": 1}}', 'has a "weight_map"'),
    "inside": ('{"x": {"weight_map": {"a": "b"}}}', 'has a "weight_map"'),
    "array": ('[{"weight_map": {"a": "b"}}]', 'has a "weight_map"'),
    "twice": ('{"weight_map": {"a": "b", "a": "c"}}', "it is not a valid JSON index: listed twice: 'a'"),
    "truncated": ('{"weight_map": {"a": "b"', "it is not a valid JSON index"),
    "deep": ('{"weight_map": ' + "[" * 100_000, "it is not a valid JSON index"),
    "long number": ('{"weight_map": {}, "x": ' + "9" * 5000 + "}", "it is not a valid JSON index|has a"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_index_is_explained(tmp_path: Path, case: str) -> None:
    raw, message = BROKEN[case]
    (tmp_path / INDEX).write_text(raw)
    with pytest.raises(FormatError, match=message):
        open_checkpoint(tmp_path / INDEX)


def test_a_map_with_many_repeated_or_missing_names_is_refused_quickly(tmp_path: Path) -> None:
    names = ",".join(f'"t{i}":"f{i}"' for i in range(30_000))
    (tmp_path / INDEX).write_text(f'{{"weight_map":{{{names},"z":"1","z":"2"}}}}')
    with pytest.raises(FormatError, match="listed twice: 'z'"):
        open_checkpoint(tmp_path / INDEX)
    (tmp_path / INDEX).write_text(f'{{"weight_map":{{{names}}}}}')
    with pytest.raises(FormatError, match="30000 of its 30000 shards are missing"):
        open_checkpoint(tmp_path / INDEX)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.text(max_size=3), st.sampled_from("123"), max_size=8),
    st.dictionaries(st.text(max_size=3), st.sampled_from("123"), max_size=2),
)
def test_accepted_if_and_only_if_index_and_shards_agree(
    tmp_path: Path, stored: dict[str, str], changed: dict[str, str]
) -> None:
    stored = {name: file for name, file in stored.items() if name != "__metadata__"}
    for file in "123":
        save_file({name: np.array([ord(f)]) for name, f in stored.items() if f == file}, tmp_path / file)
    listed = stored | changed
    index = write_index(tmp_path, listed)
    if listed == stored and listed:
        found = open_checkpoint(index)
        assert {name: chr(found.read(name)[0]) for name in found.names()} == stored
    else:
        with pytest.raises(FormatError):
            open_checkpoint(index)


# -- split files


def split(folder: Path, parts: list[dict[str, float]], **wrong: int) -> list[Path]:
    paths = []
    for number, names in enumerate(parts):
        pairs = [
            pair("split.no", U16, struct.pack("<H", number)),
            pair("split.count", U16, struct.pack("<H", wrong.get("count", len(parts)))),
            pair("split.tensors.count", 5, struct.pack("<i", wrong.get("tensors", sum(map(len, parts))))),
        ]
        if number == 0:
            pairs.append(pair("general.name", STRING, text("whole")))
        infos = [tensor(name, [1], 0, 32 * i) for i, name in enumerate(names)]
        data = b"".join(struct.pack("<f28x", value) for value in names.values())
        paths.append(folder / f"m-{number + 1:05d}-of-{len(parts):05d}.gguf")
        paths[-1].write_bytes(gguf_file(pairs, infos, data))
    return paths


def test_a_split_file_opens_whole_through_any_part(tmp_path: Path) -> None:
    paths = split(tmp_path, [{"a": 1}, {"b": 2, "c": 3}, {"d": 4}])
    for path in (*paths, tmp_path):
        found = open_checkpoint(path)
        assert found.path == paths[0]
        assert found.format == "gguf"
        assert {name: float(found.read(name)[0]) for name in found.names()} == {"a": 1, "b": 2, "c": 3, "d": 4}
        assert found.info("c").file == "m-00002-of-00003.gguf"
        assert found.metadata["general.name"] == "whole"
        assert found.metadata["split.no"] == 0
        assert found.notes == []


def test_what_ggufs_own_writer_splits(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    arrays = {f"t{i}": np.full((2, 32), i, np.float32) for i in range(5)}
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = open_checkpoint(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    assert found.names() == list(arrays)
    assert found.metadata["general.architecture"] == "llama"
    assert all(np.array_equal(found.read(name), array) for name, array in arrays.items())


def test_split_files_that_do_not_fit_together(tmp_path: Path) -> None:
    paths = split(tmp_path, [{"a": 1}, {"b": 2}, {"c": 3}])
    paths[1].rename(tmp_path / "away")
    with pytest.raises(FormatError, match=r"1 of the 3 parts of this GGUF are missing: m-00002-of-00003.gguf"):
        open_checkpoint(paths[0])
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(FormatError, match=r"m-00002-of-00003.gguf should be part 1 of 3 .* says \(2, 3\)"):
        open_checkpoint(paths[0])
    paths[0].rename(tmp_path / "model.gguf")
    with pytest.raises(
        FormatError, match=r"one of 3 parts .* its name does not tell .* Name them NAME-00001-of-00003.gguf"
    ):
        open_checkpoint(tmp_path / "model.gguf")
    paths = split(tmp_path, [{"a": 1}, {"b": 2}], tensors=3)
    with pytest.raises(FormatError, match=r"hold 2 tensors together, and split.tensors.count says 3"):
        open_checkpoint(paths[0])
    paths = split(tmp_path, [{"a": 1}, {"a": 2}])
    with pytest.raises(FormatError, match=r"lie in two shards: 'a' in m-00001-of-00002.gguf and m-00002-of-00002.gguf"):
        open_checkpoint(paths[0])
    assert Gguf(paths[1]).read("a").tolist() == [2]  # one part alone is what the class reads
