"""The command line as its users meet it: output, --json, exit status 0/1/2, one paragraph per error."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import dialects
from model_files import GPT2, tensors_of, write_hf, write_torch

Run = Callable[..., tuple[int, str, str]]


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of at most 101 tokens; the vocabulary of the tiny model is as large."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = sorted("abcdefghijklmnopqrstuvwxyz .,Ġ")
    trainer = trainers.BpeTrainer(
        vocab_size=60, initial_alphabet=letters, special_tokens=["<end>"], show_progress=False
    )
    tokenizer.train_from_iterator(["once upon a time there was a model that told a story"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = write_hf(tmp_path / "model", bos_token_id=0, eos_token_id=0)
    write_tokenizer(path)
    return path


def test_inspect(run: Run, folder: Path) -> None:
    status, out, err = run("inspect", folder)
    assert (status, err) == (0, "")
    for text in ("safetensors, 40 tensors", "gpt2, in the dialect `hf`", "from config.json", "9 of 9", "clean"):
        assert text in out


def test_inspect_json_and_tensors(run: Run, folder: Path) -> None:
    _, out, _ = run("inspect", folder, "--json", "--tensors")
    facts = json.loads(out)
    assert facts["model"]["config"]["n_heads"] == 4
    assert facts["model"]["parameters"] == sum(array.size for array in GPT2.values())
    assert facts["tensor_list"]["wte.weight"] == {"shape": [101, 32], "dtype": "float32", "nbytes": 101 * 32 * 4}
    assert "h.0.attn.c_attn.weight  32 x 96  float32" in run("inspect", folder, "--tensors")[1]


def test_inspect_of_a_model_that_is_not_known_still_says_what_the_file_is(run: Run, tmp_path: Path) -> None:
    path = write_torch(tmp_path / "resnet.pth", tensors_of({"conv1.weight": np.zeros((2, 3), np.float32)}))
    status, out, _ = run("inspect", path)
    assert status == 0
    assert "pytorch-zip, 1 tensors" in out
    assert "not recognised" in out


def test_plan_folds_layers_and_lists_all_on_request(run: Run, folder: Path) -> None:
    status, out, _ = run("plan", folder)
    assert status == 0
    assert "h.{0..2}.attn.c_attn.weight" in out
    assert "-> blocks.{0..2}.attn.{q,k,v}.weight   (transpose, then split q, k, v)" in out
    assert "h.1.attn.c_attn.weight" in run("plan", folder, "--all")[1]
    rows = json.loads(run("plan", folder, "--json", "--all")[1])["steps"]
    assert len(rows) == 40


def test_a_plan_with_problems_is_status_1_and_loading_it_status_2(run: Run, tmp_path: Path) -> None:
    path = write_hf(tmp_path, {name: value for name, value in GPT2.items() if name != "ln_f.bias"})
    status, out, _ = run("plan", path)
    assert status == 1
    assert "PROBLEM: missing 1: ln_f.bias" in out
    status, out, err = run("verify", path)
    assert (status, out) == (2, "")
    assert err.startswith("loadstone: ")
    assert "Traceback" not in err


def test_verify_says_no_with_status_1(run: Run, folder: Path) -> None:
    """Hostile random weights are worse than guessing, which is what a broken load looks like."""
    status, out, _ = run("verify", folder)
    assert status == 1
    assert "ok   every parameter equals its source: 52 parameters from 40 tensors, bit for bit" in out
    assert "FAIL loss on English" in out
    assert out.endswith("NOT verified\n")
    report = json.loads(run("verify", folder, "--json")[1])
    assert (report["ok"], report["counts"]["not_parameters_in_file"]) == (False, 0)


def test_generate_is_reproducible_and_stops(run: Run, folder: Path) -> None:
    options = ("--max-new-tokens", 12, "--seed", 5, "--temperature", 1.5)
    status, first, _ = run("generate", folder, "once upon", *options)
    assert status == 0
    assert first.startswith("once upon")
    assert run("generate", folder, "once upon", *options)[1] == first
    (answer,) = json.loads(run("generate", folder, "once upon", *options, "--json")[1])
    assert "once upon" + answer["text"] + "\n" == first
    stop = answer["text"][3:5]
    (cut,) = json.loads(run("generate", folder, "once upon", *options, "--json", "--stop", stop)[1])
    assert (cut["finish"], cut["text"]) == ("stop", answer["text"][: answer["text"].index(stop)])


def test_several_prompts_are_one_batch(run: Run, folder: Path) -> None:
    together = json.loads(run("generate", folder, "once", "a time there was", "--seed", 1, "-n", 8, "--json")[1])
    assert [item["prompt"] for item in together] == ["once", "a time there was"]
    (alone,) = json.loads(run("generate", folder, "once", "--seed", 1, "-n", 8, "--json")[1])
    assert together[0]["text"] == alone["text"]


def test_chat_once_and_as_a_loop(run: Run, folder: Path) -> None:
    status, out, _ = run("chat", folder, "--prompt", "once", "-n", 5, "--seed", 1)
    assert status == 0
    command = [sys.executable, "-m", "loadstone", "chat", str(folder), "-n", "5", "--seed", "1"]
    done = subprocess.run(command, input="\nonce\nquit\n", capture_output=True, text=True, check=True)
    assert out.strip() in done.stdout
    assert done.stdout.count(">>> ") == 3


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("inspect", "no/such/file.bin"), "no/such/file.bin"),
        (("plan", "FOLDER", "--set", "n_heads"), "expected FIELD=VALUE"),
        (("plan", "FOLDER", "--set", "n_head=4"), "no config field is called n_head"),
        (("plan", "FOLDER", "--dialect", "klingon"), "no dialect is called 'klingon'"),
        (("plan", "FOLDER", "--set", "tied=maybe"), "tied must be true or false, found 'maybe'"),
        (("plan", "FOLDER", "--set", "eos_ids=5"), "eos_ids must be a list of token ids"),
        (("plan", "FOLDER", "--set", 'rope={"zeta":1}'), "rope has the fields theta"),
        (("verify", "FOLDER", "--against", "gpt4all"), "gpt4all: there is no such file or folder"),
        (("verify", "FOLDER", "--device", "nonsense"), "device 'nonsense' cannot be used here"),
        (("generate", "FOLDER", "once", "--seed", "9" * 30), "the seed must be from 0"),
        (("generate", "FOLDER", "once", "--stop", ""), "a stop text must not be empty"),
        (("chat", "FOLDER", "--system", "be kind", "-p", "x"), "a system message needs a chat template"),
        (("generate", "FOLDER", ""), "the prompt has no tokens"),
        (("generate", "FOLDER", "once", "--top-p", "2"), "top_p must be"),
        (("generate", "FOLDER", "once " * 60), "but the context is 40"),
        (("verify", "FOLDER", "--dtype", "int8"), "dtype int8 is not supported"),
    ],
)
def test_bad_input_is_one_paragraph_and_status_2(run: Run, folder: Path, arguments: tuple[str, ...], text: str) -> None:
    status, out, err = run(*(str(folder) if item == "FOLDER" else item for item in arguments))
    assert (status, out) == (2, "")
    *notes, error = err.splitlines()
    assert error.startswith("loadstone: ")
    assert text in error
    assert all(note.startswith("note: ") for note in notes)


def test_a_model_without_a_tokenizer_verifies_but_does_not_generate(run: Run, tmp_path: Path) -> None:
    path = write_hf(tmp_path)
    status, out, _ = run("verify", path)
    assert status == 0
    assert "-    loss on English: no tokenizer was found" in out
    status, _, err = run("generate", path, "hello")
    assert status == 2
    assert "no tokenizer lies beside the weights" in err


def test_assumptions_are_told_and_can_be_set(run: Run, tmp_path: Path) -> None:
    path = write_torch(tmp_path / "model.pth", tensors_of(dialects.gpt2_raschka(GPT2)))
    status, out, err = run("verify", path)
    assert status == 0
    assert "assumed: n_heads = " in err
    assert out.endswith("verified, with assumptions\n")
    assert "assumed: n_heads = " in run("plan", path)[1]
    assert json.loads(run("verify", path, "--json")[1])["assumed"][0].startswith("n_heads")
    status, out, err = run("verify", path, "--set", "n_heads=4")
    assert (status, err) == (0, "")
    assert out.endswith("\nverified\n")


def test_set_takes_truth_values_as_people_write_them(run: Run, folder: Path) -> None:
    for value, tied in (("False", False), ("true", True)):
        facts = json.loads(run("inspect", folder, "--set", f"tied={value}", "--json")[1])
        assert facts["model"]["config"]["tied"] is tied


def test_json_is_strict_whatever_the_model_holds(run: Run, tmp_path: Path) -> None:
    path = write_hf(tmp_path, GPT2 | {"ln_f.bias": GPT2["ln_f.bias"] * float("nan")}, bos_token_id=0, eos_token_id=0)
    write_tokenizer(path)
    status, out, _ = run("verify", path, "--json")
    assert status == 1
    assert json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["loss"] is None
    status, _, err = run("generate", path, "once")
    assert status == 2
    assert "the model gives no finite score" in err


def test_control_characters_in_names_do_not_reach_the_terminal(run: Run, tmp_path: Path) -> None:
    name = "wte\x1b[31m\x07.weight"
    path = write_torch(tmp_path / "model.pth", tensors_of(GPT2 | {name: np.zeros(3, np.float32)}))
    for verb, options in (("inspect", ["--tensors"]), ("plan", ["--all"]), ("verify", [])):
        _, out, err = run(verb, path, *options)
        assert r"wte\x1b[31m\x07.weight" in out + err
        assert "\x1b" not in out + err


def test_version_and_no_arguments(run: Run) -> None:
    assert run("--version")[1].startswith("loadstone 0.")
    status, out, err = run()
    assert "Usage: loadstone" in out + err
    assert status == 2


@pytest.mark.parametrize("verb", ["inspect", "plan", "verify", "generate", "chat", "pull"])
def test_every_verb_has_help(run: Run, verb: str) -> None:
    status, out, _ = run(verb, "--help")
    assert status == 0
    assert "SRC" in out


def test_too_little_memory_is_told_in_one_paragraph(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any, **__: Any) -> None:
        raise MemoryError("Unable to allocate 250 MiB")

    monkeypatch.setattr("loadstone.checkpoint.open_checkpoint", exhausted)
    status, out, error = run("inspect", folder)
    assert (status, out) == (2, "")
    assert error.startswith("loadstone: there is not enough memory (Unable to allocate 250 MiB).")
