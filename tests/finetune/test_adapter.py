"""Adapter files: they come back as they were, on their own base only, and merge into ordinary models."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from typer import Typer
from typer.testing import CliRunner

import loadstone
from loadstone.cli.adapter import merge as merge_command
from loadstone.cli.options import spread
from loadstone.convert import convert
from loadstone.errors import LoadstoneError
from loadstone.finetune.adapter import fill_adapter, fingerprint, load_adapter, save_adapter
from loadstone.finetune.classifier import Classifier
from loadstone.finetune.classifier_files import load_classifier
from loadstone.finetune.lora import LoRA, adapted, add_lora, merge
from loadstone.finetune.record import RECORD, WEIGHTS
from loadstone.finetune.strategy import untie
from loadstone.model import GPT
from loadstone.save import save_model
from small_gpt import Wrapped, copies, small_gpt, small_llama, small_neox, tokens, train_plainly, trained


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2's adapter; the folder must not be changed."""
    folder = tmp_path_factory.mktemp("adapter") / "a"
    save_adapter(trained(small_gpt(2)), folder, "gpt2")
    return folder


@pytest.mark.parametrize(
    ("make", "adapter"),
    [
        (lambda: small_gpt(2), LoRA(rank=2, alpha=5, dropout=0.1)),
        (small_llama, LoRA(rank=3, targets=("linear", "head"), rslora=True)),
        (small_neox, LoRA(rank=2, targets=("q", "up"))),
        (lambda: small_llama().bfloat16(), LoRA(rank=2)),
    ],
)
def test_what_is_saved_comes_back(make: Callable[[], GPT], adapter: LoRA, tmp_path: Path) -> None:
    model = trained(make(), adapter).eval()
    written = save_adapter(model, tmp_path / "a", "the base")
    again = make().eval()
    assert load_adapter(again, tmp_path / "a") == written
    assert written.lora == adapter
    assert written.source == "the base"
    assert torch.equal(again(tokens()), model(tokens()))
    assert copies(again.named_parameters()).keys() == copies(model.named_parameters()).keys()
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        f"{layer}.lora_{x}" for layer, _ in adapted(model) for x in "ab"
    }
    # And once more, from the loaded one, to the same bytes.
    save_adapter(again, tmp_path / "b", "the base")
    assert {f.name: f.read_bytes() for f in (tmp_path / "a").iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "b").iterdir()
    }


def test_what_else_was_trained_is_saved_whole(tmp_path: Path) -> None:
    """A classifier's output layer, a norm: the base's own values of these do not matter then."""
    model = trained(Wrapped(small_gpt(2)), None, "score.weight", "gpt.norm.bias")
    written = save_adapter(model, tmp_path / "a", "gpt2")
    assert set(written.whole) == {"score.weight", "gpt.norm.bias"}
    other = Wrapped(small_gpt(2))
    with torch.no_grad():
        other.score.weight.fill_(7)
        other.get_parameter("gpt.norm.bias").fill_(7)
    load_adapter(other, tmp_path / "a")
    assert torch.equal(other(tokens()), model(tokens()))
    assert other.score.weight.requires_grad
    with pytest.raises(LoadstoneError, match=r"comes with 'gpt.norm.bias', 'score.weight', which the model does not"):
        load_adapter(small_gpt(2), tmp_path / "a")


def test_an_untied_model_s_adapter_unties_its_base(tmp_path: Path) -> None:
    model = small_gpt(2)
    untie(model)
    trained(model, LoRA(rank=2, targets=("v", "head")))
    save_adapter(model, tmp_path / "a", "gpt2")
    base = small_gpt(2)
    assert base.head is None
    load_adapter(base, tmp_path / "a")
    assert torch.equal(base(tokens()), model(tokens()))
    merge(base)
    save_model(base, tmp_path / "hf")
    again, _ = loadstone.load(tmp_path / "hf")
    assert (again(tokens()) - model(tokens())).abs().max() < 1e-5


