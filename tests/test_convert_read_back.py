"""convert: what was written is read back and compared, whoever changed it on the way."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from loadstone.checkpoint import open_checkpoint
from loadstone.checkpoint.base import Array, Checkpoint
from loadstone.convert import convert
from loadstone.errors import LoadstoneError
from memory import MemoryCheckpoint
from model_files import GPT2, write_hf
from small_models import CONFIGS

module = import_module("loadstone.convert")  # the package's own name for it is the function


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "source")


def test_what_is_read_back_is_compared(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that changes what it is given is caught before the result takes its name."""

    def damaged(path: Path) -> Checkpoint:
        checkpoint = open_checkpoint(path)
        if ".partial" in str(path):
            read = checkpoint.read
            checkpoint.read = lambda name: read(name) + (name == "transformer.wpe.weight")  # type: ignore[method-assign]
        return checkpoint

    monkeypatch.setattr(module, "open_checkpoint", damaged)
    with pytest.raises(LoadstoneError, match=r"not what was written: transformer\.wpe\.weight"):
        convert(source, tmp_path / "hf", to="hf")
    assert not (tmp_path / "hf").exists()


def test_a_bit_that_flips_in_the_written_file_is_seen(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes on the disk, not a reader, are wrong: the last one of the file is one of a tensor's."""

    def flipped(path: Path) -> Checkpoint:
        if ".partial" in str(path):
            with (path / "model.safetensors").open("r+b") as file:
                file.seek(-1, 2)
                last = file.read(1)[0]
                file.seek(-1, 2)
                file.write(bytes([last ^ 1]))
        return open_checkpoint(path)

    monkeypatch.setattr(module, "open_checkpoint", flipped)
    with pytest.raises(LoadstoneError, match="not what was written"):
        convert(source, tmp_path / "hf", to="hf", parity=False)
    assert not (tmp_path / "hf").exists()


class Restless(MemoryCheckpoint):
    """A source that something changes meanwhile: the second reading of a tensor is another one."""

    def read(self, name: str) -> Array:
        self.arrays[name] = self.arrays[name] + 1
        return super().read(name)


def test_a_source_that_changes_meanwhile_is_not_certified(tmp_path: Path) -> None:
    with pytest.raises(LoadstoneError, match="whether another program changes the source"):
        convert(Restless(GPT2), tmp_path / "hf", to="hf", config=CONFIGS["gpt2"], parity=False)
    assert not (tmp_path / "hf").exists()
