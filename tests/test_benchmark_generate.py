"""benchmarks/generate.py's table: each width beside the fastest other program of that width, and who is missing."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
Runs = list[dict[str, dict[str, Any]]]


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.generate")


def found(decode: float, prefill: float) -> dict[str, Any]:
    return {"decode": decode, "prefill": prefill, "first": 0.5, "peak": 100.0, "weights": 100.0, "reached": 10.0}


@pytest.fixture
def runs() -> Runs:
    """Three rounds; the machine is half as fast in the second."""
    fast = {
        "native-q8": found(300, 3000), "llama-Q8_0": found(200, 1000), "onnx-int8": found(150, 1500),
        "native-q4": found(400, 3000), "native-bfloat16": found(90, 1000), "transformers-bfloat16": found(30, 2000),
        "torch-float32": found(20, 900), "native-float32": found(60, 900), "openvino-int4": found(800, 600),
    }  # fmt: skip
    slow = {name: each | {key: each[key] / 2 for key in ("decode", "prefill")} for name, each in fast.items()}
    return [fast, slow, fast]


def test_the_best_other_of_the_same_width_is_found_for_each_figure(generate: Any, runs: Runs) -> None:
    rows = {row["contender"]: row for row in generate.table(runs, {})}
    assert rows["native-q8"]["decode_best"] == ("llama-Q8_0", 1.5)
    assert rows["native-q8"]["prefill_best"] == ("onnx-int8", 2.0)
    assert rows["native-q4"]["prefill_best"] == ("openvino-int4", 5.0)
    assert rows["native-bfloat16"]["prefill_best"] == ("transformers-bfloat16", 0.5)
    assert rows["native-float32"]["decode_best"] is None  # our own model in torch is no other program
    assert "decode_best" not in rows["onnx-int8"]


def test_a_ratio_is_the_median_of_the_rounds_own_ratios(generate: Any, runs: Runs) -> None:
    runs[1]["native-q8"] |= {"decode": 90}  # 0.9 of llama.cpp's in the slow round
    runs[2] = runs[2] | {"llama-Q8_0": found(250, 1000)}
    rows = {row["contender"]: row for row in generate.table(runs, {})}
    assert rows["native-q8"]["decode_best"] == ("llama-Q8_0", 1.2)  # of 1.5, 0.9 and 1.2; 300 / 200 were the medians


def test_every_contender_has_a_width_and_somebody_who_runs_it(generate: Any) -> None:
    for name in generate.CONTENDERS:
        assert generate.peers.bits_of(name) in (32, 16, 8, 4)
        assert name.partition("-")[0] in generate.MAKERS


def test_markdown_has_as_many_cells_in_every_line_and_names_who_is_missing(generate: Any, runs: Runs) -> None:
    rows = generate.table(runs, {"native-q8": 35.883})
    text = generate.markdown(rows, 31.0, ["onnx-int4, as onnxruntime is not installed"])
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert any("| 1.50, 3.00 | 1.50 (llama-Q8_0), 2.00 (onnx-int8) | 35.883 |" in line for line in lines)
    assert "Not measured: onnx-int4, as onnxruntime is not installed." in text


def test_a_contender_whose_package_is_absent_is_named(generate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(generate.peers.NEEDS, "onnx", ("json", "no_such_module"))
    assert generate.peers.missing("onnx-int8") == "no_such_module"
    assert generate.peers.missing("native-q8") == ""


@pytest.mark.parametrize("name", ["native-float32", "onnx-float32", "openvino-float32", "ctranslate2-float32"])
def test_other_tokens_in_float32_stop_the_script(generate: Any, name: str) -> None:
    generate.check_tokens({name: {"tokens": [1, 2, 3]}, "llama-F32": {"tokens": [9]}}, [1, 2, 3])
    with pytest.raises(SystemExit, match=f"{name}: greedy token 2 is not the one of transformers-float32"):
        generate.check_tokens({name: {"tokens": [1, 2, 4]}}, [1, 2, 3])


def test_a_name_that_is_no_contender_is_refused() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/generate.py"), "--only", "native-q8,onnx-int3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "no such contenders: onnx-int3; there are native-float32, " in done.stderr
