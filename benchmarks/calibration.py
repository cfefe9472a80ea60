"""Text of several kinds for `loadstone quantize --calibration DST`, with nothing of WikiText in it.

    python benchmarks/calibration.py DATA DST

DATA holds books.tar.xz (mlschmitt/classic-books-markdown), ptb.valid.txt, lambada_test.jsonl and
dolly_hhrlhf_train_small.jsonl; Python and prose are this repository's own. One file a kind, 250 KB at most.
"""

from __future__ import annotations

import argparse
import json
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

ROOT, MOST = Path(__file__).parents[1], 250_000  # characters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("destination", type=Path)
    asked = parser.parse_args()
    asked.destination.mkdir()
    for name, text in kinds(asked.data):
        (asked.destination / f"{name}.txt").write_text(text[:MOST], encoding="utf-8")


def kinds(data: Path) -> Iterator[tuple[str, str]]:
    yield "books", "\n\n".join(pages(data / "books.tar.xz"))
    yield "ptb", (data / "ptb.valid.txt").read_text(encoding="utf-8")
    yield "lambada", "\n\n".join(row["text"] for row in rows(data / "lambada_test.jsonl")[:600])
    said = rows(data / "dolly_hhrlhf_train_small.jsonl")
    yield "instructions", "\n\n".join(f"{asked(row['prompt'])}\n{row['response'].strip()}" for row in said)
    yield "code", "\n\n".join(texts(sorted((ROOT / "src").rglob("*.py"))))[: MOST // 2]
    yield "prose", "\n\n".join(texts(sorted((ROOT / "docs").glob("*.md"))))[: MOST // 2]


def pages(archive: Path) -> Iterator[str]:
    """Ten thousand characters from the middle of 25 books."""
    with tarfile.open(archive) as books:
        chosen = random.Random(0).sample(sorted(member.name for member in books if member.isfile()), 25)
        for name in chosen:
            file = books.extractfile(name)
            assert file is not None
            yield file.read().decode("utf-8")[60_000:70_000]


def rows(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def asked(prompt: str) -> str:
    return prompt.split("### Instruction:")[-1].replace("### Response:", "").strip()


def texts(files: list[Path]) -> Iterator[str]:
    return (file.read_text(encoding="utf-8") for file in files)


if __name__ == "__main__":
    main()
