"""convert: every ordered pair on disk is exact, what goes wrong leaves nothing behind, certificates tell the truth."""

from __future__ import annotations

import json
import os
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foreign_modules import BookModel, NanoGPT
from loadstone import certificate
from loadstone.checkpoint import open_checkpoint, proof
from loadstone.checkpoint.base import Array, Checkpoint
from loadstone.convert import convert
from loadstone.errors import ConfigError, FormatError, LoadstoneError, PlanError, SourceError
from loadstone.layouts import LAYOUTS
from loadstone.load import load_model, open_source
from loadstone.weightmap import TABLES, identify
from memory import MemoryCheckpoint
from model_files import GPT2, write_hf
from small_models import CHECKPOINTS, CONFIGS

module = import_module("loadstone.convert")  # the package's own name for it is the function
# A Mistral in GGUF is a llama, and comes back as one.
DIALECTS = {
    arch: dict.fromkeys(t.dialect for t in TABLES if t.architecture == arch and t.name != "mistral/gguf")
    for arch in CHECKPOINTS
}
PAIRS = [(arch, a, b) for arch, names in DIALECTS.items() for a, b in product(names, names)]
ACCEPT = {"nanogpt": ["activation"]}


def written(folder: Path, dialect: str) -> Path:
    return folder / (LAYOUTS[dialect].file or dialect)


def first(architecture: str, dialect: str, folder: Path) -> Path:
    """The hostile model of an architecture in one dialect on disk, by way of its hand-written tensors."""
    source = CHECKPOINTS[architecture]("hf")
    path = written(folder, dialect)
    convert(source, path, to=dialect, config=CONFIGS[architecture], accept=ACCEPT.get(dialect, ()), parity=False)
    return path


def contents(path: Path) -> dict[str, Array]:
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


