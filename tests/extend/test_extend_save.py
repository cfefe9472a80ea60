"""`loadstone extend`: what it writes generates, chats, converts and extends as any other model, and can be drawn."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import loadstone
from extendable import FAMILIES, KNOWN, gpt2_like, hostile, padded_gguf
from loadstone.chat import Conversation
from loadstone.cli.extend import BESIDE
from loadstone.cli.extend import extend as command
from loadstone.cli.options import OpenOptions, RunOptions
from loadstone.errors import LoadstoneError, TokenizerError
from loadstone.extend import extend, matrix_view
from loadstone.save import save_model

CHATML = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}<|assistant|>"
NEW = ["<|user|>", "<|assistant|>"]
Make = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(hostile(402, sigma=0.05), tmp_path / "model", gpt2_like())
    return tmp_path / "model"


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jinja"
    path.write_text(CHATML)
    return path


def run(source: Path | str, destination: Path, **options: Any) -> None:
    command(str(source), destination, RunOptions(), **({"add_token": NEW} | options))


def test_the_whole_way(folder: Path, template: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "larger"
    run(folder, place, chat_template=template)
    printed = capsys.readouterr().out
    assert "tokens    '<|user|>' is 401, '<|assistant|>' is 402" in printed
    assert f"written   {place}" in printed
    old, _ = loadstone.load(folder)
    model, tokenizer = loadstone.load(place)
    assert tokenizer is not None
    assert model.config.vocab_size == tokenizer.vocab_size == 403
    assert torch.equal(model.tok_emb.weight[:KNOWN], old.tok_emb.weight[:KNOWN])
    expected, renewed, report = extend(old, gpt2_like(), NEW)
    assert torch.equal(model.tok_emb.weight, expected.tok_emb.weight)
    assert tokenizer.backend.get_vocab() == renewed.backend.get_vocab()
    for text in ("", "the cat's <|user|> hat<|assistant|>", "<|endoftext|><|user|>"):
        for special in (True, False):
            assert tokenizer.encode(text, parse_special=special) == renewed.encode(text, parse_special=special)
    assert json.loads((place / BESIDE).read_text())["report"] == json.loads(json.dumps(report.as_dict()))

    assert loadstone.generate_text(model, tokenizer, "the", max_new_tokens=3, seed=1).startswith("the")
    pieces: list[str] = []
    Conversation(model, tokenizer, max_new_tokens=3, seed=1).answer("hat", pieces.append)
    ids = tokenizer.encode(tokenizer.apply_chat([{"role": "user", "content": "hat"}]), parse_special=True)
    assert [ids[0], ids[-1]] == [401, 402]

    for to, name in (("gguf", "larger.gguf"), ("raschka", "larger.pth"), ("nanogpt", "larger.pt")):
        loadstone.convert(place, tmp_path / name, to=to, accept=["activation"] if to == "nanogpt" else ())
        back, its_tokenizer = loadstone.load(tmp_path / name)
        assert torch.equal(back.tok_emb.weight, model.tok_emb.weight)
        if to == "gguf":
            assert its_tokenizer is not None
            assert its_tokenizer.encode("a<|user|>b", parse_special=True) == tokenizer.encode(
                "a<|user|>b", parse_special=True
            )
            assert its_tokenizer.chat_template == CHATML
    identity = loadstone.open_source(place)
    assert loadstone.verify(identity, model).checks[0].ok


@pytest.mark.parametrize("family", FAMILIES)
def test_families_come_back(family: str, tmp_path: Path) -> None:
    larger, renewed, _ = extend(hostile(KNOWN, **FAMILIES[family]), gpt2_like(), NEW, special=False, pad_to_multiple=64)
    save_model(larger, tmp_path / "larger", renewed)
    back, tokenizer = loadstone.load(tmp_path / "larger")
    assert tokenizer is not None
    assert tokenizer.encode("<|user|>") == [401]
    assert back.config.vocab_size == 448
    for name, parameter in larger.named_parameters():
        assert torch.equal(parameter, dict(back.named_parameters())[name])


def test_from_gguf_with_named_padding(tmp_path: Path) -> None:
    save_model(hostile(416), tmp_path / "model", padded_gguf())
    loadstone.convert(tmp_path / "model", tmp_path / "model.gguf", to="gguf")
    run(tmp_path / "model.gguf", tmp_path / "larger", plain=True, init="mean")
    told = json.loads((tmp_path / "larger" / BESIDE).read_text())["report"]
    assert told["rows"] == [416, 416]
    assert told["padding"] == [15, 13]
    assert [token["was"] for token in told["tokens"]] == ["padding", "padding"]
    _, tokenizer = loadstone.load(tmp_path / "larger")
    assert tokenizer is not None
    assert tokenizer.encode("<|user|>") == [401]


def test_json_and_options(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "old.txt"
    text.write_text("The dog's nest. " * 9)
    run(folder, tmp_path / "a", as_json=True, text=text, init="random", seed=3, pad_to_multiple=64)
    told = json.loads(capsys.readouterr().out)
    assert (told["init"], told["seed"], told["rows"]) == ("random", 3, [402, 448])
    assert set(told["after"]) == {"random", "mean", "mean_cov"}
    assert told["text"]["bytes"] == 16 * 9 - 3
    assert told["logits"]["equal"] in (True, False)


def test_a_template_without_the_tokens_is_told(
    folder: Path, template: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(folder, tmp_path / "a", add_token=["<|other|>"], chat_template=template)
    assert f"note      {template} writes none of the new tokens" in capsys.readouterr().out


def test_force_replaces_what_was_written(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "a")
    with pytest.raises(LoadstoneError, match="it is there already"):
        run(folder, tmp_path / "a")
    run(folder, tmp_path / "a", add_token=["<|other|>"], force=True)
    assert "<|other|>" in (tmp_path / "a" / "tokenizer.json").read_text()


def test_bad_input_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    place, bad = tmp_path / "a", tmp_path / "bad"
    bad.write_bytes(b"\xff\xfe")
    for options, kind, message in (
        ({"add_token": [""]}, TokenizerError, "number 1 of the 1 to add is empty"),
        ({"add_token": ["<|endoftext|>"]}, TokenizerError, "is a token already, with id 400"),
        ({"text": tmp_path / "none"}, LoadstoneError, "none: cannot be read as UTF-8 text"),
        ({"text": bad}, LoadstoneError, "bad: cannot be read as UTF-8 text"),
        ({"chat_template": bad}, LoadstoneError, "bad: cannot be read"),
        ({"chat_template": folder / "config.json", "init": "no"}, LoadstoneError, "init 'no' is not known"),
        ({"destination": folder, "force": True}, LoadstoneError, "the source itself lies there"),
    ):
        with pytest.raises(kind, match=message):
            run(folder, **({"destination": place} | options))
    assert not place.exists()
    save_model(hostile(402), tmp_path / "mute")
    with pytest.raises(LoadstoneError, match="no tokenizer lies beside the weights"):
        run(tmp_path / "mute", place)


def test_the_picture_is_of_the_real_matrix() -> None:
    model, tokenizer = hostile(410), gpt2_like()
    larger, renewed, _ = extend(model, tokenizer, [f"<{i}>" for i in range(12)], pad_to_multiple=64)
    view = matrix_view((model, tokenizer), (larger, renewed))
    assert view["columns"] == list(range(33))
    assert [tuple(band.values()) for band in view["before"]["bands"]] == [(0, 401, "old"), (401, 410, "padding")]
    after = view["after"]
    assert after["shape"] == [448, 32]
    assert [tuple(band.values()) for band in after["bands"]] == [
        (0, 401, "old"), (401, 413, "new"), (413, 448, "padding"),
    ]  # fmt: skip
    for side, matrix in ((view["before"], model.tok_emb.weight), (after, larger.tok_emb.weight)):
        assert [block["start"] for block in side["blocks"][1:]] == [block["stop"] for block in side["blocks"][:-1]]
        for block in side["blocks"]:
            values = matrix.detach()[block["start"] : block["stop"]]
            assert block["rms"] == pytest.approx(values.square().mean(0).sqrt().tolist(), rel=1e-3)
            assert block["mean"] == pytest.approx(values.mean(0).tolist(), rel=1e-3, abs=1e-6)
    assert [block["stop"] - block["start"] for block in after["blocks"] if block["kind"] == "new"] == [1] * 12


def test_the_picture_stays_small() -> None:
    model = hostile(8_000, d_model=768, n_layers=1)
    tokenizer = gpt2_like()
    larger, renewed, _ = extend(model, tokenizer, [f"<{i}>" for i in range(200)], pad_to_multiple=64)
    view = matrix_view((model, tokenizer), (larger, renewed))
    assert len(json.dumps(view)) < 200_000
    assert len(view["columns"]) == 49


@pytest.mark.shared
def test_the_example(shared: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "extend.py"
    source = shared / "checkpoints" / "tinystories-656k-llama"
    command = [sys.executable, "-W", "error", str(example), str(source)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    losses = [float(line.split()[1]) for line in lines if line.split()[:1] in (["before"], ["random"], ["mean"])]
    assert losses == pytest.approx([4.0785, 4.0786, 4.0785, 4.0785, 52.65, 4.0785], rel=1e-3)


@pytest.mark.shared
def test_a_trained_model(shared: Path, tmp_path: Path) -> None:
    """Stories of 656k parameters, a Llama with a SentencePiece vocabulary and no padding."""
    source = shared / "checkpoints" / "tinystories-656k-llama"
    run(source, tmp_path / "larger", chat_template=None)
    told = json.loads((tmp_path / "larger" / BESIDE).read_text())["report"]
    assert told["before"]["nats"] == pytest.approx(4.0785, abs=1e-3)
    assert told["logits"]["rows_equal"]
    assert told["logits"]["hidden_equal"]
    for init in ("mean", "mean_cov"):
        assert 0 <= told["after"][init]["nats"] - told["before"]["nats"] < 2e-3
    assert (tmp_path / "larger" / BESIDE).stat().st_size < 200_000
    options = {"max_new_tokens": 20, "temperature": 0.0}
    first, second = loadstone.load(source), loadstone.load(tmp_path / "larger")
    assert first[1] is not None
    assert second[1] is not None
    expected = loadstone.generate_text(first[0], first[1], "Once upon a time", **options)
    assert loadstone.generate_text(second[0], second[1], "Once upon a time", **options) == expected
    assert OpenOptions().open(str(tmp_path / "larger")).plan.clean
