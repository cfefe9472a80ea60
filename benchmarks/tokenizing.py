"""Megabytes of English a second to token ids: Loadstone with and without the extra `fast`, beside other programs.

    python benchmarks/tokenizing.py BOOKS.tar.xz [--mb 50] [--rounds 3] [--threads 1 2] [--tokenizer FOLDER] [--json]

Protocol: the first `mb` megabytes of the archive's `.txt` members, a document each, GPT-2's vocabulary; each contender
in a fresh process with so many threads, interleaved, medians over the rounds. The clock runs from the loaded texts to
an array of ids for each; loading vocabularies and texts is not in it, ours contains the checks of the fast encoder. In
brackets megabytes a second of processor time, which other work on the machine disturbs less. All must give the same
ids (count and SHA-256), or the script says who does not. Programs that are not installed are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

# (before the clock runs, what is clocked); as `loadstone prepare` does it, and as each program's users write it.
PREPARE = """documents = [("train", Document("book", text)) for text in texts]
groups = e.encoded(e.pieces_of(documents, tokenizer), tokenizer, np.dtype(np.uint16))
ids = [own for group in groups for _, own in group]
"""
OURS = "import loadstone.data.encoding as e\nfrom loadstone.data.corpus import Document\n"
CONTENDERS = {
    "loadstone": (OURS + "e.fast_encoder = lambda tokenizer: None", PREPARE),
    "loadstone[fast]": (OURS + "import tiktoken", PREPARE),
    "tokenizers": (
        "backend = tokenizer.backend\nbackend.encode_special_tokens = True",
        "found = backend.encode_batch_fast(texts, add_special_tokens=False)\n"
        "ids = [np.array(own.ids, np.uint16) for own in found]",
    ),
    "tiktoken": (
        "import tiktoken\nfrom loadstone.tokenizer.fast import FastEncoder\n"
        "encoding = FastEncoder(tokenizer)._encoding",
        "ids = [np.array(own, np.uint16) for own in encoding.encode_ordinary_batch(texts, num_threads=threads)]",
    ),
    "gigatoken": (
        "import gigatoken\nsteps = json.loads(tokenizer.backend.to_str())\nsteps['added_tokens'] = []\n"
        "giga = gigatoken.Tokenizer.from_json(json.dumps(steps))",
        "ids = [np.asarray(own).astype(np.uint16) for own in giga.encode_batch(texts, parallel=threads > 1)]",
    ),
}
CHILD = """
import hashlib, json, sys, tarfile, time
from pathlib import Path
import numpy as np
from loadstone.tokenizer.gpt2 import gpt2_tokenizer
threads, texts, size = {threads}, [], 0
tokenizer = gpt2_tokenizer({folder})
with tarfile.open({books!r}) as archive:
    for member in archive:
        if member.isfile() and member.name.endswith(".txt") and size < {mb} * 1e6:
            raw = archive.extractfile(member).read()
            texts.append(raw.decode(errors="replace"))
            size += len(raw)
{prepare}
wall, cpu = time.perf_counter(), time.process_time()
{encode}
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
ids = np.concatenate(ids)
ids = ids[ids != 50256]  # the end of a document, which only `prepare` adds
digest = hashlib.sha256(ids.tobytes()).hexdigest()
print(json.dumps(dict(mb=size / 1e6, wall=wall, cpu=cpu, tokens=len(ids), digest=digest)))
"""


def measure(name: str, threads: int, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Of one process; None if the program is not installed."""
    prepare, encode = CONTENDERS[name]
    folder = f"Path({str(arguments.tokenizer)!r})" if arguments.tokenizer else None
    code = CHILD.format(
        threads=threads, folder=folder, books=str(arguments.books), mb=arguments.mb, prepare=prepare, encode=encode
    )
    environment = {**os.environ, "RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    if done.returncode and "ModuleNotFoundError" in done.stderr:
        return None
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("books", type=Path)
    parser.add_argument("--mb", type=float, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--tokenizer", type=Path, help="a folder with GPT-2's encoder.json and vocab.bpe")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for number in range(arguments.rounds):
        for name in CONTENDERS:
            for threads in arguments.threads:
                print(f"round {number + 1}: {name}, {threads} threads", file=sys.stderr)
                if row := measure(name, threads, arguments):
                    found.setdefault((name, threads), []).append(row)
    rows = []
    for (name, threads), own in found.items():
        speeds = {key: statistics.median(row["mb"] / row[clock] for row in own) for key, clock in SPEEDS.items()}
        same = {key: own[0][key] for key in ("mb", "tokens", "digest")}
        rows.append({"program": name, "threads": threads, **same, **speeds})
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            print(f"{row['program']:16} {row['threads']} threads {row['speed']:>7.1f} MB/s ({row['cpu_speed']:.1f})")
    if others := {row["program"] for row in rows if row["digest"] != rows[0]["digest"]}:
        sys.exit(f"these give other ids than {rows[0]['program']}: {', '.join(sorted(others))}")
    print(f"{rows[0]['mb']:.1f} MB, {rows[0]['tokens']:,} tokens, all the same ids", file=sys.stderr)


SPEEDS = {"speed": "wall", "cpu_speed": "cpu"}

if __name__ == "__main__":
    main()
