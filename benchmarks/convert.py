"""Time to convert between every two dialects, beside copying the same bytes.

    python benchmarks/convert.py [--rounds 3] [--only gpt2 llama] [--folder DIR] [--json]

Protocol: random weights (no zeros that would become holes) of GPT-2 124M's shape (fp32, 0.5 GB) and of a Llama of 1 GB
(bf16), written in each dialect. For each ordered pair, interleaved, medians over the rounds, source and copied file in
the page cache; wall-clock seconds, and in brackets processor seconds (which a shared machine or disk disturbs less):
`convert`, as users call it but without running the two models (`parity=False`: no copy does that
either): source hashed, every tensor hashed, the written file hashed and read back and compared, flushed to the disk,
renamed; and `copy`: the result's own files copied beside it (`shutil.copyfile`: in the kernel) and flushed. `hash`:
SHA-256 of the same bytes by one thread, of which a certificate holds three: source, tensors, result.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

LLAMA = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 9, "num_attention_heads": 16,
         "num_key_value_heads": 8, "vocab_size": 32000}  # fmt: skip
ACCEPT = {"nanogpt": ("activation",)}
_BUFFER = 1 << 18
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=("gpt2", "llama"), default=("gpt2", "llama"))
    parser.add_argument("--pairs", nargs="*", metavar="FROM:TO", help="only these")
    parser.add_argument("--folder", type=Path, help="where; 10 GB")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows: list[Row] = []
    for architecture in arguments.only:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
            rows += measure(architecture, Path(temporary), arguments.rounds, arguments.pairs)
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'':24} {'MB':>6} {'convert s':>15} {'copy s':>15} {'ratio':>6} {'hash s':>15}")
    for row in rows:
        convert, copy, digest = (f"{row[key]:>7.2f} ({row[key + '_cpu']:>5.2f})" for key in ("convert", "copy", "hash"))
        ratio = f"{row['convert'] / row['copy']:>6.2f}"
        print(f"{row['from']:>10} -> {row['to']:10} {row['bytes'] / 1e6:>6.0f} {convert} {copy} {ratio} {digest}")


def measure(architecture: str, folder: Path, rounds: int, only: list[str] | None) -> list[Row]:
    sources = write_sources(architecture, folder)
    pairs = [(a, b) for a in sources for b in sources if a != b and (not only or f"{a}:{b}" in only)]
    times: dict[tuple[str, str], list[Row]] = {pair: [] for pair in pairs}
    for number in range(rounds):
        for a, b in pairs:
            print(f"round {number + 1}: {a} -> {b}", file=sys.stderr)
            times[a, b].append(one(sources[a], folder / "result", b))
    rows: list[Row] = []
    for (a, b), found in times.items():
        medians = {key: statistics.median(row[key] for row in found) for key in found[0]}
        rows.append({"model": architecture, "from": a, "to": b} | medians)
    return rows


def one(source: Path, folder: Path, to: str) -> Row:
    """Seconds to convert, to copy what was written, to hash it; and its bytes."""
    folder.mkdir()
    target = named(folder, to)
    row = clocked("convert", lambda: run(source, target, to))
    files = [file for file in folder.rglob("*") if file.is_file()]
    copies = folder / "copies"
    copies.mkdir()
    row |= clocked("copy", lambda: copy_flushed(files, copies)) | clocked("hash", lambda: hash_files(files))
    row["bytes"] = sum(file.stat().st_size for file in files)
    shutil.rmtree(folder)
    return row


def run(source: Path, target: Path, to: str) -> None:
    from loadstone.convert import convert

    convert(source, target, to=to, accept=ACCEPT.get(to, ()), parity=False)


def named(folder: Path, dialect: str) -> Path:
    from loadstone.layouts import LAYOUTS

    return folder / (LAYOUTS[dialect].file or dialect)


def copy_flushed(files: list[Path], folder: Path) -> None:
    for number, file in enumerate(files):
        copied = folder / str(number)
        shutil.copyfile(file, copied)
        with copied.open("rb") as stream:
            os.fsync(stream.fileno())


def hash_files(files: list[Path]) -> None:
    buffer = memoryview(bytearray(_BUFFER))
    for file in files:
        digest = hashlib.sha256()
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                digest.update(buffer[:count])


def clocked(name: str, work: Callable[[], Any]) -> Row:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {name: time.perf_counter() - wall, f"{name}_cpu": time.process_time() - cpu}


def write_sources(architecture: str, folder: Path) -> dict[str, Path]:
    """The same weights in every dialect of an architecture."""
    from loadstone.weightmap import TABLES

    first = folder / "hf" / "hf"
    first.mkdir(parents=True)
    {"gpt2": write_gpt2, "llama": write_llama}[architecture](first)
    sources = {"hf": first}
    for table in TABLES:
        if table.architecture == architecture and table.dialect not in sources:
            (folder / table.dialect).mkdir()
            sources[table.dialect] = named(folder / table.dialect, table.dialect)
            run(first, sources[table.dialect], table.dialect)
    return sources


def write_gpt2(folder: Path) -> None:
    import dialects
    from loadstone.checkpoint.memory import Arrays
    from loadstone.checkpoint.write_safetensors import write_safetensors

    weights = dialects.gpt2_hf(vocab=50257, context=1024, width=768, layers=12, sigma=0.04)
    write_safetensors(Arrays(folder, weights), folder)
    config = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12,
              "n_head": 12, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
              "bos_token_id": 50256, "eos_token_id": 50256}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def write_llama(folder: Path) -> None:
    """Random bits, with exponents of ordinary weights: drawing numbers would take longer than all that follows."""
    import large_models

    large_models.write(folder, LLAMA, 1 << 40)
    (file,) = folder.glob("*.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    file = file.rename(folder / "model.safetensors")
    rng = np.random.default_rng(0)
    with file.open("r+b") as stream:
        position = 8 + int.from_bytes(stream.read(8), "little")
        stream.seek(position)
        for left in range(file.stat().st_size - position, 0, -(1 << 26)):
            values = rng.standard_normal(min(left, 1 << 26) // 2, np.float32) * np.float32(0.04)
            stream.write(values.astype(ml_dtypes.bfloat16).tobytes())


if __name__ == "__main__":
    main()
