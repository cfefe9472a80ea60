"""Hub repositories: which files are chosen, and the library's real client against a hub on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fake_hub import FakeHub, Repo, pull, pull_each, refused, repo
from loadstone.checkpoint.huggingface import HubName, choose
from loadstone.errors import SourceError
from loopback import Reply, in_turn

BODY = bytes(range(256)) * 1000


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A home of its own for each test: the hub's cache, Loadstone's cache, and the working folder."""
    return tmp_path


# --- which files of a hub repository ------------------------------------------------------------------------------

NAME = HubName("owner/name")
SIDE = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
GPT2 = [*SIDE[:4], "vocab.json", "merges.txt", "model.safetensors", "pytorch_model.bin", "tf_model.h5", "64.tflite"]
GPT2 += ["flax_model.msgpack", "rust_model.ot", "README.md", "onnx/config.json", "onnx/decoder_model.onnx"]


@pytest.mark.parametrize(
    ("listing", "file", "weights", "opens"),
    [
        (GPT2, "", ["model.safetensors"], ""),
        (["pytorch_model.bin", "training_args.bin", "optimizer.pt"], "", ["pytorch_model.bin"], ""),
        ([*SHARDS, "model.safetensors.index.json", "consolidated.safetensors"], "", SHARDS, ""),
        ([*SHARDS, "model.safetensors"], "", ["model.safetensors"], ""),
        ([*SHARDS, "a.gguf"], SHARDS[1], SHARDS, SHARDS[1]),
        (["gpt2-small.pth", "optimizer.pt"], "", ["gpt2-small.pth"], "gpt2-small.pth"),
        (["training_args.bin", "mine.bin"], "", ["mine.bin"], "mine.bin"),
        (["onnx/model.bin", "mine.gguf"], "", ["mine.gguf"], "mine.gguf"),
        (["adapter.safetensors"], "", ["adapter.safetensors"], "adapter.safetensors"),
        (["one.Q4_0.gguf"], "", ["one.Q4_0.gguf"], "one.Q4_0.gguf"),
        (["a.gguf", "b.gguf", "sub/c.gguf"], "sub/c.gguf", ["sub/c.gguf"], "sub/c.gguf"),
        (["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"], "", ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"],
         "m-00001-of-00002.gguf"),
        (["README.md", "model.safetensors"], "README.md", ["README.md"], "README.md"),
    ],
)  # fmt: skip
def test_choice(listing: list[str], file: str, weights: list[str], opens: str) -> None:
    choice = choose(dict.fromkeys(listing + SIDE, 5), HubName("owner/name", file=file))
    beside = [*SIDE, "vocab.json", "merges.txt", "model.safetensors.index.json"] if "/" not in file else []
    assert sorted(choice.files) == sorted({*weights, *(name for name in beside if name in listing + SIDE)})
    assert choice.opens == opens


@pytest.mark.parametrize(
    ("listing", "file", "text"),
    [
        ({"x.Q8_0.gguf": 145_000_000, "x.Q4_0.gguf": 92_000_000}, "",
         r"owner/name: holds several models: x\.Q4_0\.gguf \(92 MB\), x\.Q8_0\.gguf \(145 MB\)\. Name one, as in "
         r"owner/name:x\.Q4_0\.gguf$"),
        ({"a.safetensors": 1, "b.safetensors": 2}, "", r"holds several models"),
        ({"x.Q4_0.gguf": 1}, "x.Q4_K.gguf", r"owner/name has no file 'x\.Q4_K\.gguf'; the nearest are: x\.Q4_0\.gguf"),
        ({SHARDS[0]: 1, SHARDS[2]: 1}, "", r"2 of the 3 shards of model\.safetensors"),
        ({"tf_model.h5": 1, "README.md": 1}, "", r"no weights of a kind that can be read .* holds: README.md, tf_mo"),
        ({}, "", r"It holds: nothing"),
    ],
)  # fmt: skip
def test_no_choice(listing: dict[str, int], file: str, text: str) -> None:
    with pytest.raises(SourceError, match=text):
        choose(listing, HubName("owner/name", file=file))


def test_hub_names() -> None:
    assert HubName.parse("a/b") == HubName("a/b")
    assert HubName.parse("a/b@refs/pr/1:sub/c d.gguf") == HubName("a/b", "refs/pr/1", "sub/c d.gguf")
    assert str(HubName("a/b", "v1", "c.gguf")) == "a/b@v1:c.gguf"
    for text in ("a", "a/b/c", "/a/b", "./a", "../b", "a/b@", "a/b:", "a/b@v1@v2", "a b/c", "\u00e4/b"):
        assert HubName.parse(text) is None