def test_a_run_goes_on_from_its_adapter(tmp_path: Path) -> None:
    model = trained(small_gpt(2), LoRA(rank=2, alpha=3), "norm.bias")

    def beside(folder: Path) -> None:
        (folder / "state.json").write_text("7")

    save_adapter(model, tmp_path / "a", "gpt2", beside=beside)
    assert (tmp_path / "a" / "state.json").read_text() == "7"
    again = small_gpt(2)
    add_lora(again, LoRA(rank=2, alpha=3))
    fill_adapter(again, tmp_path / "a")
    assert torch.equal(again(tokens()), model(tokens()))
    other = small_gpt(2)
    add_lora(other, LoRA(rank=2, alpha=4))
    with pytest.raises(LoadstoneError, match=r"another way than the model's: alpha is 4, not 3\."):
        fill_adapter(other, tmp_path / "a")
    with pytest.raises(LoadstoneError, match="not empty"):  # there is more than an adapter now
        save_adapter(model, tmp_path / "a", "gpt2", force=True)


# -- the base


def test_a_base_is_the_same_in_every_dialect_and_type_that_holds_its_values(tmp_path: Path) -> None:
    model = small_gpt(2).bfloat16().float()
    save_model(model, tmp_path / "hf", dtype="bfloat16")
    prints = {fingerprint(model)}
    for to, name in (("openai", "o"), ("raschka", "m.pth"), ("gguf", "m.gguf"), ("lesson", "m.pt")):
        convert(tmp_path / "hf", tmp_path / name, to=to)
        prints.add(fingerprint(loadstone.load(tmp_path / name)[0]))
    assert prints == {fingerprint(loadstone.load(tmp_path / "hf")[0])}
    assert fingerprint(model.half().float()) not in prints or torch.equal(
        model.half().float().tok_emb.weight, model.tok_emb.weight
    )


def test_a_fingerprint_knows_names_shapes_and_values() -> None:
    base = small_gpt(2)
    swapped = small_gpt(2)
    first, second = swapped.blocks
    swapped.blocks = nn.ModuleList([second, first])
    prints = [fingerprint(model) for model in (base, swapped, small_gpt(2, seed=1))]
    nudged = small_gpt(2)
    for parameter in nudged.parameters():  # one after the other, each by one bit
        with torch.no_grad():
            parameter.view(-1)[-1] = torch.nextafter(parameter.view(-1)[-1], torch.tensor(9.0))
        prints.append(fingerprint(nudged))
    assert len(set(prints)) == len(prints)
    with torch.no_grad():
        nudged.norm.weight.copy_(nudged.get_parameter("norm.bias"))
    assert fingerprint(nudged, ["norm.weight"]) != fingerprint(nudged, ["norm.bias"])
    add_lora(base, LoRA(rank=2))
    assert fingerprint(base) == fingerprint(small_gpt(2))
    alone = small_gpt(2)
    untie(alone)
    assert fingerprint(alone) == fingerprint(small_gpt(2), untied=True) != fingerprint(small_gpt(2))


