"""What `train` and `finetune` refuse, and what an attempt that was refused leaves for the next."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from loadstone.data.prepare import prepare
from loadstone.data.shards import Dataset
from loadstone.data.tokenizer_training import tokenizer_from

TEXT = "\n".join(f"The {a} {b} saw the {c} {d}." for a in ("old", "new", "red") for b in ("cat", "dog", "hen", "fox")
                 for c in ("big", "sad", "shy") for d in ("man", "boy", "king", "bird"))  # fmt: skip
OTHER = TEXT.swapcase()  # other characters with the same ids
SMALL = ["--set", "d_model=16", "--set", "n_layers=2", "--set", "n_heads=2", "--set", "context_length=16"]
SHORT = ["--steps", "2", "--batch-size", "2", "--eval-batches", "1"]
Run = Callable[..., tuple[int, str, str]]


def prepared(folder: Path, text: str, **options: float) -> Path:
    (folder.parent / f"{folder.name}.txt").write_text(text)
    prepare([folder.parent / f"{folder.name}.txt"], folder, tokenizer_from("char", lambda: [text]), **options)  # type: ignore[arg-type]
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return prepared(tmp_path / "data", TEXT, validation=0.1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of single characters."""
    import loadstone
    from loadstone.save import save_model

    tokenizer = tokenizer_from("char", lambda: [TEXT])
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model(loadstone.GPT(loadstone.GPTConfig(tokenizer.vocab_size, 16, 16, 2, 2)), folder, tokenizer)
    return folder


def one_paragraph(found: tuple[int, str, str], problem: str) -> None:
    status, _, err = found
    assert status == 2, err
    assert problem in err
    assert err.startswith("loadstone: ")
    assert err.count("\n") == 1


def test_an_attempt_that_failed_leaves_no_data_for_the_next(run: Run, tmp_path: Path) -> None:
    """Else the next attempt, with more text, would learn from what the first one had prepared."""
    (tmp_path / "a.txt").write_text("abcdefgh")
    (tmp_path / "b.txt").write_text(TEXT)
    flags = ["--run", tmp_path / "run", "--tokenizer", "char", *SMALL, *SHORT, "--validation", "0.1"]
    one_paragraph(run("train", "--data", tmp_path / "a.txt", *flags), "one window needs 17")
    assert run("train", "--data", tmp_path / "b.txt", *flags)[0] == 0
    assert Dataset.open(tmp_path / "run/data").info.splits["train"].tokens > 1000
    assert json.loads((tmp_path / "run/run.json").read_text())["data"]["made_from"]["sources"] == [
        str(tmp_path / "b.txt")
    ]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--tokenizer", "char"], "--tokenizer"),
        (["--validation", "0.5"], "--validation"),
        (["--validation-data", "x.txt"], "--validation-data"),
    ],
)
def test_what_prepared_data_have_settled_is_not_asked_for_in_vain(
    run: Run, data: Path, tmp_path: Path, flags: list[str], named: str
) -> None:
    found = run("train", "--run", tmp_path / "run", "--data", data, *SMALL, *SHORT, *flags)
    one_paragraph(found, f"these data are prepared, and {named} says")
    assert not (tmp_path / "run").exists()


def test_prepared_data_may_be_asked_for_as_they_are(run: Run, data: Path, tmp_path: Path) -> None:
    assert run("train", "--run", tmp_path / "r", "--data", data, *SMALL, *SHORT, "--validation", "0.1")[0] == 0


def test_two_prepared_data_sets_are_refused(run: Run, data: Path, tmp_path: Path) -> None:
    more = ["--data", data, "--data", data]
    one_paragraph(run("train", "--run", tmp_path / "run", *more, *SMALL, *SHORT), "a run's only source")


def test_data_of_another_tokenizer_are_refused_though_every_id_has_a_row(
    run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    """Or the model would learn that nothing it knows is true, and no number would tell."""
    other = prepared(tmp_path / "other", OTHER, validation=0.1)
    found = run("finetune", model, "--run", tmp_path / "run", "--data", other, *SHORT)
    one_paragraph(found, "made with another tokenizer than the model's")
    assert run("finetune", model, "--run", tmp_path / "run", "--data", data, *SHORT)[0] == 0


def test_a_run_without_evaluation(run: Run, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT)
    flags = ["--data", tmp_path / "t.txt", "--tokenizer", "char", *SMALL, *SHORT]
    status, out, err = run("train", "--run", tmp_path / "run", *flags, "--validation", "0")
    assert status == 0, err
    assert "2 steps" in out
    assert "best" not in out.splitlines()[0]


def test_validation_data_that_are_too_short_are_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT)
    flags = ["--data", tmp_path / "t.txt", "--tokenizer", "char", *SMALL, *SHORT, "--validation", "0.001"]
    one_paragraph(run("train", "--run", tmp_path / "run", *flags), "held back for validation is too short")