# --- a hub on loopback, and the library's real client in a process of its own ---------------------------------------

FILES = {name: name.encode() for name in GPT2} | {"model.safetensors": BODY}
WANTED = sorted([*SIDE[:4], "vocab.json", "merges.txt", "model.safetensors"])


@pytest.fixture
def fake() -> Iterator[FakeHub]:
    with FakeHub() as running:
        running.repos["openai-community/gpt2"] = repo(FILES)
        yield running


def test_hub_downloads_once_and_only_what_is_needed(fake: FakeHub, here: Path) -> None:
    first = pull(
        fake.url, here, "gpt2", before="import os; os.environ['TQDM_POSITION'] = '-1'  # forces tqdm's bars on"
    )
    assert first.path is not None, first.error
    assert "Fetching" not in first.told  # no bars: standard error is no terminal
    assert fake.got() == WANTED
    assert sorted(path.name for path in first.path.iterdir()) == WANTED
    assert (first.path / "model.safetensors").read_bytes() == BODY
    assert "gpt2: the hub repository openai-community/gpt2\n" in first.told
    assert f"will download 256 KB (7 files) to {here / 'hf' / 'hub'}; " in first.told
    fake.seen.clear()
    second = pull(fake.url, here, "gpt2")
    assert (second.path, fake.seen) == (first.path, [])
    assert "nothing to download" in second.told
    fake.close()
    assert pull(fake.url, here, "openai-community/gpt2", offline=True).path == first.path


def test_hub_revisions(fake: FakeHub, here: Path) -> None:
    old, new = "a" * 40, "b" * 40
    fake.repos["o/n"] = Repo(
        {old: {"model.safetensors": b"old"}, new: {"model.safetensors": b"new"}}, {"main": new, "v1": old}
    )
    *good, absent = pull_each(fake.url, here, ["o/n", "o/n@v1", "o/n@v9"])
    good.append(pull(fake.url, here, "o/n", revision=old))
    for outcome, body in zip(good, (b"new", b"old", b"old"), strict=True):
        assert outcome.path is not None, outcome.error
        assert (outcome.path / "model.safetensors").read_bytes() == body
    assert "hub repository o/n@v9 has no revision 'v9'" in absent.error


def test_hub_gguf(fake: FakeHub, here: Path) -> None:
    fake.repos["o/n"] = repo({"a.Q4_0.gguf": b"GGUF4", "a.Q8_0.gguf": b"GGUF8", "config.json": b"{}"})
    several = "holds several models: a.Q4_0.gguf (5 bytes), a.Q8_0.gguf (5 bytes). Name one, as in o/n:a.Q4_0.gguf"
    for _ in range(2):  # also once one of them is in the cache
        unnamed, chosen = pull_each(fake.url, here, ["o/n", "o/n:a.Q8_0.gguf"])
        assert several in unnamed.error
        assert chosen.path is not None, chosen.error
        assert (chosen.path.name, chosen.path.read_bytes()) == ("a.Q8_0.gguf", b"GGUF8")
    assert fake.got() == ["a.Q8_0.gguf", "config.json"]
    assert several in pull(fake.url, here, "o/n", offline=True).error


def test_hub_file_name_that_looks_like_a_pattern(fake: FakeHub, here: Path) -> None:
    fake.repos["o/n"] = repo({"a[1] b.gguf": b"GGUF"})
    outcome = pull(fake.url, here, "o/n")
    assert outcome.path is not None, outcome.error
    assert outcome.path.read_bytes() == b"GGUF"


def test_hub_interrupted_download_is_completed(fake: FakeHub, here: Path) -> None:
    first = pull(fake.url, here, "gpt2")
    assert first.path is not None
    for lost in ("tokenizer.json", "model.safetensors"):
        (first.path / lost).resolve().unlink()
        fake.seen.clear()
        assert pull(fake.url, here, "gpt2").path == first.path
        assert fake.got() == [lost]