@pytest.mark.parametrize(
    ("base", "problem"),
    [
        (
            lambda: small_gpt(2, seed=1),
            "same shape with other weights.*trained beside 'gpt2'.*type that it had in training",
        ),
        (lambda: small_gpt(3), "another base: n_layers is 3, not 2"),
        (lambda: small_gpt(2, norm_eps=1e-6), "another base: norm_eps is 1e-06, not 1e-05"),
        (lambda: small_gpt(2, tied=False), "another base: tied is False, not True"),
        (small_llama, "another base: .* more"),
    ],
)
def test_another_base_is_refused(base: Callable[[], GPT], problem: str, saved: Path) -> None:
    model = base()
    before = copies(model.named_parameters())
    with pytest.raises(LoadstoneError, match=problem) as caught:
        load_adapter(model, saved)
    assert "\n" not in str(caught.value)
    after = copies(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_other_token_ids_are_no_other_base(saved: Path) -> None:
    assert load_adapter(small_gpt(2, bos_id=3, eos_ids=(3, 5)), saved).source == "gpt2"


# -- writing


def test_nothing_is_written_over_what_is_no_adapter(tmp_path: Path) -> None:
    model = trained(small_gpt(2))
    save_adapter(model, tmp_path / "a", "gpt2")
    with pytest.raises(LoadstoneError, match="not empty"):
        save_adapter(model, tmp_path / "a", "gpt2")
    train_plainly(model, 1)
    save_adapter(model, tmp_path / "a", "gpt2", force=True)
    again = small_gpt(2)
    load_adapter(again, tmp_path / "a")
    assert torch.equal(again(tokens()), model(tokens()))
    (tmp_path / "a" / "thesis.txt").write_text("years of work")
    with pytest.raises(LoadstoneError, match="not empty"):
        save_adapter(model, tmp_path / "a", "gpt2", force=True)
    assert (tmp_path / "a" / "thesis.txt").read_text() == "years of work"


def test_a_full_disk_leaves_the_old_adapter(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(small_gpt(2))
    save_adapter(model, tmp_path / "a", "gpt2")
    before = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("loadstone.finetune.adapter.write_safetensors_file", full)
    with pytest.raises(LoadstoneError, match="cannot be written"):
        save_adapter(model, tmp_path / "a", "gpt2", force=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_is_no_adapter_is_not_saved_as_one(tmp_path: Path) -> None:
    with pytest.raises(LoadstoneError, match="no adapter to save"):
        save_adapter(small_gpt(2), tmp_path / "a", "gpt2")
    model = small_gpt(2)
    add_lora(model, LoRA(rank=2))
    model.requires_grad_(True)
    with pytest.raises(LoadstoneError, match="every weight of the base is trainable too"):
        save_adapter(model, tmp_path / "a", "gpt2")
    assert not (tmp_path / "a").exists()


# -- damaged files


def copy_of(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"adapter": 2}, "no record of an adapter of version 1"),
        ({"lora": None}, "no record"),
        ({"lora": {"rank": 2}}, "no record"),
        ({"lora.targets": "linear"}, "no record"),
        ({"lora.targets": [["linear"]]}, "no record"),
        ({"lora.targets": ["c_attn"]}, "cannot be: lora: 'c_attn' is no target"),
        ({"lora.rank": 0}, "cannot be: lora: rank must be"),
        ({"lora.rank": 10**400}, "rank .*is more than"),
        ({"lora.rank": 4}, "not those that adapter.json announces: shapes differ"),
        ({"lora.alpha": "16"}, "alpha must be"),
        ({"lora.targets": ["gate"]}, "has no gate"),
        ({"lora.targets": ["q"]}, "not those that adapter.json announces: 'blocks.0.attn.k.lora_a'"),
        ({"base": []}, "no record"),
        ({"base.config": {}}, "its config lacks vocab_size"),
        ({"base.config.d_model": 10**400}, "not a multiple|another base"),
        ({"base.config.rope": {"factors": [None]}}, "cannot be"),
        ({"base.config.n_layers": 10**9}, "another base: n_layers is 2, not 1000000000"),
        ({"base.source": 3}, "no record"),
        ({"base.weights": "0" * 64}, "other weights"),
        ({"whole": [1]}, "no record"),
        ({"whole": ["nonsense"]}, "comes with 'nonsense'"),
        ({"peft": 1}, "no record"),
        ({"labels": "ham"}, "no record"),
        ({"sha256": "0" * 64}, "not the file that adapter.json was written for"),
    ],
)
def test_a_damaged_record_is_refused(change: dict[str, Any], problem: str, saved: Path, tmp_path: Path) -> None:
    folder = copy_of(saved, tmp_path / "a")
    values = json.loads((folder / RECORD).read_text())
    for place, value in change.items():
        *outer, last = place.split(".")
        part = values
        for name in outer:
            part = part[name]
        part[last] = value
    (folder / RECORD).write_text(json.dumps(values))
    model = small_gpt(2)
    with pytest.raises(LoadstoneError, match=problem):
        load_adapter(model, folder)
    assert not list(adapted(model))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"adapter": 1e999}', "\ud800"])
