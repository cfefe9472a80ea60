"""The classification head: the last real token, padding that changes nothing, the sums, its folder, the command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

from loadstone.checkpoint import open_checkpoint, proof
from loadstone.cli.classify import classify as cli_classify
from loadstone.cli.options import spread
from loadstone.config import GPTConfig, Rope
from loadstone.config.families import GPT_NEOX_FIELDS, LLAMA_FIELDS
from loadstone.data.batch import Sample, collate
from loadstone.data.labelled import LabelledRows
from loadstone.data.records import Ragged
from loadstone.errors import ConfigError, FormatError, LoadstoneError, SourceError
from loadstone.finetune.classifier import Classification, Classifier, classify
from loadstone.finetune.classifier_files import SCORE, fill_classifier, load_classifier, padding_token, save_classifier
from loadstone.finetune.presets import strategy_for
from loadstone.load import load
from loadstone.model import GPT
from loadstone.tokenizer import Tokenizer, load_tokenizer
from small_vocabularies import byte_level, gguf_byte_level

VOCAB, MERGES = byte_level()
N = len(VOCAB)
END = VOCAB["<|endoftext|>"]
GPT2 = GPTConfig(N, 40, 32, 2, 4, bos_id=END, eos_ids=(END,))
LLAMA = GPTConfig(N, 40, 32, 2, 4, n_kv_heads=2, d_ff=48, architecture="llama", **LLAMA_FIELDS, rope=Rope())
NEOX = GPTConfig(N, 40, 32, 2, 4, architecture="gpt_neox", **GPT_NEOX_FIELDS, rope=Rope(dims=4))
CONFIGS = {"gpt2": GPT2, "gpt2 untied": replace(GPT2, tied=False), "llama": LLAMA, "neox": NEOX}
LABELS = ("eggs", "ham", "spam")


def tokenizer() -> Tokenizer:
    made = load_tokenizer(None, gguf_byte_level(VOCAB, MERGES))
    assert made is not None
    return made


@torch.no_grad()
def hostile(config: GPTConfig = GPT2, labels: tuple[str, ...] = LABELS, **options: Any) -> Classifier:
    """Weights that hide no fault."""
    torch.manual_seed(0)
    model = Classifier(GPT(config), labels, **options)
    for name, parameter in model.named_parameters():
        parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    return model.eval()


def rows_of(*lengths: int, labels: tuple[int, ...] = ()) -> list[Sample]:
    make = np.random.default_rng(0)
    classes = labels or tuple(i % len(LABELS) for i in range(len(lengths)))
    return [Sample(make.integers(0, N, n), np.array([c])) for n, c in zip(lengths, classes, strict=True)]


# The head


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_last_real_token_is_read_and_padding_changes_nothing(name: str) -> None:
    model = hostile(CONFIGS[name])
    samples = rows_of(3, 40, 1, 17)
    together = collate(samples)
    scores = model(together.inputs, together.lengths)
    for sample, score in zip(samples, scores, strict=True):
        ids = torch.from_numpy(sample.ids)[None]
        alone = model.gpt.hidden(ids)[0, -1] @ model.score.weight.T
        assert (score - alone).abs().max() < 1e-5
    other = together.inputs.clone()
    for row, length in enumerate(together.lengths):
        other[row, length:] = N - 1
    assert torch.equal(model(other, together.lengths), scores)


def test_the_score_layer() -> None:
    plain, biased = hostile(), hostile(bias=True)
    assert plain.score.bias is None
    assert biased.score.bias is not None
    fresh = Classifier(GPT(GPT2).bfloat16(), LABELS)
    assert fresh.score.weight.dtype == torch.bfloat16
    assert 0.01 < fresh.score.weight.float().std() < 0.03
    assert fresh.score.weight.shape == (3, 32)
    for labels in ((), ("a",), ("a", "a")):
        with pytest.raises(ConfigError, match="at least two labels, all different"):
            Classifier(GPT(GPT2), labels)


def test_strategies_address_it_as_score() -> None:
    model = hostile()
    strategy = strategy_for(model, "0:score,norm;1:blocks.-1-")
    assert strategy.trainable(model, 0, 10) == {"score.weight", "gpt.norm.weight", "gpt.norm.bias"}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    strategy.apply(model, 0, 10)
    loss, _ = Classification(LABELS).loss(model, collate(rows_of(3, 5)))
    loss.backward()  # type: ignore[no-untyped-call]
    torch.optim.AdamW(model.parameters(), lr=0.1).step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {"score.weight", "gpt.norm.weight", "gpt.norm.bias"}


# The task


def test_the_loss_is_the_sum_over_the_rows() -> None:
    model, batch = hostile(), collate(rows_of(3, 9, 5, 1))
    with torch.no_grad():
        loss, count = Classification(LABELS).loss(model, batch)
        parts = [Classification(LABELS).loss(model, batch.rows(i, i + 2))[0] for i in (0, 2)]
        scores = model(batch.inputs, batch.lengths).double()
    wanted = -torch.log_softmax(scores, 1)[torch.arange(4), batch.targets[:, 0]].sum()
    assert count == 4
    assert loss.dtype == torch.float32
    assert abs(float(loss) - float(wanted)) < 1e-4
    assert abs(float(sum(parts)) - float(loss)) < 1e-4


class Fixed(Classifier):
    """Says what it is told."""

    def __init__(self, said: list[int]) -> None:
        super().__init__(GPT(GPT2), LABELS)
        self.answers: Iterator[int] = iter(said)

    def forward(self, ids_BT: Tensor, lengths_B: Tensor) -> Tensor:
        return F.one_hot(torch.tensor([next(self.answers) for _ in ids_BT]), len(LABELS)).float()


def test_metrics_count_class_by_class() -> None:
    truth, said = (0, 0, 0, 1, 1, 2, 2), [0, 0, 2, 1, 0, 2, 2]
    rows = LabelledRows(Ragged.of([[i] for i in range(7)]), np.array(truth))
    model = Fixed(said).train()
    found = Classification(LABELS).evaluate(model, rows, batch_size=3)
    assert found["accuracy"] == 5 / 7
    assert [found[f"of.{name}"] for name in LABELS] == [3, 2, 2]
    assert [found[f"right.{name}"] for name in LABELS] == [2, 1, 2]
    assert [found[f"said.{name}"] for name in LABELS] == [3, 1, 3]
    right, wrong = np.log(np.e + 2) - 1, np.log(np.e + 2)
    assert abs(found["val_loss"] - (5 * right + 2 * wrong) / 7) < 1e-6
    assert model.training
    assert Classification(LABELS).evaluate(model, LabelledRows(Ragged.of([]), np.array([])))["accuracy"] == 0


def test_it_learns_from_the_last_token() -> None:
    """The class is said by the last token alone; the rows have all lengths, so that the last position would not do."""
    make = np.random.default_rng(0)
    ids = [[*make.integers(2, N, make.integers(1, 12)).tolist(), i % 2] for i in range(24)]
    rows = LabelledRows(Ragged.of(ids), np.arange(24) % 2)
    torch.manual_seed(0)
    model, task = Classifier(GPT(replace(GPT2, n_layers=1)), ("a", "b")), Classification(("a", "b"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    batch = collate(list(rows))
    for _ in range(20):
        loss, count = task.loss(model, batch)
        (loss / count).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    assert task.evaluate(model, rows)["accuracy"] == 1.0


def test_predictions() -> None:
    model, words = hostile(), tokenizer()
    texts = ["Hello", "The cat's hat; the dog's 12 bones", "x " * 100]
    found = classify(model, words, texts, batch_size=2)
    assert [prediction.cut for prediction in found] == [False, False, True]
    for text, prediction in zip(texts, found, strict=True):
        ids = torch.tensor([words.encode(text)[:40]])
        shares = model(ids, torch.tensor([ids.shape[1]]))[0].softmax(0)
        assert prediction.label == LABELS[int(shares.argmax())]
        assert list(prediction.probabilities) == list(LABELS)
        assert np.allclose(list(prediction.probabilities.values()), shares.detach(), atol=1e-5)
    with pytest.raises(ConfigError, match="text 2 is empty"):
        classify(model, words, ["a", ""])


# Its folder


def same_scores(a: Classifier, b: Classifier) -> bool:
    batch = collate(rows_of(3, 9, 5))
    with torch.no_grad():
        return torch.equal(a(batch.inputs, batch.lengths), b(batch.inputs, batch.lengths))


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_and_loaded_it_is_the_same(name: str, tmp_path: Path) -> None:
    model = hostile(CONFIGS[name])
    values = save_classifier(model, tmp_path / "m", tokenizer())
    loaded, words = load_classifier(tmp_path / "m")
    assert loaded.labels == LABELS
    assert same_scores(model, loaded)
    assert not loaded.training
    assert words is not None
    assert words.pad_id == END
    assert values["labels"] == list(LABELS)
    assert SCORE in values["tensors"]
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["architectures"][0].endswith("ForSequenceClassification")
    assert config["id2label"] == {"0": "eggs", "1": "ham", "2": "spam"}
    assert config["pad_token_id"] == END
    other = hostile(CONFIGS[name])
    torch.nn.init.zeros_(other.score.weight)
    fill_classifier(other, tmp_path / "m")
    assert same_scores(model, other)


def test_a_model_that_huggingface_cannot_express(tmp_path: Path) -> None:
    model = hostile(replace(GPT2, qkv_bias=False))
    save_classifier(model, tmp_path / "m")
    assert not (tmp_path / "m" / "config.json").exists()
    loaded, _ = load_classifier(tmp_path / "m")
    assert loaded.labels == LABELS
    assert same_scores(model, loaded)


def test_types_and_files_beside(tmp_path: Path) -> None:
    def beside(folder: Path) -> None:
        (folder / "training").mkdir()

    model = hostile()
    save_classifier(model, tmp_path / "m", dtype="bfloat16", beside=beside)
    assert (tmp_path / "m" / "training").is_dir()
    assert {info.dtype for info in open_checkpoint(tmp_path / "m").tensors.values()} == {"bfloat16"}
    loaded, _ = load_classifier(tmp_path / "m")
    assert loaded.score.weight.dtype == torch.bfloat16
    assert load_classifier(tmp_path / "m", dtype="float32")[0].score.weight.dtype == torch.float32
    assert (loaded.score.weight.float() - model.score.weight).abs().max() < 0.01
    save_classifier(hostile(), tmp_path / "again")
    save_classifier(model, tmp_path / "again", force=True)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has a bias"):
        save_classifier(hostile(bias=True), tmp_path / "m")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    with pytest.raises(SourceError, match="it is there already"):
        save_classifier(hostile(), tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", proof.NAME])
def test_a_damaged_folder_is_noticed(name: str, tmp_path: Path) -> None:
    save_classifier(hostile(), tmp_path / "m", tokenizer())
    flip(tmp_path / "m" / name, -9)
    with pytest.raises(FormatError, match=r"has changed|no valid JSON|was changed since"):
        load_classifier(tmp_path / "m")


def test_exchanged_labels_are_noticed(tmp_path: Path) -> None:
    save_classifier(hostile(), tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(path.read_text().replace('"0": "eggs"', '"0": "spam"').replace('"2": "spam"', '"2": "eggs"'))
    with pytest.raises(FormatError, match=r"it is not as it was written: 'config\.json' has changed"):
        load_classifier(tmp_path / "m")


def uncertified(tmp_path: Path, **config: Any) -> Path:
    """A folder as another program would leave it."""
    save_classifier(hostile(), tmp_path / "m")
    (tmp_path / "m" / proof.NAME).unlink()
    path = tmp_path / "m" / "config.json"
    values = json.loads(path.read_text()) | config
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return tmp_path / "m"


def test_a_folder_of_transformers_needs_no_certificate(tmp_path: Path) -> None:
    assert load_classifier(uncertified(tmp_path))[0].labels == LABELS


def test_classes_without_names_are_called_as_transformers_does(tmp_path: Path) -> None:
    folder = uncertified(tmp_path, id2label=None)
    assert load_classifier(folder)[0].labels == ("LABEL_0", "LABEL_1", "LABEL_2")


@pytest.mark.parametrize("names", [{"0": "a"}, {"0": "a", "1": "b", "3": "c"}, ["a", "b", "c"], "abc", 7])
def test_names_that_do_not_fit_are_refused(names: Any, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="the classes are numbered 0 to 2"):
        load_classifier(uncertified(tmp_path, id2label=names))


def test_a_language_model_is_no_classifier(tmp_path: Path, shared: Path) -> None:
    with pytest.raises(FormatError, match=r"holds no classifier: .*'score\.weight'.*finetune"):
        load_classifier(shared / "checkpoints" / "tiny-random-gpt2")
    save_classifier(hostile(), tmp_path / "m")
    with pytest.raises(LoadstoneError, match=SCORE):
        load(tmp_path / "m")
    with pytest.raises(FormatError, match=r"of another model: gpt\.pos_emb\.weight"):
        fill_classifier(hostile(replace(GPT2, context_length=50)), tmp_path / "m")


def test_the_padding_token_never_ends_a_text() -> None:
    gpt, words = GPT(GPT2), tokenizer()
    assert padding_token(gpt, None) == END
    assert padding_token(gpt, words) == END
    ending = load_tokenizer(None, gguf_byte_level(VOCAB, MERGES, add_eos_token=True))
    assert ending is not None
    assert ending.encode("a")[-1] == END
    assert padding_token(gpt, ending) is None
    assert padding_token(GPT(replace(GPT2, vocab_size=N + 3)), ending) == N
    assert padding_token(gpt, replace(words, pad_id=5)) == END  # 5 is a letter, which texts end with
    unknown = replace(words, special={"unk_token": "<|endoftext|>"})
    assert padding_token(gpt, unknown) is None


# The command


def command(*arguments: str) -> str:
    """Output of the command. Raises what it raises."""
    app = typer.Typer()
    app.command()(spread(cli_classify))
    ran = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert ran.exit_code == 0
    return ran.stdout


def test_the_command(tmp_path: Path) -> None:
    save_classifier(hostile(), tmp_path / "m", tokenizer())
    model, words = load_classifier(tmp_path / "m")
    assert words is not None
    (tmp_path / "lines").write_text("Hello\n\nThe cat's hat\x1b\n")
    texts = ["Good day", "Hello", "The cat's hat\x1b"]
    wanted = classify(model, words, texts)
    arguments = (str(tmp_path / "m"), "Good day", "--file", str(tmp_path / "lines"))
    found = json.loads(command(*arguments, "--json"))
    assert [each["label"] for each in found] == [each.label for each in wanted]
    assert [each["text"] for each in found] == texts
    lines = command(*arguments).splitlines()
    assert len(lines) == 3
    assert lines[0].split()[:2] == [wanted[0].label, f"{wanted[0].probabilities[wanted[0].label]:.3f}"]
    assert lines[2].endswith(r"The cat's hat\x1b")
    for wrong in ((), ("text", "--test", "data")):
        with pytest.raises(LoadstoneError, match="give either texts"):
            command(str(tmp_path / "m"), *wrong)
    with pytest.raises(SourceError, match="cannot be read as UTF-8"):
        command(str(tmp_path / "m"), "--file", str(tmp_path / "none"))


def test_the_command_tests_a_classifier(tmp_path: Path) -> None:
    save_classifier(hostile(), tmp_path / "m", tokenizer())
    texts = ["Good day", "Hello", "The cat's hat"]
    said = [each.label for each in classify(hostile(), tokenizer(), texts)]
    wrong = next(name for name in LABELS if name != said[0])
    rows = [*zip(said, texts, strict=True), (wrong, "Good day")]
    (tmp_path / "t.tsv").write_text("".join(f"{label}\t{text}\n" for label, text in rows))
    arguments = (str(tmp_path / "m"), "--test", str(tmp_path / "t.tsv"))
    lines = command(*arguments).splitlines()
    assert lines[0].startswith("75.00% of 4 right, loss ")
    assert lines[1:] == [
        f"{name}: {said.count(name)} of {said.count(name) + (name == wrong)} found; "
        f"{said.count(name) + (name == said[0])} texts were called so"
        for name in LABELS
    ]
    assert json.loads(command(*arguments, "--json"))["accuracy"] == 0.75
