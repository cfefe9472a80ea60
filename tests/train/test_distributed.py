"""Several processes (torchrun, gloo, CPU): they train as one does, go on where others stopped, and end together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from conftest import Run
from loadstone import certificate
from loadstone.errors import FormatError
from loadstone.load import load
from loadstone.train.shards import open_state
from loadstone.train.world import World
from train.ranks import run_job
from train.runs import weights_of

LOCAL = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(sys.path)}
ENVIRONMENT = {**os.environ, **LOCAL}
pytestmark = pytest.mark.usefixtures("one_thread")
PATIENCE = 300  # seconds; a launch takes 5 on an idle machine
TEXT = "\n".join(f"The {a} {b} saw the {c}." for a in ("old", "new", "red") for b in ("cat", "dog", "hen", "fox")
                 for c in ("big", "sad", "shy"))  # fmt: skip
MODEL = ["--set", "d_model=16", "--set", "n_layers=2", "--set", "n_heads=2", "--set", "context_length=16"]

BIASES = ("qkv_bias", "attn_out_bias", "mlp_bias", "norm_bias")
LLAMA = {"architecture": "llama", "rope": {"theta": 1e4}, "norm": "rmsnorm", "gated_mlp": True, "activation": "silu",
         "n_kv_heads": 1, **dict.fromkeys(BIASES, False)}  # fmt: skip

# What one process and several must do alike. The step counts of frozen parameters, tied and untied heads, rows of
# unequal numbers of targets, gradients accumulated and clipped, an evaluation whose last batch has one row.
JOBS: Mapping[str, dict[str, Any]] = {
    "tied": {"trainer": {"updates_every": 5, "eval_every": 5, "save_every": 6}},
    "untied": {"model": {"tied": False}, "trainer": {"clip": 0.0, "eval_batches": 1, "steps": 8}},
    "llama": {"model": LLAMA, "trainer": {"recompute": True, "micro_batch": 0, "steps": 4}},
    "phases": {"model": {"tied": False}, "trainer": {"strategy": "0:head;4:blocks.2;8:all", "updates_every": 4}},
    "tied phases": {"trainer": {"strategy": "0:norm;3:blocks.-1-;6:all", "layer_decay": 0.7}},
}


def torchrun(count: int, *arguments: str | Path) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return [sys.executable, *launcher, *map(str, arguments)]


def loadstone(count: int, *arguments: str | Path) -> list[str]:
    return torchrun(count, "-m", "--", "loadstone", *arguments)  # without `--`, torchrun takes --run for one of its own


def finished(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=PATIENCE)


def run_jobs(folder: Path, count: int, jobs: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    """By forked processes; the tests of how runs end use torchrun."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    return finished([sys.executable, str(Path(__file__).with_name("ranks.py")), str(folder / "jobs.json"), str(count)])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def figures(folder: Path, after: int = 0) -> dict[str, list[Any]]:
    """Of metrics.jsonl, by name; the steps after one."""
    found: dict[str, list[Any]] = {}
    for line in lines(folder / "metrics.jsonl"):
        for key, value in line.items() if line["step"] > after else ():
            found.setdefault(key, []).append(value)
    return {key: values for key, values in found.items() if key not in ("seconds", "tokens_per_s", "mfu")}


def require_alike(folder: Path, other: Path, after: int = 0) -> None:
    mine, theirs = figures(folder, after), figures(other, after)
    assert mine.keys() == theirs.keys()
    for key, values in theirs.items():
        if isinstance(values[0], dict):  # which modules learn
            assert mine[key] == values, key
        else:
            assert mine[key] == pytest.approx(values, abs=1e-5, rel=1e-5), key