def test_hub_cache_of_another_program(fake: FakeHub, here: Path) -> None:
    """Files that came one by one leave no listing: used if a whole model is there, else the hub is asked."""
    one_by_one = "from huggingface_hub import hf_hub_download\nfor file in {}: hf_hub_download('o/n', file)"
    fake.repos["o/n"] = repo(FILES)
    part = pull(fake.url, here, "o/n", before=one_by_one.format(["config.json", "model.safetensors"]), offline=True)
    assert part.path is not None, part.error  # offline takes what there is
    fake.seen.clear()
    assert pull(fake.url, here, "o/n").path == part.path
    assert fake.got() == sorted({*WANTED} - {"config.json", "model.safetensors"})
    other = here / "other"
    other.mkdir()
    whole = pull(fake.url, other, "o/n", before=one_by_one.format(["config.json", "model.safetensors", "vocab.json"]))
    assert whole.path is not None
    assert "nothing to download" in whole.told
    fake.repos["o/g"] = repo({"a.Q4_0.gguf": b"GGUF4", "a.Q8_0.gguf": b"GGUF8"})
    one_file = "from huggingface_hub import hf_hub_download\nhf_hub_download('o/g', 'a.Q4_0.gguf')"
    assert "holds several models" in pull(fake.url, here, "o/g", before=one_file).error
    fake.seen.clear()
    other = here / "third"
    other.mkdir()
    assert "nothing to download" in pull(fake.url, other, "o/g:a.Q4_0.gguf", before=one_file).told


def test_hub_down_but_the_weights_are_cached(fake: FakeHub, here: Path) -> None:
    before = (
        "from huggingface_hub import hf_hub_download\nhf_hub_download('openai-community/gpt2', 'model.safetensors')"
    )
    pull(fake.url, here, "gpt2", before=before, offline=True)
    fake.down = 403
    outcome = pull(fake.url, here, "gpt2")
    assert outcome.path is not None, outcome.error
    assert "Using the files in the cache." in outcome.told


def test_hub_goes_down_between_two_questions(fake: FakeHub, here: Path) -> None:
    """The library then returns the folder that another program left, with next to nothing in it."""
    fake.routes["/api/models/openai-community/gpt2/revision/main"] = in_turn(fake.handle, Reply(503))
    before = "from huggingface_hub import hf_hub_download\nhf_hub_download('openai-community/gpt2', 'config.json')"
    outcome = pull(fake.url, here, "gpt2", before=before)
    assert "openai-community/gpt2 came without model.safetensors, " in outcome.error


def test_hub_errors(fake: FakeHub, here: Path) -> None:
    fake.repos["o/gated"] = replace(repo(FILES), gated=True)
    fake.routes["/api/models/o/off/revision/main"] = refused(403, "", "Access to this resource is disabled.")
    (here / "o").mkdir()
    (here / "o" / "local-model").mkdir()
    expected = {
        "o/gated": f"o/gated is gated. Ask for access at {fake.url}/o/gated, then log in with `hf auth login`",
        "o/off": "hub repository o/off has been disabled",
        "o/local-modle": "does not exist on .* or is private. .* Nor is there a local file or folder o/local-modle. "
        "Did you mean o/local-model?",
        "openai-comunity/gpt2": "Did you mean openai-community/gpt2?",
        "o/bad..name": "hub repository o/bad..name is no name that the hub accepts: ",
    }
    for outcome, text in zip(pull_each(fake.url, here, list(expected)), expected.values(), strict=True):
        for part in text.split(".*"):
            assert part in outcome.error
        assert "\n" not in outcome.error
        assert "Traceback" not in outcome.told


def test_hub_out_of_reach(here: Path) -> None:
    outcome, alias = pull_each("http://127.0.0.1:9", here, ["o/n", "gpt2"])
    assert "hub repository o/n could not be reached at http://127.0.0.1:9 (" in outcome.error
    assert "Check the network" in outcome.error
    assert "Nor is there a local file or folder o/n." in outcome.error
    assert "gpt2 could not be reached" in alias.error
    assert "Nor is" not in alias.error


def test_hub_offline(fake: FakeHub, here: Path) -> None:
    in_environment = "import os\nos.environ['HF_HUB_OFFLINE'] = '1'"
    for outcome in (pull(fake.url, here, "o/n", offline=True), pull(fake.url, here, "o/n", before=in_environment)):
        assert "o/n is not (or not wholly) in the hub's cache, and offline mode is on." in outcome.error
    assert fake.seen == []


def test_hub_disk_too_small(fake: FakeHub, here: Path) -> None:
    fake.repos["o/n"] = replace(repo(FILES), listed_sizes={"model.safetensors": 523_000_000})
    small = (
        "import shutil; from types import SimpleNamespace\nshutil.disk_usage = lambda path: SimpleNamespace(free=4.1e8)"
    )
    outcome = pull(fake.url, here, "o/n", before=small)
    assert "523 MB are to be downloaded and the disk has 410 MB free." in outcome.error
    assert "HF_HOME" in outcome.error
    assert fake.got() == []