@pytest.mark.parametrize(("architecture", "a", "b"), PAIRS)
def test_every_ordered_pair_comes_back_bit_for_bit(architecture: str, a: str, b: str, tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    start = first(architecture, a, tmp_path / "1")
    there = written(tmp_path / "2", b)
    convert(start, there, to=b, accept=ACCEPT.get(b, ()), parity=False)
    back = written(tmp_path / "3", a)
    convert(there, back, to=a, accept=ACCEPT.get(a, ()), parity=False)
    ours, theirs = contents(start), contents(back)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    assert open_source(start).config == open_source(back).config
    assert all(check.ok for path in (start, there, back) for check in certificate.check(path))


def test_a_pair_of_which_one_is_wrong_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above can fail: a table that forgets a transpose gives other bits."""
    start = first("gpt2", "hf", tmp_path)
    plain, name = contents(start), "transformer.h.0.attn.c_proj.weight"
    assert not np.array_equal(plain[name], plain[name].T)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "source")


def test_the_certificate_says_where_everything_came_from(source: Path, tmp_path: Path) -> None:
    found = convert(source, tmp_path / "m.pth", to="raschka")
    assert proof.read(tmp_path / "m.pth.loadstone.json") == json.loads(json.dumps(found))
    assert found["source"]["files"].keys() == {"config.json", "model.safetensors"}
    assert found["written"]["dialect"] == "gpt2/raschka"
    entry = found["tensors"]["trf_blocks.1.att.W_key.weight"]
    assert entry["from"] == ["h.1.attn.c_attn.weight"]
    assert entry["ops"] == ["transpose", "split q, k, v"]
    assert found["counts"]["parameters"] == sum(array.size for array in GPT2.values())
    assert [parity["length"] for parity in found["parity"]["lengths"]] == [1, 7, 40]
    assert all(parity["max_abs"] < 1e-5 for parity in found["parity"]["lengths"])
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0] or found["versions"]["torch"]


def test_a_file_without_a_config_keeps_it_in_its_certificate(tmp_path: Path) -> None:
    odd = write_hf(tmp_path / "odd", n_head=8)
    convert(odd, tmp_path / "m.pth", to="raschka")
    identity = open_source(tmp_path / "m.pth")
    assert (identity.config.n_heads, identity.config_source, identity.assumed) == (8, "loadstone.json", [])
    # A certificate that is about another file is not believed.
    convert(odd, tmp_path / "other.pth", to="raschka", dtype="bfloat16")
    (tmp_path / "other.pth.loadstone.json").rename(tmp_path / "m.pth.loadstone.json")
    assert open_source(tmp_path / "m.pth").config_source != "loadstone.json"


@pytest.mark.parametrize("to", ["hf", "raschka", "openai", "gguf"])
def test_a_flipped_byte_is_named_by_tensor(source: Path, tmp_path: Path, to: str) -> None:
    path = written(tmp_path, to)
    convert(source, path, to=to, parity=False)
    assert all(check.ok for check in certificate.check(path))
    name = {"hf": "transformer.h.1.mlp.c_fc.weight", "raschka": "trf_blocks.1.ff.layers.0.weight",
            "openai": "model/h1/mlp/c_fc/w", "gguf": "blk.1.ffn_up.weight"}[to]  # fmt: skip
    checkpoint = open_checkpoint(path)
    needle = np.ascontiguousarray(checkpoint.read(name)).tobytes()
    file = path / checkpoint.info(name).file if path.is_dir() else path
    data = bytearray(file.read_bytes())
    at = data.index(needle) + len(needle) // 2
    data[at] ^= 1
    file.write_bytes(data)
    files, tensors = certificate.check(path)
    assert files.ok is False
    assert "has changed" in files.detail
    assert tensors.ok is False
    assert name in tensors.detail


def test_other_damage_is_named_too(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "hf"
    convert(source, path, to="hf", parity=False)
    (path / "config.json").write_text((path / "config.json").read_text().replace("1e-05", "1e-06"))
    (path / "stranger.txt").write_text("?")
    files, tensors = certificate.check(path)
    assert "'config.json' has changed" in files.detail
    assert tensors.ok
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-10])
    files, tensors = certificate.check(path)
    assert "certified were" in files.detail
    assert "cannot be read any more" in tensors.detail
    (path / "model.safetensors").unlink()
    assert "'model.safetensors' is missing" in certificate.check(path)[0].detail


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [("{", FormatError, "no valid JSON"), ("[]", FormatError, "no certificate of version 1"),
     ("[" * 100_000, FormatError, "no valid JSON"), ('{"certificate": 2}', FormatError, "no certificate of version 1"),
     ('{"certificate": 1, "written": {"files": {"../x": 3}}, "tensors": {}, "aliases": {}}', FormatError, "version 1"),
     (None, SourceError, "it has no certificate")],
)  # fmt: skip
def test_a_damaged_certificate_is_an_error(tmp_path: Path, text: str | None, error: type, match: str) -> None:
    folder = write_hf(tmp_path / "m")
    if text is not None:
        (folder / "loadstone.json").write_text(text)
    with pytest.raises(error, match=match):
        certificate.check(folder)


@pytest.mark.parametrize(
    "change",
    [{"written": {"files": {"../secret": {"bytes": 1, "sha256": "0"}}}}, {"written": {"files": {}}},
     {"written": {"files": {"model.safetensors": {"bytes": "12", "sha256": "0"}}}}, {"tensors": {"x": 3}},
     {"written": {"files": {"model.safetensors": {"bytes": None, "sha256": "0"}}}}, {"config": []}],
)  # fmt: skip
def test_a_hostile_certificate_is_an_error(source: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    convert(source, tmp_path / "hf", to="hf", parity=False)
    proof.write(proof.read(tmp_path / "hf" / "loadstone.json") | change, tmp_path / "hf" / "loadstone.json")
    with pytest.raises(FormatError, match="no certificate of version 1"):
        certificate.check(tmp_path / "hf")


def test_an_edited_certificate_is_an_error_and_an_edited_config_is_not_overruled(tmp_path: Path) -> None:
    source, path = first("llama", "hf", tmp_path), tmp_path / "meta"
    convert(source, path, to="meta", parity=False)
    assert open_source(path).config_source == "loadstone.json"
    params = path / "params.json"
    params.write_text(params.read_text().replace("1e-05", "1e-03"))
    assert (open_source(path).config_source, open_source(path).config.norm_eps) == ("params.json", 1e-3)
    text = (path / "loadstone.json").read_text()
    (path / "loadstone.json").write_text(text.replace('"n_heads": 6', '"n_heads": 3'))
    with pytest.raises(FormatError, match="it was changed since the conversion wrote it"):
        certificate.check(path)


# --- what the programs themselves find


def test_the_books_model_loads_the_result_strictly(source: Path, tmp_path: Path) -> None:
    found = convert(source, tmp_path / "m.pth", to="raschka")
    assert "cfg = {'vocab_size': 101, 'context_length': 40, 'emb_dim': 32, 'n_heads': 4" in found["remarks"][-1]
    theirs = BookModel(vocab=101, context=40, width=32, layers=3)
    theirs.load_state_dict(torch.load(tmp_path / "m.pth", weights_only=True), strict=True)
    key = theirs.get_parameter("trf_blocks.2.att.W_key.weight").detach().numpy()
    assert np.array_equal(key, GPT2["h.2.attn.c_attn.weight"].T[32:64])
    assert np.array_equal(theirs.out_head.weight.detach().numpy(), GPT2["wte.weight"])


def test_nanogpt_loads_the_result_strictly(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "ckpt.pt", to="nanogpt", accept=["activation"])
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert checkpoint["model_args"] == {
        "n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 40, "bias": True, "vocab_size": 101, "dropout": 0.0,
    }  # fmt: skip
    theirs = NanoGPT(vocab=101, context=40, width=32, layers=3)
    theirs.load_state_dict(checkpoint["model"], strict=True)
    down = theirs.get_parameter("transformer.h.1.mlp.c_proj.weight").detach().numpy()
    assert np.array_equal(down, GPT2["h.1.mlp.c_proj.weight"].T)


# --- what goes wrong


def test_what_the_dialect_cannot_say_is_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--accept activation"):
        convert(source, tmp_path / "ckpt.pt", to="nanogpt")
    assert not list(tmp_path.glob("*ckpt*"))
    with pytest.raises(PlanError, match="its dialects: hf, nanogpt, openai"):
        convert(source, tmp_path / "x", to="meta")
    with pytest.raises(LoadstoneError, match="Choose --to gguf"):
        convert(source, tmp_path / "x", to="hf", dtype="q8_0")
    with pytest.raises(LoadstoneError, match="dtype 'int3' is not supported"):
        convert(source, tmp_path / "x", to="hf", dtype="int3")
    assert not (tmp_path / "x").exists()


def test_an_unsound_source_is_not_converted(tmp_path: Path) -> None:
    lacking = {name: array for name, array in GPT2.items() if name != "h.1.ln_2.bias"}
    with pytest.raises(PlanError, match=r"missing 1: h\.1\.ln_2\.bias"):
        convert(write_hf(tmp_path / "s", lacking), tmp_path / "x.pth", to="raschka")


def test_only_what_a_conversion_wrote_is_replaced_and_only_when_asked(source: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(SourceError, match="no conversion wrote it"):
            convert(source, mine, to="hf", force=force)
    assert (mine / "thesis.txt").read_text() == "years of work"
    convert(source, tmp_path / "hf", to="hf", parity=False)
    with pytest.raises(SourceError, match="Replace it with --force"):
        convert(source, tmp_path / "hf", to="hf")
    found = convert(source, tmp_path / "hf", to="hf", dtype="bfloat16", force=True)
    assert found["tensors"]["transformer.wte.weight"]["dtype"] == "bfloat16"
    with pytest.raises(SourceError, match=r"this dialect is a single file; name it, for example .*hf/model\.gguf"):
        convert(source, tmp_path / "hf", to="gguf")


def test_force_replaces_nothing_that_came_or_changed_after_the_conversion(source: Path, tmp_path: Path) -> None:
    folder, file = tmp_path / "hf", tmp_path / "m.pth"
    convert(source, folder, to="hf", parity=False)
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(SourceError, match=r"'thesis\.txt' came later"):
        convert(source, folder, to="hf", force=True)
    (folder / "thesis.txt").unlink()
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1  # trained on, say: of the same size
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(SourceError, match=r"'model\.safetensors' has changed"):
        convert(source, folder, to="hf", force=True)
    assert (folder / "model.safetensors").read_bytes() == weights
    convert(source, file, to="raschka", parity=False)
    torch.save({"mine": torch.ones(3)}, file)
    with pytest.raises(SourceError, match=r"'m\.pth' has .* bytes, certified were"):
        convert(source, file, to="raschka", force=True)
    assert torch.load(file)["mine"].sum() == 3


def test_a_source_is_never_overwritten_by_its_own_conversion(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    convert(source, folder, to="hf", parity=False)
    for again in (folder, folder / "model.safetensors"):
        with pytest.raises(SourceError, match="the source itself lies there"):
            convert(again, folder, to="hf", dtype="float16", force=True)
    convert(folder, tmp_path / "m.pth", to="raschka", parity=False)
    with pytest.raises(SourceError, match="the source itself lies there"):
        convert(tmp_path / "m.pth", tmp_path / "m.pth", to="raschka", force=True)


def test_impossible_places(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (source / "config.json" / "x", source / "config.json" / "x" / "y", tmp_path / ("n" * 300)):
        with pytest.raises(SourceError, match=r"cannot be made|nothing can be written there"):
            convert(source, place, to="hf", parity=False)
    with pytest.raises(SourceError, match=r"name it, for example .*new/model\.gguf"):
        convert(source, f"{tmp_path}/new/", to="gguf")
    with pytest.raises(ConfigError):
        convert(source, tmp_path / "p" / "q" / "r.pt", to="nanogpt")
    assert not (tmp_path / "p").exists()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(SourceError, match="the folder that you are in"):
        convert(source, ".", to="hf")


def test_odd_arguments(source: Path, tmp_path: Path) -> None:
    with pytest.raises(LoadstoneError, match="shard_size '5GB': expected a number of bytes"):
        convert(source, tmp_path / "hf", to="hf", shard_size="5GB")  # type: ignore[arg-type]
    with pytest.raises(LoadstoneError, match="no config field is called nonsense"):
        convert(source, tmp_path / "hf", to="hf", accept="nonsense")
    found = convert(source, tmp_path / "ckpt.pt", to="nanogpt", accept="activation", parity=False)
    assert "accepted: nanoGPT cannot say all that this model does: activation" in found["remarks"][-1]
    assert not any(
        "accepted" in text for text in convert(source, tmp_path / "hf", to="hf", accept="activation")["remarks"]
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gguf_keeps_every_value_of_a_coarser_type_though_vectors_become_float32(tmp_path: Path, dtype: str) -> None:
    folder = tmp_path / "hf"
    convert(write_hf(tmp_path / "s"), folder, to="hf", dtype=dtype, parity=False)
    found = convert(folder, tmp_path / "m.gguf", to="gguf", parity=False)
    assert not any("rounded" in remark for remark in found["remarks"])
    convert(tmp_path / "m.gguf", tmp_path / "back", to="hf", dtype=dtype, parity=False)
    ours, theirs = contents(folder), contents(tmp_path / "back")
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert "were rounded" in convert(folder, tmp_path / "q.gguf", to="gguf", dtype="q8_0", parity=False)["remarks"][-1]


def test_float64_is_not_rounded_into_gguf_unasked(tmp_path: Path) -> None:
    doubles = MemoryCheckpoint({name: array.astype(np.float64) for name, array in GPT2.items()})
    with pytest.raises(LoadstoneError, match="GGUF has no float64"):
        convert(doubles, tmp_path / "m.gguf", to="gguf", config=CONFIGS["gpt2"])


def test_a_link_out_of_the_source_folder_is_not_carried_along(source: Path, tmp_path: Path) -> None:
    (tmp_path / "private").write_text("{}")
    (source / "special_tokens_map.json").symlink_to(tmp_path / "private")
    found = convert(source, tmp_path / "hf", to="hf", parity=False)
    assert not (tmp_path / "hf" / "special_tokens_map.json").exists()
    assert "special_tokens_map.json is not copied: it is a link out of its folder" in found["remarks"][0]


class Failing(MemoryCheckpoint):
    """A source that breaks in the middle."""

    def read(self, name: str) -> Array:
        if name == "h.2.attn.c_proj.weight":
            raise FormatError("disk", "it broke.")
        return super().read(name)


@pytest.mark.parametrize("to", ["hf", "openai", "raschka", "gguf"])
def test_a_failure_in_the_middle_leaves_nothing_new_and_nothing_lost(source: Path, tmp_path: Path, to: str) -> None:
    target = tmp_path / "out" / (LAYOUTS[to].file or to)
    with pytest.raises(FormatError, match="it broke"):
        convert(Failing(GPT2), target, to=to, config=CONFIGS["gpt2"])
    assert not target.parent.exists()
    convert(source, target, to=to, parity=False)
    before = {file: file.read_bytes() for file in target.parent.rglob("*") if file.is_file()}
    with pytest.raises(FormatError, match="it broke"):
        convert(Failing(GPT2), target, to=to, config=CONFIGS["gpt2"], force=True)
    assert before == {file: file.read_bytes() for file in target.parent.rglob("*") if file.is_file()}


def test_a_result_that_does_not_fill_the_model_is_not_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lossy(checkpoint: Checkpoint, **options: Any) -> Any:
        del checkpoint.tensors["transformer.h.0.ln_1.bias"]
        return identify(checkpoint, **options)

    monkeypatch.setattr(module, "identify", lossy)
    with pytest.raises(PlanError, match=r"missing 1: transformer\.h\.0\.ln_1\.bias"):
        convert(source, tmp_path / "hf", to="hf", parity=False)
    assert not (tmp_path / "hf").exists()


def test_the_parity_check_can_fail(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loadstone.weightmap import Identity

    real = module._reopened

    def wrong(*arguments: Any) -> Identity:
        identity = real(*arguments)
        identity.config = identity.config.with_overrides({"activation": "gelu"})
        return identity

    monkeypatch.setattr(module, "_reopened", wrong)
    with pytest.raises(LoadstoneError, match="does not compute the same"):
        convert(source, tmp_path / "hf", to="hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(("dtype", "kind"), [("q8_0", "Q8_0"), ("q4_0", "Q4_0"), ("bfloat16", "bfloat16")])
def test_coarser_types_into_gguf(source: Path, tmp_path: Path, dtype: str, kind: str) -> None:
    found = convert(source, tmp_path / "m.gguf", to="gguf", dtype=dtype, parity=False)
    assert found["tensors"]["blk.0.ffn_up.weight"]["dtype"] == kind
    model = load_model(open_source(tmp_path / "m.gguf"))
    exact = GPT2["h.0.mlp.c_fc.weight"].T
    ours = model.get_parameter("blocks.0.mlp.up.weight").detach().float().numpy()
    coarse = {"q8_0": 0.01, "q4_0": 0.15, "bfloat16": 0.01}[dtype]
    assert 0 < np.abs(ours - exact).max() < coarse * np.abs(exact).max()


def test_a_result_is_the_same_every_time(source: Path, tmp_path: Path) -> None:
    for to in ("hf", "openai", "raschka", "gguf"):
        pair = [written(tmp_path / n, to) for n in "ab"]
        one, two = (convert(source, path, to=to, parity=False)["written"]["files"] for path in pair)
        assert one == two


def test_shards(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "hf", to="hf", shard_size=30_000)
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 3
    assert all(check.ok for check in certificate.check(tmp_path / "hf"))
    one, many = contents(source), contents(tmp_path / "hf")
    assert all(np.array_equal(one[name.removeprefix("transformer.")], array) for name, array in many.items())


def test_the_source_folders_own_tokenizer_files_are_kept_to_the_byte(source: Path, tmp_path: Path) -> None:
    (source / "generation_config.json").write_text('{"temperature": 0.6}')
    convert(source, tmp_path / "hf", to="hf", parity=False)
    assert (tmp_path / "hf" / "generation_config.json").read_text() == '{"temperature": 0.6}'


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_where_nothing_may_be_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(LoadstoneError, match="permission denied"):
        convert(source, tmp_path / "locked" / "hf", to="hf")