# -- training as one process does, and going on where others stopped


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a tokenizer, to fine-tune."""
    folder = tmp_path_factory.mktemp("source")
    text = {"folder": str(folder / "run"), "request": request_of(folder, {"settings": {"steps": 1}})}
    run_job(text, World())
    return folder / "run" / "latest"


def request_of(folder: Path, more: dict[str, Any]) -> dict[str, Any]:
    (folder / "text.txt").write_text(TEXT)
    model = {"d_model": 16, "n_layers": 2, "n_heads": 2, "context_length": 16}
    data = {"sources": [str(folder / "text.txt")], "tokenizer": "char", "validation": 0.2}
    settings = {"batch_size": 6, "steps": 8, "eval_every": 4, "lr": 0.01, "log_every": 1, "eps": 1e-6}
    settings |= {"sample_every": 4, **more.pop("settings", {})}
    return {"data": data, "model": model, "settings": settings, **more}


def tuned(folder: Path, source: Path, kind: str, **tuning: Any) -> dict[str, Any]:
    (folder / "labels.tsv").write_text("".join(f"{line.split()[2]}\t{line}\n" for line in TEXT.splitlines()))
    file = {"text": "text.txt", "classify": "labels.tsv"}[kind]
    data = {"sources": [str(folder / file)], "kind": kind, "validation": 0.2}
    return request_of(folder, {"source": str(source), "data": data, "tuning": tuning, "model": {}})


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    """The jobs by one process in `1`, by two in `2`, by three in `3`; some are stopped, and resumed by more or less."""
    folder = tmp_path_factory.mktemp("jobs")
    jobs = {
        **JOBS,
        "lora": {"request": tuned(folder, source, "text", lora=2)},
        "classify": {"request": tuned(folder, source, "classify")},
    }
    stopped = {**JOBS["tied"], "stop": 6}
    for name, job in jobs.items():
        run_job({**job, "folder": str(folder / "1" / name)}, World())
    run_job({**stopped, "folder": str(folder / "1" / "stopped")}, World())
    shutil.copytree(folder / "1" / "stopped", folder / "1 to 2", symlinks=True)
    resumed: dict[str, Any] = {"trainer": {**JOBS["tied"]["trainer"], "resume": True}}
    lost = {"trainer": {"dropout": 0.2, "steps": 6, "save_every": 3}}
    two = [
        *({**job, "folder": str(folder / "2" / name)} for name, job in jobs.items()),
        {**stopped, "folder": str(folder / "2" / "stopped")},
        {**resumed, "folder": str(folder / "1 to 2")},
        {**lost, "folder": str(folder / "2" / "dropout")},
        {**lost, "folder": str(folder / "2" / "dropout stopped"), "stop": 3},
        {"trainer": {**lost["trainer"], "resume": True}, "folder": str(folder / "2" / "dropout stopped")},
    ]
    ended = run_jobs(folder, 2, two)
    assert ended.returncode == 0, ended.stderr
    assert "Warning" not in ended.stderr
    for to in ("2 to 1", "2 to 3"):
        shutil.copytree(folder / "2" / "stopped", folder / to, symlinks=True)
    run_job({**resumed, "folder": str(folder / "2 to 1")}, World())
    three = [{**resumed, "folder": str(folder / "2 to 3")}]
    three += [{**jobs[name], "folder": str(folder / "3" / name)} for name in ("tied", "untied", "classify")]
    ended = run_jobs(folder, 3, three)
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.mark.parametrize("name", [*JOBS, "lora", "classify"])
def test_two_processes_train_as_one_does(done: Path, name: str) -> None:
    require_alike(done / "2" / name, done / "1" / name)
    assert len(figures(done / "1" / name)["loss"]) >= 4


@pytest.mark.parametrize("name", ["tied", "untied", "classify"])
def test_three_processes_too_where_rows_do_not_divide_evenly(done: Path, name: str) -> None:
    require_alike(done / "3" / name, done / "1" / name)


@pytest.mark.parametrize("name", ["tied", "phases"])
def test_updates_are_measured_over_all_parts(done: Path, name: str) -> None:
    mine, theirs = (lines(done / count / name / "updates.jsonl") for count in "21")
    assert len(mine) == len(theirs) >= 3
    for a, b in zip(mine, theirs, strict=True):
        assert a["updates"] == pytest.approx(b["updates"], rel=1e-3, abs=1e-7)
        assert [k for k, v in a["updates"].items() if v == 0] == [k for k, v in b["updates"].items() if v == 0]


@pytest.mark.parametrize("how", ["2 to 1", "1 to 2", "2 to 3"])
def test_a_run_goes_on_with_another_number_of_processes(done: Path, how: str) -> None:
    require_alike(done / how, done / "1" / "tied", after=6)
    mine, theirs = (lines(folder / "updates.jsonl")[-1] for folder in (done / how, done / "1" / "tied"))
    assert mine["updates"] == pytest.approx(theirs["updates"], rel=1e-3)


def test_the_same_number_goes_on_to_the_bit_dropout_included(done: Path) -> None:
    mine, theirs = (done / "2" / name / "latest" / "model.safetensors" for name in ("dropout stopped", "dropout"))
    assert mine.read_bytes() == theirs.read_bytes()
    states = open_state(done / "2" / "dropout" / "latest" / "training")
    assert not np.array_equal(states.read("rng.cpu"), states.read("rng.cpu.1"))  # each process drops other values


def test_a_checkpoint_of_two_is_an_ordinary_model_with_the_state_that_one_would_have_written(done: Path) -> None:
    mine, theirs = (done / count / "tied" / "latest" for count in "21")
    assert all(check.ok for check in certificate.check(mine))
    a, b = (weights_of(load(folder)[0]) for folder in (mine, theirs))
    assert a.keys() == b.keys()
    for name, weight in a.items():
        if not name.endswith("attn.k.bias"):  # of no effect: its gradient is rounding
            torch.testing.assert_close(weight, b[name], rtol=1e-3, atol=3e-5, msg=name)
    saved, wanted = open_state(mine / "training"), open_state(theirs / "training")
    assert set(saved.tensors) == {*wanted.tensors, "rng.cpu.1"}
    for name in wanted.tensors:
        if name.startswith("optimizer.") and not name.endswith("attn.k.bias"):
            np.testing.assert_allclose(saved.read(name), wanted.read(name), rtol=1e-2, atol=1e-5, err_msg=name)
    assert float(saved.read("optimizer.step.norm.weight")) == 12
    assert not list((done / "2" / "tied" / "checkpoints").glob(".*"))


def test_samples_are_those_of_one_process(done: Path) -> None:
    mine, theirs = (lines(done / count / "lora" / "samples.jsonl") for count in "21")
    assert mine == theirs


# -- a training state in parts


@pytest.fixture
def parts(done: Path, tmp_path: Path) -> Path:
    shutil.copytree(done / "2" / "tied" / "latest" / "training", tmp_path / "training")
    return tmp_path / "training"


def test_a_missing_part_is_named(parts: Path) -> None:
    (parts / "state-00002-of-00002.safetensors").unlink()
    with pytest.raises(FormatError, match=r"state-00002-of-00002\.safetensors is missing"):
        open_state(parts)


def test_no_part_at_all_is_named(parts: Path) -> None:
    for file in parts.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(FormatError, match=r"state\.safetensors is missing"):
        open_state(parts)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda info: info.clear(), "does not say under DCP_SHARDING_INFO"),
        (lambda info: info.update({"optimizer.exp_avg.tok_emb.weight": 3}), "does not say under DCP_SHARDING_INFO"),
        (lambda info: offsets(info, [5, 0]), "which does not go on from there"),
        (lambda info: offsets(info, [-5, 0]), "only rows are ever divided"),
        (lambda info: offsets(info, [31, 2]), "only rows are ever divided"),
        (lambda info: offsets(info, [1e300, 0]), "only rows are ever divided"),
        (lambda info: offsets(info, [31]), "only rows are ever divided"),
        (lambda info: offsets(info, "31"), "only rows are ever divided"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts: Path, change: Any, problem: str) -> None:
    path = parts / "state-00002-of-00002.safetensors"
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        metadata = dict(file.metadata())
    info = json.loads(metadata["DCP_SHARDING_INFO"])
    change(info)
    save_file(load_file(path), path, {**metadata, "DCP_SHARDING_INFO": json.dumps(info)})
    with pytest.raises(FormatError, match=problem):
        open_state(parts)


def offsets(info: dict[str, Any], value: Any) -> None:
    info["optimizer.exp_avg.tok_emb.weight"]["saved_offsets"] = value


def test_the_parts_are_what_pytorch_reads_too(parts: Path) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

    ours = open_state(parts)
    name = "optimizer.exp_avg.tok_emb.weight"
    found = {name: torch.zeros(*ours.info(name).shape)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is one process which reads
        dcp_load(found, storage_reader=HuggingFaceStorageReader(str(parts)), no_dist=True)
    assert np.array_equal(found[name].numpy(), ours.read(name))


# -- ending together


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def long_run(folder: Path, text: Path) -> list[str | Path]:
    flags = ["--steps", "2000", "--batch-size", "4", "--save-every", "2", "--eval-every", "0", "--validation", "0.2"]
    return ["train", "--run", folder, "--data", text, "--tokenizer", "char", *MODEL, *flags]


def steps_of(folder: Path) -> int:
    return max((int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")), default=-1)


def children(process: subprocess.Popen[str]) -> list[int]:
    """The processes that torchrun started, by rank."""
    listed = (path.read_text().split() for path in Path(f"/proc/{process.pid}/task").glob("*/children"))
    return sorted(int(pid) for pids in listed for pid in pids)


def begun(folder: Path, text: Path) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(loadstone(2, *long_run(folder, text)), text=True, env=ENVIRONMENT, **pipes)
    patience = time.monotonic() + PATIENCE
    while steps_of(folder) < 4 and process.poll() is None and time.monotonic() < patience:
        time.sleep(0.05)
    return process


def require_resumable(run: Run, folder: Path) -> None:
    """The last checkpoint is whole, and one process goes on from it: this one, until Ctrl-C."""
    last = steps_of(folder)
    assert all(check.ok for check in certificate.check(folder / "checkpoints" / f"step-{last:08d}"))
    over = Event()

    def interrupt() -> None:
        patience = time.monotonic() + PATIENCE
        while steps_of(folder) <= last + 2 and time.monotonic() < patience and not over.is_set():
            time.sleep(0.02)
        if not over.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    watching = Thread(target=interrupt)
    watching.start()
    try:
        status, out, err = run("train", "--run", folder, "--resume")
    finally:
        over.set()
        watching.join()
    assert status == 130, err
    assert "all is saved" in out


def test_a_killed_process_ends_the_others_and_the_last_checkpoint_is_whole(
    run: Run, text: Path, tmp_path: Path
) -> None:
    process = begun(tmp_path / "run", text)
    victim = children(process)[1]
    os.kill(victim, signal.SIGKILL)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert err.count("loadstone: process 0 of 2 lost another one, which was killed or cannot be reached") == 1
    require_resumable(run, tmp_path / "run")


def test_a_signal_to_torchrun_saves(run: Run, text: Path, tmp_path: Path) -> None:
    process = begun(tmp_path / "run", text)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=PATIENCE)
    assert out.count("all is saved") == 1, err
    assert "loadstone: " not in err
    require_resumable(run, tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--data", "nothing.txt"], "nothing.txt"),  # found by the first, while the others wait
        (["--data", "text.txt", "--tokenizer", "char", "--schedule", "square"], "schedule 'square'"),  # found by all
    ],
)
def test_an_error_is_one_paragraph_of_one_process(text: Path, tmp_path: Path, flags: list[str], problem: str) -> None:
    ended = finished(loadstone(2, "train", "--run", tmp_path / "run", *flags))
    said = [line for line in ended.stderr.splitlines() if line.startswith("loadstone: ")]
    assert len(said) == 1, ended.stderr
    assert problem in said[0]
    assert ended.returncode != 0
    assert not (tmp_path / "run" / "run.json").exists()


def test_an_error_of_one_process_alone_ends_all(tmp_path: Path) -> None:
    begin = time.monotonic()
    (tmp_path / "jobs.json").write_text(json.dumps([{"folder": str(tmp_path / "run"), "fail": 1}]))
    ended = finished(torchrun(2, Path(__file__).with_name("ranks.py"), tmp_path / "jobs.json"))
    said = [line for line in ended.stderr.splitlines() if line.startswith("loadstone: ")]
    assert said == ["loadstone: the planted error of one process."]
    assert ended.returncode != 0
    assert time.monotonic() - begin < PATIENCE / 2