def test_a_record_that_is_no_json_object_is_refused(text: str, saved: Path, tmp_path: Path) -> None:
    folder = copy_of(saved, tmp_path / "a")
    (folder / RECORD).write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(LoadstoneError, match=RECORD):
        load_adapter(small_gpt(2), folder)


@pytest.mark.parametrize("missing", [RECORD, WEIGHTS])
def test_a_missing_file_is_named(missing: str, saved: Path, tmp_path: Path) -> None:
    folder = copy_of(saved, tmp_path / "a")
    (folder / missing).unlink()
    with pytest.raises(LoadstoneError, match=rf"{missing}: there is no such file. An adapter is a folder with"):
        load_adapter(small_gpt(2), folder)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_changed_byte_passes(saved: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = copy_of(saved, tmp_path_factory.mktemp("hostile") / "a")
    file = folder / data.draw(st.sampled_from([RECORD, WEIGHTS]))
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content[: data.draw(st.sampled_from([None, at]))])
    model = small_gpt(2)
    try:
        load_adapter(model, folder)
    except LoadstoneError:
        assert not list(adapted(model))
    else:  # a byte of the record that says how it was trained, or what its base is called
        assert file.name == RECORD


# -- the command


@pytest.fixture
def command() -> Typer:
    app = Typer()
    app.command()(spread(merge_command))
    return app


def test_merge_writes_an_ordinary_model_that_converts(tmp_path: Path, command: Typer) -> None:
    save_model(small_gpt(2), tmp_path / "base")
    base, _ = loadstone.load(tmp_path / "base")
    trained(base)
    save_adapter(base, tmp_path / "adapter", str(tmp_path / "base"))
    places = [str(tmp_path / name) for name in ("base", "adapter", "merged")]
    result = CliRunner().invoke(command, places)
    assert result.exit_code == 0, result.output
    assert "rank 2, alpha 16, 12 layers" in result.output
    assert "rounding to float32 lost 0.0%" in result.output
    assert "not checked" not in result.output
    convert(tmp_path / "merged", tmp_path / "m.gguf", to="gguf")
    convert(tmp_path / "merged", tmp_path / "m.pth", to="raschka")
    wanted = base(tokens())
    for name in ("merged", "m.gguf", "m.pth"):
        again, _ = loadstone.load(tmp_path / name)
        assert (again(tokens()) - wanted).abs().max() < 1e-5
    with pytest.raises(LoadstoneError, match="--force"):
        CliRunner().invoke(command, places, catch_exceptions=False)
    result = CliRunner().invoke(command, [*places, "--force", "--json", "--dtype", "bfloat16"])
    found = json.loads(result.output)
    assert found["base_checked"] is True
    assert found["dtype"] == "float32"  # the base's: rounded once, when it is written
    again, _ = loadstone.load(tmp_path / "merged")
    assert again.tok_emb.weight.dtype == torch.bfloat16
    assert (again(tokens()) - wanted).abs().max() < 0.5


def test_a_classifier_s_adapter_becomes_a_classifier(tmp_path: Path, command: Typer) -> None:
    save_model(small_gpt(2), tmp_path / "base")
    gpt, _ = loadstone.load(tmp_path / "base")
    model = Classifier(gpt, ("ham", "spam"))
    add_lora(model, LoRA(rank=2))
    for name, parameter in model.named_parameters():
        if name.endswith(("lora_b", "score.weight")):
            parameter.data.normal_()
    save_adapter(model, tmp_path / "a", "base")
    places = [str(tmp_path / name) for name in ("base", "a", "out")]
    result = CliRunner().invoke(command, places)
    assert result.exit_code == 0, result.output
    again, _ = load_classifier(tmp_path / "out")
    assert again.labels == ("ham", "spam")
    lengths = torch.tensor([12, 5])
    assert (again(tokens(), lengths) - model.eval()(tokens(), lengths)).abs().max() < 1e-4


def test_the_command_starts_without_torch() -> None:
    code = "import sys, loadstone.cli.adapter; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
