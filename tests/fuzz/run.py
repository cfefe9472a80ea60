"""Fuzz the readers: coverage-guided with `atheris` where it is installed, else by mutation alone.

    PYTHONPATH=tests python -m fuzz.run [--format safetensors] [--runs 100000] [--seed 1] [--blind]

Each format runs in a process of its own with a hard limit on its address space. A finding (whatever escapes that is
not a LoadstoneError, a broken promise of `targets.check`, a hang) is kept in --out, told, and the run goes on; the exit
status is 1 if there was one. Put the input into `corpus/FORMAT/`, where every test run opens it, and mend the reader.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

FORMATS = (
    *("safetensors", "index", "torch-zip", "torch-legacy", "pickle", "gguf", "bundle", "checkpoint"),
    *("config", "tokenizer"),
)
ADDRESS_SPACE = 1 << 30  # bytes beyond what the process has when it begins
TRACED = 16  # one input of so many has its memory traced, which is slow
HANG = 60  # seconds, after which an input is given up
STATISTICS = "statistics.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--format", choices=("all", *FORMATS), default="all")
    parser.add_argument("--runs", type=int, default=100_000, help="mutated files per format")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--blind", action="store_true", help="mutation alone, even if atheris is installed")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "loadstone-fuzz")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        fuzz(arguments.format, arguments.runs, arguments.seed, arguments.blind, arguments.out)
        return 0
    formats = FORMATS if arguments.format == "all" else (arguments.format,)
    return max([drive(name, arguments) for name in formats])


def drive(name: str, arguments: argparse.Namespace) -> int:
    """Run one format in a process of its own, and tell what came of it. Returns 1 if something was found."""
    out = arguments.out / name
    out.mkdir(parents=True, exist_ok=True)
    (out / STATISTICS).unlink(missing_ok=True)
    command = [sys.executable, "-m", "fuzz.run", "--child", "--format", name, "--runs", str(arguments.runs)]
    command += ["--seed", str(arguments.seed), "--out", str(out)] + ["--blind"] * arguments.blind
    began = time.monotonic()
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # memory, where there is such a thing
    with (out / "log").open("w") as log, tempfile.TemporaryDirectory(dir=shared) as folder:
        environment = os.environ | {"TMPDIR": folder}
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False)
    text = (out / "log").read_text(errors="replace")
    found: dict[str, Any] = {"runs": 0, "opened": 0, "outcomes": 0, "findings": {}}
    found |= json.loads((out / STATISTICS).read_text()) if (out / STATISTICS).is_file() else {}
    coverage = [int(edges) for edges in re.findall(r"^#\d+\s+\w+\s+cov: (\d+)", text, re.MULTILINE)]
    grown = f"{coverage[0]} -> {coverage[-1]} edges" if coverage else "no coverage measured"
    seconds = time.monotonic() - began
    print(
        f"{name:13} {found['runs']:>9,} files, {found['opened']:>7,} opened, {grown}, "
        f"{found['outcomes']} different outcomes, {seconds:.0f} s, {len(found['findings'])} findings",
        flush=True,
    )
    for where, file in found["findings"].items():
        print(f"  {where}: {file}", flush=True)
    if found["runs"] < arguments.runs or done.returncode:
        print(f"  it ended early (status {done.returncode}): see {out / 'log'}", flush=True)
        return 1
    return int(bool(found["findings"]))


# -- in the child


class Session:
    """One format being fuzzed: opens inputs, and keeps what is found."""

    def __init__(self, name: str, runs: int, out: Path) -> None:
        from fuzz.targets import TARGETS, prepare

        self.target, self.runs, self.out = TARGETS[name], runs, out
        self.folder = prepare(self.target, Path(tempfile.mkdtemp()) / "x")
        self.statistics: dict[str, Any] = {"runs": 0, "opened": 0, "outcomes": 0, "findings": {}}
        self.outcomes: set[str] = set()

    def one(self, data: bytes) -> bool:
        """Open one input. Returns whether it ended as none before."""
        from fuzz.targets import check
        from loadstone.errors import FormatError, SourceError

        try:
            refusal = check(self.target, self.folder, data, traced=self.statistics["runs"] % TRACED == 0)
            outcome, opened = str(refusal or ""), not isinstance(refusal, (FormatError, SourceError))
        except Exception as error:
            outcome, opened = self.keep(error, data), False
        self.statistics["runs"] += 1
        self.statistics["opened"] += opened
        kind = re.sub(r"'[^']*'|\"[^\"]*\"|[\d,]+", "#", outcome)[:80]
        new = kind not in self.outcomes
        self.outcomes.add(kind)
        self.statistics["outcomes"] = len(self.outcomes)
        if self.statistics["runs"] % 1000 == 0 or self.statistics["runs"] >= self.runs:
            self.save()
        return new

    def keep(self, error: Exception, data: bytes) -> str:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "loadstone" in frame.filename] or list(frames)
        where = f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}"
        if where not in self.statistics["findings"]:
            file = self.out / f"finding-{hashlib.sha256(data).hexdigest()[:12]}"
            file.write_bytes(data)
            self.statistics["findings"][where] = str(file)
            print(f"FINDING {where} in {file}\n{''.join(traceback.format_exception(error))[-3000:]}", flush=True)
            self.save()
        return where

    def save(self) -> None:
        (self.out / STATISTICS).write_text(json.dumps(self.statistics))


def fuzz(name: str, runs: int, seed: int, blind: bool, out: Path) -> None:
    """Fuzz one format in this process; does not return if atheris does it."""
    guided = find_spec("atheris") is not None and not blind
    if guided:
        atheris: Any = import_module("atheris")
        with atheris.instrument_imports(include=["loadstone"]):
            import fuzz.targets  # noqa: F401
    session = Session(name, runs, out)
    inputs = session.target.seeds()
    for data in inputs:
        session.one(data)  # imports what is imported late, before the memory is limited
    _limit_memory()
    if guided:
        _guided(session, inputs, seed)
    else:
        _blind(session, inputs, Random(seed))


def _limit_memory() -> None:
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + ADDRESS_SPACE, now + ADDRESS_SPACE))


def _guided(session: Session, inputs: list[bytes], seed: int) -> None:
    from fuzz.mutate import MAX_SIZE

    atheris: Any = import_module("atheris")
    corpus = session.out / "corpus"
    corpus.mkdir(exist_ok=True)
    for data in inputs:
        (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        def other(part: bytes) -> bytes:
            return bytes(atheris.Mutate(part, min(max_size, len(part) + 64)))

        return session.target.mutated(data, Random(seed), other)[:max_size]

    def one(data: bytes) -> None:
        session.one(data)

    left = session.runs - session.statistics["runs"]
    # One mutation at a time: stacked ones, which libFuzzer prefers, leave hardly any file sound.
    options = [
        f"-runs={left}",
        "-mutate_depth=1",
        f"-max_len={MAX_SIZE}",
        f"-timeout={HANG}",
        "-rss_limit_mb=0",
        f"-seed={seed}",
    ]
    atheris.Setup(["fuzz", *options, f"-artifact_prefix={session.out}/", str(corpus)], one, custom_mutator=mutate)
    atheris.Fuzz()


def _blind(session: Session, inputs: list[bytes], random: Random) -> None:
    """Without coverage, an input is worth keeping if it ended as none before."""

    signal.signal(signal.SIGALRM, lambda *_: os._exit(3))
    while session.statistics["runs"] < session.runs:
        data = session.target.mutated(random.choice(inputs), random)
        (session.out / "last").write_bytes(data)
        signal.alarm(HANG)
        if session.one(data):
            inputs.append(data)
    signal.alarm(0)


if __name__ == "__main__":
    sys.exit(main())