@pytest.mark.parametrize("kind", ["text", "classify"])
def test_a_run_folder_that_cannot_be_made(run: Run, model: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "t.txt").write_text(TEXT)
    (tmp_path / "l.tsv").write_text("".join(f"{label}\tThe {word}\n" for label in "ab" for word in TEXT.split()))
    source = ["--data", tmp_path / "t.txt"] if kind == "text" else ["--classify", tmp_path / "l.tsv"]
    for place in ("t.txt", "t.txt/run"):
        found = run("finetune", model, "--run", tmp_path / place, *source, *SHORT, "--validation", "0.1")
        one_paragraph(found, "the run's folder cannot be made")
    assert (tmp_path / "t.txt").read_text() == TEXT


def test_a_sample_prompt_without_tokens_is_found_out_before_the_first_step(
    run: Run, data: Path, tmp_path: Path
) -> None:
    flags = ["--run", tmp_path / "run", "--data", data, *SMALL, *SHORT, "--sample-prompt", "The @"]
    one_paragraph(run("train", *flags, "--sample-every", "1"), "holds '@' (U+0040)")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--style", "chat"], "a style is that of instructions"),
        (["--balance"], "classes are balanced where there are labels"),
        (["--lora-target", "q"], "its rank is --lora RANK"),
        (["--lora-alpha", "8"], "its rank is --lora RANK"),
    ],
)
def test_what_would_be_passed_over_is_refused(
    run: Run, model: Path, data: Path, tmp_path: Path, arguments: list[str], problem: str
) -> None:
    one_paragraph(run("finetune", model, "--run", tmp_path / "run", "--data", data, *SHORT, *arguments), problem)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"tuning": {"strategy": "freeze:1"}}, "[tuning] is for a pretrained model"),
        ({"data": {"kind": "words"}}, "kind 'words' is none of"),
    ],
)
def test_configs_that_make_no_sense(
    run: Run, data: Path, tmp_path: Path, config: dict[str, object], problem: str
) -> None:
    (tmp_path / "c.json").write_text(json.dumps(config))
    one_paragraph(run("train", tmp_path / "c.json", "--run", tmp_path / "run", "--data", data), problem)
    one_paragraph(run("train", data, "--run", tmp_path / "run"), "Data are named with --data")


def test_a_resume_names_what_differs_and_nothing_else(run: Run, data: Path, tmp_path: Path) -> None:
    flags = ["train", "--run", tmp_path / "run", *SMALL, *SHORT, "--set", "eos_ids=[3]"]
    assert run(*flags, "--data", data)[0] == 0
    assert run(*flags, "--data", data, "--resume")[0] == 0
    one_paragraph(run(*flags, "--resume", "--set", "d_model=32"), "other settings: model.d_model: 32 instead of 16. ")


def test_a_resume_with_changed_data_is_refused(run: Run, data: Path, tmp_path: Path) -> None:
    assert run("train", "--run", tmp_path / "run", "--data", data, *SMALL, *SHORT)[0] == 0
    shutil.rmtree(data)
    prepared(data, OTHER + "more", validation=0.1)
    one_paragraph(run("train", "--run", tmp_path / "run", "--resume"), "not the data that")


def test_a_resume_from_a_damaged_record_or_checkpoint(run: Run, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run("train", "--run", folder, "--data", data, *SMALL, *SHORT)[0] == 0
    record = (folder / "run.json").read_text()
    (folder / "run.json").write_text('{"request": 5}')
    one_paragraph(run("train", "--run", folder, "--resume"), "expected names and values")
    (folder / "run.json").write_text(record)
    file = folder / "checkpoints/step-00000002/model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    one_paragraph(run("train", "--run", folder, "--resume"), "resume from the checkpoint before it")
    shutil.rmtree(file.parent)
    assert run("train", "--run", folder, "--resume")[0] == 0


def test_what_was_recognised_is_said_and_an_adapter_names_its_base(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "l.tsv").write_text("".join(f"{label}\t{label} {i}\n" for i in "cat" for label in "do" * 20))
    status, out, err = run("finetune", model, "--run", tmp_path / "r", "--classify", tmp_path / "l.tsv", *SHORT,
                           "--lora", "2")  # fmt: skip
    assert status == 0, err
    assert "label in column 1, text in column 2" in err
    assert f"loadstone merge {model} " in out
    one_paragraph(run("generate", tmp_path / "r/latest", "x"), "`loadstone merge BASE ADAPTER DST`")
