"""`open_checkpoint`: folders are chosen from by content, and errors say what is missing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from loadstone.checkpoint import open_checkpoint
from loadstone.errors import FormatError, SourceError
from small_files import LFS, bundle, gguf, index, safetensors, some_zip, torch_file, value

# -- what is not there, or cannot be read


def test_a_missing_path_names_its_neighbours(tmp_path: Path) -> None:
    safetensors(tmp_path / "model.safetensors")
    with pytest.raises(
        SourceError, match=r"there is no such file or folder; the nearest names there: model\.safetensors\.$"
    ):
        open_checkpoint(tmp_path / "modle.safetensor")
    with pytest.raises(SourceError, match=r"there is no such file or folder\.$"):
        open_checkpoint(tmp_path / "xyz")
    with pytest.raises(SourceError, match=f"there is no such file, and no folder {tmp_path / 'no'}"):
        open_checkpoint(tmp_path / "no" / "model.safetensors")
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(SourceError, match="it is a link to gone, which does not exist"):
        open_checkpoint(tmp_path / "link")
    with pytest.raises(SourceError, match="no such file"):
        open_checkpoint(tmp_path / "a\0b")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match="neither a file nor a folder"):
        open_checkpoint(tmp_path / "pipe")
    with pytest.raises(SourceError, match=r"this folder holds no checkpoint. It holds no files"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["x" * 300, "loop"])
def test_what_the_system_refuses(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SourceError, match=r"cannot be opened|which does not exist"):
        open_checkpoint(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = safetensors(tmp_path / "x")
    path.chmod(0)
    with pytest.raises(SourceError, match=r"x: it cannot be opened: .*Permission denied"):
        open_checkpoint(path)


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = safetensors(tmp_path / "x")

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(SourceError, match=r"x: it cannot be opened: .*Permission denied"):
        open_checkpoint(path)
    with pytest.raises(SourceError, match=r"x is unreadable \(Permission denied\)"):
        open_checkpoint(tmp_path)


# -- folders


def test_precedence_in_a_folder(tmp_path: Path) -> None:
    """One kind after the other is added, the least preferred first: each newcomer is the one that opens."""
    bundle(tmp_path)
    assert value(tmp_path) == ("tensor-bundle", 4)
    gguf(tmp_path / "m.gguf")
    assert value(tmp_path) == ("gguf", 3)
    torch_file(tmp_path / "pytorch_model.bin", 2)
    assert value(tmp_path) == ("pytorch-zip", 2)
    torch_file(tmp_path / "shard-00001-of-00001.bin", 5)
    index(tmp_path, "pytorch_model.bin.index.json", "shard-00001-of-00001.bin")
    assert value(tmp_path) == ("pytorch-zip", 5)
    safetensors(tmp_path / "model.safetensors", 1)
    assert value(tmp_path) == ("safetensors", 1)
    safetensors(tmp_path / "shard-00001-of-00001.safetensors", 6)
    index(tmp_path, "model.safetensors.index.json", "shard-00001-of-00001.safetensors")
    assert value(tmp_path) == ("safetensors", 6)
    found = open_checkpoint(tmp_path)
    assert found.path == tmp_path / "model.safetensors.index.json"
    assert found.notes == [
        "opened model.safetensors.index.json; left aside in this folder: model.safetensors, "
        "pytorch_model.bin.index.json, pytorch_model.bin, shard-00001-of-00001.bin and 3 more"
    ]


def test_a_huggingface_folder(tmp_path: Path, shared: Path) -> None:
    folder = shared / "checkpoints/tinystories-656k-llama"
    found = open_checkpoint(folder)
    assert found.path == folder / "model.safetensors"
    assert found.notes == []


def test_nothing_is_noted_where_nothing_was_left_aside(tmp_path: Path) -> None:
    safetensors(tmp_path / "some.name")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "README.md").write_text("# Model")
    safetensors(tmp_path / ".hidden.safetensors")
    assert open_checkpoint(tmp_path).notes == []
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    bundle(tmp_path)
    (tmp_path / "hparams.json").write_text('{"n_vocab": 1}')
    assert open_checkpoint(tmp_path).notes == []


def test_an_index_whose_shards_were_not_downloaded_hides_nothing(tmp_path: Path) -> None:
    stale = index(tmp_path, "pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin")
    with pytest.raises(FormatError, match=r"1 of its 1 shards are missing: 'pytorch_model-00001-of-00002.bin'"):
        open_checkpoint(tmp_path)
    safetensors(tmp_path / "model.safetensors")
    assert value(tmp_path) == ("safetensors", 1)
    stale.write_text('{"weight_map": [')
    assert value(tmp_path) == ("safetensors", 1)


def test_what_a_trainer_saves_beside_the_weights_is_no_candidate(tmp_path: Path) -> None:
    for name in (
        "optimizer.pt",
        "scheduler.pt",
        "training_args.bin",
        "rng_state_0.pth",
        "scaler.pt",
        "random_states_1.pkl",
    ):
        torch_file(tmp_path / name, 9)
    torch_file(tmp_path / "weights.pt")
    assert value(tmp_path) == ("pytorch-zip", 2)
    assert "left aside in this folder: optimizer.pt, " in open_checkpoint(tmp_path).notes[-1]
    (tmp_path / "meta.pkl").write_bytes(b"\x80\x04}.")  # nanoGPT's vocabulary is a plain pickle
    (tmp_path / "data.zip").write_bytes(some_zip("train.txt"))
    assert value(tmp_path) == ("pytorch-zip", 2)
    torch_file(tmp_path / "pytorch_model.bin", 7)
    assert value(tmp_path) == ("pytorch-zip", 7)


def test_several_equal_candidates_are_listed(tmp_path: Path) -> None:
    for name in ("a-Q4_0.gguf", "a-Q8_0.gguf"):
        gguf(tmp_path / name)
    with pytest.raises(SourceError, match=r"holds 2 gguf files: a-Q4_0.gguf, a-Q8_0.gguf. Name one of them"):
        open_checkpoint(tmp_path)
    for number in range(2):
        torch_file(tmp_path / f"consolidated.{number:02}.pth")
    with pytest.raises(
        SourceError, match=r"2 torch files: consolidated.00.pth, .* Meta's model-parallel parts, .* not merge"
    ):
        open_checkpoint(tmp_path)
    (tmp_path / "consolidated.01.pth").unlink()
    assert value(tmp_path) == ("pytorch-zip", 2)
    for number in range(1, 4):
        safetensors(tmp_path / f"model-{number:05}-of-00003.safetensors")
    with pytest.raises(SourceError, match=r"3 safetensors files: .* look like shards whose index .* is missing"):
        open_checkpoint(tmp_path)


def test_a_folder_without_checkpoint_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "124M").mkdir()
    for name in ("README.md", "a.txt", "config.json", "merges.txt", "vocab.json"):
        (tmp_path / name).write_text("{}" if name.endswith("json") else "text")
    (tmp_path / "model.safetensors").write_bytes(LFS)
    with pytest.raises(SourceError) as caught:
        open_checkpoint(tmp_path)
    text = str(caught.value)
    assert "this folder holds no checkpoint. In it: model.safetensors is a git-LFS pointer, not the file itself" in text
    assert text.endswith("and 2 more. Its folders: 124M.")


def test_a_broken_file_in_a_folder_is_an_error_and_not_skipped(tmp_path: Path) -> None:
    path = safetensors(tmp_path / "model.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    torch_file(tmp_path / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"model.safetensors: it is truncated by 1 bytes"):
        open_checkpoint(tmp_path)


def test_a_training_run_points_to_its_model(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "best").symlink_to("checkpoints/step-00000001")
    with pytest.raises(SourceError, match=r"It is a training run; its model is .*best"):
        open_checkpoint(tmp_path)
